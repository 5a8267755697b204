// Counts what the loader's own code allocates for each token: malloc is replaced, and calls that come from this program
// (the loader and the C++ library are linked into it) are counted; those of the runtime's library are not.
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "check.h"
#include "edgeexport/session.h"

extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);
extern char __executable_start;
extern char etext;
}

namespace {

std::atomic<std::size_t> counted{0};

void count(const void* caller) {
  const char* place = static_cast<const char*>(caller);
  if (place >= &__executable_start && place < &etext) ++counted;
}

}  // namespace

extern "C" {
void* malloc(std::size_t size) {
  count(__builtin_return_address(0));
  return __libc_malloc(size);
}
void* calloc(std::size_t number, std::size_t size) {
  count(__builtin_return_address(0));
  return __libc_calloc(number, size);
}
void* realloc(void* old, std::size_t size) {
  count(__builtin_return_address(0));
  return __libc_realloc(old, size);
}
void* aligned_alloc(std::size_t alignment, std::size_t size) {
  count(__builtin_return_address(0));
  return __libc_memalign(alignment, size);
}
int posix_memalign(void** made, std::size_t alignment, std::size_t size) {
  count(__builtin_return_address(0));
  *made = __libc_memalign(alignment, size);
  return *made == nullptr ? ENOMEM : 0;
}
}

// test-allocations BUNDLE ONNXRUNTIME LITERT CACHE
int main(int arguments, char** values) {
  CHECK(arguments == 5);
  edgeexport::RuntimeOptions options;
  options.threads = 2;
  options.onnxruntime = values[2];
  options.litert = values[3];
  options.cacheFolder = values[4];
  const auto session = edgeexport::Session::open(edgeexport::Bundle::open(values[1]), options);
  CHECK(counted > 0);  // opening allocates: the counter works
  std::vector<float> logits(session->vocab());
  const std::int32_t prompt[] = {1, 2, 3, 4, 5};
  session->prefill(prompt, 5, logits.data());
  session->decode(session->greedy(), logits.data());
  const std::size_t before = counted;
  for (int i = 0; i < 40; ++i) session->decode(session->greedy(), logits.data());
  std::printf("%zu allocations in 40 tokens\n", counted - before);
  CHECK(counted == before);
}
