// Runs a bundle's decoder and its encoders in TensorRT: caches stay on the GPU, all else goes through pinned memory.
#include "tensorrt_engine.h"

#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <initializer_list>
#include <stdexcept>

#include "edgeexport/json.h"
#include "errors.h"
#include "interface.h"
#include "named.h"
#include "stopwatch.h"
#include "tensorrt_network.h"

namespace edgeexport {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using tensorrt::DeviceMemory;
using tensorrt::kRuntime;
using tensorrt::Network;
using tensorrt::Value;

constexpr const char* kStep = "step";  // the signature of a component that has no variants
constexpr const char* kBuiltOnDevice = "tensorrt-kit";
constexpr const char* kTokens = "T";  // what every family calls the number of a call's tokens
constexpr std::size_t kMaxPlan = 1 << 20;

const Signature& signatureOf(const Component& component, const std::string& variant) {
  const Signature* found = component.signature(variant.empty() ? kStep : variant);
  if (found == nullptr) throw errors::bundleNoVariant(component.name, variant);
  return *found;
}

std::string withoutEnding(const std::string& file, const std::string& ending) {
  if (file.size() < ending.size()) return file;
  const std::size_t stem = file.size() - ending.size();
  return file.compare(stem, ending.size(), ending) == 0 ? file.substr(0, stem) : file;
}

// TensorRT-RTX's engines say how long they are. Throws artifact-does-not-open.
void checkLength(const std::string& path) {
  std::array<unsigned char, 24> head{};  // the length lies at 16
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  const auto size = static_cast<std::uint64_t>(file.tellg());
  file.seekg(0).read(reinterpret_cast<char*>(head.data()), head.size());
  std::uint64_t told = 0;
  for (std::size_t i = head.size(); i > 16; --i) told = told << 8 | head[i - 1];
  const bool begins = file.good() && std::equal(head.begin(), head.begin() + 4, "vtrt");
  if (!begins) throw errors::artifactDoesNotOpen(path, kRuntime, "it does not begin with vtrt");
  if (told == size) return;
  throw errors::artifactDoesNotOpen(
      path, kRuntime, "it has " + std::to_string(size) + " bytes, and says that it has " + std::to_string(told));
}

// The engine of a signature: out of the bundle, or built on this very device.
std::string engineFile(const Bundle& bundle, const Component& component, const std::string& file,
                       const RuntimeOptions& options) {
  if (component.backend != kBuiltOnDevice) {
    // The one file for compute capability 7.5 has its own name; it is there where the others cannot run on such a GPU.
    const std::string apart = withoutEnding(file, ".engine") + ".sm75.engine";
    const bool has = std::count(component.files.begin(), component.files.end(), apart) > 0;
    const std::string path = bundle.path(has && tensorrt::computeCapability() == 75 ? apart : file);
    checkLength(path);
    return path;
  }
  const std::string folder = options.engines.empty() ? bundle.folder() + "/../engines" : options.engines;
  const std::string path = folder + "/" + withoutEnding(file, ".onnx") + ".engine";
  struct stat found {};
  if (::stat(path.c_str(), &found) != 0) throw errors::engineToBuild(component.name, path);
  return path;
}

// Whether a cache is updated in one buffer, or from one to another.
bool updatesInPlace(const Bundle& bundle, const Component& component) {
  const std::string file = component.name + ".build_plan.json";
  try {
    return Json::parse(bundle.read(file, kMaxPlan)).at("graphs").array().at(0).at("in_place").boolean();
  } catch (const JsonError& problem) {
    throw errors::artifactDoesNotOpen(file, kRuntime, problem.what());
  } catch (const std::out_of_range&) {
    throw errors::artifactDoesNotOpen(file, kRuntime, "it has no graph");
  }
}

std::vector<std::string> cachesOf(const Component& component) {
  std::vector<std::string> names;
  for (const auto& [past, present] : component.state) names.insert(names.end(), {past, present});
  return names;
}

Dims dims(std::initializer_list<std::size_t> sizes) {
  Dims made{};
  for (const std::size_t size : sizes) made.d[made.nbDims++] = static_cast<std::int64_t>(size);
  return made;
}

std::size_t sizeOf(const Value& value, int axis) { return static_cast<std::size_t>(value.most.d[axis]); }

class TensorRtDecoder final : public DecoderEngine {
 public:
  TensorRtDecoder(const std::string& path, const Component& component, bool inPlace)
      : shape_(decoderShape(component, signatureOf(component, ""), kTensorRtForm, 0)),
        network_(path, signatureOf(component, ""), cachesOf(component)),
        logits_(network_.at("logits", DataType::kFLOAT, 3)),
        position_(network_.at("position", DataType::kINT64, 1)),
        fed_(embedded() ? network_.at("inputs_embeds", DataType::kFLOAT, 3)
                        : network_.at("input_ids", DataType::kINT64, 2)),
        turns_(network_.find("rope_positions")) {
    longest_ = sizeOf(fed_, 1);
    if (turns_ != nullptr) longest_ = std::min(longest_, sizeOf(network_.at("rope_positions", DataType::kINT64, 3), 2));
    if (logits_.count() != sizeOf(logits_, 2)) network_.refuse("it gives logits of more than the last token");
    if (sizeOf(logits_, 2) != shape_.vocab) network_.refuse("it gives other logits than the manifest says");
    if (embedded() && sizeOf(fed_, 2) != shape_.width) network_.refuse("it takes other embeddings than the manifest says");
    if (position_.count() != 1) network_.refuse("it takes more than one position");
    for (const auto& [past, present] : component.state) {
      const Value& from = *network_.find(past);
      const Value& to = *network_.find(present);
      if (from.bytes() != to.bytes()) network_.refuse("its cache " + past + " is not of one dtype");
      caches_.push_back({past, present, tensorrt::onDevice(from.bytes()), nullptr});
      if (!inPlace) caches_.back().other = tensorrt::onDevice(from.bytes());
    }
    bindCaches();
  }

