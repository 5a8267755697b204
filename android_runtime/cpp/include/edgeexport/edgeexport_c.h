/* The loader as plain C, for other languages: opaque handles, and errors as values. Nothing is thrown across it. */
#ifndef EDGEEXPORT_C_H
#define EDGEEXPORT_C_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define EDGEEXPORT_API __attribute__((visibility("default")))

typedef struct edgeexport_bundle edgeexport_bundle;
typedef struct edgeexport_session edgeexport_session;
typedef struct edgeexport_features edgeexport_features; /* what the model sees of a picture, or hears in a sound */

/* Every call that can fail returns null when it did not, and an error else, which the caller frees. A null handle or
   pointer is the error bad-argument, but where a comment says that it may be null. */
typedef struct edgeexport_error edgeexport_error;

EDGEEXPORT_API const char* edgeexport_error_code(const edgeexport_error* error); /* kebab-case, permanent */
EDGEEXPORT_API const char* edgeexport_error_problem(const edgeexport_error* error);
EDGEEXPORT_API const char* edgeexport_error_where(const edgeexport_error* error);
EDGEEXPORT_API const char* edgeexport_error_why(const edgeexport_error* error);
EDGEEXPORT_API const char* edgeexport_error_fix(const edgeexport_error* error);
EDGEEXPORT_API void edgeexport_error_free(edgeexport_error* error); /* may be null */

/* Where the runtimes are and how they run; a null string means its default, see RuntimeOptions in engine.h. */
typedef struct edgeexport_options {
  int32_t threads; /* 0: the runtime chooses */
  const char* onnxruntime;
  const char* litert;
  const char* cache_folder;
  int32_t verified; /* 0: files are read and compared with their hashes before a runtime opens them; see RuntimeOptions */
} edgeexport_options;

EDGEEXPORT_API edgeexport_error* edgeexport_bundle_open(const char* folder, edgeexport_bundle** bundle);
/* Reads every file and compares its hash. */
EDGEEXPORT_API edgeexport_error* edgeexport_bundle_verify(const edgeexport_bundle* bundle);
/* A listed file's bytes, compared with its hash; free them with edgeexport_free. */
EDGEEXPORT_API edgeexport_error* edgeexport_bundle_read(const edgeexport_bundle* bundle, const char* file, size_t limit,
                                                        char** bytes, size_t* size);
/* How many ids end an answer; the first `room` of them are written to `ids`, which may be null where room is 0. */
EDGEEXPORT_API size_t edgeexport_bundle_stop_ids(const edgeexport_bundle* bundle, int64_t* ids, size_t room);
EDGEEXPORT_API void edgeexport_bundle_free(edgeexport_bundle* bundle); /* may be null; sessions may outlive it */

/* `options` may be null. */
EDGEEXPORT_API edgeexport_error* edgeexport_session_open(const edgeexport_bundle* bundle,
                                                         const edgeexport_options* options,
                                                         edgeexport_session** session);
EDGEEXPORT_API size_t edgeexport_session_position(const edgeexport_session* session); /* 0 for null, as the next two */
EDGEEXPORT_API size_t edgeexport_session_context(const edgeexport_session* session);
EDGEEXPORT_API size_t edgeexport_session_vocab(const edgeexport_session* session);
/* `features` may be null where there are none; `logits`, of vocab numbers, may be null. */
EDGEEXPORT_API edgeexport_error* edgeexport_session_prefill(edgeexport_session* session, const int32_t* tokens,
                                                            size_t count, const edgeexport_features* const* features,
                                                            size_t feature_count, float* logits);
EDGEEXPORT_API edgeexport_error* edgeexport_session_decode(edgeexport_session* session, int32_t token, float* logits);
EDGEEXPORT_API edgeexport_error* edgeexport_session_greedy(edgeexport_session* session, int32_t* token);
EDGEEXPORT_API edgeexport_error* edgeexport_session_truncate(edgeexport_session* session, int64_t length);
/* height * width * 3 bytes RGB. */
EDGEEXPORT_API edgeexport_error* edgeexport_session_encode_image(edgeexport_session* session, const uint8_t* rgb,
                                                                 size_t height, size_t width,
                                                                 edgeexport_features** features);
/* Samples of one channel, full scale -1 to 1. */
EDGEEXPORT_API edgeexport_error* edgeexport_session_encode_audio(edgeexport_session* session, const float* samples,
                                                                 size_t count, int32_t rate,
                                                                 edgeexport_features** features);
/* The prompt with each picture's placeholder repeated once per feature; free the tokens with edgeexport_free. */
EDGEEXPORT_API edgeexport_error* edgeexport_session_expand(edgeexport_session* session, const int32_t* tokens,
                                                           size_t count, const edgeexport_features* const* features,
                                                           size_t feature_count, int32_t** expanded,
                                                           size_t* expanded_count);
EDGEEXPORT_API void edgeexport_features_free(edgeexport_features* features); /* may be null */

/* Makes the bundle's conversations anew and replays its golden vectors, of pictures and sound too; an error where
   something else comes out. */
EDGEEXPORT_API edgeexport_error* edgeexport_session_self_check(const edgeexport_bundle* bundle,
                                                               edgeexport_session* session);
/* The JSON for `edgeexport parity --import`; free it with edgeexport_free. `options` may be null. */
EDGEEXPORT_API edgeexport_error* edgeexport_device_report(const edgeexport_bundle* bundle,
                                                          const edgeexport_options* options, const char* device_model,
                                                          const char* device_system, char** json);

/* Lets a running call end, waits for it, and releases the runtime. May be called from any thread, and again. */
EDGEEXPORT_API void edgeexport_session_close(edgeexport_session* session); /* may be null */
/* No other call may be running or come after it. */
EDGEEXPORT_API void edgeexport_session_free(edgeexport_session* session); /* may be null */

EDGEEXPORT_API void edgeexport_free(void* memory); /* may be null */

#ifdef __cplusplus
}
#endif

#endif
