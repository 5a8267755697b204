// UTF-8: characters out of bytes, and bytes out of characters.
#include "utf8.h"

namespace edgeexport::utf8 {

Step next(std::string_view text, std::size_t at) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned first = byte(at);
  if (first < 0x80) return {first, 1, true, false};
  if (first < 0xC2 || first > 0xF4) return {0, 1, false, false};
  const std::size_t wanted = first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
  // the second byte's bounds exclude characters written too long, surrogates, and what lies beyond U+10FFFF
  const unsigned low = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
  const unsigned high = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
  char32_t code = first & (0x7FU >> wanted);
  for (std::size_t i = 1; i < wanted; ++i) {
    if (at + i == text.size()) return {0, i, false, true};
    const unsigned found = byte(at + i);
    if (found < (i == 1 ? low : 0x80U) || found > (i == 1 ? high : 0xBFU)) return {0, i, false, false};
    code = code << 6 | (found & 0x3F);
  }
  return {code, wanted, true, false};
}

void append(std::string& text, char32_t code) {
  const auto put = [&](char32_t byte) { text.push_back(static_cast<char>(static_cast<unsigned char>(byte))); };
  if (code < 0x80) {
    put(code);
    return;
  }
  if (code < 0x800) {
    put(0xC0 | code >> 6);
  } else {
    if (code < 0x10000) {
      put(0xE0 | code >> 12);
    } else {
      put(0xF0 | code >> 18);
      put(0x80 | (code >> 12 & 0x3F));
    }
    put(0x80 | (code >> 6 & 0x3F));
  }
  put(0x80 | (code & 0x3F));
}

std::size_t appendLossy(std::string& text, std::string_view bytes, bool last) {
  std::size_t at = 0;
  while (at < bytes.size()) {
    const Step step = next(bytes, at);
    if (step.cut && !last) break;
    text.append(step.valid ? bytes.substr(at, step.length) : std::string_view("\xEF\xBF\xBD"));
    at += step.length;
  }
  return at;
}

}  // namespace edgeexport::utf8
