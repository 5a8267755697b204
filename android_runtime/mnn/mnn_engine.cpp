// Runs a bundle's decoder in MNN-LLM, with its own cache, and its encoders as plain MNN modules.
#include "mnn_engine.h"

#include <algorithm>
#include <cstring>
#include <llm/llm.hpp>

#include "errors.h"
#include "stopwatch.h"

namespace edgeexport {
namespace {

using MNN::Express::NCHW;
using MNN::Express::VARP;
using MNN::Transformer::Llm;

constexpr const char* kRuntime = "MNN";
constexpr const char* kStep = "step";  // the signature of a component that has no variants

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
      : llm_(openLlm(bundle, component, "config.json", options.threads)) {
    const Signature& signature = signatureOf(component, "");
    vocab_ = static_cast<std::size_t>(signature.outputs.front().shape.back().max);
    context_ = component.kv ? static_cast<std::size_t>(component.kv->context) : 0;
    const TensorSpec& fed = signature.inputs.front();
    if (fed.name == "inputs_embeds") width_ = static_cast<std::size_t>(fed.shape.back().max);
  }

  std::size_t context() const noexcept override { return context_; }
  std::size_t vocab() const noexcept override { return vocab_; }
  std::size_t width() const noexcept override { return width_; }
  double runtimeSeconds() const noexcept override { return seconds_; }

  const float* step(const Piece& piece, std::size_t position) override {
    const Stopwatch watch(seconds_);
    const int count = static_cast<int>(piece.count);
    const VARP fed = width_ ? valueOf(piece.embeddings, {count, 1, static_cast<int>(width_)})
                            : llm_->embedding(std::vector<int>(piece.tokens, piece.tokens + count));
    // What lies in the cache behind `position` is forgotten, and so many tokens are appended.
    llm_->setKVCacheInfo(piece.count, held_ - std::min(held_, position));
    const auto made = llm_->forwardRaw(fed, llm_->gen_attention_mask(count), positionsOf(piece, position));
    if (made.empty()) throw errors::runtimeFailed(kRuntime, "it gave no logits");
    logits_ = made.front();
    const auto* info = logits_->getInfo();
    const float* all = logits_->readMap<float>();
    if (info == nullptr || all == nullptr || static_cast<std::size_t>(info->size) < vocab_)
      throw errors::runtimeFailed(kRuntime, "its logits cannot be read");
    held_ = position + piece.count;
    return all + (static_cast<std::size_t>(info->size) - vocab_);
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

  HeldLlm llm_;
  VARP logits_;
  std::size_t context_ = 0, vocab_ = 0, width_ = 0;
  std::size_t held_ = 0;  // tokens in the cache
  double seconds_ = 0;
};

// A table of embeddings: MNN-LLM reads rows from the file as they are asked for.
class MnnLookup : public GraphEngine {
 public:
  MnnLookup(const Bundle& bundle, const Component& component)
      : llm_(openLlm(bundle, component, component.name + ".json", 1)) {}

  void run(const std::vector<TensorView>& inputs, const TensorView& output) override {
    const auto count = static_cast<std::size_t>(inputs.front().shape.back());
    const VARP rows = llm_->embedding(idsOf(static_cast<const std::int64_t*>(inputs.front().data), count));
    const float* found = rows->readMap<float>();
    if (found == nullptr) throw errors::runtimeFailed(kRuntime, "a lookup gave nothing");
    std::memcpy(output.data, found, static_cast<std::size_t>(rows->getInfo()->size) * sizeof(float));
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
    module_.reset(
        MNN::Express::Module::load(inputs, {signature_.outputs.front().name}, path.c_str(), runtime_, nullptr));
    if (!module_) throw errors::artifactDoesNotOpen(path, kRuntime, "see what MNN wrote to the log");
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
    const VARP plain = MNN::Express::_Convert(made.front(), NCHW);
    const float* found = plain->readMap<float>();
    if (found == nullptr) throw errors::runtimeFailed(kRuntime, "its output cannot be read");
    std::memcpy(output.data, found, static_cast<std::size_t>(plain->getInfo()->size) * sizeof(float));
  }

 private:
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
