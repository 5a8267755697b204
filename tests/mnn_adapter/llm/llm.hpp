// What android_runtime/mnn uses of MNN 3.6's C++ interface, declared in our own words for the tests: no header of MNN's
// comes with its Python package. Members are in the order of MNN's own, as far as calls depend on it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

enum MNNForwardType { MNN_FORWARD_CPU = 0 };

struct halide_type_t {
  std::int32_t code;  // 0 int, 2 float
  std::uint8_t bits;
  std::uint16_t lanes;
};
template <typename Type>
inline halide_type_t halide_type_of();
template <>
inline halide_type_t halide_type_of<float>() {
  return {2, 32, 1};
}
template <>
inline halide_type_t halide_type_of<int>() {
  return {0, 32, 1};
}

namespace MNN {

struct BackendConfig {
  int memory = 0, power = 0, precision = 0;
  void* sharedContext = nullptr;
};

struct ScheduleConfig {
  std::vector<std::string> saveTensors;
  MNNForwardType type = MNN_FORWARD_CPU;
  int numThread = 4;
  struct Path {
    std::vector<std::string> inputs, outputs;
    int mode = 0;
  };
  Path path;
  MNNForwardType backupType = MNN_FORWARD_CPU;
  BackendConfig* backendConfig = nullptr;
};

namespace Express {

enum Dimensionformat { NHWC, NC4HW4, NCHW };

class Variable {
 public:
  struct Info {
    Dimensionformat order;
    std::vector<int> dim;
    halide_type_t type;
    int size;
  };
  const Info* getInfo();
  template <typename Type>
  const Type* readMap() {
    return static_cast<const Type*>(readInternal());
  }

 private:
  void* readInternal(bool forShape = false);
};

class VARP {
 public:
  VARP() = default;
  ~VARP() {}
  VARP(const VARP&) = default;
  VARP& operator=(const VARP&) = default;
  Variable* operator->() const { return mContent.get(); }
  Variable* get() const { return mContent.get(); }

 private:
  std::shared_ptr<Variable> mContent;
};
using VARPS = std::vector<VARP>;

VARP _Const(const void* data, std::vector<int> shape, Dimensionformat format, halide_type_t type);
VARP _Convert(VARP input, Dimensionformat format);

class Executor {
 public:
  class RuntimeManager {
   public:
    ~RuntimeManager();
    static RuntimeManager* createRuntimeManager(const ScheduleConfig& config);
    void setExternalFile(std::string file);
  };
};

class Module {
 public:
  struct Config;
  virtual ~Module() = default;
  virtual std::vector<VARP> onForward(const std::vector<VARP>& inputs) = 0;
  static Module* load(const std::vector<std::string>& inputs, const std::vector<std::string>& outputs,
                      const char* file, const std::shared_ptr<Executor::RuntimeManager> manager,
                      const Config* config = nullptr);
  struct Info {
    std::vector<Variable::Info> inputs;
    Dimensionformat defaultFormat;
    std::shared_ptr<Executor::RuntimeManager> runTimeManager;
    std::vector<std::string> inputNames, outputNames;
  };
  const Info* getInfo() const;
};

}  // namespace Express

namespace Transformer {

class Llm {
 public:
  static Llm* createLLM(const std::string& config);
  static void destroy(Llm* llm);
  virtual ~Llm();
  virtual bool load();
  virtual Express::VARP gen_attention_mask(int count);
  virtual Express::VARP gen_position_ids(int count);
  virtual Express::VARP embedding(const std::vector<int>& ids);
  virtual int sample(Express::VARP logits, int offset = 0, int size = 0);
  virtual std::vector<Express::VARP> forwardRaw(Express::VARP embeddings, Express::VARP mask, Express::VARP positions,
                                                Express::VARPS more = {});
  void setKVCacheInfo(std::size_t add, std::size_t remove, int* reserve = nullptr, int reserved = 0);
  virtual void response(const std::vector<int>& ids, std::ostream* out, const char* end, int most);
  virtual void generate_init(std::ostream* out, const char* end);
  bool set_config(const std::string& content);
};

}  // namespace Transformer
}  // namespace MNN
