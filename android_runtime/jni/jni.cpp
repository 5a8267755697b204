// The native methods of Native.java.
#include <algorithm>
#include <iterator>
#include <limits>

#include "conversation.h"
#include "edgeexport/self_check.h"
#include "errors.h"
#include "handles.h"
#include "input_errors.h"
#include "java.h"
#include "jni_errors.h"
#include "responses.h"

namespace {

using namespace edgeexport;
using java::guarded;

Handles<Conversation>& sessions() {
  static Handles<Conversation> open;
  return open;
}

Handles<Responses>& caches() {
  static Handles<Responses> open;
  return open;
}

// Throws cache-closed, also for a number that is no cache's.
std::shared_ptr<Responses> foundCache(jlong handle) {
  auto cache = caches().find(handle);
  if (!cache) throw errors::cacheClosed();
  return cache;
}

// Throws session-closed, also for a number that is no session's.
std::shared_ptr<Conversation> found(jlong handle) {
  auto session = sessions().find(handle);
  if (!session) throw errors::sessionClosed();
  return session;
}

RuntimeOptions optionsOf(JNIEnv* env, jint threads, jstring onnxruntime, jstring litert, jstring cacheFolder,
                         jboolean verified) {
  RuntimeOptions made;
  made.threads = threads;
  const std::string libraries[] = {java::text(env, onnxruntime, "onnxruntime"), java::text(env, litert, "litert")};
  if (!libraries[0].empty()) made.onnxruntime = libraries[0];
  if (!libraries[1].empty()) made.litert = libraries[1];
  made.cacheFolder = java::text(env, cacheFolder, "cacheFolder");
  made.verify = verified == JNI_FALSE;
  return made;
}

jint size(std::size_t value) {
  return static_cast<jint>(std::min<std::size_t>(value, std::numeric_limits<jint>::max()));
}

// Ids that can all be in the cache at once: more than that are refused before they are copied.
std::vector<std::int32_t> tokensOf(JNIEnv* env, Session& session, jintArray tokens) {
  java::requireThere(env, tokens, "tokens");
  const auto count = static_cast<std::size_t>(env->GetArrayLength(tokens));
  if (count > session.context()) throw errors::contextFull(session.position(), count, session.context());
  return java::ints(env, tokens, "tokens");
}

Features featuresOf(JNIEnv* env, jobject given) {
  java::requireThere(env, given, "shown");
  const java::Names& names = java::names();
  Features made;
  const auto component = static_cast<jstring>(env->GetObjectField(given, names.component));
  made.component = java::text(env, component, "component");
  env->DeleteLocalRef(component);
  const auto values = static_cast<jfloatArray>(env->GetObjectField(given, names.values));
  made.values = java::floats(env, values, "values");
  env->DeleteLocalRef(values);
  const auto count = [&](jfieldID field) {
    return static_cast<std::size_t>(std::max(0, env->GetIntField(given, field)));
  };
  made.rows = count(names.rows);
  made.width = count(names.width);
  made.gridRows = count(names.gridRows);
  made.gridColumns = count(names.gridColumns);
  if (made.rows * made.width != made.values.size()) {
    throw errors::badJavaArgument("these are no features", "Features", "their values do not fill their rows");
  }
  return made;
}

std::vector<Features> listOf(JNIEnv* env, jobjectArray shown) {
  java::requireThere(env, shown, "shown");
  std::vector<Features> made;
  for (jsize i = 0; i < env->GetArrayLength(shown); ++i) {
    const jobject each = env->GetObjectArrayElement(shown, i);
    made.push_back(featuresOf(env, each));
    env->DeleteLocalRef(each);
  }
  return made;
}

jobject javaFeatures(JNIEnv* env, const Features& features) {
  const jstring component = java::string(env, features.component);
  const auto count = static_cast<jsize>(features.values.size());
  const jfloatArray values = env->NewFloatArray(count);
  java::check(env);
  env->SetFloatArrayRegion(values, 0, count, features.values.data());
  const jobject made = env->NewObject(java::names().features, java::names().featuresInit, component,
                                      size(features.rows), size(features.width), values, size(features.gridRows),
                                      size(features.gridColumns));
  java::check(env);
  return made;
}

// Messages.java says how they lie in these arrays.
std::vector<Message> messagesOf(JNIEnv* env, jobjectArray roles, jintArray partCounts, jobjectArray parts) {
  const std::vector<jint> counts = java::ints(env, partCounts, "partCounts");
  std::vector<Message> messages;
  jsize next = 0;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    const auto role = static_cast<jstring>(env->GetObjectArrayElement(roles, static_cast<jsize>(i)));
    java::check(env);
    messages.push_back({java::text(env, role, "role"), {}});
    env->DeleteLocalRef(role);
    for (jint part = 0; part < counts[i]; ++part) {
      const auto text = static_cast<jstring>(env->GetObjectArrayElement(parts, next++));
      java::check(env);
      messages.back().parts.push_back({text == nullptr ? "" : java::text(env, text, "text"), text == nullptr});
      env->DeleteLocalRef(text);
    }
  }
  return messages;
}

