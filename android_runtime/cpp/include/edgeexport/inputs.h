// From tokens, pictures and sound to what a decoder is fed, where a model's embedding is a component of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "edgeexport/bundle.h"
#include "edgeexport/engine.h"
#include "edgeexport/preprocess.h"

namespace edgeexport {

// What an encoder takes of one picture or sound: rows and columns of merged patches are those of a picture that is
// spliced into the prompt.
struct EncoderInput {
  std::string component;  // vision or audio
  std::string variant;    // of the component; empty where it has none
  std::string name;       // pixels, patches or mel
  std::vector<std::int64_t> shape;
  std::vector<float> values;
  std::size_t gridRows = 0;
  std::size_t gridColumns = 0;
};

// What an encoder made of it: [rows, width].
struct Features {
  std::string component;
  std::size_t rows = 0;
  std::size_t width = 0;
  std::vector<float> values;
  std::size_t gridRows = 0;
  std::size_t gridColumns = 0;
};

// A bundle's preprocess.json. Throws bundle-bad-preprocess, and what Bundle::read throws.
Preprocess contractOf(const Bundle& bundle);

// The way into one model. Calls come from one thread at a time.
class Inputs {
 public:
  // Opens the embedding of a bundle that has a preprocess.json, once what the manifest says of all components agrees
  // with the contract and the decoder's width. Throws what contractOf and openGraph throw.
  Inputs(const Bundle& bundle, const RuntimeOptions& options, std::size_t width, std::size_t context);
  ~Inputs();

  const Preprocess& contract() const noexcept { return contract_; }
  bool turns() const { return contract_.splices && contract_.positionRows == 3; }  // by M-RoPE

  Features encode(const EncoderInput& input);

  // The prompt with each picture's one placeholder repeated once per feature. Throws image-tokens-mismatch.
  std::vector<std::int32_t> expand(const std::vector<std::int32_t>& tokens,
                                   const std::vector<Features>& features) const;

  // The embeddings, and M-RoPE positions, of token ids behind `position` cached ones. What the piece points to lasts
  // until the next call. An image token stands for no picture in what the model itself has `written`. Call `accept`
  // when the decoder has taken them. Throws image-tokens-mismatch, runtime-failed.
  Piece feed(const std::int32_t* tokens, std::size_t count, const std::vector<Features>& features, bool written,
             std::size_t position);
  void accept(std::size_t position, std::size_t count, const std::vector<Features>& features);
  void truncate(std::size_t length);

  double runtimeSeconds() const noexcept { return seconds_; }

 private:
  void checkPromises() const;
  GraphEngine& graph(const std::string& component, const std::string& variant);
  void splice(const std::int32_t* tokens, std::size_t count, const std::vector<Features>& features);
  void attend(std::size_t count, const std::vector<Features>& features);
  void turn(const std::int32_t* tokens, std::size_t count, const std::vector<Features>& features, bool written,
            std::int64_t start);

  const Bundle bundle_;
  const RuntimeOptions options_;
  const std::size_t width_;
  const Preprocess contract_;
  std::map<std::string, std::unique_ptr<GraphEngine>> graphs_;
  double seconds_ = 0;

  // Reused by every call, so that one token allocates nothing.
  std::vector<std::int64_t> ids_;
  std::vector<float> embeddings_;
  std::vector<float> fused_;
  std::vector<float> shown_;
  std::vector<std::int64_t> rope_;
  std::vector<TensorView> embedInputs_;
  TensorView embedOutput_;
  std::vector<TensorView> fusionInputs_;
  TensorView fusionOutput_;

  std::vector<std::int64_t> ropeAt_;  // M-RoPE position of the token that would follow so many cached ones, by number
  std::int64_t nextRope_ = 0;
  std::vector<Features> attended_;
  std::size_t attendedFrom_ = 0;
};

}  // namespace edgeexport
