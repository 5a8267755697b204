// What the tests check with: a failed check ends the program with the place and the expression.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

#include "edgeexport/error.h"

#define CHECK(condition)                                                             \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                  \
    }                                                                                \
  } while (false)

// The code of the Error that a call throws, or nothing.
template <typename Call>
std::string codeOf(Call call) {
  try {
    call();
  } catch (const edgeexport::Error& problem) {
    return problem.code();
  }
  return "";
}
