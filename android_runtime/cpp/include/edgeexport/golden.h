// A bundle's golden vectors: what the reference was asked and shown, and how far a session's answers are from its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "edgeexport/bundle.h"
#include "edgeexport/session.h"

namespace edgeexport {

// A prompt, what follows it, and logits [steps, vocab] after the prompt and after each token that follows.
struct GoldenVectors {
  std::vector<std::int32_t> prompt;
  std::vector<std::int32_t> answer;
  std::size_t steps = 0;
  std::size_t vocab = 0;
  std::vector<float> reference;  // of the original model
  std::vector<float> artifact;   // of this artifact where it was built; empty where it was not recorded
  std::map<std::string, std::vector<float>> prepared;  // "input.0.patches": rows of what an encoder is given

  // Throws golden-unusable, and what Bundle::read throws.
  static GoldenVectors read(const Bundle& bundle, const std::string& file);
};

// How far a session's logits are from the golden vectors'. NaN where a number is not finite.
struct GoldenComparison {
  std::size_t steps = 0;
  std::optional<double> maxAbs;  // largest difference from the artifact's
  double kl = 0;                 // mean divergence from the reference, in nats
  double top1 = 0;               // share of steps where both choose alike
};

// The bundle's prompts: the one of text alone, named "text", and those with pictures and sound. Throws golden-unusable
// where the bundle has none.
std::vector<Golden::Case> goldenCases(const Bundle& bundle);

// Feeds the session as the reference was fed, pictures and sound from their files on; it is reset before and after.
// Throws golden-mismatch where the model has another vocabulary, or its encoders would be given something else than
// where the bundle was built; golden-unusable, and what Bundle::read and the session throw.
GoldenComparison replay(const Bundle& bundle, const Golden::Case& golden, Session& session);

}  // namespace edgeexport
