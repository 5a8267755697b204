// The normal form NFC: The Unicode Standard, chapter 3.11.
#include "normal_form.h"

#include <algorithm>
#include <utility>

namespace edgeexport {

namespace {

constexpr std::uint32_t kCodes = 0x110000;
constexpr std::uint32_t kMaxParts = 18;  // of a character: The Unicode Standard, chapter 3.11, stays below

// Hangul syllables are made by arithmetic: The Unicode Standard, chapter 3.12.
constexpr char32_t kSyllable = 0xAC00, kLead = 0x1100, kVowel = 0x1161, kTail = 0x11A7;
constexpr char32_t kLeads = 19, kVowels = 21, kTails = 28, kSyllables = kLeads * kVowels * kTails;

}  // namespace

NormalForm::NormalForm(NumbersReader& reader) {
  const Numbers counts = reader.numbers(4);
  from_ = reader.numbersBelow(counts[0], kCodes);
  starts_ = reader.starts(counts[0], counts[1]);
  for (std::uint32_t i = 0; i < counts[0]; ++i) {
    reader.require(starts_[i + 1] - starts_[i] <= kMaxParts, "a character has too many parts");
  }
  parts_ = reader.numbersBelow(counts[1], kCodes);
  classes_ = reader.numbersBelow(counts[2], kCodes << 8);
  reader.require(counts[3] < kCodes, "it has too many compositions");
  pairs_ = reader.numbersBelow(std::size_t{3} * counts[3], kCodes);
  const auto row = [this](std::size_t i) { return std::make_pair(pairs_[3 * i], pairs_[3 * i + 1]); };
  bool sorted = std::is_sorted(from_.begin(), from_.end()) && std::is_sorted(classes_.begin(), classes_.end());
  for (std::size_t i = 1; i < counts[3]; ++i) sorted = sorted && row(i - 1) < row(i);
  reader.require(sorted, "its normal form is not in order");
}

void NormalForm::decompose(char32_t code, std::vector<char32_t>& out) const {
  if (code >= kSyllable && code < kSyllable + kSyllables) {
    const char32_t place = code - kSyllable;
    out.push_back(kLead + place / (kVowels * kTails));
    out.push_back(kVowel + place / kTails % kVowels);
    if (place % kTails != 0) out.push_back(kTail + place % kTails);
    return;
  }
  const auto found = std::lower_bound(from_.begin(), from_.end(), code);
  if (found == from_.end() || *found != code) {
    out.push_back(code);
    return;
  }
  const auto place = static_cast<std::size_t>(found - from_.begin());
  for (std::uint32_t i = starts_[place]; i < starts_[place + 1]; ++i) out.push_back(parts_[i]);
}

std::uint32_t NormalForm::combiningClass(char32_t code) const {
  const auto found = std::lower_bound(classes_.begin(), classes_.end(), static_cast<std::uint32_t>(code) << 8);
  return found != classes_.end() && *found >> 8 == code ? *found & 0xFF : 0;
}

char32_t NormalForm::composed(char32_t first, char32_t second) const {
  if (first >= kLead && first < kLead + kLeads && second >= kVowel && second < kVowel + kVowels) {
    return kSyllable + ((first - kLead) * kVowels + (second - kVowel)) * kTails;
  }
  const bool open = first >= kSyllable && first < kSyllable + kSyllables && (first - kSyllable) % kTails == 0;
  if (open && second > kTail && second < kTail + kTails) return first + (second - kTail);
  std::size_t low = 0;
  std::size_t high = pairs_.size() / 3;
  const auto wanted = std::make_pair<std::uint32_t, std::uint32_t>(first, second);
  while (low < high) {
    const std::size_t middle = (low + high) / 2;
    const auto found = std::make_pair(pairs_[3 * middle], pairs_[3 * middle + 1]);
    if (found == wanted) return pairs_[3 * middle + 2];
    (found < wanted ? low : high) = found < wanted ? middle + 1 : middle;
  }
  return 0;
}

void NormalForm::apply(std::vector<char32_t>& codes) const {
  if (std::all_of(codes.begin(), codes.end(), [](char32_t code) { return code < 0x80; })) return;
  std::vector<char32_t> apart;
  apart.reserve(codes.size() * 2);
  for (const char32_t code : codes) decompose(code, apart);
  for (std::size_t i = 0; i < apart.size();) {
    std::size_t stop = i;
    while (stop < apart.size() && combiningClass(apart[stop]) != 0) ++stop;
    const auto by = [this](char32_t a, char32_t b) { return combiningClass(a) < combiningClass(b); };
    const auto begin = apart.begin();
    std::stable_sort(begin + static_cast<std::ptrdiff_t>(i), begin + static_cast<std::ptrdiff_t>(stop), by);
    i = stop + 1;
  }
  codes.clear();
  std::size_t starter = apart.size();  // none yet
  int before = -1;                     // class of what stands between the starter and here; -1: nothing does
  for (const char32_t code : apart) {
    const int kind = static_cast<int>(combiningClass(code));
    if (starter < codes.size() && before < kind) {
      if (const char32_t one = composed(codes[starter], code)) {
        codes[starter] = one;
        continue;
      }
    }
    if (kind == 0) starter = codes.size();
    before = kind == 0 ? -1 : kind;
    codes.push_back(code);
  }
}

}  // namespace edgeexport
