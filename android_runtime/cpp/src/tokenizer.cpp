// Text to token ids and back. The tables are described in edgeexport/text_tables/bpe.py.
#include "edgeexport/tokenizer.h"

#include <algorithm>
#include <array>
#include <optional>
#include <string>

#include "errors.h"
#include "normal_form.h"
#include "numbers_reader.h"
#include "splitting.h"
#include "utf8.h"

namespace edgeexport {

namespace {

using Ids = std::vector<std::int32_t>;

constexpr std::string_view kMagic = "EEBPE/1\n";
constexpr std::uint32_t kNone = 0xFFFFFFFF;
constexpr std::uint32_t kNfc = 1, kWholeTokens = 2;
constexpr std::uint32_t kMaxIds = 1U << 21;
constexpr std::uint32_t kMaxSteps = 64;
constexpr std::uint32_t kMaxToken = 1U << 16;  // bytes: each id of an answer adds so many to its text
constexpr std::uint32_t kMaxAround = 64;       // ids that are put before or after a text

struct Added {
  std::int32_t id;
  std::string text;
};

struct Merge {
  std::uint32_t rank;
  std::uint32_t result;
};

// A token of a piece that is being merged, and its neighbours.
struct Symbol {
  std::uint32_t id;
  std::uint32_t before, after;  // kNone at the ends
  bool alive;
};

struct Candidate {
  std::uint32_t rank, place, result;
  // for a heap whose top has the lowest rank, and of those the first place
  bool operator<(const Candidate& other) const {
    return rank != other.rank ? rank > other.rank : place > other.place;
  }
};

// Working memory of one text.
struct Scratch {
  std::vector<char32_t> codes;
  std::vector<std::size_t> offsets;
  std::vector<std::uint8_t> classes;
  std::vector<Symbol> symbols;
  std::vector<Candidate> heap;
};

}  // namespace

struct Tokenizer::Tables {
  Numbers starts;
  std::string bytes;
  Numbers byteIds;
  Numbers mergeStarts, mergeRights, mergeRanks, mergeResults;
  Numbers byBytes;
  std::array<std::vector<Added>, 2> added;  // in order; of the second, those that are looked for in a text's normal form
  std::vector<bool> special;  // by id
  Ids before, after;
  std::optional<NormalForm> normalForm;
  std::vector<SplittingStep> steps;

  explicit Tables(NumbersReader reader);

  std::size_t ids() const { return starts.size() - 1; }

  std::string_view token(std::size_t id) const {
    return std::string_view(bytes).substr(starts[id], starts[id + 1] - starts[id]);
  }

  void append(std::string& out, std::int32_t id, bool skip) const {
    if (id < 0) throw errors::badToken("ids are whole numbers from 0");
    const auto place = static_cast<std::size_t>(id);
    if (place < ids() && !(skip && special[place])) out.append(token(place));
  }

