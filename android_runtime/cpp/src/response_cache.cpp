// Answers to frequent prompts, kept for a while.
#include "edgeexport/response_cache.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "errors.h"

namespace edgeexport {

namespace {

// Words of the present moment and of the present day. Lower case; those in ASCII are looked for as whole words.
constexpr std::string_view kMomentWords[] = {
    "now", "right now", "currently", "current time", "what time", "clock", "o'clock",
    "现在", "此刻", "刚才", "刚刚", "几点", "当前时间", "马上"};
constexpr std::string_view kDayWords[] = {
    "today", "tonight", "tomorrow", "yesterday", "current", "latest", "newest", "recent", "recently", "date",
    "weather", "news", "this week", "this month", "this year", "next week", "last week", "monday", "tuesday",
    "wednesday", "thursday", "friday", "saturday", "sunday", "january", "february", "april", "june", "july",
    "august", "september", "october", "november", "december",
    "今天", "今日", "今晚", "今早", "明天", "昨天", "后天", "目前", "当前", "最新", "最近", "日期", "星期",
    "天气", "新闻", "本周", "本月", "今年"};

bool isDigit(char byte) { return byte >= '0' && byte <= '9'; }
bool isWord(char byte) {
  return isDigit(byte) || (byte >= 'a' && byte <= 'z') || static_cast<unsigned char>(byte) >= 0x80;
}

std::string lowered(std::string_view text) {
  std::string made(text);
  for (char& byte : made) {
    if (byte >= 'A' && byte <= 'Z') byte = static_cast<char>(byte - 'A' + 'a');
  }
  return made;
}

bool holds(std::string_view text, std::string_view word) {
  const bool ascii = static_cast<unsigned char>(word[0]) < 0x80;
  for (std::size_t at = text.find(word); at != std::string_view::npos; at = text.find(word, at + 1)) {
    const std::size_t end = at + word.size();
    const bool whole = (at == 0 || !isWord(text[at - 1])) && (end == text.size() || !isWord(text[end]));
    if (whole || !ascii) return true;
  }
  return false;
}

template <typename Words>
bool holdsAny(std::string_view text, const Words& words) {
  return std::any_of(std::begin(words), std::end(words), [text](std::string_view word) { return holds(text, word); });
}

// A sign that stands between the numbers of a date or a time, or behind one of them; its length, or 0.
std::size_t separator(std::string_view text) {
  for (const std::string_view sign : {"-", "/", ".", ":", "年", "月", "日", "号", "点", "时"}) {
    if (text.substr(0, sign.size()) == sign) return sign.size();
  }
  return 0;
}

// Whether numbers stand in a text as a date or a time has them: 2026-11-21, 21/11, 21.11.2026, 12:30, 11月21日. One
// point alone makes a fraction.
bool holdsNumbersOfTime(std::string_view text) {
  std::size_t at = 0;
  while (at < text.size()) {
    if (!isDigit(text[at])) {
      ++at;
      continue;
    }
    int points = 0;
    while (at < text.size() && isDigit(text[at])) {
      while (at < text.size() && isDigit(text[at])) ++at;
      const std::size_t length = separator(text.substr(at));
      if (length == 0) break;
      const bool followed = at + length < text.size() && isDigit(text[at + length]);
      if (length > 1 || (followed && text[at] != '.')) return true;
      if (followed && ++points > 1) return true;
      at += length;
    }
  }
  return false;
}

std::string scoped(const PromptKey& key, std::string_view prompt) {
  // lengths in front, so that no two keys run together to the same text
  return std::to_string(key.bundleDigest.size()) + ":" + key.bundleDigest +
         std::to_string(key.templateDigest.size()) + ":" + key.templateDigest + std::string(prompt);
}

}  // namespace

std::string ResponseCache::normalised(std::string_view prompt) {
  if (prompt.find('\n') != std::string_view::npos) return std::string(prompt);
  std::string made;
  for (const char byte : prompt) {
    const bool space = byte == ' ' || byte == '\t';
    if (!space) made.push_back(byte);
    else if (!made.empty() && made.back() != ' ') made.push_back(' ');
  }
  if (!made.empty() && made.back() == ' ') made.pop_back();
  return made;
}

Freshness ResponseCache::freshness(std::string_view prompt) {
  const std::string text = lowered(prompt);
  if (holdsAny(text, kMomentWords)) return Freshness::kNever;
  return holdsNumbersOfTime(text) || holdsAny(text, kDayWords) ? Freshness::kSameDay : Freshness::kAlways;
}

std::optional<PromptKey> promptKey(const Bundle& bundle, const ChatTemplate& chat, std::vector<Message> messages) {
  const auto shows = [](const Message& each) {
    return std::any_of(each.parts.begin(), each.parts.end(), [](const MessagePart& part) { return part.image; });
  };
  if (std::any_of(messages.begin(), messages.end(), shows)) return std::nullopt;
  const auto& files = bundle.manifest().files;
  const auto file = files.find(ChatTemplate::kFile);
  if (file == files.end()) throw errors::bundleFileMissing(bundle.folder(), ChatTemplate::kFile);
  PromptKey made{bundle.digest(), file->second.sha256, chat.render(messages), ""};
  for (Message& each : messages) {
    if (each.parts.size() == 1) each.parts[0].text = ResponseCache::normalised(each.parts[0].text);
  }
  made.normal = chat.render(messages);
  return made;
}

std::optional<std::string> ResponseCache::find(const PromptKey& key, const Moment& now) {
  const auto fresh = [&](const Entry& entry) {
    const double age = now.seconds - entry.made.seconds;
    return age >= 0 && age <= limits_.seconds && (!entry.sameDay || entry.made.day == now.day);
  };
  const std::pair<std::map<std::string, Entries::iterator>*, std::string> tries[] = {
      {&exact_, scoped(key, key.prompt)}, {&normal_, scoped(key, key.normal)}};
  for (const auto& [index, wanted] : tries) {
    const auto found = index->find(wanted);
    if (found == index->end()) continue;
    const auto entry = found->second;
    if (!fresh(*entry)) {
      erase(entry);
      continue;
    }
    entries_.splice(entries_.begin(), entries_, entry);
    return entry->answer;
  }
  return std::nullopt;
}

bool ResponseCache::store(const PromptKey& key, std::string answer, const Moment& now) {
  const Freshness kind = freshness(key.prompt);
  if (kind == Freshness::kNever) return false;
  Entry made{scoped(key, key.prompt), scoped(key, key.normal), std::move(answer), now,
             kind == Freshness::kSameDay};
  if (const auto old = exact_.find(made.key); old != exact_.end()) erase(old->second);
  if (limits_.entries == 0 || made.bytes() > limits_.bytes) return false;
  while (entries_.size() >= limits_.entries || bytes_ + made.bytes() > limits_.bytes) erase(std::prev(entries_.end()));
  bytes_ += made.bytes();
  entries_.push_front(std::move(made));
  exact_[entries_.front().key] = entries_.begin();
  normal_[entries_.front().normalKey] = entries_.begin();
  return true;
}

void ResponseCache::clear() {
  entries_.clear();
  exact_.clear();
  normal_.clear();
  bytes_ = 0;
}

void ResponseCache::erase(Entries::iterator entry) {
  exact_.erase(entry->key);
  const auto normal = normal_.find(entry->normalKey);
  if (normal != normal_.end() && normal->second == entry) normal_.erase(normal);
  bytes_ -= entry->bytes();
  entries_.erase(entry);
}

}  // namespace edgeexport
