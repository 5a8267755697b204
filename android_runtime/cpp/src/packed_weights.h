// Where the packed weights of a model file lie while LiteRT opens it.
#pragma once

#include <string>

#include "edgeexport/bundle.h"
#include "edgeexport/engine.h"

namespace edgeexport::litert {

// XNNPACK takes any file whose weights have the same shapes, and computes with another model's numbers without a word.
// So a kept file is named by the model's content, as it was read here and not as a manifest claims it, and is used only
// where it has the digest that it was kept with.
class PackedWeights {
 public:
  // `model` is a listed file of the bundle, which was compared with its hash if the options say so; `library` is the
  // runtime's.
  PackedWeights(const Bundle& bundle, const std::string& model, const std::string& library,
                const RuntimeOptions& options);
  // Throws away what was packed and not kept.
  ~PackedWeights();
  PackedWeights(const PackedWeights&) = delete;
  PackedWeights& operator=(const PackedWeights&) = delete;

  // For the runtime; empty where nothing is kept.
  const std::string& path() const { return used_; }
  // Gives what was packed its lasting name, once the runtime has packed all of it.
  void keep();

 private:
  std::string kept_;
  std::string used_;
};

}  // namespace edgeexport::litert
