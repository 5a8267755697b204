// Failures of Java's side alone: one function per code, as in errors.h.
#pragma once

#include <string>

#include "edgeexport/error.h"

namespace edgeexport::errors {

inline Error answerInterrupted(const std::string& why) {
  return {"answer-interrupted", "the answer cannot go on", "Answer", why,
          "let an answer end before its session is used otherwise, or begin another one"};
}

inline Error cacheClosed() {
  return {"cache-closed", "the response cache was closed and cannot be used any more", "ResponseCache",
          "close() released its answers", "open another one"};
}

inline Error badJavaArgument(const std::string& what, const std::string& where, const std::string& why) {
  return {"bad-argument", what, where, why, "pass what the method's comment asks for"};
}

}  // namespace edgeexport::errors
