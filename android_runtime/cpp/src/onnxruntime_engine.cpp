// Runs .onnx and .ort artifacts in ONNX Runtime on the processor; a decoder's KV cache is bound once, updated in place.
#include <algorithm>
#include <array>
#include <map>
#include <memory>

#include "arena.h"
#include "engines.h"
#include "onnxruntime_api.h"
#include "stopwatch.h"

namespace edgeexport {
namespace {

using namespace onnxruntime;

constexpr const char* kRuntime = "ONNX Runtime";
constexpr const char* kStep = "step";  // the signature of a component that has no variants

// KleidiAI rounds what it multiplies int4 weights with once per token, all other kernels once per block: its logits are
// further from the ones that were compared when the bundle was built than the bundle's gates allow.
constexpr const char* kDisableKleidiAi = "mlas.disable_kleidiai";

template <typename Type>
struct Release {
  void (*release)(Type*);
  void operator()(Type* held) const { release(held); }
};
template <typename Type>
using Held = std::unique_ptr<Type, Release<Type>>;

struct ValueSpec {
  int type = 0;
  std::vector<std::int64_t> shape;  // -1 where it is symbolic
};

// The runtime with one open model.
class Model {
 public:
  Model(const std::string& path, const RuntimeOptions& options)
      : path_(path), library_(options.onnxruntime), api_(library_) {
    try {
      env_ = make<OrtEnv>(api_.releaseEnv, [&](OrtEnv** out) { return api_.createEnv(kLogErrors, "edgeexport", out); });
      auto settings = make<OrtSessionOptions>(api_.releaseSessionOptions,
                                              [&](OrtSessionOptions** out) { return api_.createSessionOptions(out); });
      check(api_.setLogSeverity(settings.get(), kLogErrors));
      check(api_.addConfig(settings.get(), kDisableKleidiAi, "1"));
      if (options.threads > 0) check(api_.setIntraOpThreads(settings.get(), options.threads));
      session_ = make<OrtSession>(api_.releaseSession, [&](OrtSession** out) {
        return api_.createSession(env_.get(), path.c_str(), settings.get(), out);
      });
      memory_ = make<OrtMemoryInfo>(api_.releaseMemoryInfo, [&](OrtMemoryInfo** out) {
        return api_.createCpuMemoryInfo(kDeviceAllocator, kDefaultMemory, out);
      });
      readSpecs();
    } catch (const Error& problem) {
      throw errors::artifactDoesNotOpen(path, kRuntime, problem.why());
    }
  }

  const Api& api() const { return api_; }
  OrtSession* session() const { return session_.get(); }

  // An input or output; throws artifact-does-not-open unless it is there with this type and number of dimensions.
  const ValueSpec& spec(const std::string& name, int type, std::size_t rank) const {
    const auto found = specs_.find(name);
    if (found == specs_.end() || found->second.type != type || found->second.shape.size() != rank) {
      throw errors::artifactDoesNotOpen(path_, kRuntime, "it has no " + name + " of the type that the loader feeds");
    }
    return found->second;
  }
  bool has(const std::string& name) const { return specs_.count(name) > 0; }
  // A fixed size of a shape. Throws artifact-does-not-open.
  std::size_t size(const ValueSpec& spec, std::size_t axis) const {
    if (spec.shape[axis] <= 0) throw errors::artifactDoesNotOpen(path_, kRuntime, "a size is not fixed");
    return static_cast<std::size_t>(spec.shape[axis]);
  }

  Held<OrtValue> tensor(void* data, int type, const std::int64_t* shape, std::size_t rank) const {
    std::size_t bytes = type == kFloat ? sizeof(float) : sizeof(std::int64_t);
    for (std::size_t i = 0; i < rank; ++i) bytes *= static_cast<std::size_t>(shape[i]);
    return make<OrtValue>(api_.releaseValue, [&](OrtValue** out) {
      return api_.createTensor(memory_.get(), data, bytes, shape, rank, type, out);
    });
  }

  void check(OrtStatus* status) const {
    if (status == nullptr) return;
    const std::string problem = api_.errorMessage(status);
    api_.releaseStatus(status);
    throw errors::runtimeFailed(kRuntime, problem);
  }

  template <typename Type, typename Make>
  Held<Type> make(void (*release)(Type*), Make create) const {
    Type* made = nullptr;
    check(create(&made));
    return Held<Type>(made, Release<Type>{release});
  }

