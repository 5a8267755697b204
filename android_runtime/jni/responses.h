// What a handle of a response cache stands for: a cache that sessions and threads share.
#pragma once

#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "edgeexport/response_cache.h"

namespace edgeexport {

class Responses {
 public:
  explicit Responses(const CacheLimits& limits) : cache_(limits) {}

  std::optional<std::string> find(const PromptKey& key, const Moment& now) {
    const std::lock_guard<std::mutex> held(mutex_);
    return cache_.find(key, now);
  }
  bool store(const PromptKey& key, std::string answer, const Moment& now) {
    const std::lock_guard<std::mutex> held(mutex_);
    return cache_.store(key, std::move(answer), now);
  }
  void clear() {
    const std::lock_guard<std::mutex> held(mutex_);
    cache_.clear();
  }
  std::size_t size() {
    const std::lock_guard<std::mutex> held(mutex_);
    return cache_.size();
  }

 private:
  std::mutex mutex_;
  ResponseCache cache_;
};

}  // namespace edgeexport
