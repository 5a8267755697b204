// The C interface: every function turns what is thrown into an error value.
#include "edgeexport/edgeexport_c.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "edgeexport/bundle.h"
#include "edgeexport/error.h"
#include "edgeexport/self_check.h"
#include "edgeexport/session.h"
#include "errors.h"

struct edgeexport_error {
  edgeexport::Error error;
};
struct edgeexport_bundle {
  edgeexport::Bundle bundle;
};
struct edgeexport_session {
  std::unique_ptr<edgeexport::Session> session;
};
struct edgeexport_features {
  edgeexport::Features features;
};

namespace {

using edgeexport::Error;
using edgeexport::Features;
namespace errors = edgeexport::errors;

// For where there is no memory to keep an error: it is there from the start, and never freed.
edgeexport_error* noMemory() noexcept {
  static edgeexport_error lasting{errors::outOfMemory("even for saying what failed")};
  return &lasting;
}
edgeexport_error* const kNoMemory = noMemory();

// What work throws as an error of the caller's.
edgeexport_error* thrown() {
  try {
    throw;
  } catch (const Error& error) {
    return new edgeexport_error{error};
  } catch (const std::bad_alloc&) {
    return new edgeexport_error{errors::outOfMemory("for this call")};
  } catch (const std::length_error&) {
    return new edgeexport_error{errors::outOfMemory("for this call")};
  } catch (const std::exception& error) {
    return new edgeexport_error{errors::internalError(error.what())};
  } catch (...) {
    return new edgeexport_error{errors::internalError("something that is no std::exception")};
  }
}

// Nothing that work throws leaves it.
template <typename Work>
edgeexport_error* guarded(Work work) noexcept {
  try {
    work();
    return nullptr;
  } catch (...) {
    try {
      return thrown();
    } catch (...) {
      return kNoMemory;
    }
  }
}

template <typename... Pointers>
void require(const char* call, const Pointers*... pointers) {
  const bool missing = (... || (pointers == nullptr));
  if (missing) throw errors::badArgument(call);
}

edgeexport::RuntimeOptions optionsOf(const edgeexport_options* given) {
  edgeexport::RuntimeOptions made;
  if (given == nullptr) return made;
  made.threads = given->threads;
  if (given->onnxruntime != nullptr) made.onnxruntime = given->onnxruntime;
  if (given->litert != nullptr) made.litert = given->litert;
  if (given->cache_folder != nullptr) made.cacheFolder = given->cache_folder;
  made.verify = given->verified == 0;
  return made;
}

std::vector<Features> featuresOf(const char* call, const edgeexport_features* const* given, std::size_t count) {
  std::vector<Features> made;
  if (count > 0) require(call, given);
  for (std::size_t i = 0; i < count; ++i) {
    require(call, given[i]);
    made.push_back(given[i]->features);
  }
  return made;
}

// Bytes for another language to free.
char* copied(const void* data, std::size_t size) {
  auto* bytes = static_cast<char*>(std::malloc(size + 1));
  if (bytes == nullptr) throw std::bad_alloc();
  std::memcpy(bytes, data, size);
  bytes[size] = '\0';
  return bytes;
}

}  // namespace

const char* edgeexport_error_code(const edgeexport_error* error) {
  return error == nullptr ? "" : error->error.code().c_str();
}
const char* edgeexport_error_problem(const edgeexport_error* error) {
  return error == nullptr ? "" : error->error.problem().c_str();
}
const char* edgeexport_error_where(const edgeexport_error* error) {
  return error == nullptr ? "" : error->error.where().c_str();
}
const char* edgeexport_error_why(const edgeexport_error* error) {
  return error == nullptr ? "" : error->error.why().c_str();
}
const char* edgeexport_error_fix(const edgeexport_error* error) {
  return error == nullptr ? "" : error->error.fix().c_str();
}
void edgeexport_error_free(edgeexport_error* error) {
  if (error != kNoMemory) delete error;
}

edgeexport_error* edgeexport_bundle_open(const char* folder, edgeexport_bundle** bundle) {
  return guarded([&] {
    require("edgeexport_bundle_open", folder, bundle);
    *bundle = new edgeexport_bundle{edgeexport::Bundle::open(folder)};
  });
}

edgeexport_error* edgeexport_bundle_verify(const edgeexport_bundle* bundle) {
  return guarded([&] {
    require("edgeexport_bundle_verify", bundle);
    bundle->bundle.verify();
  });
}

edgeexport_error* edgeexport_bundle_read(const edgeexport_bundle* bundle, const char* file, size_t limit, char** bytes,
                                         size_t* size) {
  return guarded([&] {
    require("edgeexport_bundle_read", bundle, file, bytes, size);
    const std::string text = bundle->bundle.read(file, limit);
    *bytes = copied(text.data(), text.size());
    *size = text.size();
  });
}

