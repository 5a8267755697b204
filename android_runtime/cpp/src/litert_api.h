// The part of LiteRT's C API that is used, declared by ourselves after litert/c/*.h of LiteRT 2.3 (Apache-2.0).
#pragma once

#include <cstddef>
#include <cstdint>

#include "library.h"

namespace edgeexport::litert {

struct Environment;
struct ModelHandle;
struct Options;
struct OpaqueOptions;
struct CompiledModel;
struct SignatureHandle;
struct TensorHandle;
struct TensorBuffer;

using Status = int;  // 0 is good

constexpr int kCpu = 1;        // kLiteRtHwAcceleratorCpu
constexpr int kFloat32 = 1;    // kLiteRtElementTypeFloat32
constexpr int kInt32 = 2;      // kLiteRtElementTypeInt32
constexpr int kIntOption = 2;  // kLiteRtAnyTypeInt
constexpr int kAutoRegister = 24;  // kLiteRtEnvOptionTagAutoRegisterAccelerators
constexpr int kLogSeverity = 25;   // kLiteRtEnvOptionTagMinLoggerSeverity
constexpr int kLogErrors = 3;
constexpr std::size_t kMaxRank = 8;

struct TensorType {
  std::int32_t element;
  std::uint32_t rank : 7;
  std::uint32_t hasStrides : 1;
  std::int32_t dimensions[kMaxRank];
  std::uint32_t strides[kMaxRank];
};
static_assert(sizeof(TensorType) == 72, "LiteRtRankedTensorType is 72 bytes");

struct EnvironmentOption {
  std::int32_t tag;
  struct {
    std::int32_t type;
    std::int64_t value;
  } value;
};
static_assert(sizeof(EnvironmentOption) == 24, "LiteRtEnvOption is 24 bytes");

struct Api {
  Status (*createEnvironment)(int count, const EnvironmentOption*, Environment**);
  void (*destroyEnvironment)(Environment*);
  Status (*createModelFromFile)(Environment*, const char* path, ModelHandle**);
  void (*destroyModel)(ModelHandle*);
  Status (*signatureCount)(ModelHandle*, std::size_t*);
  Status (*signature)(ModelHandle*, std::size_t index, SignatureHandle**);
  Status (*signatureKey)(SignatureHandle*, const char**);
  Status (*inputCount)(SignatureHandle*, std::size_t*);
  Status (*inputName)(SignatureHandle*, std::size_t index, const char**);
  Status (*inputTensor)(SignatureHandle*, std::size_t index, TensorHandle**);
  Status (*outputCount)(SignatureHandle*, std::size_t*);
  Status (*outputName)(SignatureHandle*, std::size_t index, const char**);
  Status (*outputTensor)(SignatureHandle*, std::size_t index, TensorHandle**);
  Status (*tensorType)(TensorHandle*, TensorType*);
  Status (*createOptions)(Options**);
  void (*destroyOptions)(Options*);
  Status (*setAccelerators)(Options*, int set);
  Status (*createOpaqueOptions)(const char* kind, void* payload, void (*destroy)(void*), OpaqueOptions**);
  Status (*addOpaqueOptions)(Options*, OpaqueOptions*);  // takes them over
  Status (*createCompiledModel)(Environment*, ModelHandle*, Options*, CompiledModel**);
  void (*destroyCompiledModel)(CompiledModel*);
  Status (*createHostBuffer)(const TensorType*, void* data, std::size_t bytes, void (*destroy)(void*), TensorBuffer**);
  void (*destroyBuffer)(TensorBuffer*);
  Status (*run)(CompiledModel*, std::size_t signature, std::size_t inputCount, TensorBuffer**, std::size_t outputCount,
                TensorBuffer**);

  // Throws runtime-too-old when the library lacks one of these.
  explicit Api(const Library& library) {
    // It has no version to ask for. 2.1 had other parameters under the same names; this came with 2.3.
    Status (*marker)() = nullptr;
    library.find(marker, "LiteRtCompiledModelIsNonCpuFullyAccelerated");
    library.find(createEnvironment, "LiteRtCreateEnvironment");
    library.find(destroyEnvironment, "LiteRtDestroyEnvironment");
    library.find(createModelFromFile, "LiteRtCreateModelFromFile");
    library.find(destroyModel, "LiteRtDestroyModel");
    library.find(signatureCount, "LiteRtGetNumModelSignatures");
    library.find(signature, "LiteRtGetModelSignature");
    library.find(signatureKey, "LiteRtGetSignatureKey");
    library.find(inputCount, "LiteRtGetNumSignatureInputs");
    library.find(inputName, "LiteRtGetSignatureInputName");
    library.find(inputTensor, "LiteRtGetSignatureInputTensorByIndex");
    library.find(outputCount, "LiteRtGetNumSignatureOutputs");
    library.find(outputName, "LiteRtGetSignatureOutputName");
    library.find(outputTensor, "LiteRtGetSignatureOutputTensorByIndex");
    library.find(tensorType, "LiteRtGetRankedTensorType");
    library.find(createOptions, "LiteRtCreateOptions");
    library.find(destroyOptions, "LiteRtDestroyOptions");
    library.find(setAccelerators, "LiteRtSetOptionsHardwareAccelerators");
    library.find(createOpaqueOptions, "LiteRtCreateOpaqueOptions");
    library.find(addOpaqueOptions, "LiteRtAddOpaqueOptions");
    library.find(createCompiledModel, "LiteRtCreateCompiledModel");
    library.find(destroyCompiledModel, "LiteRtDestroyCompiledModel");
    library.find(createHostBuffer, "LiteRtCreateTensorBufferFromHostMemory");
    library.find(destroyBuffer, "LiteRtDestroyTensorBuffer");
    library.find(run, "LiteRtRunCompiledModel");
  }
};

}  // namespace edgeexport::litert
