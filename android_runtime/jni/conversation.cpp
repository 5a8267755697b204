// What a handle stands for: a session with its bundle's text, the answer it is giving, and its governor.
#include "conversation.h"

#include <utility>

#include "errors.h"
#include "jni_errors.h"

namespace edgeexport {
namespace {

std::unique_lock<std::mutex> taken(std::mutex& mutex) {
  std::unique_lock<std::mutex> held(mutex, std::try_to_lock);
  if (!held.owns_lock()) throw errors::sessionBusy();
  return held;
}

}  // namespace

const Tokenizer& Conversation::tokenizer() {
  const std::lock_guard<std::mutex> held(textMutex_);
  if (!tokenizer_) tokenizer_ = Tokenizer::parse(bundle_.read(Tokenizer::kFile, Tokenizer::kMaxBytes));
  return *tokenizer_;
}

const ChatTemplate& Conversation::chatTemplate() {
  const std::lock_guard<std::mutex> held(textMutex_);
  if (!chatTemplate_) chatTemplate_ = ChatTemplate::parse(bundle_.read(ChatTemplate::kFile, ChatTemplate::kMaxBytes));
  return *chatTemplate_;
}

std::int64_t Conversation::begin(Prompt prompt, bool fromStart, const Sampling& sampling, std::int64_t maxTokens) {
  const auto held = taken(answerMutex_);
  std::optional<TextStream> text;
  if (bundle_.manifest().files.count(Tokenizer::kFile) > 0) text = tokenizer().stream();
  answer_.emplace(*session_, std::move(prompt), fromStart, sampling, maxTokens, bundle_.manifest().stopIds,
                  std::move(text));
  return ++answers_;
}

Answer& Conversation::answer(std::int64_t number) {
  if (!answer_ || number != answers_) throw errors::answerInterrupted("another answer has begun since");
  return *answer_;
}

bool Conversation::feedPiece(std::int64_t number) {
  const auto held = taken(answerMutex_);
  return answer(number).feedPiece();
}

std::optional<std::int32_t> Conversation::next(std::int64_t number, std::string& text) {
  const auto held = taken(answerMutex_);
  return answer(number).next(text);
}

std::optional<FinishReason> Conversation::finishReason(std::int64_t number) {
  const auto held = taken(answerMutex_);
  return answer(number).finishReason();
}

void Conversation::govern(double budget, const GovernorOptions& options) {
  const std::lock_guard<std::mutex> held(governorMutex_);
  governor_.emplace(budget, options);
}

double Conversation::report(double seconds, double reading) {
  const std::lock_guard<std::mutex> held(governorMutex_);
  return governor_ ? governor_->update(seconds, reading) : 1.0;
}

double Conversation::pause(double tokenSeconds) {
  const std::lock_guard<std::mutex> held(governorMutex_);
  return governor_ ? governor_->pause(tokenSeconds) : 0.0;
}

}  // namespace edgeexport
