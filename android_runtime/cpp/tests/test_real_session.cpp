// A bundle in its real runtime: several threads, closing while decoding, a full cache, too little memory.
#include <sys/resource.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "edgeexport/session.h"

namespace {

using edgeexport::Bundle;
using edgeexport::RuntimeOptions;
using edgeexport::Session;

void hammer(const Bundle& bundle, const RuntimeOptions& options) {
  const auto session = Session::open(bundle, options);
  std::atomic<std::size_t> made{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] {
      for (int k = 0; k < 30; ++k) {
        const std::string code = codeOf([&] { session->decode(k + 1, nullptr); });
        CHECK(code.empty() || code == "session-busy");
        if (code.empty()) ++made;
      }
    });
  }
  for (std::thread& each : threads) each.join();
  CHECK(made > 0 && session->position() == made);
}

void closeWhileDecoding(const Bundle& bundle, const RuntimeOptions& options) {
  const auto session = Session::open(bundle, options);
  std::atomic<int> decoded{0};
  std::string code;
  std::thread decoding([&] {
    while (code.empty()) {
      code = codeOf([&] { session->decode(5, nullptr); });
      ++decoded;
    }
  });
  while (decoded < 2) std::this_thread::yield();
  session->close();
  decoding.join();
  CHECK(code == "session-closed");
}

// What is behind the cache's end stays out of reach, and the session goes on.
void fillCache(const Bundle& bundle, const RuntimeOptions& options) {
  const auto session = Session::open(bundle, options);
  const std::vector<std::int32_t> prompt(session->context() - 1, 3);
  session->prefill(prompt.data(), prompt.size(), nullptr);
  session->decode(4, nullptr);
  CHECK(codeOf([&] { session->decode(4, nullptr); }) == "context-full");
  session->truncate(3);
  session->decode(4, nullptr);
  CHECK(session->position() == 4);
}

void tooLittleMemory(const Bundle& bundle, const RuntimeOptions& options) {
  rlimit before{};
  ::getrlimit(RLIMIT_AS, &before);
  const rlimit little{std::size_t{100} << 20, before.rlim_max};
  ::setrlimit(RLIMIT_AS, &little);
  const std::string code = codeOf([&] { Session::open(bundle, options); });
  ::setrlimit(RLIMIT_AS, &before);
  std::printf("with 100 MiB of address space: %s\n", code.c_str());
  CHECK(code == "artifact-does-not-open" || code == "out-of-memory" || code == "runtime-missing");
}

}  // namespace

// test-real-session BUNDLE ONNXRUNTIME LITERT CACHE [memory]
int main(int count, char** values) {
  CHECK(count >= 5);
  RuntimeOptions options;
  options.threads = 1;  // a pool of the runtime's would only wait for itself under a sanitizer
  options.onnxruntime = values[2];
  options.litert = values[3];
  options.cacheFolder = values[4];
  const Bundle bundle = Bundle::open(values[1]);
  if (count > 5) {
    tooLittleMemory(bundle, options);
    return 0;
  }
  hammer(bundle, options);
  closeWhileDecoding(bundle, options);
  fillCache(bundle, options);
  std::printf("real session: all held\n");
}
