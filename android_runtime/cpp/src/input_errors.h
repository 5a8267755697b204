// Failures of texts, pictures, sound and settings: one function per code, as in errors.h.
#pragma once

#include <cstddef>
#include <string>

#include "edgeexport/error.h"

namespace edgeexport::errors {

inline Error tokenizerUnusable(const std::string& where, const std::string& problem) {
  return {"tokenizer-unusable", "the tokenizer cannot be used", where, problem,
          "download the bundle again, or build it again with --force"};
}

inline Error chatTemplateFailed(const std::string& problem) {
  return {"chat-template-failed", "the chat template cannot render this conversation", "the conversation", problem,
          "check the roles and the order of the messages"};
}

inline Error bundleBadPreprocess(const std::string& where, const std::string& problem) {
  return {"bundle-bad-preprocess", "the bundle's contract of pictures and sound cannot be used", where, problem,
          "download the bundle again, or build it again with --force"};
}

inline Error badSampling(const std::string& option, double value, const std::string& allowed) {
  return {"bad-sampling", option + " cannot be " + std::to_string(value), option, "allowed: " + allowed,
          "pass a value of " + option + " in that range"};
}

inline Error notAnImage(const std::string& problem) {
  return {"not-an-image", "this is no picture that can be read", "the array of pixels", problem,
          "pass bytes RGB RGB ..., row by row from the top, without gaps"};
}

inline Error imageTooLarge(const std::string& problem, std::size_t limit) {
  return {"image-too-large", "the picture is too large", "the array of pixels", problem,
          "make it smaller: at most " + std::to_string(limit) + " pixels are read"};
}

inline Error imageTooNarrow(std::size_t height, std::size_t width, int limit) {
  return {"image-too-narrow", "the picture is too narrow",
          std::to_string(height) + " x " + std::to_string(width) + " pixels",
          "its longer side may be at most " + std::to_string(limit) + " times its shorter one",
          "crop the picture"};
}

inline Error gridNotBuilt(const std::string& grid) {
  return {"grid-not-built", "the bundle's vision component was not built for this grid of patches", grid,
          "the contract does not list it",
          "take the grid that chooseGrid gives, or add a screen of this size to the target and build again"};
}

inline Error badSound(const std::string& problem) {
  return {"bad-sound", "these samples cannot be used as sound", "the samples", problem,
          "pass finite samples of one channel, full scale -1 to 1"};
}

inline Error badSampleRate(int rate, int low, int high) {
  return {"bad-sample-rate", "sound at " + std::to_string(rate) + " Hz cannot be used", "the sample rate",
          "rates from " + std::to_string(low) + " to " + std::to_string(high) + " Hz are resampled",
          "record or convert it at 16000 Hz"};
}

inline Error soundTooLong(double seconds, double limit) {
  return {"sound-too-long", "the sound is too long", "the samples",
          "it has " + std::to_string(seconds) + " seconds, at most " + std::to_string(limit) + " are read",
          "cut it"};
}

// Codes of devices alone.

inline Error badText(const std::string& problem) {
  return {"bad-text", "the text is not UTF-8", "the text", problem, "pass text in UTF-8"};
}

inline Error badPolicy(const std::string& option, double value, const std::string& allowed) {
  return {"bad-policy", option + " cannot be " + std::to_string(value), option, "allowed: " + allowed,
          "pass a value of " + option + " in that range"};
}

}  // namespace edgeexport::errors
