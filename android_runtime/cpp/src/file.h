// A plain file, read from its start in blocks.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "edgeexport/sha256.h"

namespace edgeexport {

class File {
 public:
  using Take = std::function<void(const char*, std::size_t)>;

  // Opens nothing but a plain file: no link, and no pipe, which would wait for a writer.
  explicit File(const std::string& path)
      : descriptor_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK)) {
    struct stat found {};
    if (opened() && (::fstat(descriptor_, &found) != 0 || !S_ISREG(found.st_mode))) {
      ::close(descriptor_);
      descriptor_ = -1;
      errno = EINVAL;
    }
  }
  ~File() {
    if (opened()) ::close(descriptor_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  bool opened() const { return descriptor_ >= 0; }

  // Hands out the content in blocks, to `limit` bytes. Returns how many there were; false where reading failed.
  bool each(std::size_t limit, std::size_t& total, const Take& take) {
    std::vector<char> block(kBlock);
    total = 0;
    while (total < limit) {
      const ssize_t got = ::read(descriptor_, block.data(), std::min(kBlock, limit - total));
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) return false;
      if (got == 0) break;
      take(block.data(), static_cast<std::size_t>(got));
      total += static_cast<std::size_t>(got);
    }
    return true;
  }

 private:
  static constexpr std::size_t kBlock = std::size_t{1} << 18;

  int descriptor_;
};

// The sha256 of a plain file's content, or nothing where it cannot be read.
inline std::optional<std::string> sha256File(const std::string& path) {
  File file(path);
  Sha256 hash;
  std::size_t total = 0;
  const auto hashed = [&](const char* data, std::size_t size) { hash.update(data, size); };
  if (!file.opened() || !file.each(static_cast<std::size_t>(-1), total, hashed)) return std::nullopt;
  return hash.hex();
}

}  // namespace edgeexport
