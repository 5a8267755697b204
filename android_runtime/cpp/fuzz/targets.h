// What is fuzzed: each reader of files that anyone may have written, with inputs that it reads to begin with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace edgeexport::fuzz {

struct Target {
  const char* name;
  // Whether it could be read; else it was refused. What else happens is a fault.
  bool (*read)(std::string_view text);
  std::vector<std::string> (*seeds)();
};

// The target of this name, or null. `all` are all of them.
const Target* target(const std::string& name);
const std::vector<Target>& all();

}  // namespace edgeexport::fuzz
