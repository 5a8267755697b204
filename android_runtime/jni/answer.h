// The generation loop: choose the next token, feed it, stop for a stated reason.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "edgeexport/sampling.h"
#include "edgeexport/session.h"
#include "edgeexport/tokenizer.h"

namespace edgeexport {

// A stop id was chosen; as many tokens as asked for were given; the cache is full.
enum class FinishReason { kStop, kLength, kContext };

struct Prompt {
  std::vector<std::int32_t> tokens;  // each picture's placeholder once per feature
  std::vector<Features> features;
};

// The tokens of one answer, computed as they are asked for, as edgeexport/session/generate.py does it. A stop id ends
// it and is not part of it; its last token is not in the cache. For one thread at a time.
class Answer {
 public:
  // Computes nothing yet. `fromStart`: only in a session without tokens. Without `text` its tokens have none. Throws
  // bad-sampling, bad-token.
  Answer(Session& session, Prompt prompt, bool fromStart, const Sampling& sampling, std::int64_t maxTokens,
         std::vector<std::int64_t> stopIds, std::optional<TextStream> text);

  // Takes in a piece of a prompt that is longer than one, of kLongestPiece tokens; false where there is none left, or
  // the prompt shows something. A caller that lost interest stops in between. Throws as next does.
  bool feedPiece();

  // The next token, or nothing at the end; `text` is what became certain with it. Throws what prefill and decode throw,
  // nonfinite-logits, and answer-interrupted where the session's position was changed since the last token. A call that
  // throws may be made again.
  std::optional<std::int32_t> next(std::string& text);

  std::optional<FinishReason> finishReason() const noexcept { return reason_; }

 private:
  void requireUntouched() const;
  void feed();

  Session& session_;
  Prompt prompt_;
  const bool fromStart_;
  Chooser choose_;
  const std::size_t maxTokens_;
  const std::vector<std::int64_t> stopIds_;
  std::optional<TextStream> text_;
  std::vector<float> logits_;
  std::size_t taken_ = 0;             // tokens of the prompt that are in the cache
  std::size_t position_ = 0;          // of the session, behind what it was fed
  std::optional<std::int32_t> last_;  // the token that was given last
  std::size_t given_ = 0;
  bool fed_ = false;  // logits_ are those behind the last token
  std::optional<FinishReason> reason_;
};

}  // namespace edgeexport