// An array of Java's for logits, or none.
class Logits {
 public:
  Logits(JNIEnv* env, const Session& session, jfloatArray given) : env_(env), given_(given) {
    if (given == nullptr) return;
    values_.resize(session.vocab());
    if (static_cast<std::size_t>(env->GetArrayLength(given)) != values_.size()) {
      throw errors::badJavaArgument("the array of logits has another size", "logits",
                        "it must have vocab() = " + std::to_string(values_.size()) + " numbers, or be null");
    }
  }
  float* data() { return given_ == nullptr ? nullptr : values_.data(); }
  void give() const {
    if (given_ != nullptr) env_->SetFloatArrayRegion(given_, 0, static_cast<jsize>(values_.size()), values_.data());
  }

 private:
  JNIEnv* env_;
  jfloatArray given_;
  std::vector<float> values_;
};

jlong open(JNIEnv* env, jclass, jstring folder, jint threads, jstring onnxruntime, jstring litert, jstring cache,
           jboolean verified) {
  return guarded(env, [&]() -> jlong {
    const RuntimeOptions options = optionsOf(env, threads, onnxruntime, litert, cache, verified);
    return sessions().add(std::make_shared<Conversation>(Bundle::open(java::text(env, folder, "folder")), options));
  });
}

void close(JNIEnv* env, jclass, jlong handle) {
  guarded(env, [&] {
    if (const auto session = sessions().remove(handle)) session->session().close();
  });
}

void verify(JNIEnv* env, jclass, jstring folder) {
  guarded(env, [&] { Bundle::open(java::text(env, folder, "folder")).verify(); });
}

jstring deviceReport(JNIEnv* env, jclass, jstring folder, jint threads, jstring onnxruntime, jstring litert,
                     jstring cache, jboolean verified, jstring model, jstring system) {
  return guarded(env, [&] {
    const RuntimeOptions options = optionsOf(env, threads, onnxruntime, litert, cache, verified);
    const Device device{java::text(env, model, "model"), java::text(env, system, "system")};
    const Bundle bundle = Bundle::open(java::text(env, folder, "folder"));
    return java::string(env, edgeexport::deviceReport(bundle, options, device));
  });
}

void selfCheck(JNIEnv* env, jclass, jlong handle) {
  guarded(env, [&] {
    const auto session = found(handle);
    edgeexport::selfCheck(session->bundle(), session->session());
  });
}

jint position(JNIEnv* env, jclass, jlong handle) {
  return guarded(env, [&] { return size(found(handle)->session().position()); });
}

jint context(JNIEnv* env, jclass, jlong handle) {
  return guarded(env, [&] { return size(found(handle)->session().context()); });
}

jint vocab(JNIEnv* env, jclass, jlong handle) {
  return guarded(env, [&] { return size(found(handle)->session().vocab()); });
}

