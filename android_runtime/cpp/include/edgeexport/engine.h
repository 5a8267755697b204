// What a runtime offers to a session: one open decoder with its KV cache, and graphs that keep nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "edgeexport/bundle.h"

namespace edgeexport {

// Where the runtimes are, and how they run. A library is a file's path, or a name that the app's loader finds.
struct RuntimeOptions {
  int threads = 0;  // 0: the runtime chooses
  std::string onnxruntime = "libonnxruntime.so";
  std::string litert = "libLiteRt.so";
  // A folder of the app's (context.cacheDir) where LiteRT's packed weights are kept between runs, and used again where
  // they still have the digest that they were kept with. Without one it packs them in memory, once for each signature
  // of the model.
  std::string cacheFolder;
  // A runtime trusts the file that it opens: what is damaged in it ends the process. So the files of a component are read
  // and compared with their hashes each time before one is opened. Switch it off for a bundle that was verified when it
  // was installed, in a folder that nothing but the app writes to.
  bool verify = true;
  // Where the engines are that TensorRT built on this very device; by default `engines` beside the bundle's folder.
  std::string engines;
};

// A piece of a prompt: `count` token ids, or as many embeddings [count, width] where the model has its embedding
// apart, and M-RoPE positions where the model turns by them.
struct Piece {
  std::size_t count = 0;
  const std::int32_t* tokens = nullptr;
  const float* embeddings = nullptr;
  const std::int64_t* rope = nullptr;  // three rows, `ropeStride` numbers apart
  std::size_t ropeStride = 0;
};

// Longest piece of a prompt that an engine is given at once: the memory of activations grows with it.
constexpr std::size_t kLongestPiece = 512;

// One open decoder with its KV cache, at batch 1. Calls come from one thread at a time.
class DecoderEngine {
 public:
  virtual ~DecoderEngine() = default;

  virtual std::size_t context() const noexcept = 0;  // slots in the cache
  virtual std::size_t vocab() const noexcept = 0;    // number of logits
  virtual std::size_t width() const noexcept = 0;    // of the embeddings it takes; 0 where it takes token ids
  virtual bool turns() const noexcept { return false; }  // whether it takes M-RoPE positions
  // Writes the piece's keys and values at cache slots position.. in place, and returns the logits [vocab] of its last
  // token, which the next call overwrites. Throws runtime-failed.
  virtual const float* step(const Piece& piece, std::size_t position) = 0;

  // Seconds inside the runtime's own calls so far.
  virtual double runtimeSeconds() const noexcept = 0;
};

// A tensor in memory of the caller's.
struct TensorView {
  std::string name;
  enum class Type { kFloat32, kInt64 } type = Type::kFloat32;
  std::vector<std::int64_t> shape;
  void* data = nullptr;

  // Of elements.
  std::size_t count() const {
    std::size_t total = 1;
    for (const std::int64_t size : shape) total *= static_cast<std::size_t>(size);
    return total;
  }
};

// One open artifact without state: an encoder, an embedding table.
class GraphEngine {
 public:
  virtual ~GraphEngine() = default;

  // Inputs and output by the names and shapes of the canonical graph; the output's memory is the caller's.
  // Throws runtime-failed.
  virtual void run(const std::vector<TensorView>& inputs, const TensorView& output) = 0;
};

// Opens a component with the runtime that the manifest names for it. Throws backend-not-built, runtime-missing,
// runtime-too-old, artifact-does-not-open, bundle-bad-manifest, bundle-no-component, bundle-no-variant, out-of-memory,
// and what Bundle::verify throws.
std::unique_ptr<DecoderEngine> openDecoder(const Bundle& bundle, const RuntimeOptions& options);
std::unique_ptr<GraphEngine> openGraph(const Bundle& bundle, const std::string& component, const std::string& variant,
                                       const RuntimeOptions& options);

}  // namespace edgeexport
