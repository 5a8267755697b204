// Opens a .tflite file: its external weights are checked first, since the runtime trusts the offsets in the file.
#include "litert_model.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "edgeexport/sha256.h"
#include "named.h"
#include "tflite_check.h"

namespace edgeexport::litert {
namespace {

// Where the packed weights of a model file are kept, or nothing. XNNPACK takes any file whose weights have the same
// shapes, and computes with another model's numbers without a word: so the name holds the content's hash, and the
// file's own size and time.
std::string packedWeights(const std::string& path, const std::string& digest, const RuntimeOptions& options) {
  struct stat found {};
  if (options.cacheFolder.empty() || ::stat(path.c_str(), &found) != 0) return "";
  const std::string key = digest + " " + std::to_string(found.st_size) + " " + std::to_string(found.st_mtime);
  return options.cacheFolder + "/" + sha256Hex(key) + ".xnnpack";
}

std::string quotedToml(const std::string& text) {
  std::string made = "\"";
  for (const char letter : text) {
    if (letter == '"' || letter == '\\') made.push_back('\\');
    made.push_back(letter);
  }
  return made + "\"";
}

// While one is alive the runtime packs weights into a file of this process's; at the end it gets its lasting name.
class PackedWeights {
 public:
  explicit PackedWeights(std::string kept) : kept_(std::move(kept)), used_(kept_) {
    struct stat found {};
    if (!kept_.empty() && ::stat(kept_.c_str(), &found) != 0) used_ = kept_ + "." + std::to_string(::getpid());
  }
  ~PackedWeights() {
    if (used_ != kept_ && std::rename(used_.c_str(), kept_.c_str()) != 0) std::remove(used_.c_str());
  }
  PackedWeights(const PackedWeights&) = delete;
  PackedWeights& operator=(const PackedWeights&) = delete;

  const std::string& used() const { return used_; }