jlongArray stopIds(JNIEnv* env, jclass, jlong handle) {
  return guarded(env, [&] {
    const auto session = found(handle);
    const std::vector<std::int64_t>& stops = session->bundle().manifest().stopIds;
    const std::vector<jlong> ids(stops.begin(), stops.end());
    const jlongArray made = env->NewLongArray(static_cast<jsize>(ids.size()));
    java::check(env);
    env->SetLongArrayRegion(made, 0, static_cast<jsize>(ids.size()), ids.data());
    return made;
  });
}

jstring render(JNIEnv* env, jclass, jlong handle, jobjectArray roles, jintArray partCounts, jobjectArray parts) {
  return guarded(env, [&] {
    const auto session = found(handle);
    return java::string(env, session->chatTemplate().render(messagesOf(env, roles, partCounts, parts)));
  });
}

jintArray tokenize(JNIEnv* env, jclass, jlong handle, jstring text, jboolean addSpecialTokens) {
  return guarded(env, [&] {
    const auto session = found(handle);
    return java::array(env, session->tokenizer().encode(java::text(env, text, "text"), addSpecialTokens == JNI_TRUE));
  });
}

jstring detokenize(JNIEnv* env, jclass, jlong handle, jintArray tokens, jboolean skipSpecialTokens) {
  return guarded(env, [&] {
    const auto session = found(handle);
    const std::vector<std::int32_t> ids = java::ints(env, tokens, "tokens");
    return java::string(env, session->tokenizer().decode(ids, skipSpecialTokens == JNI_TRUE));
  });
}

jobject encodeImage(JNIEnv* env, jclass, jlong handle, jbyteArray rgb, jint height, jint width) {
  return guarded(env, [&] {
    const auto session = found(handle);
    java::requireThere(env, rgb, "rgb");
    const std::int64_t pixels = height > 0 && width > 0 ? std::int64_t{height} * width : 0;
    if (std::int64_t{env->GetArrayLength(rgb)} / 3 != pixels || env->GetArrayLength(rgb) % 3 != 0 || pixels == 0) {
      throw errors::notAnImage("the array has another size than height * width * 3");
    }
    const std::vector<jbyte> bytes = java::bytes(env, rgb, "rgb");
    return javaFeatures(env, session->session().encodeImage({reinterpret_cast<const std::uint8_t*>(bytes.data()),
                                                             static_cast<std::size_t>(height),
                                                             static_cast<std::size_t>(width)}));
  });
}

jobject encodeAudio(JNIEnv* env, jclass, jlong handle, jfloatArray samples, jint rate) {
  return guarded(env, [&] {
    const auto session = found(handle);
    const std::vector<float> values = java::floats(env, samples, "samples");
    return javaFeatures(env, session->session().encodeAudio({values.data(), values.size(), rate}));
  });
}

void prefill(JNIEnv* env, jclass, jlong handle, jintArray tokens, jobjectArray shown, jfloatArray logits) {
  guarded(env, [&] {
    const auto session = found(handle);
    const std::vector<Features> features = listOf(env, shown);
    Session& used = session->session();
    const std::vector<std::int32_t> prompt = used.expand(tokensOf(env, used, tokens), features);
    Logits out(env, used, logits);
    used.prefill(prompt.data(), prompt.size(), out.data(), features);
    out.give();
  });
}

void decode(JNIEnv* env, jclass, jlong handle, jint token, jfloatArray logits) {
  guarded(env, [&] {
    const auto session = found(handle);
    Logits out(env, session->session(), logits);
    session->session().decode(token, out.data());
    out.give();
  });
}

jint greedy(JNIEnv* env, jclass, jlong handle) {
  return guarded(env, [&]() -> jint { return found(handle)->session().greedy(); });
}

void truncate(JNIEnv* env, jclass, jlong handle, jlong length) {
  guarded(env, [&] { found(handle)->session().truncate(length); });
}

