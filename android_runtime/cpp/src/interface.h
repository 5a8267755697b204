// What a manifest promises of an artifact: whether it suffices to run it, and whether the runtime reports the same.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "edgeexport/bundle.h"

namespace edgeexport {

// An input or output as a runtime reports it. A size is -1 where the runtime leaves it open.
struct ReportedValue {
  std::string name;
  std::string dtype;
  std::vector<std::int64_t> shape;
};

// The manifest's is the interface that memory is laid out by, so each value of the artifact must be promised with its
// dtype and shape, and each that is promised must be there. Throws artifact-does-not-open.
void requirePromised(const Signature& promised, const std::vector<ReportedValue>& inputs,
                     const std::vector<ReportedValue>& outputs, const std::string& path, const char* runtime);

// How a backend lays out what every decoder takes.
struct DecoderForm {
  const char* tokens;
  const char* embeddings;
  const char* position;
  const char* whole;  // the dtype of tokens and positions
  bool perToken;      // a position for each token, not for the first alone; and caches grow by slices of as many
  bool halves;        // caches may be float16
};
constexpr DecoderForm kCanonicalForm{"input_ids", "inputs_embeds", "position", "int64", false, false};
constexpr DecoderForm kTensorRtForm{"input_ids", "inputs_embeds", "position", "int64", false, true};
constexpr DecoderForm kLiteRtForm{"tokens", "embeddings", "input_pos", "int32", true, false};

// What LiteRT's signatures call a value of the canonical graph.
std::string liteRtName(const std::string& canonical);

struct DecoderShape {
  std::size_t vocab = 0;  // 0 for a signature that gives no logits
  std::size_t context = 0;
  std::size_t heads = 0;
  std::size_t headWidth = 0;
  std::size_t width = 0;  // of embeddings; 0 where it takes token ids
  bool turns = false;     // takes M-RoPE positions

  // Whether another signature can take its turn over the same memory.
  bool continues(const DecoderShape& other) const noexcept {
    return context == other.context && heads == other.heads && headWidth == other.headWidth && width == other.width &&
           turns == other.turns;
  }
};

// What a signature of a decoder says of its model, for calls of `length` tokens, or of any number where it is 0: tokens
// or embeddings, positions, each state's cache, logits, all in shapes that fit together, and nothing else. Throws
// bundle-bad-manifest.
DecoderShape decoderShape(const Component& component, const Signature& signature, const DecoderForm& form,
                          std::size_t length);

// What the loader calls `name` in the canonical graph, in a signature of any backend; null where it is not there.
const TensorSpec* inputOf(const Signature& signature, const std::string& name);
const TensorSpec* outputOf(const Signature& signature, const std::string& name);

}  // namespace edgeexport
