// All buffers of a session in one block: aligned for vector units, zero, taken from the system page by page as used.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "errors.h"

namespace edgeexport {

class Arena {
 public:
  // LiteRT asks for 64; XNNPACK reads up to 16 bytes behind a buffer, which the padding covers.
  static constexpr std::size_t kAlignment = 64;
  static constexpr std::size_t kPadding = 64;

  // Bytes that a buffer of `bytes` takes up.
  static constexpr std::size_t room(std::size_t bytes) {
    return (bytes + kPadding + kAlignment - 1) / kAlignment * kAlignment;
  }

  Arena() = default;
  explicit Arena(std::size_t size) : size_(size) {
    void* block = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (block == MAP_FAILED) throw errors::outOfMemory(bytesText(size));
    block_ = static_cast<std::uint8_t*>(block);
  }
  ~Arena() {
    if (block_ != nullptr) ::munmap(block_, size_);
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // A buffer of zeros; throws out-of-memory beyond what the arena was made for.
  template <typename Element>
  Element* take(std::size_t count) {
    const std::size_t needed = room(count * sizeof(Element));
    if (needed > size_ - used_) throw errors::outOfMemory(bytesText(used_ + needed));
    auto* taken = reinterpret_cast<Element*>(block_ + used_);
    used_ += needed;
    return taken;
  }

 private:
  static std::string bytesText(std::size_t size) {
    return "for the cache and the session's buffers, " + std::to_string(size) + " bytes";
  }

  std::uint8_t* block_ = nullptr;
  std::size_t size_ = 0;
  std::size_t used_ = 0;
};

}  // namespace edgeexport