jlong begin(JNIEnv* env, jclass, jlong handle, jintArray prompt, jobjectArray shown, jboolean fromStart,
            jint maxTokens, jdouble temperature, jdouble topP, jint topK, jfloat repetitionPenalty,
            jfloat frequencyPenalty, jlong seed) {
  return guarded(env, [&]() -> jlong {
    const auto session = found(handle);
    if (topK < 0) throw errors::badSampling("top_k", topK, "0 (all) and above");
    if (seed < 0) throw errors::badSampling("seed", static_cast<double>(seed), "0 and above");
    const Sampling sampling{temperature, topP, static_cast<std::size_t>(topK), repetitionPenalty, frequencyPenalty,
                            static_cast<std::uint64_t>(seed)};
    Prompt made{{}, listOf(env, shown)};
    made.tokens = session->session().expand(tokensOf(env, session->session(), prompt), made.features);
    return session->begin(std::move(made), fromStart == JNI_TRUE, sampling, maxTokens);
  });
}

jboolean feed(JNIEnv* env, jclass, jlong handle, jlong answer) {
  return guarded(env, [&]() -> jboolean { return found(handle)->feedPiece(answer) ? JNI_TRUE : JNI_FALSE; });
}

jint next(JNIEnv* env, jclass, jlong handle, jlong answer, jobjectArray text) {
  return guarded(env, [&]() -> jint {
    const auto session = found(handle);
    std::string became;
    const std::optional<std::int32_t> token = session->next(answer, became);
    env->SetObjectArrayElement(text, 0, java::string(env, became));
    return token.value_or(-1);
  });
}

jint finishReason(JNIEnv* env, jclass, jlong handle, jlong answer) {
  return guarded(env, [&]() -> jint {
    const std::optional<FinishReason> reason = found(handle)->finishReason(answer);
    return reason ? static_cast<jint>(*reason) : -1;
  });
}

jlong openCache(JNIEnv* env, jclass, jint entries, jlong bytes, jdouble seconds) {
  return guarded(env, [&]() -> jlong {
    if (entries < 0 || bytes < 0 || !(seconds >= 0)) {
      throw errors::badJavaArgument("these are no limits of a cache", "ResponseCache", "one of them is below 0");
    }
    return caches().add(std::make_shared<Responses>(
        CacheLimits{static_cast<std::size_t>(entries), static_cast<std::size_t>(bytes), seconds}));
  });
}

void closeCache(JNIEnv* env, jclass, jlong cache) {
  guarded(env, [&] { caches().remove(cache); });
}

void clearCache(JNIEnv* env, jclass, jlong cache) {
  guarded(env, [&] { foundCache(cache)->clear(); });
}

jint cacheSize(JNIEnv* env, jclass, jlong cache) {
  return guarded(env, [&] { return size(foundCache(cache)->size()); });
}

jstring recall(JNIEnv* env, jclass, jlong cache, jlong handle, jobjectArray roles, jintArray partCounts,
               jobjectArray parts, jdouble seconds, jlong day) {
  return guarded(env, [&]() -> jstring {
    const auto session = found(handle);
    const auto used = foundCache(cache);
    const auto key = session->key(messagesOf(env, roles, partCounts, parts));
    const auto answer = key ? used->find(*key, {seconds, day}) : std::nullopt;
    return answer ? java::string(env, *answer) : nullptr;
  });
}

void keep(JNIEnv* env, jclass, jlong cache, jlong handle, jobjectArray roles, jintArray partCounts,
          jobjectArray parts, jdouble seconds, jlong day, jstring answer) {
  guarded(env, [&] {
    const auto session = found(handle);
    const auto used = foundCache(cache);
    const auto key = session->key(messagesOf(env, roles, partCounts, parts));
    if (key) used->store(*key, java::text(env, answer, "answer"), {seconds, day});
  });
}

void govern(JNIEnv* env, jclass, jlong handle, jdouble budget, jdouble high, jdouble low, jdouble down, jdouble up,
            jdouble slowest, jdouble fastest, jdouble hold, jdouble calm) {
  guarded(env, [&] { found(handle)->govern(budget, {high, low, down, up, slowest, fastest, hold, calm}); });
}

