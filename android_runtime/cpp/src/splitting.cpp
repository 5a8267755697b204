// A pre-tokeniser: programs over classes of characters in place of regular expressions.
#include "splitting.h"

#include <algorithm>

namespace edgeexport {

namespace {

constexpr std::size_t kNone = static_cast<std::size_t>(-1);
constexpr std::uint32_t kMaxClasses = 64;
constexpr std::uint32_t kMaxItems = 64;
constexpr std::uint32_t kMaxAlternatives = 1024;

// Patterns of known tokenizers take some 50 steps for a character; long runs of spaces or newlines more, by their length.
constexpr std::uint64_t kStepsPerText = std::uint64_t{1} << 22;
constexpr std::uint64_t kStepsPerCharacter = std::uint64_t{1} << 11;

bool has(std::uint64_t classes, std::uint8_t each) { return (classes >> each & 1) != 0; }

}  // namespace

SplittingStep::SplittingStep(NumbersReader& reader) {
  ranges_ = reader.numbers(reader.number());
  const auto wrong = [](std::uint32_t range) { return (range & 0xFF) >= kMaxClasses; };
  reader.require(!ranges_.empty() && ranges_.front() >> 8 == 0 && std::is_sorted(ranges_.begin(), ranges_.end()) &&
                     std::none_of(ranges_.begin(), ranges_.end(), wrong),
                 "its classes of characters are not in order");
  const std::uint32_t alternatives = reader.number();
  reader.require(alternatives <= kMaxAlternatives, "a step has too many alternatives");
  for (std::uint32_t i = 0; i < alternatives; ++i) {
    const std::uint32_t items = reader.number();
    reader.require(items <= kMaxItems, "an alternative has too many parts");
    Alternative made;
    bool takes = false;
    for (std::uint32_t j = 0; j < items; ++j) {
      const Numbers row = reader.numbers(5);
      const Item item{row[0] != 0, std::uint64_t{row[2]} << 32 | row[1], row[3], row[4]};
      reader.require(item.most > 0 && item.least <= item.most, "a part counts backwards");
      takes = takes || (!item.absent && item.least > 0);
      made.push_back(item);
    }
    reader.require(takes, "an alternative matches nothing");
    alternatives_.push_back(std::move(made));
  }
}

std::uint8_t SplittingStep::classOf(char32_t code) const {
  const std::uint32_t wanted = static_cast<std::uint32_t>(code) << 8 | 0xFF;
  const auto after = std::upper_bound(ranges_.begin(), ranges_.end(), wanted);
  return static_cast<std::uint8_t>(*(after - 1) & 0xFF);
}

void SplittingStep::Attempt::step() const {
  if (left == 0) throw errors::tokenizerUnusable("tokenizer/bpe.bin", "its patterns take too many steps for a text");
  --left;
}

std::size_t SplittingStep::matched(const Item* item, const Item* end, const Attempt& attempt, std::size_t at) {
  attempt.step();
  if (item == end) return at;
  const auto& classes = attempt.classes;
  if (item->absent) {
    const bool follows = at < attempt.last && has(item->classes, classes[at]);
    return follows ? kNone : matched(item + 1, end, attempt, at);
  }
  const std::size_t limit = at + std::min<std::size_t>(item->most, attempt.last - at);
  std::size_t stop = at;
  for (; stop < limit && has(item->classes, classes[stop]); ++stop) attempt.step();
  if (stop - at < item->least) return kNone;
  for (;; --stop) {
    const std::size_t found = matched(item + 1, end, attempt, stop);
    if (found != kNone || stop - at == item->least) return found;
  }
}

std::vector<Span> SplittingStep::split(const std::vector<char32_t>& codes, const std::vector<Span>& pieces,
                                       std::vector<std::uint8_t>& classes) const {
  classes.resize(codes.size());
  std::transform(codes.begin(), codes.end(), classes.begin(), [this](char32_t code) { return classOf(code); });
  std::vector<Span> found;
  std::uint64_t left = kStepsPerText + kStepsPerCharacter * codes.size();
  for (const Span& piece : pieces) {
    const Attempt attempt{classes, piece.last, left};
    std::size_t unmatched = piece.first;
    std::size_t at = piece.first;
    while (at < piece.last) {
      std::size_t stop = kNone;
      for (const Alternative& each : alternatives_) {
        stop = matched(each.data(), each.data() + each.size(), attempt, at);
        if (stop != kNone) break;
      }
      if (stop == kNone) {
        ++at;
        continue;
      }
      if (unmatched < at) found.push_back({unmatched, at});
      found.push_back({at, stop});
      unmatched = at = stop;
    }
    if (unmatched < piece.last) found.push_back({unmatched, piece.last});
  }
  return found;
}

}  // namespace edgeexport
