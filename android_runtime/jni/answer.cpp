// The generation loop: choose the next token, feed it, stop for a stated reason.
#include "answer.h"

#include <algorithm>

#include "errors.h"
#include "input_errors.h"
#include "jni_errors.h"

namespace edgeexport {
namespace {

std::size_t checked(std::int64_t maxTokens) {
  if (maxTokens < 1) throw errors::badSampling("max_tokens", static_cast<double>(maxTokens), "1 and above");
  return static_cast<std::size_t>(maxTokens);
}

}  // namespace

Answer::Answer(Session& session, Prompt prompt, bool fromStart, const Sampling& sampling, std::int64_t maxTokens,
               std::vector<std::int64_t> stopIds, std::optional<TextStream> text)
    : session_(session),
      prompt_(std::move(prompt)),
      fromStart_(fromStart),
      choose_(sampling, session.vocab(), prompt_.tokens),
      maxTokens_(checked(maxTokens)),
      stopIds_(std::move(stopIds)),
      text_(std::move(text)),
      logits_(session.vocab()) {}

void Answer::requireUntouched() const {
  const std::size_t found = session_.position();
  if (found != position_) {
    throw errors::answerInterrupted("the session is at position " + std::to_string(found) + ", and the answer was at " +
                                    std::to_string(position_));
  }
}

bool Answer::feedPiece() {
  const std::size_t left = prompt_.tokens.size() - taken_;
  if (left <= kLongestPiece || !prompt_.features.empty() || last_ || fed_) return false;
  if (fromStart_ || taken_ > 0) requireUntouched();
  if (taken_ == 0 && left > session_.context() - session_.position()) {  // none of it, then
    throw errors::contextFull(session_.position(), left, session_.context());
  }
  session_.prefill(prompt_.tokens.data() + taken_, kLongestPiece, nullptr);
  taken_ += kLongestPiece;
  position_ = session_.position();
  return true;
}

void Answer::feed() {
  if (fromStart_ || last_ || taken_ > 0) requireUntouched();
  if (last_) {
    session_.decode(*last_, logits_.data());
  } else {
    session_.prefill(prompt_.tokens.data() + taken_, prompt_.tokens.size() - taken_, logits_.data(), prompt_.features);
  }
  position_ = session_.position();
  fed_ = true;
}

std::optional<std::int32_t> Answer::next(std::string& text) {
  text.clear();
  if (reason_) return std::nullopt;
  if (!fed_) feed();
  const std::int32_t token = choose_.choose(logits_.data(), position_);
  if (std::find(stopIds_.begin(), stopIds_.end(), token) != stopIds_.end()) {
    reason_ = FinishReason::kStop;
    if (text_) text = text_->flush();
    return std::nullopt;
  }
  ++given_;
  last_ = token;
  fed_ = false;
  if (given_ == maxTokens_) {
    reason_ = FinishReason::kLength;
  } else if (position_ == session_.context()) {
    reason_ = FinishReason::kContext;
  }
  if (text_) text = text_->push(token) + (reason_ ? text_->flush() : "");
  return token;
}

}  // namespace edgeexport