jdouble report(JNIEnv* env, jclass, jlong handle, jdouble seconds, jdouble reading) {
  return guarded(env, [&] { return found(handle)->report(seconds, reading); });
}

jdouble pause(JNIEnv* env, jclass, jlong handle, jdouble tokenSeconds) {
  return guarded(env, [&] { return found(handle)->pause(tokenSeconds); });
}

jdouble loadOfStatus(JNIEnv*, jclass, jint status) { return Governor::loadOfStatus(status); }

template <typename Function>
JNINativeMethod row(const char* name, const char* type, Function* function) {
  return {const_cast<char*>(name), const_cast<char*>(type), reinterpret_cast<void*>(function)};
}

bool registerMethods(JNIEnv* env) {
#define TEXT "Ljava/lang/String;"
#define SHOWN "[Ldev/edgeexport/Features;"
  const JNINativeMethod methods[] = {
      row("open", "(" TEXT "I" TEXT TEXT TEXT "Z)J", open),
      row("close", "(J)V", close),
      row("verify", "(" TEXT ")V", verify),
      row("deviceReport", "(" TEXT "I" TEXT TEXT TEXT "Z" TEXT TEXT ")" TEXT, deviceReport),
      row("selfCheck", "(J)V", selfCheck),
      row("position", "(J)I", position),
      row("context", "(J)I", context),
      row("vocab", "(J)I", vocab),
      row("stopIds", "(J)[J", stopIds),
      row("render", "(J[" TEXT "[I[" TEXT ")" TEXT, render),
      row("tokenize", "(J" TEXT "Z)[I", tokenize),
      row("detokenize", "(J[IZ)" TEXT, detokenize),
      row("encodeImage", "(J[BII)Ldev/edgeexport/Features;", encodeImage),
      row("encodeAudio", "(J[FI)Ldev/edgeexport/Features;", encodeAudio),
      row("prefill", "(J[I" SHOWN "[F)V", prefill),
      row("decode", "(JI[F)V", decode),
      row("greedy", "(J)I", greedy),
      row("truncate", "(JJ)V", truncate),
      row("begin", "(J[I" SHOWN "ZIDDIFFJ)J", begin),
      row("feed", "(JJ)Z", feed),
      row("next", "(JJ[" TEXT ")I", next),
      row("finishReason", "(JJ)I", finishReason),
      row("openCache", "(IJD)J", openCache),
      row("closeCache", "(J)V", closeCache),
      row("clearCache", "(J)V", clearCache),
      row("cacheSize", "(J)I", cacheSize),
      row("recall", "(JJ[" TEXT "[I[" TEXT "DJ)" TEXT, recall),
      row("keep", "(JJ[" TEXT "[I[" TEXT "DJ" TEXT ")V", keep),
      row("govern", "(JDDDDDDDDD)V", govern),
      row("report", "(JDD)D", report),
      row("pause", "(JD)D", pause),
      row("loadOfStatus", "(I)D", loadOfStatus),
  };
#undef TEXT
#undef SHOWN
  const jclass native = env->FindClass("dev/edgeexport/Native");
  if (native == nullptr) return false;
  return env->RegisterNatives(native, methods, static_cast<jint>(std::size(methods))) == JNI_OK;
}

}  // namespace

extern "C" JNIEXPORT jint JNI_OnLoad(JavaVM* machine, void*) {
  void* env = nullptr;
  if (machine->GetEnv(&env, JNI_VERSION_1_6) != JNI_OK) return JNI_ERR;
  auto* const found = static_cast<JNIEnv*>(env);
  return java::names().find(found) && registerMethods(found) ? JNI_VERSION_1_6 : JNI_ERR;
}

extern "C" JNIEXPORT void JNI_OnUnload(JavaVM* machine, void*) {
  void* env = nullptr;
  if (machine->GetEnv(&env, JNI_VERSION_1_6) == JNI_OK) java::names().release(static_cast<JNIEnv*>(env));
}