 private:
  std::string kept_;
  std::string used_;
};

}  // namespace

std::size_t Value::bytes() const {
  std::size_t total = sizeof(std::int32_t);
  for (std::size_t i = 0; i < type.rank; ++i) total *= size(i);
  return total;
}

const Value* ModelSignature::input(const std::string& wanted) const { return named(inputs, wanted); }

const Value* ModelSignature::output(const std::string& wanted) const { return named(outputs, wanted); }

Model::Model(const std::string& path, const std::string& digest, const RuntimeOptions& options)
    : path_(path), library_(options.litert), api_(library_) {
  const std::string damage = tfliteDamage(path);
  if (!damage.empty()) refuse(damage);
  const PackedWeights packed(packedWeights(path, digest, options));
  try {
    const EnvironmentOption settings[] = {{kAutoRegister, {kIntOption, kCpu}},
                                          {kLogSeverity, {kIntOption, kLogErrors}}};
    Environment* environment = nullptr;
    check(api_.createEnvironment(2, settings, &environment), "LiteRtCreateEnvironment");
    environment_ = Held<Environment>(environment, {api_.destroyEnvironment});
    ModelHandle* model = nullptr;
    check(api_.createModelFromFile(environment, path.c_str(), &model), "LiteRtCreateModelFromFile");
    model_ = Held<ModelHandle>(model, {api_.destroyModel});

    Options* raw = nullptr;
    check(api_.createOptions(&raw), "LiteRtCreateOptions");
    const Held<Options> compilation(raw, {api_.destroyOptions});
    check(api_.setAccelerators(raw, kCpu), "LiteRtSetOptionsHardwareAccelerators");
    const long processors = options.threads > 0 ? options.threads : ::sysconf(_SC_NPROCESSORS_ONLN);
    std::string toml = "num_threads = " + std::to_string(processors) + "\n";
    if (!packed.used().empty()) toml += "weight_cache_file_path = " + quotedToml(packed.used()) + "\n";
    char* payload = ::strdup(toml.c_str());  // the runtime frees it
    OpaqueOptions* cpu = nullptr;
    check(api_.createOpaqueOptions("xnnpack", payload, [](void* text) { std::free(text); }, &cpu),
          "LiteRtCreateOpaqueOptions");
    check(api_.addOpaqueOptions(raw, cpu), "LiteRtAddOpaqueOptions");
    CompiledModel* compiled = nullptr;
    check(api_.createCompiledModel(environment, model, raw, &compiled), "LiteRtCreateCompiledModel");
    compiled_ = Held<CompiledModel>(compiled, {api_.destroyCompiledModel});
    readSignatures();
  } catch (const Error& problem) {
    if (problem.code() != "runtime-failed") throw;
    refuse(problem.why());
  }
}

const ModelSignature* Model::signature(const std::string& name) const { return named(signatures_, name); }

Held<TensorBuffer> Model::buffer(const Value& value, void* memory) const {
  TensorBuffer* made = nullptr;
  check(api_.createHostBuffer(&value.type, memory, value.bytes(), nullptr, &made),
        "LiteRtCreateTensorBufferFromHostMemory");
  return Held<TensorBuffer>(made, {api_.destroyBuffer});
}

void Model::run(const ModelSignature& signature, std::vector<TensorBuffer*>& inputs,
                std::vector<TensorBuffer*>& outputs) {
  const Status status = api_.run(compiled_.get(), signature.index, inputs.size(), inputs.data(), outputs.size(),
                                 outputs.data());
  if (status != 0) check(status, "LiteRtRunCompiledModel");
}

void Model::refuse(const std::string& problem) const { throw errors::artifactDoesNotOpen(path_, kRuntime, problem); }

void Model::readSignatures() {
  const auto read = [&](SignatureHandle* signature, auto count, auto nameOf, auto tensorOf) {
    std::vector<Value> values;
    std::size_t total = 0;
    check(count(signature, &total), "LiteRtGetNumSignatureInputs");
    for (std::size_t i = 0; i < total; ++i) {
      const char* name = nullptr;
      TensorHandle* tensor = nullptr;
      Value value{};
      check(nameOf(signature, i, &name), "LiteRtGetSignatureInputName");
      check(tensorOf(signature, i, &tensor), "LiteRtGetSignatureInputTensorByIndex");
      check(api_.tensorType(tensor, &value.type), "LiteRtGetRankedTensorType");
      value.name = name;
      if (value.type.element != kFloat32 && value.type.element != kInt32) {
        refuse(value.name + " is neither float32 nor int32");
      }
      for (std::size_t k = 0; k < value.type.rank; ++k) {
        if (value.type.dimensions[k] < 1) refuse(value.name + " has no fixed shape");
      }
      values.push_back(value);
    }
    return values;
  };
  std::size_t total = 0;
  check(api_.signatureCount(model_.get(), &total), "LiteRtGetNumModelSignatures");
  for (std::size_t i = 0; i < total; ++i) {
    SignatureHandle* handle = nullptr;
    const char* key = nullptr;
    check(api_.signature(model_.get(), i, &handle), "LiteRtGetModelSignature");
    check(api_.signatureKey(handle, &key), "LiteRtGetSignatureKey");
    signatures_.push_back({key, i, read(handle, api_.inputCount, api_.inputName, api_.inputTensor),
                           read(handle, api_.outputCount, api_.outputName, api_.outputTensor)});
  }
}

void Model::check(Status status, const char* call) const {
  if (status != 0) throw errors::runtimeFailed(kRuntime, std::string(call) + " gave status " + std::to_string(status));
}

Call::Call(Model& model, const ModelSignature& signature, const std::function<void*(const Value&)>& memoryOf)
    : model_(&model), signature_(&signature) {
  const auto wrap = [&](const std::vector<Value>& values, std::vector<TensorBuffer*>& buffers) {
    for (const Value& value : values) {
      held_.push_back(model.buffer(value, memoryOf(value)));
      buffers.push_back(held_.back().get());
    }
  };
  wrap(signature.inputs, inputs_);
  wrap(signature.outputs, outputs_);
}

SignatureName SignatureName::parse(const std::string& name) {
  static const std::string kWindow = "window_";
  static const std::string kPrefill = "prefill_";
  // A number of at most nine digits that fills a part of the name; 0 where it is none.
  const auto number = [](const std::string& text) -> std::size_t {
    const bool digits = !text.empty() && text.size() < 10 && text.find_first_not_of("0123456789") == std::string::npos;
    return digits ? std::stoul(text) : 0;
  };
  SignatureName made;
  std::string rest = name;
  if (name.compare(0, kWindow.size(), kWindow) == 0) {
    const std::size_t end = name.find('_', kWindow.size());
    made.window = end == std::string::npos ? 0 : number(name.substr(kWindow.size(), end - kWindow.size()));
    if (made.window > 0) rest = name.substr(end + 1);
  }
  if (rest == "decode") made.length = 1;
  if (rest.compare(0, kPrefill.size(), kPrefill) == 0) made.length = number(rest.substr(kPrefill.size()));
  return made;
}

}  // namespace edgeexport::litert
