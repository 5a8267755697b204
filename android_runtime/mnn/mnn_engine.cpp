// Runs a bundle's decoder in MNN-LLM, with its own cache, and its encoders as plain MNN modules.
#include "mnn_engine.h"

#include <algorithm>
#include <cstring>
#include <llm/llm.hpp>

#include "edgeexport/json.h"
#include "errors.h"
#include "interface.h"
#include "named.h"
#include "stopwatch.h"

namespace edgeexport {
namespace {

using MNN::Express::NCHW;
using MNN::Express::VARP;
using MNN::Transformer::Llm;

constexpr const char* kRuntime = "MNN";
constexpr const char* kStep = "step";  // the signature of a component that has no variants
constexpr const char* kConfig = "config.json";
constexpr const char* kModelConfig = "llm_config.json";
constexpr std::size_t kMaxConfig = std::size_t{1} << 20;

struct Destroy {
  void operator()(Llm* held) const { Llm::destroy(held); }
};
using HeldLlm = std::unique_ptr<Llm, Destroy>;

template <typename Type>
VARP valueOf(const Type* data, const std::vector<int>& shape) {
  return MNN::Express::_Const(data, shape, NCHW, halide_type_of<Type>());
}

std::vector<int> idsOf(const std::int64_t* ids, std::size_t count) { return std::vector<int>(ids, ids + count); }

const Signature& signatureOf(const Component& component, const std::string& variant) {
  const Signature* found = component.signature(variant.empty() ? kStep : variant);
  if (found == nullptr) throw errors::bundleNoVariant(component.name, variant);
  return *found;
}

// The one output of a component without state.
const TensorSpec& onlyOutput(const Component& component, const Signature& signature) {
  if (signature.outputs.size() != 1) {
    throw errors::bundleBadManifest(component.name + ", signature " + signature.name, "it has not one output");
  }
  return signature.outputs.front();
}

// Throws artifact-does-not-open unless a configuration, which is all that MNN-LLM says of a model before it runs, has
// this number under a key.
void requireSaid(const Bundle& bundle, const std::string& file, const char* key, std::size_t wanted) {
  std::string problem;
  try {
    const std::int64_t said = Json::parse(bundle.read(file, kMaxConfig)).at(key).integer();
    if (said >= 0 && static_cast<std::size_t>(said) == wanted) return;
    problem = std::string(key) + " is " + std::to_string(said) + ", the manifest says " + std::to_string(wanted);
  } catch (const JsonError& error) {
    problem = error.what();
  }
  throw errors::artifactDoesNotOpen(bundle.path(file), kRuntime, problem);
}

// Copies what was computed. Throws runtime-failed unless it is as many floats as there is room for.
void copyTo(const TensorView& output, const VARP& made) {
  const auto* info = made.get() == nullptr ? nullptr : made->getInfo();
  const float* values = info == nullptr ? nullptr : made->readMap<float>();
  if (info == nullptr || values == nullptr) throw errors::runtimeFailed(kRuntime, "its output cannot be read");
  const halide_type_t wanted = halide_type_of<float>();
  if (info->type.code != wanted.code || info->type.bits != wanted.bits || info->size < 0 ||
      static_cast<std::size_t>(info->size) != output.count()) {
    throw errors::runtimeFailed(kRuntime, "its output is not " + output.name + " as the manifest says");
  }
  std::memcpy(output.data, values, output.count() * sizeof(float));
}

// The engine over a configuration of the bundle. Every file of the component is there, and as long as it should be.
HeldLlm openLlm(const Bundle& bundle, const Component& component, const std::string& config, int threads) {
  for (const std::string& name : component.files) bundle.path(name);
  const std::string path = bundle.path(config);
  HeldLlm llm(Llm::createLLM(path));
  if (threads > 0 && llm) llm->set_config("{\"thread_num\": " + std::to_string(threads) + "}");
  if (!llm || !llm->load()) throw errors::artifactDoesNotOpen(path, kRuntime, "see what MNN wrote to the log");
  llm->generate_init(nullptr, nullptr);
  return llm;
}

class MnnDecoder : public DecoderEngine {
 public:
  MnnDecoder(const Bundle& bundle, const Component& component, const RuntimeOptions& options)
      : shape_(decoderShape(component, signatureOf(component, ""), kCanonicalForm, 0)) {
    if (shape_.vocab == 0) throw errors::artifactDoesNotOpen(bundle.folder(), kRuntime, "it gives no logits");
    if (shape_.width > 0) requireSaid(bundle, kModelConfig, "hidden_size", shape_.width);
    requireSaid(bundle, kModelConfig, "layer_nums", component.state.size() / 2);
    llm_ = openLlm(bundle, component, kConfig, options.threads);
  }

