// What goes wrong, with the same codes as the Python side: what happened, where, why, and what to do about it.
#pragma once

#include <stdexcept>
#include <string>

namespace edgeexport {

// A failure that a caller can act on. `code` is kebab-case and permanent; `fix` always says something.
class Error : public std::runtime_error {
 public:
  Error(std::string code, std::string what, std::string where, std::string why, std::string fix)
      : std::runtime_error("error[" + code + "]: " + what + "\n  where: " + where + "\n  why: " + why +
                           "\n  fix: " + fix),
        code_(std::move(code)),
        problem_(std::move(what)),
        where_(std::move(where)),
        why_(std::move(why)),
        fix_(std::move(fix)) {}

  const std::string& code() const noexcept { return code_; }
  // One sentence; what() of std::exception is the whole text instead.
  const std::string& problem() const noexcept { return problem_; }
  const std::string& where() const noexcept { return where_; }
  const std::string& why() const noexcept { return why_; }
  const std::string& fix() const noexcept { return fix_; }

 private:
  std::string code_;
  std::string problem_;
  std::string where_;
  std::string why_;
  std::string fix_;
};

}  // namespace edgeexport