  const Added* addedAt(std::string_view text, std::size_t at, bool normalized) const;
  template <typename Rest>
  void splitByAdded(std::string_view text, bool normalized, Ids& out, const Rest& rest) const;
  void encodeNormal(std::string_view text, Ids& out, Scratch& scratch) const;
  void encodePiece(std::string_view piece, Ids& out, Scratch& scratch) const;
  std::optional<Merge> merge(std::uint32_t left, std::uint32_t right) const;
  std::optional<std::uint32_t> wholeToken(std::string_view piece) const;
};

Tokenizer::Tables::Tables(NumbersReader reader) {
  reader.require(reader.bytes(kMagic.size()) == kMagic, "it is not a table of schema EEBPE/1");
  const Numbers head = reader.numbers(9);
  const std::uint32_t count = head[0], flags = head[8];
  reader.require(count > 0 && count <= kMaxIds, "it has no ids, or too many");
  reader.require(head[7] <= kMaxSteps && flags <= (kNfc | kWholeTokens), "it asks for steps that are unknown");
  starts = reader.starts(count, head[1]);
  for (std::uint32_t i = 0; i < count; ++i) reader.require(starts[i + 1] - starts[i] <= kMaxToken, "a token is too long");
  bytes = std::string(reader.paddedBytes(head[1]));
  byteIds = reader.numbers(256);
  const auto wrong = [count](std::uint32_t id) { return id != kNone && id >= count; };
  reader.require(std::none_of(byteIds.begin(), byteIds.end(), wrong), "a byte has an id that is out of bounds");
  mergeStarts = reader.starts(count, head[2]);
  mergeRights = reader.numbersBelow(head[2], count);
  mergeRanks = reader.numbers(head[2]);
  mergeResults = reader.numbersBelow(head[2], count);
  byBytes = reader.numbersBelow(head[3], count);
  special.resize(count);
  for (std::uint32_t i = 0; i < head[4]; ++i) {
    const Numbers row = reader.numbers(4);
    reader.require(row[0] < count, "an added token is out of bounds");
    special[row[0]] = row[1] != 0;
    reader.require(row[3] <= kMaxToken, "an added token is too long");
    Added token{static_cast<std::int32_t>(row[0]), std::string(reader.paddedBytes(row[3]))};
    if (!token.text.empty()) added[row[2] != 0 ? 1 : 0].push_back(std::move(token));
  }
  for (std::vector<Added>* each : {&added[0], &added[1]}) {
    std::stable_sort(each->begin(), each->end(), [](const Added& a, const Added& b) { return a.text < b.text; });
  }
  reader.require(head[5] <= kMaxAround && head[6] <= kMaxAround, "it puts too many tokens around a text");
  const Numbers around = reader.numbersBelow(std::size_t{head[5]} + head[6], count);
  before.assign(around.begin(), around.begin() + static_cast<std::ptrdiff_t>(head[5]));
  after.assign(around.begin() + static_cast<std::ptrdiff_t>(head[5]), around.end());
  if ((flags & kNfc) != 0) normalForm.emplace(reader);
  for (std::uint32_t i = 0; i < head[7]; ++i) steps.emplace_back(reader);
  reader.end();
}

// The longest added token that stands at a place: among those that begin as the text does, byte by byte.
const Added* Tokenizer::Tables::addedAt(std::string_view text, std::size_t at, bool normalized) const {
  const std::vector<Added>& all = added[normalized ? 1 : 0];
  const Added* found = nullptr;
  auto first = all.begin();
  auto end = all.end();
  for (std::size_t depth = 0; first != end && at + depth < text.size(); ++depth) {
    // those that have ended before this byte come first, and count as lower than any
    const auto value = [depth](const Added& token) {
      return depth < token.text.size() ? static_cast<unsigned char>(token.text[depth]) : -1;
    };
    const int wanted = static_cast<unsigned char>(text[at + depth]);
    first = std::partition_point(first, end, [&](const Added& token) { return value(token) < wanted; });
    end = std::partition_point(first, end, [&](const Added& token) { return value(token) == wanted; });
    if (first != end && first->text.size() == depth + 1) found = &*first;
  }
  return found;
}

// Appends the added tokens of a text and, through `rest`, what stands between them.
template <typename Rest>
void Tokenizer::Tables::splitByAdded(std::string_view text, bool normalized, Ids& out, const Rest& rest) const {
  std::size_t start = 0;
  for (std::size_t at = 0; at < text.size();) {
    const Added* token = addedAt(text, at, normalized);
    if (token == nullptr) {
      ++at;
      continue;
    }
    if (start < at) rest(text.substr(start, at - start));
    out.push_back(token->id);
    start = at = at + token->text.size();
  }
  if (start < text.size()) rest(text.substr(start));
}

// Appends the ids of a text in its normal form that has no added tokens.
void Tokenizer::Tables::encodeNormal(std::string_view text, Ids& out, Scratch& scratch) const {
  scratch.codes.clear();
  scratch.offsets.clear();
  for (std::size_t at = 0; at < text.size();) {
    const utf8::Step step = utf8::next(text, at);
    scratch.codes.push_back(step.code);
    scratch.offsets.push_back(at);
    at += step.length;
  }
  scratch.offsets.push_back(text.size());
  std::vector<Span> pieces{{0, scratch.codes.size()}};
  for (const SplittingStep& step : steps) pieces = step.split(scratch.codes, pieces, scratch.classes);
  for (const Span& each : pieces) {
    const std::size_t first = scratch.offsets[each.first];
    encodePiece(text.substr(first, scratch.offsets[each.last] - first), out, scratch);
  }
}

std::optional<Merge> Tokenizer::Tables::merge(std::uint32_t left, std::uint32_t right) const {
  const auto begin = mergeRights.begin() + static_cast<std::ptrdiff_t>(mergeStarts[left]);
  const auto end = mergeRights.begin() + static_cast<std::ptrdiff_t>(mergeStarts[left + 1]);
  const auto found = std::lower_bound(begin, end, right);
  if (found == end || *found != right) return std::nullopt;
  const auto place = static_cast<std::size_t>(found - mergeRights.begin());
  return Merge{mergeRanks[place], mergeResults[place]};
}

std::optional<std::uint32_t> Tokenizer::Tables::wholeToken(std::string_view piece) const {
  const auto by = [this](std::uint32_t id, std::string_view wanted) { return token(id) < wanted; };
  const auto found = std::lower_bound(byBytes.begin(), byBytes.end(), piece, by);
  if (found == byBytes.end() || token(*found) != piece) return std::nullopt;
  return *found;
}

// Appends the ids of one piece: of all neighbours that can be merged, those of the lowest rank are, again and again.
void Tokenizer::Tables::encodePiece(std::string_view piece, Ids& out, Scratch& scratch) const {
  if (const auto whole = wholeToken(piece)) {
    out.push_back(static_cast<std::int32_t>(*whole));
    return;
  }
  auto& symbols = scratch.symbols;
  auto& heap = scratch.heap;
  symbols.clear();
  heap.clear();
  for (const char byte : piece) {
    const std::uint32_t id = byteIds[static_cast<unsigned char>(byte)];
    if (id == kNone) continue;  // the library leaves out what the vocabulary does not have
    const auto place = static_cast<std::uint32_t>(symbols.size());
    if (place > 0) symbols.back().after = place;
    symbols.push_back({id, place > 0 ? place - 1 : kNone, kNone, true});
  }
  const auto offer = [&](std::uint32_t place) {
    const auto found = merge(symbols[place].id, symbols[symbols[place].after].id);
    if (!found) return;
    heap.push_back({found->rank, place, found->result});
    std::push_heap(heap.begin(), heap.end());
  };
  for (std::uint32_t place = 0; place + 1 < symbols.size(); ++place) offer(place);
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end());
    const Candidate best = heap.back();
    heap.pop_back();
    Symbol& left = symbols[best.place];
    if (!left.alive || left.after == kNone) continue;
    Symbol& right = symbols[left.after];
    const auto found = merge(left.id, right.id);
    if (!found || found->result != best.result) continue;  // one of the two has grown since
    left.id = best.result;
    left.after = right.after;
    right.alive = false;
    if (left.after != kNone) {
      symbols[left.after].before = best.place;
      offer(best.place);
    }
    if (left.before != kNone) offer(left.before);
  }
  for (const Symbol& each : symbols) {
    if (each.alive) out.push_back(static_cast<std::int32_t>(each.id));
  }
}