 private:
  void readSpecs() {
    OrtAllocator* allocator = nullptr;
    check(api_.defaultAllocator(&allocator));
    const auto read = [&](auto count, auto nameOf, auto typeOf) {
      std::size_t total = 0;
      check(count(session_.get(), &total));
      for (std::size_t i = 0; i < total; ++i) {
        char* name = nullptr;
        check(nameOf(session_.get(), i, allocator, &name));
        const std::string copy = name;
        check(api_.allocatorFree(allocator, name));
        const auto info = make<OrtTypeInfo>(api_.releaseTypeInfo,
                                            [&](OrtTypeInfo** out) { return typeOf(session_.get(), i, out); });
        const OrtTensorTypeAndShapeInfo* tensor = nullptr;
        check(api_.tensorInfo(info.get(), &tensor));
        if (tensor == nullptr) continue;
        ValueSpec& spec = specs_[copy];
        std::size_t rank = 0;
        check(api_.elementType(tensor, &spec.type));
        check(api_.dimensionCount(tensor, &rank));
        spec.shape.resize(rank);
        check(api_.dimensions(tensor, spec.shape.data(), rank));
      }
    };
    read(api_.inputCount, api_.inputName, api_.inputTypeInfo);
    read(api_.outputCount, api_.outputName, api_.outputTypeInfo);
  }

  std::string path_;
  Library library_;
  Api api_;
  Held<OrtEnv> env_{nullptr, {nullptr}};
  Held<OrtSession> session_{nullptr, {nullptr}};
  Held<OrtMemoryInfo> memory_{nullptr, {nullptr}};
  std::map<std::string, ValueSpec> specs_;
};

std::string graphFile(const Bundle& bundle, const Component& component, const std::string& variant) {
  const Signature* signature = component.signature(variant.empty() ? kStep : variant);
  if (signature == nullptr) throw errors::bundleNoVariant(component.name, variant);
  for (const std::string& file : component.files) bundle.path(file);  // the weights lie in files that the graph names
  return bundle.path(signature->file);
}

class OnnxDecoder final : public DecoderEngine {
 public:
  OnnxDecoder(const std::string& path, const Component& component, const RuntimeOptions& options)
      : model_(path, options) {
    if (component.state.empty()) throw errors::artifactDoesNotOpen(path, kRuntime, "it has no cache");
    const ValueSpec& logits = model_.spec("logits", kFloat, 3);
    vocab_ = model_.size(logits, 2);
    context_ = model_.size(model_.spec(component.state[0].first, kFloat, 4), 2);
    longest_ = std::min(kLongestPiece, context_);
    rope_ = model_.has("rope_positions");
    if (model_.has("inputs_embeds")) width_ = model_.size(model_.spec("inputs_embeds", kFloat, 3), 2);
    model_.spec(fedName(), width_ > 0 ? kFloat : kInt64, width_ > 0 ? 3 : 2);

    std::size_t needed = Arena::room(sizeof(std::int64_t)) + Arena::room(vocab_ * sizeof(float)) +
                         Arena::room(longest_ * (width_ > 0 ? width_ * sizeof(float) : sizeof(std::int64_t))) +
                         Arena::room(3 * longest_ * sizeof(std::int64_t));
    for (const auto& pair : component.state) needed += Arena::room(cacheSize(pair.first) * sizeof(float));
    arena_ = std::make_unique<Arena>(needed);
    position_ = arena_->take<std::int64_t>(1);
    logits_ = arena_->take<float>(vocab_);
    if (width_ > 0) {
      embeddings_ = arena_->take<float>(longest_ * width_);
    } else {
      tokens_ = arena_->take<std::int64_t>(longest_);
    }
    turns_ = arena_->take<std::int64_t>(3 * longest_);

    binding_ = model_.make<OrtIoBinding>(
        api().releaseIoBinding, [&](OrtIoBinding** out) { return api().createIoBinding(model_.session(), out); });
    const std::int64_t one = 1;
    bindInput("position", position_, kInt64, &one, 1);
    const std::array<std::int64_t, 3> logitsShape = {1, 1, static_cast<std::int64_t>(vocab_)};
    bindOutput("logits", hold(model_.tensor(logits_, kFloat, logitsShape.data(), logitsShape.size())));
    for (const auto& [past, present] : component.state) {
      const ValueSpec& spec = model_.spec(past, kFloat, 4);
      model_.spec(present, kFloat, 4);
      OrtValue* cache =
          hold(model_.tensor(arena_->take<float>(cacheSize(past)), kFloat, spec.shape.data(), spec.shape.size()));
      model_.check(api().bindInput(binding_.get(), past.c_str(), cache));
      bindOutput(present, cache);
    }
  }

  std::size_t context() const noexcept override { return context_; }
  std::size_t vocab() const noexcept override { return vocab_; }
  std::size_t width() const noexcept override { return width_; }
  double runtimeSeconds() const noexcept override { return seconds_; }

