// Strict JSON: a recursive reader with a depth limit.
#include "edgeexport/json.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <locale>
#include <numeric>
#include <sstream>
#include <system_error>

namespace edgeexport {

class JsonReader {
 public:
  JsonReader(std::string_view text, const JsonLimits& limits)
      : text_(text), depth_(limits.depth), valuesLeft_(limits.values) {}

  Json document() {
    Json value = read(0);
    space();
    if (at_ != text_.size()) fail("text after the end");
    return value;
  }

 private:
  [[noreturn]] void fail(const std::string& problem) const {
    throw JsonError(problem + " at byte " + std::to_string(at_));
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  void space() {
    while (at_ < text_.size() && (peek() == ' ' || peek() == '\n' || peek() == '\r' || peek() == '\t')) ++at_;
  }

  void expect(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) fail("no value that JSON knows");
    at_ += word.size();
  }

  Json read(int level) {
    if (level > depth_) fail("nested too deep");
    if (valuesLeft_-- == 0) fail("too many values");
    space();
    Json made;
    switch (peek()) {
      case '{': object(made, level); break;
      case '[': array(made, level); break;
      case '"': made.value_ = string(); break;
      case 't': expect("true"); made.value_ = true; break;
      case 'f': expect("false"); made.value_ = false; break;
      case 'n': expect("null"); break;
      default: number(made);
    }
    return made;
  }

  void object(Json& made, int level) {
    Json::Object found;
    ++at_;
    space();
    while (peek() != '}') {
      if (peek() != '"') fail("no key");
      std::string key = string();
      space();
      if (peek() != ':') fail("no colon after a key");
      ++at_;
      found.members.emplace_back(std::move(key), read(level + 1));
      if (!another('}')) break;
      if (peek() == '}') fail("a comma before the end");
    }
    ++at_;
    found.sorted.resize(found.members.size());
    std::iota(found.sorted.begin(), found.sorted.end(), 0U);
    const auto key = [&](std::uint32_t index) -> const std::string& { return found.members[index].first; };
    std::sort(found.sorted.begin(), found.sorted.end(),
              [&](std::uint32_t a, std::uint32_t b) { return key(a) < key(b); });
    const auto twice = std::adjacent_find(found.sorted.begin(), found.sorted.end(),
                                          [&](std::uint32_t a, std::uint32_t b) { return key(a) == key(b); });
    if (twice != found.sorted.end()) fail("a key is given twice");
    made.value_ = std::move(found);
  }

  void array(Json& made, int level) {
    std::vector<Json> found;
    ++at_;
    space();
    while (peek() != ']') {
      found.push_back(read(level + 1));
      if (!another(']')) break;
      if (peek() == ']') fail("a comma before the end");
    }
    ++at_;
    made.value_ = std::move(found);
  }

  // After an element: true when a comma says that another follows.
  bool another(char end) {
    space();
    if (peek() == end) return false;
    if (peek() != ',') fail("no comma");
    ++at_;
    space();
    return true;
  }

  void number(Json& made) {
    const std::size_t start = at_;
    const auto digits = [&] {
      const std::size_t from = at_;
      while (peek() >= '0' && peek() <= '9') ++at_;
      if (at_ == from) fail("no value that JSON knows");
    };
    if (peek() == '-') ++at_;
    if (peek() == '0') {
      ++at_;
    } else {
      digits();
    }
    bool whole = true;
    if (peek() == '.') {
      whole = false;
      ++at_;
      digits();
    }
    if (peek() == 'e' || peek() == 'E') {
      whole = false;
      ++at_;
      if (peek() == '+' || peek() == '-') ++at_;
      digits();
    }
    const std::string_view digitsOf = text_.substr(start, at_ - start);
    if (whole) {
      std::int64_t value = 0;
      const auto read = std::from_chars(digitsOf.data(), digitsOf.data() + digitsOf.size(), value);
      if (read.ec != std::errc()) fail("a whole number too large");
      made.value_ = value;
    } else {
      if (digitsOf.size() > kMaxDigits) fail("a number too long");
      // a stream of the classic locale: strtod's decimal point depends on the app's; from_chars lacks floats on NDKs
      std::istringstream stream{std::string(digitsOf)};
      stream.imbue(std::locale::classic());
      double value = 0;
      if (!(stream >> value) || !std::isfinite(value)) fail("a number too large");
      made.value_ = value;
    }
  }

  std::string string() {
    std::string made;
    ++at_;
    for (;;) {
      if (at_ >= text_.size()) fail("a string without end");
      const unsigned char byte = static_cast<unsigned char>(text_[at_]);
      if (byte == '"') break;
      if (byte < 0x20) fail("a control character in a string");
      if (byte == '\\') {
        escape(made);
      } else if (byte < 0x80) {
        made.push_back(text_[at_++]);
      } else {
        character(made, byte);
      }
    }
    ++at_;
    return made;
  }

