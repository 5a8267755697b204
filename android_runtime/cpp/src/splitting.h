// A pre-tokeniser: programs over classes of characters in place of regular expressions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "numbers_reader.h"

namespace edgeexport {

// Part of a text: characters first .. last - 1.
struct Span {
  std::size_t first = 0;
  std::size_t last = 0;
};

// One step of the pre-tokeniser. The format, and how alternatives are tried, are described in
// edgeexport/text_tables/splitting.py.
class SplittingStep {
 public:
  // Throws tokenizer-unusable.
  explicit SplittingStep(NumbersReader& reader);

  // Splits each of `pieces` of the text `codes`; `classes` is working memory. Throws tokenizer-unusable where that takes
  // more steps than any pattern of a tokenizer needs: repetitions behind each other can be tried in exponentially many
  // ways.
  std::vector<Span> split(const std::vector<char32_t>& codes, const std::vector<Span>& pieces,
                          std::vector<std::uint8_t>& classes) const;

 private:
  struct Item {
    bool absent;
    std::uint64_t classes;
    std::uint32_t least;
    std::uint32_t most;
  };
  using Alternative = std::vector<Item>;

  std::uint8_t classOf(char32_t code) const;
  // One match that is tried: the classes of a piece's characters, and the steps that are left.
  struct Attempt {
    const std::vector<std::uint8_t>& classes;
    std::size_t last;
    std::uint64_t& left;

    void step() const;  // throws tokenizer-unusable where none is left
  };
  // The end of the longest match at `at` that a regex engine finds first, or kNone.
  static std::size_t matched(const Item* item, const Item* end, const Attempt& attempt, std::size_t at);

  Numbers ranges_;  // first code point << 8 | class, ascending
  std::vector<Alternative> alternatives_;
};

}  // namespace edgeexport
