// The part of ONNX Runtime's C API that is used, declared by ourselves: OrtApi is a table of function pointers to which
// new versions only append. Positions as in onnxruntime_c_api.h of 1.24 and later (checked against ORT_API_VERSION 29).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "library.h"

namespace edgeexport::onnxruntime {

struct OrtEnv;
struct OrtSession;
struct OrtSessionOptions;
struct OrtStatus;
struct OrtMemoryInfo;
struct OrtValue;
struct OrtIoBinding;
struct OrtTypeInfo;
struct OrtTensorTypeAndShapeInfo;
struct OrtAllocator;
struct OrtRunOptions;

constexpr int kLogErrors = 3;        // ORT_LOGGING_LEVEL_ERROR
constexpr int kFloat = 1;            // ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
constexpr int kInt64 = 7;            // ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64
constexpr int kDeviceAllocator = 0;  // OrtDeviceAllocator
constexpr int kDefaultMemory = 0;    // OrtMemTypeDefault

// The oldest API that has all that is declared here, and the version of the operators that bundles use.
constexpr std::uint32_t kApiVersion = 24;

struct Api {
  const char* (*errorMessage)(const OrtStatus*);
  OrtStatus* (*createEnv)(int level, const char* name, OrtEnv**);
  OrtStatus* (*createSession)(const OrtEnv*, const char* path, const OrtSessionOptions*, OrtSession**);
  OrtStatus* (*run)(OrtSession*, const OrtRunOptions*, const char* const* inputNames, const OrtValue* const* inputs,
                    std::size_t inputCount, const char* const* outputNames, std::size_t outputCount,
                    OrtValue** outputs);
  OrtStatus* (*createSessionOptions)(OrtSessionOptions**);
  OrtStatus* (*setLogSeverity)(OrtSessionOptions*, int level);
  OrtStatus* (*setIntraOpThreads)(OrtSessionOptions*, int threads);
  OrtStatus* (*addConfig)(OrtSessionOptions*, const char* key, const char* value);
  OrtStatus* (*inputCount)(const OrtSession*, std::size_t*);
  OrtStatus* (*inputTypeInfo)(const OrtSession*, std::size_t index, OrtTypeInfo**);
  OrtStatus* (*outputTypeInfo)(const OrtSession*, std::size_t index, OrtTypeInfo**);
  OrtStatus* (*inputName)(const OrtSession*, std::size_t index, OrtAllocator*, char**);
  OrtStatus* (*outputName)(const OrtSession*, std::size_t index, OrtAllocator*, char**);
  OrtStatus* (*outputCount)(const OrtSession*, std::size_t*);
  OrtStatus* (*createTensor)(const OrtMemoryInfo*, void* data, std::size_t bytes, const std::int64_t* shape,
                             std::size_t rank, int elementType, OrtValue**);
  OrtStatus* (*tensorInfo)(const OrtTypeInfo*, const OrtTensorTypeAndShapeInfo**);
  OrtStatus* (*elementType)(const OrtTensorTypeAndShapeInfo*, int*);
  OrtStatus* (*dimensionCount)(const OrtTensorTypeAndShapeInfo*, std::size_t*);
  OrtStatus* (*dimensions)(const OrtTensorTypeAndShapeInfo*, std::int64_t*, std::size_t);
  OrtStatus* (*createCpuMemoryInfo)(int allocator, int memory, OrtMemoryInfo**);
  OrtStatus* (*allocatorFree)(OrtAllocator*, void*);
  OrtStatus* (*defaultAllocator)(OrtAllocator**);
  void (*releaseEnv)(OrtEnv*);
  void (*releaseStatus)(OrtStatus*);
  void (*releaseMemoryInfo)(OrtMemoryInfo*);
  void (*releaseSession)(OrtSession*);
  void (*releaseValue)(OrtValue*);
  void (*releaseTypeInfo)(OrtTypeInfo*);
  void (*releaseSessionOptions)(OrtSessionOptions*);
  OrtStatus* (*runWithBinding)(OrtSession*, const OrtRunOptions*, const OrtIoBinding*);
  OrtStatus* (*createIoBinding)(OrtSession*, OrtIoBinding**);
  void (*releaseIoBinding)(OrtIoBinding*);
  OrtStatus* (*bindInput)(OrtIoBinding*, const char* name, const OrtValue*);
  OrtStatus* (*bindOutput)(OrtIoBinding*, const char* name, const OrtValue*);

  // Throws runtime-too-old when the library does not speak kApiVersion.
  explicit Api(const Library& library) {
    struct Base {
      const void* const* (*api)(std::uint32_t version);
      const char* (*version)();
    };
    const Base* (*base)() = nullptr;
    library.find(base, "OrtGetApiBase");
    const Base* found = base();
    table_ = found->api(kApiVersion);
    if (table_ == nullptr) {
      throw errors::runtimeTooOld(library.name(), std::string("it is ONNX Runtime ") + found->version() +
                                                      ", which has no API version " + std::to_string(kApiVersion));
    }
    take(errorMessage, 2);
    take(createEnv, 3);
    take(createSession, 7);
    take(run, 9);
    take(createSessionOptions, 10);
    take(setLogSeverity, 22);
    take(setIntraOpThreads, 24);
    take(inputCount, 30);
    take(outputCount, 31);
    take(inputTypeInfo, 33);
    take(outputTypeInfo, 34);
    take(inputName, 36);
    take(outputName, 37);
    take(createTensor, 49);
    take(tensorInfo, 55);
    take(elementType, 60);
    take(dimensionCount, 61);
    take(dimensions, 62);
    take(createCpuMemoryInfo, 69);
    take(allocatorFree, 76);
    take(defaultAllocator, 78);
    take(releaseEnv, 92);
    take(releaseStatus, 93);
    take(releaseMemoryInfo, 94);
    take(releaseSession, 95);
    take(releaseValue, 96);
    take(releaseTypeInfo, 98);
    take(releaseSessionOptions, 100);
    take(addConfig, 130);
    take(runWithBinding, 133);
    take(createIoBinding, 134);
    take(releaseIoBinding, 135);
    take(bindInput, 136);
    take(bindOutput, 137);
  }

 private:
  template <typename Function>
  void take(Function*& function, std::size_t position) {
    std::memcpy(&function, &table_[position], sizeof(function));
  }

  const void* const* table_ = nullptr;
};

}  // namespace edgeexport::onnxruntime
