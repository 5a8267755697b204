// Numbers that stand for objects: another language keeps the number, and a wrong one finds nothing.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

namespace edgeexport {

// No number is given twice. Whoever found an object keeps it alive for as long as it is used.
template <typename Object>
class Handles {
 public:
  std::int64_t add(std::shared_ptr<Object> object) {
    const std::lock_guard<std::mutex> held(mutex_);
    objects_.emplace(++last_, std::move(object));
    return last_;
  }

  // Null where there is none, or no more.
  std::shared_ptr<Object> find(std::int64_t handle) const {
    const std::lock_guard<std::mutex> held(mutex_);
    const auto found = objects_.find(handle);
    return found == objects_.end() ? nullptr : found->second;
  }

  // What the handle stood for until now, or null.
  std::shared_ptr<Object> remove(std::int64_t handle) {
    const std::lock_guard<std::mutex> held(mutex_);
    const auto found = objects_.find(handle);
    if (found == objects_.end()) return nullptr;
    std::shared_ptr<Object> object = std::move(found->second);
    objects_.erase(found);
    return object;
  }

 private:
  mutable std::mutex mutex_;
  std::map<std::int64_t, std::shared_ptr<Object>> objects_;
  std::int64_t last_ = 0;
};

}  // namespace edgeexport
