// Answers to frequent prompts, kept for a while.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "edgeexport/bundle.h"
#include "edgeexport/chat.h"

namespace edgeexport {

// What an answer depends on. Greedy answers to text alone belong here, since pictures, sounds and a seed are not part
// of the key.
struct PromptKey {
  std::string bundleDigest;    // of the manifest
  std::string templateDigest;  // of tokenizer/chat.json, or of whatever made the prompt
  std::string prompt;          // the whole text that the model is given, its system message in it
  std::string normal;          // the prompt that it would be without needless spaces
};

// Of a conversation that a bundle's model is to answer from the start; each message of one part is normalised by
// itself. Nothing where a picture is shown. Throws chat-template-failed,
// bundle-file-missing where the bundle has no template.
std::optional<PromptKey> promptKey(const Bundle& bundle, const ChatTemplate& chat, std::vector<Message> messages);

// The time of a question, given by the caller: seconds of any clock, and the number of the local calendar day. Answers
// of a later time, as there are after a clock was set back, are not given.
struct Moment {
  double seconds = 0;
  std::int64_t day = 0;
};

// How long an answer to a prompt may be given again: a prompt that speaks of a date, or of today, is another question
// tomorrow; one that speaks of the present moment is another one at once.
enum class Freshness { kAlways, kSameDay, kNever };

struct CacheLimits {
  std::size_t entries = 256;
  std::size_t bytes = std::size_t{1} << 20;  // of keys and answers
  double seconds = 7 * 86400.0;              // age
};

// For one thread at a time. The least recently used entry goes first.
class ResponseCache {
 public:
  explicit ResponseCache(const CacheLimits& limits = {}) : limits_(limits) {}

  // The answer to this very prompt; else to one that differs in nothing but its spaces.
  std::optional<std::string> find(const PromptKey& key, const Moment& now);

  // Keeps an answer; false where it must not be kept, or is too large.
  bool store(const PromptKey& key, std::string answer, const Moment& now);

  void clear();
  std::size_t size() const noexcept { return entries_.size(); }
  std::size_t bytes() const noexcept { return bytes_; }

  // The text without spaces at its ends and with runs of them as one. A text of several lines stays as it is: there,
  // spaces may mean something.
  static std::string normalised(std::string_view prompt);
  static Freshness freshness(std::string_view prompt);

 private:
  struct Entry {
    std::string key;
    std::string normalKey;
    std::string answer;
    Moment made;
    bool sameDay;

    std::size_t bytes() const noexcept { return 2 * key.size() + 2 * normalKey.size() + answer.size(); }
  };
  using Entries = std::list<Entry>;

  void erase(Entries::iterator entry);

  CacheLimits limits_;
  Entries entries_;  // the most recently used first
  std::map<std::string, Entries::iterator> exact_;
  std::map<std::string, Entries::iterator> normal_;  // the newest of those that have this normal form
  std::size_t bytes_ = 0;
};

}  // namespace edgeexport
