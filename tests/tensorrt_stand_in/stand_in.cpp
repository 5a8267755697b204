// A stand-in for TensorRT and CUDA where there is no GPU: no engine, no kernel. What it opens as an engine names an
// ONNX graph, which ONNX Runtime computes on the addresses that were bound.
//
// It is stricter than what it stands for. Memory of the "GPU" faults when the host touches it, and is not zero at
// first; nothing happens on a stream before it is waited for; copies go to and from pinned memory alone; a cache is
// updated in one buffer, or from one to another, as its graph wants. STAND_IN_FAULT=WHAT or WHAT:N lets the Nth call of
// a kind fail.
#include <NvInferRuntime.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "edgeexport/json.h"
#include "onnxruntime_api.h"

using edgeexport::Json;
using nvinfer1::DataType;
using nvinfer1::Dims;
namespace ort = edgeexport::onnxruntime;

struct CUstream_st {
  std::vector<std::function<cudaError_t()>> work;
};

namespace {

std::map<const std::uint8_t*, std::size_t> deviceBlocks;
std::map<const std::uint8_t*, std::size_t> pinnedBlocks;

bool within(const std::map<const std::uint8_t*, std::size_t>& blocks, const void* place, std::size_t bytes) {
  const auto* start = static_cast<const std::uint8_t*>(place);
  auto found = blocks.upper_bound(start);
  if (found == blocks.begin()) return false;
  --found;
  return start + bytes <= found->first + found->second;
}

void protect(int how) {
  for (const auto& [start, bytes] : deviceBlocks) ::mprotect(const_cast<std::uint8_t*>(start), bytes, how);
}

// Within, the "GPU" works: its memory can be read and written.
struct Working {
  Working() { protect(PROT_READ | PROT_WRITE); }
  ~Working() { protect(PROT_NONE); }
};

bool fails(const std::string& kind) {
  static std::map<std::string, int> calls;
  const char* wanted = std::getenv("STAND_IN_FAULT");
  const std::string text = wanted == nullptr ? "" : wanted;
  const std::size_t colon = text.find(':');
  const int number = colon == std::string::npos ? 1 : std::atoi(text.c_str() + colon + 1);
  return text.substr(0, colon) == kind && ++calls[kind] == number;
}

}  // namespace

extern "C" {
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return fails("no-device") ? cudaErrorNoDevice : cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const char* wanted = std::getenv("STAND_IN_CAPABILITY");
  const int capability = wanted == nullptr ? 89 : std::atoi(wanted);
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? capability / 10 : capability % 10;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t code) {
  switch (code) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorIllegalAddress: return "an illegal memory access was encountered";
  }
  return "unknown";
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaMalloc(void** made, std::size_t bytes) {
  if (fails("memory")) return cudaErrorMemoryAllocation;
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  const std::size_t whole = (bytes + page - 1) / page * page;
  void* block = ::mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  std::memset(block, 0xFF, whole);  // no number, in any type
  ::mprotect(block, whole, PROT_NONE);
  deviceBlocks[static_cast<std::uint8_t*>(block)] = bytes;
  *made = block;
  return cudaSuccess;
}
cudaError_t cudaFree(void* held) {
  const auto found = deviceBlocks.find(static_cast<std::uint8_t*>(held));
  if (found == deviceBlocks.end()) return cudaErrorInvalidValue;
  ::munmap(held, found->second);
  deviceBlocks.erase(found);
  return cudaSuccess;
}
cudaError_t cudaMallocHost(void** made, std::size_t bytes) {
  if (fails("pinned")) return cudaErrorMemoryAllocation;
  *made = std::malloc(bytes);
  pinnedBlocks[static_cast<std::uint8_t*>(*made)] = bytes;
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* held) {
  if (pinnedBlocks.erase(static_cast<std::uint8_t*>(held)) == 0) return cudaErrorInvalidValue;
  std::free(held);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* device, int byte, std::size_t bytes) {
  if (!within(deviceBlocks, device, bytes)) return cudaErrorInvalidValue;
  const Working working;
  std::memset(device, byte, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* made) {
  *made = new CUstream_st;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const auto work = std::exchange(stream->work, {});
  const Working working;
  for (const auto& each : work) {
    if (const cudaError_t code = each(); code != cudaSuccess) return code;
  }
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  const bool up = kind == cudaMemcpyHostToDevice;
  if (!within(up ? deviceBlocks : pinnedBlocks, to, bytes)) return cudaErrorInvalidValue;
  if (!within(up ? pinnedBlocks : deviceBlocks, from, bytes)) return cudaErrorInvalidValue;
  stream->work.emplace_back([=] {
    std::memcpy(to, from, bytes);
    return cudaSuccess;
  });
  return cudaSuccess;
}
}

