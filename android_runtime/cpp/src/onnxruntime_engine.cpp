// Runs .onnx and .ort artifacts in ONNX Runtime on the processor; a decoder's KV cache is bound once, updated in place.
#include <algorithm>
#include <array>
#include <memory>
#include <utility>

#include "arena.h"
#include "engines.h"
#include "interface.h"
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

// The manifest's name of an element type; of those that no bundle has, a name that no manifest knows.
std::string dtypeOf(int type) {
  switch (type) {
    case kFloat: return "float32";
    case kInt64: return "int64";
    default: return "type " + std::to_string(type);
  }
}

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
      readValues();
    } catch (const Error& problem) {
      throw errors::artifactDoesNotOpen(path, kRuntime, problem.why());
    }
  }

  const Api& api() const { return api_; }
  OrtSession* session() const { return session_.get(); }

  // Throws artifact-does-not-open unless it takes and gives what the manifest says.
  void requireAs(const Signature& promised) const { requirePromised(promised, inputs_, outputs_, path_, kRuntime); }

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
  void readValues() {
    OrtAllocator* allocator = nullptr;
    check(api_.defaultAllocator(&allocator));
    const auto read = [&](auto count, auto nameOf, auto typeOf) {
      std::vector<ReportedValue> values;
      std::size_t total = 0;
      check(count(session_.get(), &total));
      for (std::size_t i = 0; i < total; ++i) {
        char* name = nullptr;
        check(nameOf(session_.get(), i, allocator, &name));
        ReportedValue value{name, "no tensor", {}};
        check(api_.allocatorFree(allocator, name));
        const auto info = make<OrtTypeInfo>(api_.releaseTypeInfo,
                                            [&](OrtTypeInfo** out) { return typeOf(session_.get(), i, out); });
        const OrtTensorTypeAndShapeInfo* tensor = nullptr;
        check(api_.tensorInfo(info.get(), &tensor));
        if (tensor != nullptr) {
          int type = 0;
          std::size_t rank = 0;
          check(api_.elementType(tensor, &type));
          check(api_.dimensionCount(tensor, &rank));
          value.dtype = dtypeOf(type);
          value.shape.resize(rank);
          check(api_.dimensions(tensor, value.shape.data(), rank));
        }
        values.push_back(std::move(value));
      }
      return values;
    };
    inputs_ = read(api_.inputCount, api_.inputName, api_.inputTypeInfo);
    outputs_ = read(api_.outputCount, api_.outputName, api_.outputTypeInfo);
  }

  std::string path_;
  Library library_;
  Api api_;
  Held<OrtEnv> env_{nullptr, {nullptr}};
  Held<OrtSession> session_{nullptr, {nullptr}};
  Held<OrtMemoryInfo> memory_{nullptr, {nullptr}};
  std::vector<ReportedValue> inputs_;
  std::vector<ReportedValue> outputs_;
};

const Signature& signatureOf(const Component& component, const std::string& variant) {
  const Signature* signature = component.signature(variant.empty() ? kStep : variant);
  if (signature == nullptr) throw errors::bundleNoVariant(component.name, variant);
  return *signature;
}

std::string graphFile(const Bundle& bundle, const Component& component, const Signature& signature) {
  for (const std::string& file : component.files) bundle.path(file);  // the weights lie in files that the graph names
  return bundle.path(signature.file);
}