size_t edgeexport_bundle_stop_ids(const edgeexport_bundle* bundle, int64_t* ids, size_t room) {
  if (bundle == nullptr) return 0;
  const std::vector<std::int64_t>& found = bundle->bundle.manifest().stopIds;
  if (ids != nullptr) std::copy_n(found.begin(), std::min(room, found.size()), ids);
  return found.size();
}

void edgeexport_bundle_free(edgeexport_bundle* bundle) { delete bundle; }

edgeexport_error* edgeexport_session_open(const edgeexport_bundle* bundle, const edgeexport_options* options,
                                          edgeexport_session** session) {
  return guarded([&] {
    require("edgeexport_session_open", bundle, session);
    *session = new edgeexport_session{edgeexport::Session::open(bundle->bundle, optionsOf(options))};
  });
}

size_t edgeexport_session_position(const edgeexport_session* session) {
  return session == nullptr ? 0 : session->session->position();
}
size_t edgeexport_session_context(const edgeexport_session* session) {
  return session == nullptr ? 0 : session->session->context();
}
size_t edgeexport_session_vocab(const edgeexport_session* session) {
  return session == nullptr ? 0 : session->session->vocab();
}

edgeexport_error* edgeexport_session_prefill(edgeexport_session* session, const int32_t* tokens, size_t count,
                                             const edgeexport_features* const* features, size_t feature_count,
                                             float* logits) {
  return guarded([&] {
    require("edgeexport_session_prefill", session);
    session->session->prefill(tokens, count, logits,
                              featuresOf("edgeexport_session_prefill", features, feature_count));
  });
}

edgeexport_error* edgeexport_session_decode(edgeexport_session* session, int32_t token, float* logits) {
  return guarded([&] {
    require("edgeexport_session_decode", session);
    session->session->decode(token, logits);
  });
}

edgeexport_error* edgeexport_session_greedy(edgeexport_session* session, int32_t* token) {
  return guarded([&] {
    require("edgeexport_session_greedy", session, token);
    *token = session->session->greedy();
  });
}

edgeexport_error* edgeexport_session_truncate(edgeexport_session* session, int64_t length) {
  return guarded([&] {
    require("edgeexport_session_truncate", session);
    session->session->truncate(length);
  });
}

edgeexport_error* edgeexport_session_encode_image(edgeexport_session* session, const uint8_t* rgb, size_t height,
                                                  size_t width, edgeexport_features** features) {
  return guarded([&] {
    require("edgeexport_session_encode_image", session, rgb, features);
    *features = new edgeexport_features{session->session->encodeImage({rgb, height, width})};
  });
}

edgeexport_error* edgeexport_session_encode_audio(edgeexport_session* session, const float* samples, size_t count,
                                                  int32_t rate, edgeexport_features** features) {
  return guarded([&] {
    require("edgeexport_session_encode_audio", session, samples, features);
    *features = new edgeexport_features{session->session->encodeAudio({samples, count, rate})};
  });
}

edgeexport_error* edgeexport_session_expand(edgeexport_session* session, const int32_t* tokens, size_t count,
                                            const edgeexport_features* const* features, size_t feature_count,
                                            int32_t** expanded, size_t* expanded_count) {
  return guarded([&] {
    require("edgeexport_session_expand", session, tokens, expanded, expanded_count);
    const std::vector<Features> shown = featuresOf("edgeexport_session_expand", features, feature_count);
    const std::vector<std::int32_t> found =
        session->session->expand(std::vector<std::int32_t>(tokens, tokens + count), shown);
    *expanded = reinterpret_cast<int32_t*>(copied(found.data(), found.size() * sizeof(int32_t)));
    *expanded_count = found.size();
  });
}

void edgeexport_features_free(edgeexport_features* features) { delete features; }

edgeexport_error* edgeexport_session_self_check(const edgeexport_bundle* bundle, edgeexport_session* session) {
  return guarded([&] {
    require("edgeexport_session_self_check", bundle, session);
    edgeexport::selfCheck(bundle->bundle, *session->session);
  });
}

edgeexport_error* edgeexport_device_report(const edgeexport_bundle* bundle, const edgeexport_options* options,
                                           const char* device_model, const char* device_system, char** json) {
  return guarded([&] {
    require("edgeexport_device_report", bundle, device_model, device_system, json);
    const std::string text =
        edgeexport::deviceReport(bundle->bundle, optionsOf(options), {device_model, device_system});
    *json = copied(text.data(), text.size());
  });
}

void edgeexport_session_close(edgeexport_session* session) {
  if (session != nullptr) session->session->close();
}
void edgeexport_session_free(edgeexport_session* session) { delete session; }
void edgeexport_free(void* memory) { std::free(memory); }