  std::size_t context() const noexcept override { return shape_.context; }
  std::size_t vocab() const noexcept override { return shape_.vocab; }
  std::size_t width() const noexcept override { return shape_.width; }
  bool turns() const noexcept override { return shape_.turns; }
  double runtimeSeconds() const noexcept override { return seconds_; }

  const float* step(const Piece& piece, std::size_t position) override {
    const Stopwatch watch(seconds_);
    const int count = static_cast<int>(piece.count);
    const VARP fed = width() > 0 ? valueOf(piece.embeddings, {count, 1, static_cast<int>(width())})
                                 : llm_->embedding(std::vector<int>(piece.tokens, piece.tokens + count));
    // What lies in the cache behind `position` is forgotten, and so many tokens are appended.
    llm_->setKVCacheInfo(piece.count, held_ - std::min(held_, position));
    const auto made = llm_->forwardRaw(fed, llm_->gen_attention_mask(count), positionsOf(piece, position));
    if (made.empty()) throw errors::runtimeFailed(kRuntime, "it gave no logits");
    logits_ = made.front();
    const auto* info = logits_.get() == nullptr ? nullptr : logits_->getInfo();
    const float* all = info == nullptr ? nullptr : logits_->readMap<float>();
    if (info == nullptr || all == nullptr) throw errors::runtimeFailed(kRuntime, "its logits cannot be read");
    const bool promised = !info->dim.empty() && info->dim.back() > 0 && info->size >= info->dim.back() &&
                          static_cast<std::size_t>(info->dim.back()) == vocab();
    if (!promised) throw errors::runtimeFailed(kRuntime, "its logits are not as many as the manifest says");
    held_ = position + piece.count;
    return all + (static_cast<std::size_t>(info->size) - vocab());
  }

 private:
  static VARP positionsOf(const Piece& piece, std::size_t position) {
    const std::size_t rows = piece.rope ? 3 : 1;
    std::vector<int> numbers(rows * piece.count);
    for (std::size_t row = 0; row < rows; ++row)
      for (std::size_t k = 0; k < piece.count; ++k)
        numbers[row * piece.count + k] =
            static_cast<int>(piece.rope ? piece.rope[row * piece.ropeStride + k]
                                        : static_cast<std::int64_t>(position + k));
    return valueOf(numbers.data(), {static_cast<int>(rows), static_cast<int>(piece.count)});
  }

  const DecoderShape shape_;
  HeldLlm llm_;
  VARP logits_;
  std::size_t held_ = 0;  // tokens in the cache
  double seconds_ = 0;
};

// A table of embeddings: MNN-LLM reads rows from the file as they are asked for.
class MnnLookup : public GraphEngine {
 public:
  MnnLookup(const Bundle& bundle, const Component& component) {
    const std::string config = component.name + ".json";
    const TensorSpec& made = onlyOutput(component, signatureOf(component, ""));
    if (made.shape.empty()) throw errors::artifactDoesNotOpen(bundle.path(config), kRuntime, "it gives no rows");
    requireSaid(bundle, config, "hidden_size", static_cast<std::size_t>(made.shape.back().max));
    llm_ = openLlm(bundle, component, config, 1);
  }

  void run(const std::vector<TensorView>& inputs, const TensorView& output) override {
    const TensorView* ids = named(inputs, std::string(kCanonicalForm.tokens));
    if (ids == nullptr || ids->type != TensorView::Type::kInt64) {
      throw errors::runtimeFailed(kRuntime, "no tokens are given to a lookup");
    }
    copyTo(output, llm_->embedding(idsOf(static_cast<const std::int64_t*>(ids->data), ids->count())));
  }

