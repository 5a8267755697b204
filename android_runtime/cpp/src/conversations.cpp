// Whether this loader makes the same text and tokens of conversations as Python did when the bundle was built.
#include "edgeexport/conversations.h"

#include <string>
#include <vector>

#include "edgeexport/json.h"
#include "errors.h"

namespace edgeexport {
namespace {

constexpr std::size_t kMaxBytes = std::size_t{1} << 24;

}  // namespace

void checkConversations(std::string_view json, const ChatTemplate& chat, const Tokenizer& tokenizer) {
  constexpr const char* kWhere = "golden/chat.json";
  try {
    const Json turns = Json::parse(json);
    for (std::size_t i = 0; i < turns.array().size(); ++i) {
      const Json& turn = turns.array()[i];
      const std::string text = chat.render(messagesOf(turn.at("messages")));
      std::vector<std::int32_t> tokens;
      for (const Json& id : turn.at("tokens").array()) tokens.push_back(static_cast<std::int32_t>(id.integer()));
      if (text != turn.at("text").string() || tokenizer.encode(text) != tokens) {
        const std::string name = "conversation " + std::to_string(i);
        throw errors::goldenMismatch(kWhere, name + " gives another text or other tokens");
      }
    }
  } catch (const JsonError& error) {
    throw errors::goldenUnusable(kWhere, error.what());
  }
}

bool checkConversations(const Bundle& bundle) {
  const Manifest& manifest = bundle.manifest();
  const std::optional<std::string>& file = manifest.golden.chat;
  if (!file || manifest.files.count(Tokenizer::kFile) == 0 || manifest.files.count(ChatTemplate::kFile) == 0) {
    return false;
  }
  checkConversations(bundle.read(*file, kMaxBytes),
                     ChatTemplate::parse(bundle.read(ChatTemplate::kFile, ChatTemplate::kMaxBytes)),
                     Tokenizer::parse(bundle.read(Tokenizer::kFile, Tokenizer::kMaxBytes)));
  return true;
}

}  // namespace edgeexport
