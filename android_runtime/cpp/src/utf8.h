// UTF-8: characters out of bytes, and bytes out of characters.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace edgeexport::utf8 {

struct Step {
  char32_t code = 0;
  std::size_t length = 0;  // bytes of the character, or of what cannot be one
  bool valid = false;
  bool cut = false;  // not valid because the text ends within a character
};

// What stands at `at`. Bytes that are no character are taken as the longest start of one, as the Unicode Standard
// recommends (chapter 3.9) and Rust and the WHATWG do it. Requires at < text.size().
Step next(std::string_view text, std::size_t at);

void append(std::string& text, char32_t code);

// Appends `bytes` with U+FFFD for each run that is no character, and returns how many bytes were used up: a character
// that the end cuts is left over, unless `last`.
std::size_t appendLossy(std::string& text, std::string_view bytes, bool last);

}  // namespace edgeexport::utf8
