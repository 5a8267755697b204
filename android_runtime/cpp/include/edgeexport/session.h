// One conversation with the decoder of a bundle: the contract of edgeexport's sessions in every language.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "edgeexport/bundle.h"
#include "edgeexport/engine.h"
#include "edgeexport/images.h"
#include "edgeexport/inputs.h"
#include "edgeexport/mel.h"

namespace edgeexport {

// Tokens in, logits out, at batch 1; the cache is changed in place, so truncate only moves the position.
//
// Any thread may call anything at any time, but calls do not queue: one that comes while another runs throws
// session-busy. close() from another thread lets a running call end at its next piece (with session-closed), waits for
// it, and releases the runtime. Only the destructor must not race with calls.
//
// Decoding allocates no memory of the loader's after the first token.
class Session {
 public:
  // Opens the decoder, and the embedding where it is apart; encoders are opened when they are first used. Throws what
  // openDecoder throws, and bundle-bad-preprocess.
  static std::unique_ptr<Session> open(const Bundle& bundle, const RuntimeOptions& options = {});

  // Over an engine that is open already; `inputs` for models with an embedding of their own.
  explicit Session(std::unique_ptr<DecoderEngine> engine, std::unique_ptr<Inputs> inputs = nullptr);
  ~Session() { close(); }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  std::size_t position() const noexcept { return position_.load(); }  // tokens in the cache
  std::size_t context() const noexcept { return context_; }           // tokens that the cache can hold
  std::size_t vocab() const noexcept { return vocab_; }               // token ids

  // Seconds inside the runtime so far, of the decoder and of what embeds its tokens. Throws session-busy,
  // session-closed.
  double runtimeSeconds();

  // What the model sees or hears: to be given to prefill. Throws modality-missing, bundle-no-variant, runtime-failed,
  // session-busy, session-closed, and what preparing the picture or sound and opening the encoder throw.
  Features encodeImage(const ImageView& image);
  Features encodeAudio(const SoundView& sound);
  // The prompt with each picture's one placeholder repeated once per feature. Throws image-tokens-mismatch,
  // session-busy, session-closed.
  std::vector<std::int32_t> expand(const std::vector<std::int32_t>& tokens, const std::vector<Features>& features);

  // Appends one or more tokens, and the features of the pictures and sounds that they show, in order. Writes the logits
  // [vocab] of the last token to `logits`, unless it is null. The position stays where it was when this throws
  // bad-token, context-full, modality-missing, image-tokens-mismatch, runtime-failed, session-busy, session-closed.
  void prefill(const std::int32_t* tokens, std::size_t count, float* logits,
               const std::vector<Features>& features = {});

  // Appends one token of an answer: as prefill, but an image token is a word like any other here.
  void decode(std::int32_t token, float* logits);

  // The id of the largest logit of the last call, the lowest of equal ones. Throws nonfinite-logits, bad-token before
  // the first call, session-busy, session-closed.
  std::int32_t greedy();

  // Forgets all tokens but the first `length`. Throws bad-truncate, session-busy, session-closed.
  void truncate(std::int64_t length);
  void reset() { truncate(0); }

  // Releases the cache and the runtime; calling it again does nothing.
  void close() noexcept;

 private:
  class Use;

  void append(const std::int32_t* tokens, std::size_t count, const std::vector<Features>& features, bool written,
              float* logits);

  const std::size_t context_;
  const std::size_t vocab_;
  std::mutex mutex_;  // held by the one call that runs; guards all below but the atomics
  std::atomic<bool> closed_{false};
  std::atomic<std::size_t> position_{0};
  std::unique_ptr<DecoderEngine> engine_;
  std::unique_ptr<Inputs> inputs_;
  const float* logits_ = nullptr;  // the engine's, of the last call
};

}  // namespace edgeexport