  std::size_t context() const noexcept override { return shape_.context; }
  std::size_t vocab() const noexcept override { return sizeOf(logits_, 2); }
  std::size_t width() const noexcept override { return shape_.width; }
  bool turns() const noexcept override { return shape_.turns; }
  double runtimeSeconds() const noexcept override { return seconds_; }

  // In pieces of what the engine takes at most.
  const float* step(const Piece& piece, std::size_t position) override {
    for (std::size_t start = 0; start < piece.count; start += longest_) {
      run(piece, start, std::min(longest_, piece.count - start), position + start);
    }
    return logits_.data<float>();
  }

 private:
  // A key or a value of one layer: of two buffers, `held` is the one to be read.
  struct Cache {
    std::string past;
    std::string present;
    DeviceMemory held;
    DeviceMemory other;
  };

  bool embedded() const { return shape_.width > 0; }

  void bindCaches() {
    for (const Cache& each : caches_) {
      network_.bind(each.past, each.held.get());
      network_.bind(each.present, each.other ? each.other.get() : each.held.get());
    }
  }

  // Pieces of the same length in a row need it once.
  void reshape(std::size_t count) {
    if (count == shaped_) return;
    shaped_ = 0;
    network_.reshape(fed_, embedded() ? dims({1, count, width()}) : dims({1, count}));
    if (turns_ != nullptr) network_.reshape(*turns_, dims({3, 1, count}));
    shaped_ = count;
  }

  void run(const Piece& piece, std::size_t start, std::size_t count, std::size_t position) {
    reshape(count);
    if (embedded()) {
      std::copy_n(piece.embeddings + start * width(), count * width(), fed_.data<float>());
    } else {
      std::copy_n(piece.tokens + start, count, fed_.data<std::int64_t>());
    }
    for (std::size_t row = 0; turns_ != nullptr && row < 3; ++row) {
      std::copy_n(piece.rope + row * piece.ropeStride + start, count, turns_->data<std::int64_t>() + row * count);
    }
    *position_.data<std::int64_t>() = static_cast<std::int64_t>(position);
    const Stopwatch watch(seconds_);
    network_.send(fed_, count * (embedded() ? width() * sizeof(float) : sizeof(std::int64_t)));
    network_.send(position_, sizeof(std::int64_t));
    if (turns_ != nullptr) network_.send(*turns_, 3 * count * sizeof(std::int64_t));
    network_.run();
    network_.fetch(logits_, logits_.bytes());
    network_.wait();
    if (!caches_.front().other) return;
    for (Cache& each : caches_) each.held.swap(each.other);
    bindCaches();
  }

