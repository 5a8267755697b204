// libFuzzer's entry: FUZZ_TARGET in the environment names what is read.
#include <cstdio>
#include <cstdlib>

#include "targets.h"

namespace {

const edgeexport::fuzz::Target& chosen() {
  static const edgeexport::fuzz::Target* const found = [] {
    const char* name = std::getenv("FUZZ_TARGET");
    const auto* target = edgeexport::fuzz::target(name == nullptr ? "" : name);
    if (target == nullptr) {
      std::fputs("FUZZ_TARGET is none of:", stderr);
      for (const auto& each : edgeexport::fuzz::all()) std::fprintf(stderr, " %s", each.name);
      std::fputs("\n", stderr);
      std::exit(2);
    }
    return target;
  }();
  return *found;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  chosen().read({reinterpret_cast<const char*>(data), size});
  return 0;
}
