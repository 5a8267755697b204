// Reads a .safetensors file that anyone may have written. Format: https://github.com/huggingface/safetensors#format
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace edgeexport {

// The file contradicts itself. Callers turn it into an Error of their own code.
class SafetensorsError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Safetensors {
 public:
  struct Tensor {
    std::string dtype;  // as in the file: F32, I64, ...
    std::vector<std::int64_t> shape;
    std::size_t offset = 0;  // into the file's bytes
    std::size_t bytes = 0;
  };

  // Takes the whole file. Every offset is compared with its size. Throws SafetensorsError.
  static Safetensors parse(std::string file);

  const std::map<std::string, Tensor>& tensors() const noexcept { return tensors_; }
  // Values of a tensor, copied out. Each throws SafetensorsError unless the tensor is there and of this type and rank.
  std::vector<std::int64_t> integers(const std::string& name, std::size_t rank) const;
  std::vector<float> floats(const std::string& name, std::size_t rank) const;

 private:
  const Tensor& at(const std::string& name, const std::string& dtype, std::size_t rank) const;

  std::string file_;
  std::map<std::string, Tensor> tensors_;
};

}  // namespace edgeexport