namespace {

constexpr std::size_t kHeader = 24;  // as TensorRT-RTX's: "vtrt", and at 16 the length of the whole
constexpr int kHalf = 10;            // ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16

struct Tensor {
  std::string name;
  bool input;
  DataType type;
  Dims shape;  // of the network: -1 where it is free
  Dims most;   // of the profile
  std::vector<std::string> free;  // the name of each size that is free, else empty
};

struct Description {
  std::string graph;
  std::string onnxruntime;
  bool inPlace;
  std::vector<Tensor> tensors;
  std::vector<std::pair<std::string, std::string>> state;
};

DataType typeOf(const std::string& name) {
  return name == "half" ? DataType::kHALF : name == "int64" ? DataType::kINT64 : DataType::kFLOAT;
}

std::size_t widthOf(DataType type) { return type == DataType::kHALF ? 2 : type == DataType::kINT64 ? 8 : 4; }

Dims sizes(const Json& found) {
  Dims made{};
  for (const Json& each : found.array()) made.d[made.nbDims++] = each.isString() ? 0 : each.integer();
  return made;
}

Description described(const std::string& text) {
  const Json found = Json::parse(text);
  Description made{
      found.at("graph").string(), found.at("onnxruntime").string(), found.at("in_place").boolean(), {}, {}};
  for (const Json& each : found.at("tensors").array()) {
    Tensor tensor{each.at("name").string(), each.at("input").boolean(), typeOf(each.at("dtype").string()),
                  sizes(each.at("network")), sizes(each.at("most")), {}};
    for (const Json& size : each.at("graph").array()) tensor.free.push_back(size.isString() ? size.string() : "");
    for (int axis = 0; axis < tensor.shape.nbDims; ++axis) {
      if (tensor.free[static_cast<std::size_t>(axis)].empty()) tensor.most.d[axis] = sizes(each.at("graph")).d[axis];
    }
    made.tensors.push_back(tensor);
  }
  for (const Json& pair : found.at("state").array()) {
    made.state.emplace_back(pair.array()[0].string(), pair.array()[1].string());
  }
  return made;
}

// The graph in ONNX Runtime.
class Graph {
 public:
  explicit Graph(const Description& description) : library_(description.onnxruntime), api_(library_) {
    ort::OrtSessionOptions* options = nullptr;
    ok(api_.createEnv(ort::kLogErrors, "stand-in", &env_));
    ok(api_.createSessionOptions(&options));
    ok(api_.setIntraOpThreads(options, 2));
    ok(api_.createSession(env_, description.graph.c_str(), options, &session_));
    api_.releaseSessionOptions(options);
    ok(api_.createCpuMemoryInfo(ort::kDeviceAllocator, ort::kDefaultMemory, &memory_));
  }
  ~Graph() {
    api_.releaseMemoryInfo(memory_);
    api_.releaseSession(session_);
    api_.releaseEnv(env_);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  bool run(const std::vector<Tensor>& tensors, const std::vector<Dims>& shapes,
           const std::vector<void*>& places) const {
    std::vector<const char*> names[2];
    std::vector<ort::OrtValue*> values[2];
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      std::size_t bytes = widthOf(tensors[i].type);
      for (int axis = 0; axis < shapes[i].nbDims; ++axis) bytes *= static_cast<std::size_t>(shapes[i].d[axis]);
      const int type = tensors[i].type == DataType::kHALF    ? kHalf
                       : tensors[i].type == DataType::kINT64 ? ort::kInt64
                                                             : ort::kFloat;
      ort::OrtValue* made = nullptr;
      ok(api_.createTensor(memory_, places[i], bytes, shapes[i].d, static_cast<std::size_t>(shapes[i].nbDims), type,
                           &made));
      names[tensors[i].input].push_back(tensors[i].name.c_str());
      values[tensors[i].input].push_back(made);
    }
    const bool good = ok(api_.run(session_, nullptr, names[1].data(), values[1].data(), values[1].size(),
                                  names[0].data(), names[0].size(), values[0].data()));
    for (const auto& side : values) {
      for (ort::OrtValue* each : side) api_.releaseValue(each);
    }
    return good;
  }

