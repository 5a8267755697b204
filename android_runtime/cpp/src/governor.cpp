// How fast to decode so that a budget of power or heat is kept.
#include "edgeexport/governor.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "input_errors.h"

namespace edgeexport {

namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();

void require(bool good, const char* option, double value, const char* allowed) {
  if (!good) throw errors::badPolicy(option, value, allowed);  // a NaN is not good
}

}  // namespace

Governor::Governor(double budget, const GovernorOptions& options)
    : options_(options), budget_(budget), rate_(options.fastest), now_(-kNever), changed_(-kNever),
      calmSince_(kNever) {
  require(budget > 0 && budget < kNever, "budget", budget, "above 0");
  require(options.high > 0 && options.high <= 1, "high", options.high, "above 0, up to 1");
  require(options.low > 0 && options.low < options.high, "low", options.low, "above 0, below high");
  require(options.down > 0 && options.down < 1, "down", options.down, "above 0, below 1");
  require(options.up > 1 && options.up < kNever, "up", options.up, "above 1");
  require(options.fastest > 0 && options.fastest <= 1, "fastest", options.fastest, "above 0, up to 1");
  require(options.slowest > 0 && options.slowest <= options.fastest, "slowest", options.slowest,
          "above 0, up to fastest");
  require(options.hold >= 0 && options.hold < kNever, "hold", options.hold, "0 and above");
  require(options.calm >= 0 && options.calm < kNever, "calm", options.calm, "0 and above");
}

double Governor::update(double seconds, double reading) {
  if (!std::isfinite(seconds) || seconds < now_ || !std::isfinite(reading) || reading < 0) return rate_;
  now_ = seconds;
  const double load = reading / budget_;
  if (load >= options_.low) calmSince_ = kNever;
  if (load > options_.high) {
    if (seconds - changed_ >= options_.hold) {
      rate_ = std::max(options_.slowest, rate_ * options_.down);
      changed_ = seconds;
    }
  } else if (load < options_.low) {
    calmSince_ = std::min(calmSince_, seconds);
    if (seconds - std::max(calmSince_, changed_) >= options_.calm) {
      rate_ = std::min(options_.fastest, rate_ * options_.up);
      changed_ = seconds;
    }
  }
  return rate_;
}

double Governor::pause(double tokenSeconds) const noexcept { return tokenSeconds * (1.0 / rate_ - 1.0); }

double Governor::loadOfStatus(int status) noexcept {
  if (status <= 0) return 0.0;
  return status == 1 ? 0.8 : 1.0;
}

}  // namespace edgeexport
