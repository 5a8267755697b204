// Strict JSON as it comes with a bundle: UTF-8, every key once, finite numbers, bounded in size, depth and number.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace edgeexport {

// Text that is no strict JSON, or a value that is not of the asked kind. Callers turn it into an Error of their own
// code, since only they know which file it was.
class JsonError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct JsonLimits {
  std::size_t bytes = std::size_t{16} << 20;
  int depth = 64;
  std::size_t values = std::size_t{1} << 20;  // each takes some 60 bytes of memory, however short its text is
};

class Json {
 public:
  using Member = std::pair<std::string, Json>;

  // Reads one value that fills the whole text. Throws JsonError.
  static Json parse(std::string_view text, const JsonLimits& limits = {});

  bool isNull() const noexcept { return std::holds_alternative<std::nullptr_t>(value_); }
  bool isBool() const noexcept { return std::holds_alternative<bool>(value_); }
  bool isInteger() const noexcept { return std::holds_alternative<std::int64_t>(value_); }
  bool isNumber() const noexcept { return isInteger() || std::holds_alternative<double>(value_); }
  bool isString() const noexcept { return std::holds_alternative<std::string>(value_); }
  bool isArray() const noexcept { return std::holds_alternative<std::vector<Json>>(value_); }
  bool isObject() const noexcept { return std::holds_alternative<Object>(value_); }

  // Each throws JsonError when the value is of another kind.
  bool boolean() const;
  std::int64_t integer() const;
  double number() const;  // an integer is a number too
  const std::string& string() const;
  const std::vector<Json>& array() const;
  const std::vector<Member>& members() const;  // in the order of the text

  // The member of an object, or null. Throws JsonError when this is no object.
  const Json* find(std::string_view key) const;
  // The member of an object. Throws JsonError when there is none.
  const Json& at(std::string_view key) const;

 private:
  friend class JsonReader;
  struct Object {
    std::vector<Member> members;
    std::vector<std::uint32_t> sorted;  // indices of members by key, for find
  };

  std::variant<std::nullptr_t, bool, std::int64_t, double, std::string, std::vector<Json>, Object> value_ = nullptr;
};

// The text as a JSON string with its quotes, ASCII control characters escaped.
std::string jsonQuoted(std::string_view text);

}  // namespace edgeexport
