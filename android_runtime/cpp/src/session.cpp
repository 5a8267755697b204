// Feeds tokens to an open decoder, keeps its position, refuses misuse.
#include "edgeexport/session.h"

#include <algorithm>
#include <cmath>

#include "edgeexport/prepare.h"
#include "errors.h"
#include "guard.h"

namespace edgeexport {
namespace {

constexpr const char* kTokens = "to compute with these tokens";
constexpr const char* kMedium = "to take in the picture or sound";

}  // namespace

// The right to use the session, for the time of one call.
class Session::Use {
 public:
  explicit Use(Session& session) : held_(session.mutex_, std::try_to_lock) {
    if (session.closed_) throw errors::sessionClosed();
    if (!held_.owns_lock()) throw errors::sessionBusy();
  }

 private:
  std::unique_lock<std::mutex> held_;
};

std::unique_ptr<Session> Session::open(const Bundle& bundle, const RuntimeOptions& options) {
  return guarded("to open the session", [&] {
    auto engine = openDecoder(bundle, options);
    std::unique_ptr<Inputs> inputs;
    if (engine->width() > 0) inputs = std::make_unique<Inputs>(bundle, options, engine->width(), engine->context());
    if (engine->turns() != (inputs && inputs->turns())) {
      throw errors::bundleBadManifest("decoder", "it takes M-RoPE positions, or the contract of prompts makes some, not both");
    }
    return std::make_unique<Session>(std::move(engine), std::move(inputs));
  });
}

Session::Session(std::unique_ptr<DecoderEngine> engine, std::unique_ptr<Inputs> inputs)
    : context_(engine->context()), vocab_(engine->vocab()), engine_(std::move(engine)), inputs_(std::move(inputs)) {}

double Session::runtimeSeconds() {
  const Use use(*this);
  return engine_->runtimeSeconds() + (inputs_ ? inputs_->runtimeSeconds() : 0.0);
}

Features Session::encodeImage(const ImageView& image) {
  const Use use(*this);
  if (!inputs_) throw errors::modalityMissing("picture", "vision");
  return guarded(kMedium, [&] { return inputs_->encode(prepareImage(image, inputs_->contract())); });
}

Features Session::encodeAudio(const SoundView& sound) {
  const Use use(*this);
  if (!inputs_) throw errors::modalityMissing("sound", "audio");
  return guarded(kMedium, [&] { return inputs_->encode(prepareAudio(sound, inputs_->contract())); });
}

std::vector<std::int32_t> Session::expand(const std::vector<std::int32_t>& tokens,
                                          const std::vector<Features>& features) {
  const Use use(*this);
  return guarded(kTokens, [&] { return inputs_ ? inputs_->expand(tokens, features) : tokens; });
}

void Session::prefill(const std::int32_t* tokens, std::size_t count, float* logits,
                      const std::vector<Features>& features) {
  const Use use(*this);
  guarded(kTokens, [&] { append(tokens, count, features, false, logits); });
}

void Session::decode(std::int32_t token, float* logits) {
  static const std::vector<Features> kNone;
  const Use use(*this);
  guarded(kTokens, [&] { append(&token, 1, kNone, true, logits); });
}

void Session::append(const std::int32_t* tokens, std::size_t count, const std::vector<Features>& features, bool written,
                     float* logits) {
  if (tokens == nullptr || count == 0) throw errors::badToken("one or more ids are needed");
  for (std::size_t i = 0; i < count; ++i) {
    if (tokens[i] < 0 || static_cast<std::size_t>(tokens[i]) >= vocab_) {
      throw errors::badToken("id " + std::to_string(tokens[i]) + " is not in 0.." + std::to_string(vocab_ - 1));
    }
  }
  const std::size_t position = position_;
  if (count > context_ - position) throw errors::contextFull(position, count, context_);
  if (!inputs_ && !features.empty()) throw errors::modalityMissing("picture or sound", "embed");

  Piece whole;
  whole.count = count;
  whole.tokens = tokens;
  if (inputs_) whole = inputs_->feed(tokens, count, features, written, position);
  logits_ = nullptr;
  const float* found = nullptr;
  for (std::size_t start = 0; start < count; start += kLongestPiece) {
    if (closed_) throw errors::sessionClosed();
    Piece piece = whole;
    piece.count = std::min(kLongestPiece, count - start);
    if (whole.tokens != nullptr) piece.tokens += start;
    if (whole.embeddings != nullptr) piece.embeddings += start * engine_->width();
    if (whole.rope != nullptr) piece.rope += start;
    found = engine_->step(piece, position + start);
  }
  if (closed_) throw errors::sessionClosed();
  if (inputs_) inputs_->accept(position, count, features);
  position_ = position + count;
  logits_ = found;
  if (logits != nullptr) std::copy_n(found, vocab_, logits);
}

std::int32_t Session::greedy() {
  const Use use(*this);
  if (logits_ == nullptr) throw errors::badToken("no token was given yet, so there are no logits");
  const float* logits = logits_;
  std::size_t best = 0;
  for (std::size_t i = 1; i < vocab_; ++i) {
    if (logits[i] <= logits[best]) continue;
    best = i;
    if (std::isnan(logits[i])) break;
  }
  if (!std::isfinite(logits[best])) throw errors::nonfiniteLogits(position_);
  return static_cast<std::int32_t>(best);
}

void Session::truncate(std::int64_t length) {
  const Use use(*this);
  const std::size_t position = position_;
  if (length < 0 || static_cast<std::uint64_t>(length) > position) throw errors::badTruncate(length, position);
  position_ = static_cast<std::size_t>(length);
  if (inputs_) inputs_->truncate(position_);
}

void Session::close() noexcept {
  closed_ = true;
  const std::lock_guard<std::mutex> last(mutex_);
  logits_ = nullptr;
  engine_.reset();
  inputs_.reset();
}

}  // namespace edgeexport
