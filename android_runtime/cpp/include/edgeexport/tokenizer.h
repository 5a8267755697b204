// Text to token ids and back: the byte-level BPE that a bundle holds as tokenizer/bpe.bin.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace edgeexport {

class TextStream;

// Can be used by several threads at once: nothing of it changes.
class Tokenizer {
 public:
  static constexpr const char* kFile = "tokenizer/bpe.bin";
  static constexpr std::size_t kMaxBytes = std::size_t{256} << 20;

  // Reads the bytes of kFile, which are not needed afterwards. Throws tokenizer-unusable.
  static Tokenizer parse(std::string_view data);

  // One more than the highest id.
  std::size_t vocab() const noexcept;

  // The ids of a text; special tokens written out in it are recognised. With `addSpecialTokens` the tokenizer puts
  // its own around it: right for plain text, wrong for a rendered chat. Throws bad-text for what is not UTF-8.
  std::vector<std::int32_t> encode(std::string_view text, bool addSpecialTokens = false) const;

  // The text of all ids together; bytes that are no UTF-8 become U+FFFD, ids without a token add nothing.
  // Throws bad-token for a negative id.
  std::string decode(const std::vector<std::int32_t>& ids, bool skipSpecialTokens = true) const;

  // A streaming decoder for one answer, which may outlive this object.
  TextStream stream(bool skipSpecialTokens = true) const;

 private:
  friend class TextStream;
  struct Tables;
  explicit Tokenizer(std::shared_ptr<const Tables> tables) : tables_(std::move(tables)) {}

  std::shared_ptr<const Tables> tables_;
};

// Turns ids into text as they come. All pieces together equal Tokenizer::decode of all ids, and no piece ends within a
// character: its bytes are held back until it is whole, or can no longer become so.
class TextStream {
 public:
  // The text that became certain with this token; often its own, sometimes "". Throws bad-token.
  std::string push(std::int32_t id);

  // What was still held back, as U+FFFD. The stream starts anew after it.
  std::string flush();

 private:
  friend class Tokenizer;
  TextStream(std::shared_ptr<const Tokenizer::Tables> tables, bool skip)
      : tables_(std::move(tables)), skip_(skip) {}

  std::shared_ptr<const Tokenizer::Tables> tables_;
  bool skip_;
  std::string held_;  // the first bytes of a character
};

}  // namespace edgeexport
