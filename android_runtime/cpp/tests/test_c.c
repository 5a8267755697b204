/* The C interface, from C: misuse, and one answer.
   test-c BUNDLE ONNXRUNTIME LITERT CACHE TOKEN... prints the answer. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "edgeexport/edgeexport_c.h"

static void expect(edgeexport_error* error, const char* code) {
  const char* found = error == NULL ? "" : edgeexport_error_code(error);
  if (strcmp(found, code) != 0) {
    fprintf(stderr, "expected \"%s\", got \"%s\": %s; %s\n", code, found, edgeexport_error_problem(error),
            edgeexport_error_why(error));
    exit(1);
  }
  if (error != NULL && (edgeexport_error_where(error)[0] == '\0' || edgeexport_error_fix(error)[0] == '\0')) exit(1);
  edgeexport_error_free(error);
}

static void misuse(void) {
  edgeexport_bundle* bundle = NULL;
  edgeexport_session* session = NULL;
  edgeexport_features* features = NULL;
  int32_t token = 1;
  char* text = NULL;
  expect(edgeexport_bundle_open(NULL, &bundle), "bad-argument");
  expect(edgeexport_bundle_open("nowhere", NULL), "bad-argument");
  expect(edgeexport_bundle_open("nowhere", &bundle), "bundle-not-found");
  expect(edgeexport_bundle_verify(NULL), "bad-argument");
  expect(edgeexport_session_open(NULL, NULL, &session), "bad-argument");
  expect(edgeexport_session_prefill(NULL, &token, 1, NULL, 0, NULL), "bad-argument");
  expect(edgeexport_session_decode(NULL, 1, NULL), "bad-argument");
  expect(edgeexport_session_greedy(NULL, &token), "bad-argument");
  expect(edgeexport_session_truncate(NULL, 0), "bad-argument");
  expect(edgeexport_session_encode_image(NULL, NULL, 1, 1, &features), "bad-argument");
  expect(edgeexport_session_encode_audio(NULL, NULL, 1, 16000, &features), "bad-argument");
  expect(edgeexport_session_self_check(NULL, NULL), "bad-argument");
  expect(edgeexport_device_report(NULL, NULL, "a", "b", &text), "bad-argument");
  if (edgeexport_session_position(NULL) != 0 || edgeexport_session_context(NULL) != 0) exit(1);
  if (edgeexport_session_vocab(NULL) != 0) exit(1);
  if (edgeexport_bundle_stop_ids(NULL, NULL, 0) != 0) exit(1);
  edgeexport_bundle_free(NULL);
  edgeexport_session_close(NULL);
  edgeexport_session_free(NULL);
  edgeexport_features_free(NULL);
  edgeexport_error_free(NULL);
  edgeexport_free(NULL);
}

int main(int count, char** values) {
  edgeexport_bundle* bundle = NULL;
  edgeexport_session* session = NULL;
  edgeexport_options options;
  int32_t prompt[64];
  size_t length = 0;
  int i;
  misuse();
  if (count < 6) return 0;
  memset(&options, 0, sizeof(options));
  options.threads = 2;
  options.onnxruntime = values[2];
  options.litert = values[3];
  options.cache_folder = values[4];
  for (i = 5; i < count && length < 64; ++i) prompt[length++] = (int32_t)atoi(values[i]);
  expect(edgeexport_bundle_open(values[1], &bundle), "");
  expect(edgeexport_session_open(bundle, &options, &session), "");
  expect(edgeexport_session_self_check(bundle, session), "");
  edgeexport_bundle_free(bundle);
  expect(edgeexport_session_prefill(session, prompt, length, NULL, 0, NULL), "");
  for (i = 0; i < 8; ++i) {
    int32_t token = 0;
    expect(edgeexport_session_greedy(session, &token), "");
    printf(i == 0 ? "%d" : " %d", token);
    expect(edgeexport_session_decode(session, token, NULL), "");
  }
  printf("\n");
  if (edgeexport_session_position(session) != length + 8) return 1;
  edgeexport_session_close(session);
  edgeexport_session_close(session);
  expect(edgeexport_session_decode(session, 1, NULL), "session-closed");
  edgeexport_session_free(session);
  return 0;
}
