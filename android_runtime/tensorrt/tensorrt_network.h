// One open engine on the GPU, with memory for all that goes in and out of it.
#pragma once

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <vector>

#include "edgeexport/bundle.h"

namespace edgeexport::tensorrt {

constexpr const char* kRuntime = "TensorRT";

struct FreeDevice {
  void operator()(void* held) const { ::cudaFree(held); }
};
struct FreePinned {
  void operator()(void* held) const { ::cudaFreeHost(held); }
};
struct EndStream {
  void operator()(cudaStream_t held) const {
    ::cudaStreamSynchronize(held);  // a call that failed may have left work behind
    ::cudaStreamDestroy(held);
  }
};
using DeviceMemory = std::unique_ptr<void, FreeDevice>;
using PinnedMemory = std::unique_ptr<void, FreePinned>;
using Stream = std::unique_ptr<std::remove_pointer_t<cudaStream_t>, EndStream>;

// Of the GPU in use, times ten: 75, 89, 120. Throws no-gpu, runtime-failed.
int computeCapability();

// Memory of zeros on the GPU. Throws out-of-memory, runtime-failed.
DeviceMemory onDevice(std::size_t bytes);

// The errors that TensorRT reports, from whatever thread, as far as there is room for them: it allocates nothing.
class Log final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override;
  // What was said since it was last asked.
  std::string take();

 private:
  std::mutex mutex_;
  std::array<char, 400> text_{};
  std::size_t used_ = 0;
};

// An input or output. A cache has no memory here: its owner binds it.
struct Value {
  std::string name;
  nvinfer1::DataType type{};
  nvinfer1::Dims most{};  // the largest shape it may have
  bool free = false;      // whether it may have others
  PinnedMemory host;
  DeviceMemory device;

  std::size_t count() const;  // of elements, at most
  std::size_t bytes() const;
  template <typename Element>
  Element* data() const {
    return static_cast<Element*>(host.get());
  }
};

class Network {
 public:
  // Opens the engine at `path`, and checks that it takes and gives what `signature` says; `caches` are the names that
  // are bound by their owner. Throws no-gpu, runtime-too-old, artifact-does-not-open, out-of-memory.
  Network(const std::string& path, const Signature& signature, const std::vector<std::string>& caches);
  Network(const Network&) = delete;
  Network& operator=(const Network&) = delete;

  // Null where there is none.
  const Value* find(const std::string& name) const;
  // Throws artifact-does-not-open where there is none of this type and rank.
  const Value& at(const std::string& name, nvinfer1::DataType type, int rank) const;
  [[noreturn]] void refuse(const std::string& problem) const;

  // Each of these throws out-of-memory, runtime-failed.
  void bind(const std::string& name, void* device);               // where a cache is
  void reshape(const Value& value, const nvinfer1::Dims& shape);  // the shape of an input of the next runs
  void send(const Value& value, std::size_t bytes);               // from host memory to the GPU's
  void run();
  void fetch(const Value& value, std::size_t bytes);  // from the GPU's memory to the host's
  void wait();                                        // until all of it is done

 private:
  Value checked(const TensorSpec& spec, bool input, bool cache) const;
  void prepare(const std::vector<std::string>& caches);
  [[noreturn]] void failed();

  std::string path_;
  Log log_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  std::vector<Value> inputs_;
  std::vector<Value> outputs_;
  Stream stream_;
};

}  // namespace edgeexport::tensorrt
