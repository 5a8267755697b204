// Adds the time of a scope to a total: what a runtime's calls take, as opposed to the loader's own work.
#pragma once

#include <chrono>

namespace edgeexport {

class Stopwatch {
 public:
  explicit Stopwatch(double& seconds) : seconds_(seconds), started_(std::chrono::steady_clock::now()) {}
  ~Stopwatch() { seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - started_).count(); }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

 private:
  double& seconds_;
  std::chrono::steady_clock::time_point started_;
};

}  // namespace edgeexport
