// What goes wrong, with the same codes as the Python side: what happened, where, why, and what to do about it.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>

namespace edgeexport {

// A failure that a caller can act on. `code` is kebab-case and permanent; `fix` always says something.
class Error : public std::runtime_error {
 public:
  // What is long is cut: names and numbers in it may come from a file that anyone wrote.
  Error(std::string code, std::string what, std::string where, std::string why, std::string fix)
      : Error(Cut{}, std::move(code), cut(std::move(what)), cut(std::move(where)), cut(std::move(why)),
              std::move(fix)) {}

  const std::string& code() const noexcept { return code_; }
  // One sentence; what() of std::exception is the whole text instead.
  const std::string& problem() const noexcept { return problem_; }
  const std::string& where() const noexcept { return where_; }
  const std::string& why() const noexcept { return why_; }
  const std::string& fix() const noexcept { return fix_; }

 private:
  struct Cut {};
  static constexpr std::size_t kMaxText = 4096;  // bytes; a path is no longer

  Error(Cut, std::string code, std::string what, std::string where, std::string why, std::string fix)
      : std::runtime_error("error[" + code + "]: " + what + "\n  where: " + where + "\n  why: " + why +
                           "\n  fix: " + fix),
        code_(std::move(code)),
        problem_(std::move(what)),
        where_(std::move(where)),
        why_(std::move(why)),
        fix_(std::move(fix)) {}

  static std::string cut(std::string text) {
    if (text.size() <= kMaxText) return text;
    std::size_t end = kMaxText;
    while ((static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;  // not within a character
    return text.erase(end) + " ...";
  }

  std::string code_;
  std::string problem_;
  std::string where_;
  std::string why_;
  std::string fix_;
};

}  // namespace edgeexport
