// Chat templates without Jinja. The table is described in edgeexport/text_tables/chat.py.
#include "edgeexport/chat.h"

#include <algorithm>

#include "edgeexport/json.h"
#include "input_errors.h"
#include "utf8.h"

namespace edgeexport {

namespace {

constexpr std::string_view kSchema = "edgeexport.chat/1";
constexpr std::string_view kEndOfThought = "</think>";

// What Python's str.strip takes away.
bool isSpace(char32_t code) {
  return (code >= 0x09 && code <= 0x0D) || (code >= 0x1C && code <= 0x20) || code == 0x85 || code == 0xA0 ||
         code == 0x1680 || (code >= 0x2000 && code <= 0x200A) || code == 0x2028 || code == 0x2029 ||
         code == 0x202F || code == 0x205F || code == 0x3000;
}

std::string_view stripped(std::string_view text) {
  std::size_t first = text.size();
  std::size_t last = text.size();
  for (std::size_t at = 0; at < text.size();) {
    const utf8::Step step = utf8::next(text, at);
    if (!step.valid || !isSpace(step.code)) {
      if (first == text.size()) first = at;
      last = at + step.length;
    }
    at += step.length;
  }
  return text.substr(first, last - first);
}

MessagePart partOf(const Json& part) {
  const std::string& type = part.at("type").string();
  if (type != "text" && type != "image") throw JsonError("a part of type " + type);
  return type == "image" ? MessagePart{"", true} : MessagePart{part.at("text").string(), false};
}

}  // namespace

std::vector<Message> messagesOf(const Json& list) {
  try {
    std::vector<Message> messages;
    for (const Json& each : list.array()) {
      Message message{each.at("role").string(), {}};
      const Json& content = each.at("content");
      if (content.isString()) {
        message.parts.push_back({content.string(), false});
      } else {
        for (const Json& part : content.array()) message.parts.push_back(partOf(part));
      }
      messages.push_back(std::move(message));
    }
    return messages;
  } catch (const JsonError& error) {
    throw errors::chatTemplateFailed(std::string("these are no messages: ") + error.what());
  }
}

ChatTemplate ChatTemplate::parse(std::string_view json) {
  try {
    const Json whole = Json::parse(json, {kMaxBytes, 8});
    if (whole.at("schema").string() != kSchema) throw JsonError("its schema is not " + std::string(kSchema));
    ChatTemplate made;
    for (const auto& [name, text] : whole.at("joins").members()) made.joins_.emplace(name, text.string());
    for (const auto& [role, rule] : whole.at("content").members()) {
      const std::string& name = rule.string();
      if (name == "as-is") {
        made.rules_.emplace(role, Rule::kAsIs);
      } else if (name == "strip") {
        made.rules_.emplace(role, Rule::kStrip);
      } else if (name == "after-thought") {
        made.rules_.emplace(role, Rule::kAfterThought);
      } else if (name == "after-thought-strip") {
        made.rules_.emplace(role, Rule::kAfterThoughtStrip);
      } else {
        throw JsonError("a rule for content is unknown: " + name);
      }
    }
    if (const Json& image = whole.at("image"); !image.isNull()) made.image_ = image.string();
    return made;
  } catch (const JsonError& error) {
    throw errors::tokenizerUnusable(kFile, error.what());
  }
}

const std::string& ChatTemplate::join(const std::string& before, const std::string& after) const {
  const auto found = joins_.find(before + " " + after);
  if (found == joins_.end()) throw errors::chatTemplateFailed("no " + after + " can follow " + before);
  return found->second;
}

std::string ChatTemplate::applied(Rule rule, std::string_view text) {
  const std::size_t thought = text.rfind(kEndOfThought);
  const bool skips = rule == Rule::kAfterThought || rule == Rule::kAfterThoughtStrip;
  if (skips && thought != std::string_view::npos) {
    text.remove_prefix(thought + kEndOfThought.size());
    if (rule == Rule::kAfterThought) text.remove_prefix(std::min(text.find_first_not_of('\n'), text.size()));
  }
  if (rule == Rule::kStrip || rule == Rule::kAfterThoughtStrip) text = stripped(text);
  return std::string(text);
}

std::string ChatTemplate::render(const std::vector<Message>& messages) const {
  std::string text;
  std::string before = "start";
  for (const Message& message : messages) {
    text += join(before, message.role);
    const auto rule = rules_.find(message.role);
    if (rule == rules_.end()) throw errors::chatTemplateFailed("it has no role " + message.role);
    for (const MessagePart& part : message.parts) {
      if (!part.image) {
        text += applied(rule->second, part.text);
      } else if (image_ && message.role == "user") {
        text += *image_;
      } else {
        throw errors::chatTemplateFailed("a picture stands where the template takes none");
      }
    }
    before = message.role;
  }
  return text + join(before, "answer");
}

}  // namespace edgeexport