 private:
  bool ok(ort::OrtStatus* status) const {
    if (status == nullptr) return true;
    std::fprintf(stderr, "the stand-in's graph: %s\n", api_.errorMessage(status));
    api_.releaseStatus(status);
    return false;
  }

  edgeexport::Library library_;
  ort::Api api_;
  ort::OrtEnv* env_ = nullptr;
  ort::OrtSession* session_ = nullptr;
  ort::OrtMemoryInfo* memory_ = nullptr;
};

class Context final : public nvinfer1::IExecutionContext {
 public:
  Context(const Description& description, nvinfer1::ILogger& logger)
      : description_(description), logger_(logger), graph_(description), places_(description.tensors.size()) {
    for (const Tensor& each : description.tensors) shapes_.push_back(each.shape);
  }

  bool setInputShape(const char* name, const Dims& shape) noexcept override {
    const std::size_t i = indexOf(name);
    const Tensor& tensor = description_.tensors[i];
    for (int axis = 0; axis < shape.nbDims; ++axis) {
      const std::string& symbol = tensor.free[static_cast<std::size_t>(axis)];
      const std::int64_t least = symbol.empty() ? tensor.most.d[axis] : 1;
      const bool fits = shape.d[axis] >= least && shape.d[axis] <= tensor.most.d[axis];
      if (!fits) return refuse("IExecutionContext::setInputShape: Error Code 3: API Usage Error");
      if (!symbol.empty()) free_[symbol] = shape.d[axis];
    }
    shapes_[i] = shape;
    return true;
  }

  Dims getTensorShape(const char* name) const noexcept override {
    const std::size_t i = indexOf(name);
    const Tensor& tensor = description_.tensors[i];
    if (tensor.input) return shapes_[i];
    Dims made = tensor.most;
    for (int axis = 0; axis < made.nbDims; ++axis) {
      const std::string& symbol = tensor.free[static_cast<std::size_t>(axis)];
      const auto found = free_.find(symbol);
      if (!symbol.empty()) made.d[axis] = found == free_.end() ? -1 : found->second;
    }
    return made;
  }

  bool setTensorAddress(const char* name, void* data) noexcept override {
    places_[indexOf(name)] = data;
    return true;
  }

  bool enqueueV3(cudaStream_t stream) noexcept override {
    if (fails("enqueue")) return refuse("IExecutionContext::enqueueV3: Error Code 1: Myelin (stand-in)");
    if (fails("enqueue-memory")) return refuse("Error Code 2: OutOfMemory (Requested size was 123 bytes.)");
    std::vector<Dims> shapes;
    for (std::size_t i = 0; i < places_.size(); ++i) {
      const Tensor& tensor = description_.tensors[i];
      shapes.push_back(getTensorShape(tensor.name.c_str()));
      std::size_t bytes = widthOf(tensor.type);
      for (int axis = 0; axis < shapes[i].nbDims; ++axis) bytes *= static_cast<std::size_t>(shapes[i].d[axis]);
      if (!within(deviceBlocks, places_[i], bytes)) return refuse("no memory of this size is bound to " + tensor.name);
    }
    for (const auto& [past, present] : description_.state) {
      const bool same = places_[indexOf(past.c_str())] == places_[indexOf(present.c_str())];
      if (same != description_.inPlace) return refuse("the cache " + past + " is bound as this graph does not take it");
    }
    const bool crashes = fails("kernel");
    stream->work.emplace_back([this, shapes, places = places_, crashes] {
      return !crashes && graph_.run(description_.tensors, shapes, places) ? cudaSuccess : cudaErrorIllegalAddress;
    });
    return true;
  }

