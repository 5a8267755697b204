// The normal form NFC: The Unicode Standard, chapter 3.11.
#pragma once

#include <vector>

#include "numbers_reader.h"

namespace edgeexport {

class NormalForm {
 public:
  // Throws tokenizer-unusable. The format is described in edgeexport/text_tables/bpe.py.
  explicit NormalForm(NumbersReader& reader);

  void apply(std::vector<char32_t>& codes) const;

 private:
  void decompose(char32_t code, std::vector<char32_t>& out) const;
  std::uint32_t combiningClass(char32_t code) const;
  char32_t composed(char32_t first, char32_t second) const;  // 0: none

  Numbers from_;     // characters that are taken apart, ascending
  Numbers starts_;   // where their parts start in parts_
  Numbers parts_;
  Numbers classes_;  // character << 8 | combining class, ascending
  Numbers pairs_;    // first, second, result; ascending
};

}  // namespace edgeexport