  const DecoderShape shape_;
  std::vector<Cache> caches_;  // above the network, whose work ends before they are freed
  Network network_;
  const Value& logits_;
  const Value& position_;
  const Value& fed_;
  const Value* turns_;  // null where the model counts positions itself
  std::size_t longest_ = 0;
  std::size_t shaped_ = 0;
  double seconds_ = 0;
};

// A component without state. Inputs and output that have tokens are cut where the engine takes fewer.
class TensorRtGraph final : public GraphEngine {
 public:
  TensorRtGraph(const std::string& path, const Signature& signature)
      : signature_(signature), network_(path, signature, {}) {}

  void run(const std::vector<TensorView>& inputs, const TensorView& output) override {
    const Value& made = value(output);
    const std::size_t total = tokens(output.name) ? static_cast<std::size_t>(output.shape[1]) : 1;
    const std::size_t most = tokens(output.name) ? sizeOf(made, 1) : 1;
    const std::size_t row = output.count() / total;
    if (row != made.count() / most) network_.refuse("its " + output.name + " has another shape");
    for (std::size_t start = 0; start < total; start += most) {
      const std::size_t rows = std::min(most, total - start);
      for (const TensorView& input : inputs) give(input, start, rows);
      network_.run();
      network_.fetch(made, rows * row * sizeof(float));
      network_.wait();
      std::copy_n(made.data<float>(), rows * row, static_cast<float*>(output.data) + start * row);
    }
  }

 private:
  const Value& value(const TensorView& view) const {
    const auto type = view.type == TensorView::Type::kFloat32 ? DataType::kFLOAT : DataType::kINT64;
    return network_.at(view.name, type, static_cast<int>(view.shape.size()));
  }

  // Whether the second axis of a value counts tokens.
  bool tokens(const std::string& name) const {
    const TensorSpec* input = named(signature_.inputs, name);
    const TensorSpec& spec = input != nullptr ? *input : *named(signature_.outputs, name);
    return spec.shape.size() > 1 && spec.shape[1].name == kTokens;
  }

  void give(const TensorView& view, std::size_t start, std::size_t rows) {
    const Value& into = value(view);
    Dims shape{};
    for (const std::int64_t size : view.shape) shape.d[shape.nbDims++] = size;
    std::size_t from = 0;
    std::size_t all = view.count();
    if (tokens(view.name)) {
      const std::size_t row = all / static_cast<std::size_t>(view.shape[1]);
      from = start * row;
      all = rows * row;
      shape.d[1] = static_cast<std::int64_t>(rows);
    }
    if (!into.free && all != into.count()) network_.refuse("its " + view.name + " has another shape");
    if (all > into.count()) throw errors::tooManyFeatures(static_cast<std::size_t>(view.shape[1]), sizeOf(into, 1));
    network_.reshape(into, shape);
    const std::size_t width = view.type == TensorView::Type::kFloat32 ? sizeof(float) : sizeof(std::int64_t);
    const auto* bytes = static_cast<const std::uint8_t*>(view.data);
    std::copy_n(bytes + from * width, all * width, into.data<std::uint8_t>());
    network_.send(into, all * width);
  }

  const Signature signature_;
  Network network_;
};

}  // namespace

std::unique_ptr<DecoderEngine> openTensorRtDecoder(const Bundle& bundle, const Component& component,
                                                   const RuntimeOptions& options) {
  const std::string path = engineFile(bundle, component, signatureOf(component, "").file, options);
  return std::make_unique<TensorRtDecoder>(path, component, updatesInPlace(bundle, component));
}

std::unique_ptr<GraphEngine> openTensorRtGraph(const Bundle& bundle, const Component& component,
                                               const std::string& variant, const RuntimeOptions& options) {
  const Signature& signature = signatureOf(component, variant);
  return std::make_unique<TensorRtGraph>(engineFile(bundle, component, signature.file, options), signature);
}

}  // namespace edgeexport
