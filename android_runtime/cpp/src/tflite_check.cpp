// Walks Model.buffers of a .tflite flatbuffer, every offset compared with the file's size before it is followed.
// Source: tflite/schema.fbs (Model.buffers is field 4; Buffer.offset and Buffer.size, both ulong, are 1 and 2).
#include "tflite_check.h"

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "mapped_file.h"

namespace edgeexport {
namespace {

// Bytes that are read at checked places alone.
class Bytes {
 public:
  Bytes(const void* data, std::uint64_t size) : data_(static_cast<const std::uint8_t*>(data)), size_(size) {}

  std::uint64_t size() const { return size_; }

  template <typename Number>
  Number read(std::uint64_t at) const {
    if (at > size_ || size_ - at < sizeof(Number)) throw std::runtime_error("an offset leaves the file");
    Number value;
    std::memcpy(&value, data_ + at, sizeof(value));
    return value;
  }

  // Where a table's field lies, or 0 where it is left out.
  std::uint64_t field(std::uint64_t table, unsigned index) const {
    const auto back = read<std::int32_t>(table);
    const std::int64_t vtable = static_cast<std::int64_t>(table) - back;
    if (vtable < 0) throw std::runtime_error("an offset leaves the file");
    const auto at = static_cast<std::uint64_t>(vtable);
    const std::uint64_t slot = 4 + 2 * std::uint64_t{index};
    if (slot >= read<std::uint16_t>(at)) return 0;
    const auto offset = read<std::uint16_t>(at + slot);
    return offset == 0 ? 0 : table + offset;
  }

  std::uint64_t follow(std::uint64_t at) const { return at + read<std::uint32_t>(at); }

 private:
  const std::uint8_t* data_;
  std::uint64_t size_;
};

}  // namespace

std::string tfliteDamage(const void* data, std::size_t size) {
  const Bytes file(data, size);
  try {
    if (file.read<std::uint32_t>(4) != 0x334C4654) return "it does not begin as a .tflite file";  // "TFL3"
    const std::uint64_t buffers = file.field(file.follow(0), 4);
    if (buffers == 0) return "";
    const std::uint64_t vector = file.follow(buffers);
    const auto count = file.read<std::uint32_t>(vector);
    for (std::uint64_t i = 0; i < count; ++i) {
      const std::uint64_t buffer = file.follow(vector + 4 + 4 * i);
      const std::uint64_t offsetField = file.field(buffer, 1);
      const std::uint64_t sizeField = file.field(buffer, 2);
      if (offsetField == 0 || sizeField == 0) continue;
      const auto offset = file.read<std::uint64_t>(offsetField);
      const auto length = file.read<std::uint64_t>(sizeField);
      if (offset > file.size() || length > file.size() - offset) return "its weights end behind the file";
    }
    return "";
  } catch (const std::runtime_error& problem) {
    return problem.what();
  }
}

std::string tfliteDamage(const std::string& path) {
  const MappedFile file(path);
  return file ? tfliteDamage(file.data(), file.size()) : "it cannot be read, or is empty";
}

}  // namespace edgeexport
