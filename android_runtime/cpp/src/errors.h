// Every failure of the loader: one function per code. Codes and wording are those of the Python side; those at the end
// exist on devices alone.
#pragma once

#include <cstdint>
#include <string>

#include "edgeexport/error.h"

namespace edgeexport::errors {

inline const char* const kFetchAgain = "download the bundle again, or build it again with --force";

inline Error bundleNotFound(const std::string& folder) {
  return {"bundle-not-found", "there is no bundle here", folder, "a bundle is a folder with a manifest.json",
          "give the folder that `edgeexport build` printed"};
}

inline Error bundleBadManifest(const std::string& where, const std::string& problem) {
  return {"bundle-bad-manifest", "the bundle's manifest cannot be trusted", where, problem, kFetchAgain};
}

inline Error bundleTooNew(const std::string& where, const std::string& schema, const std::string& known) {
  return {"bundle-too-new", "the bundle's schema is " + schema, where, "this version reads " + known,
          "ship the app with a newer edgeexport runtime"};
}

inline Error bundleFileMissing(const std::string& where, const std::string& name) {
  return {"bundle-file-missing", "a file of the bundle is missing: " + name, where, "the manifest lists it",
          kFetchAgain};
}

inline Error bundleFileChanged(const std::string& where, const std::string& name, const std::string& problem) {
  return {"bundle-file-changed", "a file of the bundle is not the one that was built: " + name, where, problem,
          kFetchAgain};
}

inline Error bundleUnsafePath(const std::string& where, const std::string& name, const std::string& problem) {
  return {"bundle-unsafe-path", "the bundle holds something else than plain files and folders: " + name, where, problem,
          "do not use this bundle unless you made it; replace the entry by the plain file"};
}

inline Error bundleNoComponent(const std::string& folder, const std::string& name) {
  return {"bundle-no-component", "the bundle has no component named " + name, folder,
          "its manifest does not list one", "use a bundle that was built from a language model"};
}

inline Error bundleNoVariant(const std::string& component, const std::string& variant) {
  return {"bundle-no-variant", component + " was not built for " + (variant.empty() ? "one fixed shape" : variant),
          component, "the manifest lists no signature of this name",
          "add the picture's size to screens under [shapes.vision] of the target, and build again"};
}

inline Error artifactDoesNotOpen(const std::string& path, const std::string& runtime, const std::string& problem) {
  return {"artifact-does-not-open", runtime + " cannot open the artifact", path, problem.substr(0, 400),
          "run `edgeexport verify` on the bundle; if it is intact, update the runtime to the version in its manifest"};
}

inline Error contextFull(std::size_t position, std::size_t asked, std::size_t context) {
  return {"context-full", std::to_string(asked) + " more tokens do not fit into the cache",
          "position " + std::to_string(position),
          "the cache has " + std::to_string(context) + " slots, " + std::to_string(context - position) +
              " of them free",
          "shorten the prompt, call truncate() or reset(), or build with a larger --context"};
}

inline Error badToken(const std::string& problem) {
  return {"bad-token", "these are not token ids of this model", "the session's input", problem,
          "pass ids that the bundle's own tokenizer made"};
}

inline Error badTruncate(std::int64_t asked, std::size_t position) {
  return {"bad-truncate", "the cache cannot be truncated to " + std::to_string(asked),
          "position " + std::to_string(position),
          "truncate takes a whole number from 0 to the position, " + std::to_string(position),
          "call truncate(n) with n no larger than session.position"};
}

inline Error sessionClosed() {
  return {"session-closed", "the session was closed and cannot be used any more", "Session",
          "close() released the cache and the runtime", "open another one"};
}

inline Error noGpu(const std::string& problem) {
  return {"no-gpu", "nothing here can run on an NVIDIA GPU", "CUDA", problem,
          "install NVIDIA's driver where there is a GPU, or use a bundle of android-ort or android-tflite"};
}

inline Error engineToBuild(const std::string& component, const std::string& path) {
  return {"engine-to-build", "the engine of " + component + " is not here: this device is to build it", path,
          "an engine of TensorRT is made for the GPU that is present",
          "in the bundle's folder: python3 engine_builder.pyz build --out ../engines; or name the engines' folder in "
          "the session's options"};
}

inline Error nonfiniteLogits(std::size_t position) {
  return {"nonfinite-logits", "the model computed NaN or infinite logits", "position " + std::to_string(position),
          "the largest of the logits is not a finite number, so no next token can be chosen",
          "run selfCheck(); if it passes, this is a bug in edgeexport or in the backend's runtime"};
}

inline Error goldenMismatch(const std::string& where, const std::string& problem) {
  return {"golden-mismatch", "the bundle does not compute what it computed when it was built", where, problem,
          "download or build the bundle again; if it stays, the runtime on this device computes differently"};
}

inline Error goldenUnusable(const std::string& where, const std::string& problem) {
  return {"golden-unusable", "the bundle's golden vectors cannot be replayed", where, problem,
          "build the bundle again with --force"};
}

inline Error modalityMissing(const std::string& what, const std::string& component) {
  return {"modality-missing", "this model takes no " + what, component, "the bundle has no component " + component,
          "leave it out, or use a bundle of a model that takes it"};
}

inline Error imageTokensMismatch(std::size_t places, std::size_t wanted) {
  return {"image-tokens-mismatch",
          "the prompt has " + std::to_string(places) + " places for pictures' features, and " + std::to_string(wanted) +
              " are to be put there",
          "prompt", "each picture has its placeholder once in the text, which is then repeated once per feature",
          "name as many pictures as the prompt has placeholders, and repeat each once per feature"};
}

inline Error tooManyFeatures(std::size_t count, std::size_t most) {
  return {"too-many-features", "the prompt's pictures and sounds make " + std::to_string(count) + " features together",
          "prompt", "the artifact was built for " + std::to_string(most) + " at most",
          "show fewer, or set features = " + std::to_string(count) +
              " in [options] of the target's file and build again"};
}

// Codes of devices alone.

inline Error sessionBusy() {
  return {"session-busy", "the session is in use by another thread", "Session",
          "one call runs at a time, and calls are not queued", "share a lock, or open a session per thread"};
}

inline Error runtimeMissing(const std::string& library, const std::string& problem) {
  return {"runtime-missing", "the runtime that this bundle needs cannot be loaded", library, problem,
          "add it to the app (for this device's ABI), or give its path in the session's options"};
}

inline Error runtimeTooOld(const std::string& library, const std::string& problem) {
  return {"runtime-too-old", "the runtime is not one that this loader can talk to", library, problem,
          "ship the version that the bundle's manifest names under tools, or a newer one"};
}

inline Error runtimeFailed(const std::string& runtime, const std::string& problem) {
  return {"runtime-failed", runtime + " failed while computing", runtime, problem.substr(0, 400),
          "free memory and call reset(); if it stays, run selfCheck() and report what it says"};
}

inline Error backendNotBuilt(const std::string& component, const std::string& backend) {
  return {"backend-not-built", "this loader cannot run backend " + backend, component,
          "it was compiled without an engine for it",
          "build the bundle for android-ort or android-tflite, or compile the loader with MNN_ROOT or TENSORRT_ROOT"};
}

inline Error outOfMemory(const std::string& problem) {
  return {"out-of-memory", "the device has no memory for the session", "Session", "there was not enough " + problem,
          "close other sessions, or build the bundle with a smaller --context"};
}

inline Error badArgument(const std::string& call) {
  return {"bad-argument", "a null pointer was given to " + call, call, "only what its comment says may be null",
          "pass what edgeexport_c.h asks for; a handle is not to be used after it was freed"};
}

inline Error internalError(const std::string& problem) {
  return {"internal-error", "edgeexport itself failed", "edgeexport", problem,
          "this is a bug: report it with the bundle's manifest and the device's model"};
}

}  // namespace edgeexport::errors
