// Whether a bundle computes on this very device what it computed where it was built, and a report of what was measured.
#pragma once

#include <string>

#include "edgeexport/bundle.h"
#include "edgeexport/engine.h"
#include "edgeexport/golden.h"
#include "edgeexport/session.h"

namespace edgeexport {

// Renders and tokenises the bundle's conversations anew, where it has some and this loader's tables for them; replays
// its golden vectors, of pictures and sound too, and compares each with the bundle's gates: with the artifact's own
// logits where there are some and a gate for them, else with the reference's. Gives all steps together with the worst
// of each number. Throws golden-mismatch, golden-unusable, and what replay and checkConversations throw.
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
