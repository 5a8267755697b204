// Opens an engine, checks its interface against the manifest's, and turns what CUDA and TensorRT report into errors.
#include "tensorrt_network.h"

#include <algorithm>
#include <cstring>
#include <string_view>

#include "errors.h"
#include "mapped_file.h"
#include "named.h"

namespace edgeexport::tensorrt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;

constexpr const char* kCuda = "CUDA";

void check(cudaError_t code) {
  if (code == cudaSuccess) return;
  ::cudaGetLastError();  // so that TensorRT does not find it, too
  const std::string said = ::cudaGetErrorString(code);
  if (code == cudaErrorMemoryAllocation) throw errors::outOfMemory("on the GPU: " + said);
  throw errors::runtimeFailed(kCuda, said);
}

void requireGpu() {
  int count = 0;
  const cudaError_t code = ::cudaGetDeviceCount(&count);
  if (code != cudaSuccess) throw errors::noGpu(std::string("CUDA says: ") + ::cudaGetErrorString(code));
  if (count == 0) throw errors::noGpu("CUDA finds no device");
}

bool tellsOfMemory(const std::string& said) {
  return said.find("OutOfMemory") != std::string::npos || said.find("out of memory") != std::string::npos;
}

bool known(const Dims& shape) {
  return shape.nbDims >= 0 && std::all_of(shape.d, shape.d + shape.nbDims, [](auto size) { return size >= 0; });
}

}  // namespace

