// Chat templates without Jinja: the table that a bundle holds as tokenizer/chat.json.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace edgeexport {

// Text, or the place of a picture.
struct MessagePart {
  std::string text;
  bool image = false;
};

struct Message {
  std::string role;  // system, user or assistant
  std::vector<MessagePart> parts;
};

class Json;

// Messages out of JSON of the usual form: [{"role": ..., "content": text or parts}], a part being
// {"type": "text", "text": ...} or {"type": "image"}. Throws chat-template-failed.
std::vector<Message> messagesOf(const Json& list);

class ChatTemplate {
 public:
  static constexpr const char* kFile = "tokenizer/chat.json";
  static constexpr std::size_t kMaxBytes = std::size_t{1} << 20;

  // Throws tokenizer-unusable.
  static ChatTemplate parse(std::string_view json);

  // The text of a conversation that the model is to answer, to be tokenised without special tokens of the tokenizer's
  // own. Throws chat-template-failed where roles follow each other in a way that the table does not have.
  std::string render(const std::vector<Message>& messages) const;

 private:
  enum class Rule { kAsIs, kStrip, kAfterThought, kAfterThoughtStrip };

  const std::string& join(const std::string& before, const std::string& after) const;
  static std::string applied(Rule rule, std::string_view text);

  std::map<std::string, std::string> joins_;  // "user assistant": what stands between the two
  std::map<std::string, Rule> rules_;         // by role
  std::optional<std::string> image_;
};

}  // namespace edgeexport