  const float* step(const Piece& piece, std::size_t position) override {
    if (piece.count != bound_) bindPiece(piece.count);
    if (width_ > 0) {
      std::copy_n(piece.embeddings, piece.count * width_, embeddings_);
    } else {
      std::copy_n(piece.tokens, piece.count, tokens_);
    }
    for (std::size_t row = 0; rope_ && row < 3; ++row) {
      std::copy_n(piece.rope + row * piece.ropeStride, piece.count, turns_ + row * piece.count);
    }
    *position_ = static_cast<std::int64_t>(position);
    const Stopwatch watch(seconds_);
    model_.check(api().runWithBinding(model_.session(), nullptr, binding_.get()));
    return logits_;
  }

 private:
  const Api& api() const { return model_.api(); }
  const char* fedName() const { return width_ > 0 ? "inputs_embeds" : "input_ids"; }

  std::size_t cacheSize(const std::string& name) const {
    const ValueSpec& spec = model_.spec(name, kFloat, 4);
    return model_.size(spec, 0) * model_.size(spec, 1) * model_.size(spec, 2) * model_.size(spec, 3);
  }

  OrtValue* hold(Held<OrtValue> value) {
    held_.push_back(std::move(value));
    return held_.back().get();
  }

  void bindInput(const char* name, void* data, int type, const std::int64_t* shape, std::size_t rank) {
    const Held<OrtValue> value = model_.tensor(data, type, shape, rank);  // the binding keeps a reference of its own
    model_.check(api().bindInput(binding_.get(), name, value.get()));
  }

  void bindOutput(const std::string& name, OrtValue* value) {
    model_.check(api().bindOutput(binding_.get(), name.c_str(), value));
  }

  // The inputs whose shape follows the number of tokens. Pieces of the same length in a row need it once.
  void bindPiece(std::size_t count) {
    bound_ = 0;
    const auto length = static_cast<std::int64_t>(count);
    const std::array<std::int64_t, 3> fed = {1, length, static_cast<std::int64_t>(width_)};
    if (width_ > 0) {
      bindInput(fedName(), embeddings_, kFloat, fed.data(), 3);
    } else {
      bindInput(fedName(), tokens_, kInt64, fed.data(), 2);
    }
    const std::array<std::int64_t, 3> turned = {3, 1, length};
    if (rope_) bindInput("rope_positions", turns_, kInt64, turned.data(), 3);
    bound_ = count;
  }

  Model model_;
  std::size_t vocab_ = 0;
  std::size_t context_ = 0;
  std::size_t longest_ = 0;
  std::size_t width_ = 0;
  bool rope_ = false;
  double seconds_ = 0;
  std::unique_ptr<Arena> arena_;
  std::int64_t* position_ = nullptr;
  std::int64_t* tokens_ = nullptr;
  std::int64_t* turns_ = nullptr;
  float* embeddings_ = nullptr;
  float* logits_ = nullptr;
  std::vector<Held<OrtValue>> held_;
  Held<OrtIoBinding> binding_{nullptr, {nullptr}};
  std::size_t bound_ = 0;
};

class OnnxGraph final : public GraphEngine {
 public:
  OnnxGraph(const std::string& path, const RuntimeOptions& options) : model_(path, options) {}

  void run(const std::vector<TensorView>& inputs, const TensorView& output) override {
    held_.clear();
    values_.clear();
    names_.clear();
    for (const TensorView& input : inputs) {
      held_.push_back(tensor(input));
      values_.push_back(held_.back().get());
      names_.push_back(input.name.c_str());
    }
    const Held<OrtValue> made = tensor(output);
    OrtValue* result = made.get();
    const char* name = output.name.c_str();
    model_.check(model_.api().run(model_.session(), nullptr, names_.data(), values_.data(), values_.size(), &name, 1,
                                  &result));
  }

 private:
  Held<OrtValue> tensor(const TensorView& view) const {
    const int type = view.type == TensorView::Type::kFloat32 ? kFloat : kInt64;
    return model_.tensor(view.data, type, view.shape.data(), view.shape.size());
  }

  Model model_;
  // of the last run: kept, so that the next one allocates nothing
  std::vector<Held<OrtValue>> held_;
  std::vector<const OrtValue*> values_;
  std::vector<const char*> names_;
};

}  // namespace

std::unique_ptr<DecoderEngine> openOnnxDecoder(const Bundle& bundle, const Component& component,
                                               const RuntimeOptions& options) {
  return std::make_unique<OnnxDecoder>(graphFile(bundle, component, ""), component, options);
}

std::unique_ptr<GraphEngine> openOnnxGraph(const Bundle& bundle, const Component& component, const std::string& variant,
                                           const RuntimeOptions& options) {
  return std::make_unique<OnnxGraph>(graphFile(bundle, component, variant), options);
}

}  // namespace edgeexport