 private:
  std::size_t indexOf(const char* name) const {
    const auto wanted = [&](const Tensor& each) { return each.name == name; };
    const auto found = std::find_if(description_.tensors.begin(), description_.tensors.end(), wanted);
    return static_cast<std::size_t>(found - description_.tensors.begin());
  }

  bool refuse(const std::string& why) {
    logger_.log(nvinfer1::ILogger::Severity::kERROR, why.c_str());
    return false;
  }

  const Description& description_;
  nvinfer1::ILogger& logger_;
  Graph graph_;
  std::vector<void*> places_;
  std::vector<Dims> shapes_;
  std::map<std::string, std::int64_t> free_;
};

class Engine final : public nvinfer1::ICudaEngine {
 public:
  Engine(Description description, nvinfer1::ILogger& logger) : description_(std::move(description)), logger_(logger) {}

  nvinfer1::IExecutionContext* createExecutionContext() noexcept override {
    if (!fails("context")) return new Context(description_, logger_);
    logger_.log(nvinfer1::ILogger::Severity::kERROR, "Error Code 1: Cuda Runtime (out of memory)");
    return nullptr;
  }
  std::int32_t getNbIOTensors() const noexcept override {
    return static_cast<std::int32_t>(description_.tensors.size());
  }
  const char* getIOTensorName(std::int32_t index) const noexcept override {
    return description_.tensors[static_cast<std::size_t>(index)].name.c_str();
  }
  Dims getTensorShape(const char* name) const noexcept override { return at(name).shape; }
  DataType getTensorDataType(const char* name) const noexcept override { return at(name).type; }
  nvinfer1::TensorIOMode getTensorIOMode(const char* name) const noexcept override {
    return at(name).input ? nvinfer1::TensorIOMode::kINPUT : nvinfer1::TensorIOMode::kOUTPUT;
  }
  nvinfer1::TensorLocation getTensorLocation(const char*) const noexcept override {
    return nvinfer1::TensorLocation::kDEVICE;
  }
  Dims getProfileShape(const char* name, std::int32_t, nvinfer1::OptProfileSelector) const noexcept override {
    return at(name).most;
  }

 private:
  const Tensor& at(const std::string& name) const {
    return *std::find_if(description_.tensors.begin(), description_.tensors.end(),
                         [&](const Tensor& each) { return each.name == name; });
  }

  Description description_;
  nvinfer1::ILogger& logger_;
};

class Runtime final : public nvinfer1::IRuntime {
 public:
  explicit Runtime(nvinfer1::ILogger& logger) : logger_(logger) {}

  nvinfer1::ICudaEngine* deserializeCudaEngine(const void* blob, std::size_t size) noexcept override {
    std::uint64_t told = 0;
    if (size >= kHeader) std::memcpy(&told, static_cast<const char*>(blob) + 16, sizeof(told));
    if (told == size) {
      return new Engine(described({static_cast<const char*>(blob) + kHeader, size - kHeader}), logger_);
    }
    logger_.log(nvinfer1::ILogger::Severity::kWARNING, "a warning is no reason");
    logger_.log(nvinfer1::ILogger::Severity::kERROR, "Error Code 1: Serialization (magicTag)");
    return nullptr;
  }

 private:
  nvinfer1::ILogger& logger_;
};

}  // namespace

nvinfer1::IRuntime* nvinfer1::createInferRuntime(ILogger& logger) noexcept {
  if (!fails("runtime")) return new Runtime(logger);
  logger.log(ILogger::Severity::kERROR, "Error Code 6: API Usage Error (CUDA initialization failure with error: 35)");
  return nullptr;
}
