// What a handle stands for: a session with its bundle's text, the answer it is giving, and its governor.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "answer.h"
#include "edgeexport/bundle.h"
#include "edgeexport/chat.h"
#include "edgeexport/governor.h"
#include "edgeexport/response_cache.h"
#include "edgeexport/session.h"
#include "edgeexport/tokenizer.h"

namespace edgeexport {

// Any thread may call anything at any time, as with the session itself.
class Conversation {
 public:
  Conversation(Bundle bundle, const RuntimeOptions& options)
      : bundle_(std::move(bundle)), session_(Session::open(bundle_, options)) {}

  const Bundle& bundle() const noexcept { return bundle_; }
  Session& session() noexcept { return *session_; }

  // Read when they are first asked for. They throw tokenizer-unusable, and what Bundle::read throws.
  const Tokenizer& tokenizer();
  const ChatTemplate& chatTemplate();
  // Throws as chatTemplate and promptKey do.
  std::optional<PromptKey> key(std::vector<Message> messages) {
    return promptKey(bundle_, chatTemplate(), std::move(messages));
  }

  // Begins an answer, which ends the one before, and gives its number. Throws session-busy, and what Answer throws.
  std::int64_t begin(Prompt prompt, bool fromStart, const Sampling& sampling, std::int64_t maxTokens);
  // Throws as next does.
  bool feedPiece(std::int64_t answer);
  // The next token of the answer of this number. Throws answer-interrupted where it is not the last one that began,
  // session-busy, and what Answer::next throws.
  std::optional<std::int32_t> next(std::int64_t answer, std::string& text);
  std::optional<FinishReason> finishReason(std::int64_t answer);

  // Throws bad-policy.
  void govern(double budget, const GovernorOptions& options);
  // Without a governor the rate is 1 and there are no pauses.
  double report(double seconds, double reading);
  double pause(double tokenSeconds);

 private:
  Answer& answer(std::int64_t number);

  const Bundle bundle_;
  const std::unique_ptr<Session> session_;

  std::mutex textMutex_;  // guards the next two until they are there
  std::optional<Tokenizer> tokenizer_;
  std::optional<ChatTemplate> chatTemplate_;

  std::mutex answerMutex_;  // held by the one call that runs
  std::optional<Answer> answer_;
  std::int64_t answers_ = 0;

  std::mutex governorMutex_;
  std::optional<Governor> governor_;
};

}  // namespace edgeexport