class OnnxDecoder final : public DecoderEngine {
 public:
  OnnxDecoder(const std::string& path, const Component& component, const Signature& signature,
              const RuntimeOptions& options)
      : shape_(decoderShape(component, signature, kCanonicalForm, 0)), model_(path, options) {
    if (shape_.vocab == 0) throw errors::artifactDoesNotOpen(path, kRuntime, "it gives no logits");
    model_.requireAs(signature);
    const std::size_t longest = std::min(kLongestPiece, shape_.context);
    const std::size_t cache = shape_.heads * shape_.context * shape_.headWidth;
    arena_ = std::make_unique<Arena>(
        Arena::room(sizeof(std::int64_t)) + Arena::room(shape_.vocab * sizeof(float)) +
        Arena::room(longest * (width() > 0 ? width() * sizeof(float) : sizeof(std::int64_t))) +
        Arena::room(3 * longest * sizeof(std::int64_t)) + component.state.size() * Arena::room(cache * sizeof(float)));
    position_ = arena_->take<std::int64_t>(1);
    logits_ = arena_->take<float>(shape_.vocab);
    if (width() > 0) {
      embeddings_ = arena_->take<float>(longest * width());
    } else {
      tokens_ = arena_->take<std::int64_t>(longest);
    }
    turns_ = arena_->take<std::int64_t>(3 * longest);

    binding_ = model_.make<OrtIoBinding>(
        api().releaseIoBinding, [&](OrtIoBinding** out) { return api().createIoBinding(model_.session(), out); });
    const std::int64_t one = 1;
    bindInput("position", position_, kInt64, &one, 1);
    const std::array<std::int64_t, 3> logitsShape = {1, 1, static_cast<std::int64_t>(shape_.vocab)};
    const std::array<std::int64_t, 4> cacheShape = {1, static_cast<std::int64_t>(shape_.heads),
                                                    static_cast<std::int64_t>(shape_.context),
                                                    static_cast<std::int64_t>(shape_.headWidth)};
    bindOutput("logits", hold(model_.tensor(logits_, kFloat, logitsShape.data(), logitsShape.size())));
    for (const auto& [past, present] : component.state) {
      OrtValue* held =
          hold(model_.tensor(arena_->take<float>(cache), kFloat, cacheShape.data(), cacheShape.size()));
      model_.check(api().bindInput(binding_.get(), past.c_str(), held));
      bindOutput(present, held);
    }
  }

  std::size_t context() const noexcept override { return shape_.context; }
  std::size_t vocab() const noexcept override { return shape_.vocab; }
  std::size_t width() const noexcept override { return shape_.width; }
  bool turns() const noexcept override { return shape_.turns; }
  double runtimeSeconds() const noexcept override { return seconds_; }

  const float* step(const Piece& piece, std::size_t position) override {
    if (piece.count != bound_) bindPiece(piece.count);
    if (width() > 0) {
      std::copy_n(piece.embeddings, piece.count * width(), embeddings_);
    } else {
      std::copy_n(piece.tokens, piece.count, tokens_);
    }
    for (std::size_t row = 0; shape_.turns && row < 3; ++row) {
      std::copy_n(piece.rope + row * piece.ropeStride, piece.count, turns_ + row * piece.count);
    }
    *position_ = static_cast<std::int64_t>(position);
    const Stopwatch watch(seconds_);
    model_.check(api().runWithBinding(model_.session(), nullptr, binding_.get()));
    return logits_;
  }

 private:
  const Api& api() const { return model_.api(); }
  const char* fedName() const { return width() > 0 ? kCanonicalForm.embeddings : kCanonicalForm.tokens; }

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
    const std::array<std::int64_t, 3> fed = {1, length, static_cast<std::int64_t>(width())};
    if (width() > 0) {
      bindInput(fedName(), embeddings_, kFloat, fed.data(), 3);
    } else {
      bindInput(fedName(), tokens_, kInt64, fed.data(), 2);
    }
    const std::array<std::int64_t, 3> turned = {3, 1, length};
    if (shape_.turns) bindInput("rope_positions", turns_, kInt64, turned.data(), 3);
    bound_ = count;
  }

  const DecoderShape shape_;
  Model model_;
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
  OnnxGraph(const std::string& path, const Signature& signature, const RuntimeOptions& options)
      : model_(path, options) {
    model_.requireAs(signature);
  }

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
  const Signature& signature = signatureOf(component, "");
  return std::make_unique<OnnxDecoder>(graphFile(bundle, component, signature), component, signature, options);
}

std::unique_ptr<GraphEngine> openOnnxGraph(const Bundle& bundle, const Component& component, const std::string& variant,
                                           const RuntimeOptions& options) {
  const Signature& signature = signatureOf(component, variant);
  return std::make_unique<OnnxGraph>(graphFile(bundle, component, signature), signature, options);
}

}  // namespace edgeexport
