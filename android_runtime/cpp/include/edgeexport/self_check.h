// Replays a bundle's golden vectors on this very device, and reports what was measured.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "edgeexport/bundle.h"
#include "edgeexport/engine.h"
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

// Feeds the session as the reference was fed; it is reset before and after. Throws golden-mismatch where the model has
// another vocabulary, and what the session throws.
GoldenComparison measure(Session& session, const GoldenVectors& vectors);

// Measures the bundle's golden vectors of text, and compares with its gates: with the artifact's own logits where there
// are some and a gate for them, else with the reference's. Throws golden-mismatch, golden-unusable.
GoldenComparison selfCheck(const Bundle& bundle, Session& session);

// What measured: the model (Pixel 9) and its system with version and build.
struct Device {
  std::string model;
  std::string system;
};

// Opens a session, measures, and gives the JSON that `edgeexport parity BUNDLE --import` reads. It holds measurements
// and failures and no verdicts; a failure is a row of it, nothing is thrown for one.
std::string deviceReport(const Bundle& bundle, const RuntimeOptions& options, const Device& device);

}  // namespace edgeexport