 private:
  HeldLlm llm_;
};

// An encoder. Its weights are widened to float32 when it is opened: close it when the picture is encoded.
class MnnGraph : public GraphEngine {
 public:
  MnnGraph(const Bundle& bundle, const Component& component, const std::string& variant, const RuntimeOptions& options)
      : signature_(signatureOf(component, variant)) {
    MNN::BackendConfig backend;
    MNN::ScheduleConfig schedule;
    schedule.type = MNN_FORWARD_CPU;
    if (options.threads > 0) schedule.numThread = options.threads;
    schedule.backendConfig = &backend;
    runtime_.reset(MNN::Express::Executor::RuntimeManager::createRuntimeManager(schedule));
    runtime_->setExternalFile(bundle.path(component.name + ".mnn.weight"));
    std::vector<std::string> inputs;
    for (const TensorSpec& spec : signature_.inputs) inputs.push_back(spec.name);
    const std::string path = bundle.path(signature_.file);
    const std::string& made = onlyOutput(component, signature_).name;
    module_.reset(MNN::Express::Module::load(inputs, {made}, path.c_str(), runtime_, nullptr));
    if (!module_) throw errors::artifactDoesNotOpen(path, kRuntime, "see what MNN wrote to the log");
    requireInputs(path);
  }

  void run(const std::vector<TensorView>& inputs, const TensorView& output) override {
    std::vector<VARP> given;
    for (const TensorSpec& spec : signature_.inputs) {
      const auto named = [&](const TensorView& each) { return each.name == spec.name; };
      const auto found = std::find_if(inputs.begin(), inputs.end(), named);
      if (found == inputs.end()) throw errors::runtimeFailed(kRuntime, "the input " + spec.name + " is not given");
      const std::vector<int> shape(found->shape.begin(), found->shape.end());
      if (found->type == TensorView::Type::kFloat32) {
        given.push_back(valueOf(static_cast<const float*>(found->data), shape));
      } else {
        std::size_t count = 1;
        for (const int size : shape) count *= static_cast<std::size_t>(size);
        given.push_back(valueOf(idsOf(static_cast<const std::int64_t*>(found->data), count).data(), shape));
      }
    }
    const auto made = module_->onForward(given);
    if (made.empty()) throw errors::runtimeFailed(kRuntime, "it gave no output");
    copyTo(output, MNN::Express::_Convert(made.front(), NCHW));
  }

 private:
  // The inputs are those of the manifest; what comes out is known when it runs.
  void requireInputs(const std::string& path) const {
    const auto* info = module_->getInfo();
    if (info == nullptr || info->inputs.size() != info->inputNames.size()) {
      throw errors::artifactDoesNotOpen(path, kRuntime, "it does not say what it takes");
    }
    std::vector<ReportedValue> reported;
    for (std::size_t i = 0; i < info->inputs.size(); ++i) {
      const auto& each = info->inputs[i];
      const bool whole = each.type.code != halide_type_of<float>().code;
      // MNN knows whole numbers of 32 bits alone
      ReportedValue value{info->inputNames[i], whole ? "int64" : "float32", {}};
      for (const int size : each.dim) value.shape.push_back(size > 0 ? size : -1);
      reported.push_back(std::move(value));
    }
    Signature promised = signature_;
    promised.outputs.clear();
    requirePromised(promised, reported, {}, path, kRuntime);
  }

  Signature signature_;
  std::shared_ptr<MNN::Express::Executor::RuntimeManager> runtime_;
  std::unique_ptr<MNN::Express::Module> module_;
};

}  // namespace

std::unique_ptr<DecoderEngine> openMnnDecoder(const Bundle& bundle, const Component& component,
                                              const RuntimeOptions& options) {
  return std::make_unique<MnnDecoder>(bundle, component, options);
}

std::unique_ptr<GraphEngine> openMnnGraph(const Bundle& bundle, const Component& component, const std::string& variant,
                                          const RuntimeOptions& options) {
  const std::string config = component.name + ".json";
  if (std::find(component.files.begin(), component.files.end(), config) != component.files.end())
    return std::make_unique<MnnLookup>(bundle, component);
  return std::make_unique<MnnGraph>(bundle, component, variant, options);
}

}  // namespace edgeexport