Tokenizer Tokenizer::parse(std::string_view data) {
  if (data.size() > kMaxBytes) throw errors::tokenizerUnusable(kFile, "it is larger than any tokenizer needs");
  return Tokenizer(std::make_shared<const Tables>(NumbersReader(data, kFile)));
}

std::size_t Tokenizer::vocab() const noexcept { return tables_->ids(); }

Ids Tokenizer::encode(std::string_view text, bool addSpecialTokens) const {
  for (std::size_t at = 0; at < text.size();) {
    const utf8::Step step = utf8::next(text, at);
    if (!step.valid) throw errors::badText("at byte " + std::to_string(at) + " is no character");
    at += step.length;
  }
  const Tables& tables = *tables_;
  Ids out;
  Scratch scratch;
  if (addSpecialTokens) out = tables.before;
  const auto plain = [&](std::string_view part) { tables.encodeNormal(part, out, scratch); };
  std::string normal;
  tables.splitByAdded(text, false, out, [&](std::string_view part) {
    if (tables.normalForm) {
      scratch.codes.clear();
      for (std::size_t at = 0; at < part.size();) {
        const utf8::Step step = utf8::next(part, at);
        scratch.codes.push_back(step.code);
        at += step.length;
      }
      tables.normalForm->apply(scratch.codes);
      normal.clear();
      for (const char32_t code : scratch.codes) utf8::append(normal, code);
      part = normal;
    }
    tables.splitByAdded(part, true, out, plain);
  });
  if (addSpecialTokens) out.insert(out.end(), tables.after.begin(), tables.after.end());
  return out;
}

std::string Tokenizer::decode(const Ids& ids, bool skipSpecialTokens) const {
  std::string bytes;
  for (const std::int32_t id : ids) tables_->append(bytes, id, skipSpecialTokens);
  std::string text;
  text.reserve(bytes.size());
  utf8::appendLossy(text, bytes, true);
  return text;
}

TextStream Tokenizer::stream(bool skipSpecialTokens) const { return {tables_, skipSpecialTokens}; }

std::string TextStream::push(std::int32_t id) {
  tables_->append(held_, id, skip_);
  std::string text;
  held_.erase(0, utf8::appendLossy(text, held_, false));
  return text;
}

std::string TextStream::flush() {
  std::string text;
  utf8::appendLossy(text, held_, true);
  held_.clear();
  return text;
}

}  // namespace edgeexport
