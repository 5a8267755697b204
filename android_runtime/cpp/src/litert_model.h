// One open .tflite file in LiteRT on the processor, its signatures, and calls of them over memory of the loader's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "edgeexport/engine.h"
#include "litert_api.h"

namespace edgeexport::litert {

inline const char* const kRuntime = "LiteRT";

template <typename Type>
struct Destroy {
  void (*destroy)(Type*);
  void operator()(Type* held) const { destroy(held); }
};
template <typename Type>
using Held = std::unique_ptr<Type, Destroy<Type>>;

struct Value {
  std::string name;
  TensorType type;

  // Bytes; elements are 32 bits wide.
  std::size_t bytes() const;
  std::size_t size(std::size_t axis) const { return static_cast<std::size_t>(type.dimensions[axis]); }
};

struct ModelSignature {
  std::string name;
  std::size_t index = 0;
  std::vector<Value> inputs;
  std::vector<Value> outputs;

  const Value* input(const std::string& wanted) const;
  const Value* output(const std::string& wanted) const;
};

class Model {
 public:
  // Opens a listed file of the bundle.
  Model(const Bundle& bundle, const std::string& file, const RuntimeOptions& options);

  // What it has under a signature's name: it takes and gives what the manifest says. Throws artifact-does-not-open.
  const ModelSignature& signature(const Signature& promised) const;

  // A tensor over memory of the loader's, 64-byte aligned.
  Held<TensorBuffer> buffer(const Value& value, void* memory) const;
  // Throws runtime-failed.
  void run(const ModelSignature& signature, std::vector<TensorBuffer*>& inputs, std::vector<TensorBuffer*>& outputs);

  [[noreturn]] void refuse(const std::string& problem) const;

 private:
  void readSignatures();
  void check(Status status, const char* call) const;

  std::string file_;
  std::string path_;
  Library library_;
  Api api_;
  Held<Environment> environment_{nullptr, {nullptr}};
  Held<ModelHandle> model_{nullptr, {nullptr}};
  Held<CompiledModel> compiled_{nullptr, {nullptr}};
  std::vector<ModelSignature> signatures_;
};

// One signature with its buffers.
class Call {
 public:
  // `memoryOf` gives an input's or output's memory: the same for all calls that share it.
  Call(Model& model, const ModelSignature& signature, const std::function<void*(const Value&)>& memoryOf);

  void run() { model_->run(*signature_, inputs_, outputs_); }

 private:
  Model* model_;
  const ModelSignature* signature_;
  std::vector<Held<TensorBuffer>> held_;
  std::vector<TensorBuffer*> inputs_;
  std::vector<TensorBuffer*> outputs_;
};

// What a signature's name says, as litert_names.py writes it: tokens of a piece (0 where it takes none) and the slots
// of the cache that it attends to (0: all).
struct SignatureName {
  std::size_t length = 0;
  std::size_t window = 0;

  static SignatureName parse(const std::string& name);
};

}  // namespace edgeexport::litert