int computeCapability() {
  requireGpu();
  int device = 0;
  int major = 0;
  int minor = 0;
  check(::cudaGetDevice(&device));
  check(::cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check(::cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return 10 * major + minor;
}

DeviceMemory onDevice(std::size_t bytes) {
  void* made = nullptr;
  check(::cudaMalloc(&made, bytes));
  DeviceMemory held(made);
  check(::cudaMemset(made, 0, bytes));
  return held;
}

void Log::log(Severity severity, const char* message) noexcept {
  if (severity > Severity::kERROR) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::string_view between = used_ > 0 ? "; " : "";
  for (const std::string_view part : {between, std::string_view(message)}) {
    const std::size_t fits = std::min(part.size(), text_.size() - used_);
    std::memcpy(text_.data() + used_, part.data(), fits);
    used_ += fits;
  }
}

std::string Log::take() {
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::string said(text_.data(), used_);
  used_ = 0;
  return said.empty() ? "it gives no reason" : said;
}

std::size_t Value::count() const {
  std::size_t total = 1;
  for (int axis = 0; axis < most.nbDims; ++axis) total *= static_cast<std::size_t>(most.d[axis]);
  return total;
}

std::size_t Value::bytes() const {
  const std::size_t width = type == DataType::kINT64 ? 8 : type == DataType::kFLOAT ? 4 : 2;
  return count() * width;
}

Network::Network(const std::string& path, const Signature& signature, const std::vector<std::string>& caches)
    : path_(path) {
  requireGpu();
  runtime_.reset(nvinfer1::createInferRuntime(log_));
  if (!runtime_) throw errors::runtimeTooOld(kRuntime, log_.take());
  const MappedFile file(path);
  if (!file) refuse("it cannot be read");
  engine_.reset(runtime_->deserializeCudaEngine(file.data(), file.size()));
  if (engine_) context_.reset(engine_->createExecutionContext());
  if (!context_) {
    const std::string said = log_.take();
    if (tellsOfMemory(said)) throw errors::outOfMemory("on the GPU to open " + path + ": " + said);
    refuse(said);
  }
  const auto read = [&](const std::vector<TensorSpec>& specs, bool input, std::vector<Value>& values) {
    for (const TensorSpec& spec : specs) {
      const bool cache = std::find(caches.begin(), caches.end(), spec.name) != caches.end();
      values.push_back(checked(spec, input, cache));
    }
  };
  read(signature.inputs, true, inputs_);
  read(signature.outputs, false, outputs_);
  if (static_cast<std::size_t>(engine_->getNbIOTensors()) != inputs_.size() + outputs_.size()) {
    refuse("it has inputs or outputs that the manifest does not name");
  }
  cudaStream_t stream = nullptr;
  check(::cudaStreamCreate(&stream));
  stream_.reset(stream);
  prepare(caches);
}

// A value of the engine's that is the one promised. A cache may be float16, which no caller sees.
Value Network::checked(const TensorSpec& spec, bool input, bool cache) const {
  bool found = false;
  for (int i = 0; i < engine_->getNbIOTensors(); ++i) found = found || spec.name == engine_->getIOTensorName(i);
  const char* name = spec.name.c_str();
  const auto mode = input ? nvinfer1::TensorIOMode::kINPUT : nvinfer1::TensorIOMode::kOUTPUT;
  if (!found || engine_->getTensorIOMode(name) != mode) {
    refuse("it has no " + std::string(input ? "input " : "output ") + spec.name);
  }
  Value made;
  made.name = spec.name;
  made.type = engine_->getTensorDataType(name);
  made.most = engine_->getTensorShape(name);
  const auto fits = [](const Dim& wanted, auto size) {
    return wanted.min < wanted.max || size == wanted.max || size == -1;  // -1: it is known when it runs
  };
  bool good = static_cast<std::size_t>(made.most.nbDims) == spec.shape.size() &&
              std::equal(spec.shape.begin(), spec.shape.end(), made.most.d, fits);
  if (cache) {
    good = good && (made.type == DataType::kHALF || made.type == DataType::kFLOAT) && known(made.most);
  } else {
    good = good && made.type == (spec.dtype == "int64" ? DataType::kINT64 : DataType::kFLOAT);
  }
  if (!good || engine_->getTensorLocation(name) != nvinfer1::TensorLocation::kDEVICE) {
    refuse("its " + spec.name + " is not of the manifest's type and shape");
  }
  made.free = !known(made.most);
  return made;
}

// Memory for the largest shapes of all values, bound once.
void Network::prepare(const std::vector<std::string>& caches) {
  const auto allocate = [&](Value& value) {
    if (!known(value.most) || value.count() == 0) refuse("the size of " + value.name + " is not known before it runs");
    if (std::find(caches.begin(), caches.end(), value.name) != caches.end()) return;
    void* host = nullptr;
    check(::cudaMallocHost(&host, value.bytes()));
    value.host.reset(host);
    value.device = onDevice(value.bytes());
    bind(value.name, value.device.get());
  };
  for (Value& value : inputs_) {
    if (value.free) value.most = engine_->getProfileShape(value.name.c_str(), 0, nvinfer1::OptProfileSelector::kMAX);
    allocate(value);
    reshape(value, value.most);
  }
  for (Value& value : outputs_) {
    value.most = context_->getTensorShape(value.name.c_str());
    allocate(value);
  }
}

const Value* Network::find(const std::string& name) const {
  const Value* input = named(inputs_, name);
  return input != nullptr ? input : named(outputs_, name);
}

const Value& Network::at(const std::string& name, DataType type, int rank) const {
  const Value* found = find(name);
  if (found == nullptr || found->type != type || found->most.nbDims != rank) {
    refuse("it has no " + name + " of the type that the loader feeds");
  }
  return *found;
}

void Network::refuse(const std::string& problem) const { throw errors::artifactDoesNotOpen(path_, kRuntime, problem); }

void Network::failed() {
  const std::string said = log_.take();
  if (tellsOfMemory(said)) throw errors::outOfMemory("on the GPU: " + said);
  throw errors::runtimeFailed(kRuntime, said);
}

void Network::bind(const std::string& name, void* device) {
  if (!context_->setTensorAddress(name.c_str(), device)) failed();
}

void Network::reshape(const Value& value, const Dims& shape) {
  if (value.free && !context_->setInputShape(value.name.c_str(), shape)) failed();
}

void Network::send(const Value& value, std::size_t bytes) {
  check(::cudaMemcpyAsync(value.device.get(), value.host.get(), bytes, cudaMemcpyHostToDevice, stream_.get()));
}

void Network::run() {
  if (!context_->enqueueV3(stream_.get())) failed();
}

void Network::fetch(const Value& value, std::size_t bytes) {
  check(::cudaMemcpyAsync(value.host.get(), value.device.get(), bytes, cudaMemcpyDeviceToHost, stream_.get()));
}

void Network::wait() { check(::cudaStreamSynchronize(stream_.get())); }

}  // namespace edgeexport::tensorrt
