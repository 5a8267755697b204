// What a runtime or the standard library throws, as the loader's own error.
#pragma once

#include <new>
#include <stdexcept>
#include <string>

#include "errors.h"

namespace edgeexport {

// Gives what `work` gives, and throws nothing but Error. `purpose` says what there was no memory for.
template <typename Work>
auto guarded(const char* purpose, Work work) -> decltype(work()) {
  try {
    return work();
  } catch (const Error&) {
    throw;
  } catch (const std::bad_alloc&) {  // runtimes throw it through their C functions, and vectors do
    throw errors::outOfMemory(purpose);
  } catch (const std::length_error&) {  // a vector of more than any memory
    throw errors::outOfMemory(purpose);
  } catch (const std::exception& problem) {
    throw errors::internalError(problem.what());
  }
}

}  // namespace edgeexport
