// Opens a .tflite file: its external weights are checked first, since the runtime trusts the offsets in the file.
#include "litert_model.h"

#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "interface.h"
#include "named.h"
#include "packed_weights.h"
#include "tflite_check.h"

namespace edgeexport::litert {
namespace {

std::string quotedToml(const std::string& text) {
  std::string made = "\"";
  for (const char letter : text) {
    if (letter == '"' || letter == '\\') made.push_back('\\');
    made.push_back(letter);
  }
  return made + "\"";
}

}  // namespace

std::size_t Value::bytes() const {
  std::size_t total = sizeof(std::int32_t);
  for (std::size_t i = 0; i < type.rank; ++i) total *= size(i);
  return total;
}

const Value* ModelSignature::input(const std::string& wanted) const { return named(inputs, wanted); }

const Value* ModelSignature::output(const std::string& wanted) const { return named(outputs, wanted); }

Model::Model(const Bundle& bundle, const std::string& file, const RuntimeOptions& options)
    : file_(file), path_(bundle.path(file)), library_(options.litert), api_(library_) {
  const std::string damage = tfliteDamage(path_);
  if (!damage.empty()) refuse(damage);
  PackedWeights packed(bundle, file, library_.path("LiteRtCreateEnvironment"), options);
  try {
    const EnvironmentOption settings[] = {{kAutoRegister, {kIntOption, kCpu}},
                                          {kLogSeverity, {kIntOption, kLogErrors}}};
    Environment* environment = nullptr;
    check(api_.createEnvironment(2, settings, &environment), "LiteRtCreateEnvironment");
    environment_ = Held<Environment>(environment, {api_.destroyEnvironment});
    ModelHandle* model = nullptr;
    check(api_.createModelFromFile(environment, path_.c_str(), &model), "LiteRtCreateModelFromFile");
    model_ = Held<ModelHandle>(model, {api_.destroyModel});

    Options* raw = nullptr;
    check(api_.createOptions(&raw), "LiteRtCreateOptions");
    const Held<Options> compilation(raw, {api_.destroyOptions});
    check(api_.setAccelerators(raw, kCpu), "LiteRtSetOptionsHardwareAccelerators");
    const long processors = options.threads > 0 ? options.threads : ::sysconf(_SC_NPROCESSORS_ONLN);
    std::string toml = "num_threads = " + std::to_string(processors) + "\n";
    if (!packed.path().empty()) toml += "weight_cache_file_path = " + quotedToml(packed.path()) + "\n";
    char* payload = ::strdup(toml.c_str());  // the runtime frees it
    OpaqueOptions* cpu = nullptr;
    check(api_.createOpaqueOptions("xnnpack", payload, [](void* text) { std::free(text); }, &cpu),
          "LiteRtCreateOpaqueOptions");
    check(api_.addOpaqueOptions(raw, cpu), "LiteRtAddOpaqueOptions");
    CompiledModel* compiled = nullptr;
    check(api_.createCompiledModel(environment, model, raw, &compiled), "LiteRtCreateCompiledModel");
    compiled_ = Held<CompiledModel>(compiled, {api_.destroyCompiledModel});
    readSignatures();
    packed.keep();
  } catch (const Error& problem) {
    if (problem.code() != "runtime-failed") throw;
    refuse(problem.why());
  }
}

const ModelSignature& Model::signature(const Signature& promised) const {
  const ModelSignature* found = named(signatures_, promised.name);
  if (found == nullptr || promised.file != file_) refuse("it has no signature " + promised.name);
  const auto reported = [](const std::vector<Value>& values) {
    std::vector<ReportedValue> made;
    for (const Value& value : values) {
      made.push_back({value.name, value.type.element == kFloat32 ? "float32" : "int32",
                      {value.type.dimensions, value.type.dimensions + value.type.rank}});
    }
    return made;
  };
  requirePromised(promised, reported(found->inputs), reported(found->outputs), path_, kRuntime);
  return *found;
}

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
      if (value.type.rank > kMaxRank) refuse(value.name + " has too many dimensions");
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
