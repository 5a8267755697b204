// How fast to decode so that a budget of power or heat is kept.
#pragma once

namespace edgeexport {

struct GovernorOptions {
  double high = 0.9;     // above this part of the budget the rate is lowered
  double low = 0.7;      // below this part it is restored; between the two it stays
  double down = 0.8;     // factor of a step down
  double up = 1.1;       // factor of a step up
  double slowest = 0.1;  // bounds of the rate; 1 is as fast as the device can
  double fastest = 1.0;
  double hold = 5.0;     // seconds that a step down is given to show its effect before the next
  double calm = 10.0;    // seconds that readings must stay below `low` before a step up
};

// Turns readings into a decode rate. The same readings give the same rates: it has no clock and no thread of its own.
//
// The budget and the readings are of one unit, whichever the device can measure: watts, degrees above the ambient
// temperature, or Android's thermal headroom, whose budget is 1. Android's thermal status becomes a reading by
// `loadOfStatus`, with a budget of 1.
class Governor {
 public:
  // Throws bad-policy.
  explicit Governor(double budget, const GovernorOptions& options = {});

  // The rate after a reading that was taken at `seconds` of a clock that never goes back. A reading that is no number
  // (getThermalHeadroom gives NaN when it is asked too often), is negative, or is older than the last changes nothing.
  double update(double seconds, double reading);

  // Part of the full decode rate, from `slowest` to `fastest`.
  double rate() const noexcept { return rate_; }

  // Seconds to wait after a token that took `tokenSeconds` to compute.
  double pause(double tokenSeconds) const noexcept;

  // A reading for PowerManager's THERMAL_STATUS_NONE (0) to THERMAL_STATUS_SHUTDOWN (6), against a budget of 1: light
  // heat holds the rate, moderate heat and more lower it.
  static double loadOfStatus(int status) noexcept;

 private:
  GovernorOptions options_;
  double budget_;
  double rate_;
  double now_;         // of the last reading
  double changed_;     // when the rate was lowered or raised last
  double calmSince_;   // since when readings have been below `low`; infinite while they are not
};

}  // namespace edgeexport