  // One UTF-8 sequence of two to four bytes: no overlong form, no surrogate, nothing above U+10FFFF.
  void character(std::string& made, unsigned char first) {
    const std::size_t length = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
    if (first < 0xC2 || first > 0xF4 || at_ + length > text_.size()) fail("not UTF-8");
    const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text_[at_ + i]); };
    for (std::size_t i = 1; i < length; ++i) {
      if ((byte(i) & 0xC0) != 0x80) fail("not UTF-8");
    }
    if ((first == 0xE0 && byte(1) < 0xA0) || (first == 0xED && byte(1) > 0x9F) || (first == 0xF0 && byte(1) < 0x90) ||
        (first == 0xF4 && byte(1) > 0x8F)) {
      fail("not UTF-8");
    }
    made.append(text_.substr(at_, length));
    at_ += length;
  }

  void escape(std::string& made) {
    ++at_;
    const char kind = peek();
    ++at_;
    switch (kind) {
      case '"': case '\\': case '/': made.push_back(kind); return;
      case 'b': made.push_back('\b'); return;
      case 'f': made.push_back('\f'); return;
      case 'n': made.push_back('\n'); return;
      case 'r': made.push_back('\r'); return;
      case 't': made.push_back('\t'); return;
      case 'u': break;
      default: fail("an escape that JSON does not know");
    }
    std::uint32_t point = hex();
    if (point >= 0xD800 && point < 0xDC00 && text_.substr(at_, 2) == "\\u") {
      at_ += 2;
      const std::uint32_t low = hex();
      if (low < 0xDC00 || low > 0xDFFF) fail("half a surrogate pair");
      point = 0x10000 + ((point - 0xD800) << 10) + (low - 0xDC00);
    } else if (point >= 0xD800 && point <= 0xDFFF) {
      fail("half a surrogate pair");
    }
    const auto put = [&](std::uint32_t byte) { made.push_back(static_cast<char>(byte)); };
    if (point < 0x80) {
      put(point);
    } else if (point < 0x800) {
      put(0xC0 | (point >> 6));
      put(0x80 | (point & 0x3F));
    } else if (point < 0x10000) {
      put(0xE0 | (point >> 12));
      put(0x80 | ((point >> 6) & 0x3F));
      put(0x80 | (point & 0x3F));
    } else {
      put(0xF0 | (point >> 18));
      put(0x80 | ((point >> 12) & 0x3F));
      put(0x80 | ((point >> 6) & 0x3F));
      put(0x80 | (point & 0x3F));
    }
  }

  std::uint32_t hex() {
    std::uint32_t value = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const char digit = peek();
      value <<= 4;
      if (digit >= '0' && digit <= '9') {
        value |= static_cast<std::uint32_t>(digit - '0');
      } else if (digit >= 'a' && digit <= 'f') {
        value |= static_cast<std::uint32_t>(digit - 'a' + 10);
      } else if (digit >= 'A' && digit <= 'F') {
        value |= static_cast<std::uint32_t>(digit - 'A' + 10);
      } else {
        fail("no hex digit");
      }
    }
    return value;
  }

  static constexpr std::size_t kMaxDigits = 1024;  // of a fraction

  std::string_view text_;
  int depth_;
  std::size_t valuesLeft_;
  std::size_t at_ = 0;
};

namespace {

template <typename Kind, typename Value>
const Kind& kindOf(const Value& value, const char* name) {
  const Kind* found = std::get_if<Kind>(&value);
  if (found == nullptr) throw JsonError(std::string("a value is not ") + name);
  return *found;
}

}  // namespace

Json Json::parse(std::string_view text, const JsonLimits& limits) {
  if (text.size() > limits.bytes) throw JsonError("it has more than " + std::to_string(limits.bytes) + " bytes");
  return JsonReader(text, limits).document();
}

bool Json::boolean() const { return kindOf<bool>(value_, "true or false"); }

std::int64_t Json::integer() const { return kindOf<std::int64_t>(value_, "a whole number"); }

double Json::number() const {
  return isInteger() ? static_cast<double>(integer()) : kindOf<double>(value_, "a number");
}

const std::string& Json::string() const { return kindOf<std::string>(value_, "a string"); }

const std::vector<Json>& Json::array() const { return kindOf<std::vector<Json>>(value_, "a list"); }

const std::vector<Json::Member>& Json::members() const { return kindOf<Object>(value_, "an object").members; }

const Json* Json::find(std::string_view key) const {
  const Object& object = kindOf<Object>(value_, "an object");
  const auto place = std::lower_bound(
      object.sorted.begin(), object.sorted.end(), key,
      [&](std::uint32_t index, std::string_view wanted) { return object.members[index].first < wanted; });
  if (place == object.sorted.end() || object.members[*place].first != key) return nullptr;
  return &object.members[*place].second;
}

const Json& Json::at(std::string_view key) const {
  const Json* found = find(key);
  if (found == nullptr) throw JsonError("there is no \"" + std::string(key) + "\"");
  return *found;
}

std::string jsonQuoted(std::string_view text) {
  static constexpr char kHex[] = "0123456789abcdef";
  std::string made = "\"";
  for (const char letter : text) {
    const unsigned char byte = static_cast<unsigned char>(letter);
    if (letter == '"' || letter == '\\') {
      made += {'\\', letter};
    } else if (byte < 0x20) {
      made += {'\\', 'u', '0', '0', kHex[byte >> 4], kHex[byte & 15]};
    } else {
      made.push_back(letter);
    }
  }
  return made + "\"";
}

}  // namespace edgeexport
