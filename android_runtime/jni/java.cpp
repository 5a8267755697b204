// Between Java and C++: text, arrays, exceptions.
#include "java.h"

#include "utf8.h"

namespace edgeexport::java {
namespace {

jclass classOf(JNIEnv* env, const char* name) {
  const jclass local = env->FindClass(name);
  if (local == nullptr) return nullptr;
  const auto global = static_cast<jclass>(env->NewGlobalRef(local));
  env->DeleteLocalRef(local);
  return global;
}

bool isHigh(jchar unit) { return unit >= 0xD800 && unit < 0xDC00; }
bool isLow(jchar unit) { return unit >= 0xDC00 && unit < 0xE000; }

}  // namespace

Names& names() {
  static Names found;
  return found;
}

bool Names::find(JNIEnv* env) {
  exception = classOf(env, "dev/edgeexport/EdgeException");
  if (exception == nullptr) return false;
  exceptionInit = env->GetMethodID(exception, "<init>",
                                   "(Ljava/lang/String;Ljava/lang/String;Ljava/lang/String;Ljava/lang/String;"
                                   "Ljava/lang/String;)V");
  if (exceptionInit == nullptr) return false;
  features = classOf(env, "dev/edgeexport/Features");
  if (features == nullptr) return false;
  featuresInit = env->GetMethodID(features, "<init>", "(Ljava/lang/String;II[FII)V");
  if (featuresInit == nullptr) return false;
  const struct {
    jfieldID& field;
    const char* name;
    const char* type;
  } fields[] = {{component, "component", "Ljava/lang/String;"},
                {rows, "rows", "I"},
                {width, "width", "I"},
                {values, "values", "[F"},
                {gridRows, "gridRows", "I"},
                {gridColumns, "gridColumns", "I"}};
  for (const auto& each : fields) {
    each.field = env->GetFieldID(features, each.name, each.type);
    if (each.field == nullptr) return false;
  }
  return true;
}

void Names::release(JNIEnv* env) {
  env->DeleteGlobalRef(exception);
  env->DeleteGlobalRef(features);
  *this = Names();
}

// Where there is no memory for it, Java's OutOfMemoryError says so.
void throwError(JNIEnv* env, const Error& error) {
  try {
    const jstring code = string(env, error.code());
    const jstring what = string(env, error.problem());
    const jstring where = string(env, error.where());
    const jstring why = string(env, error.why());
    const jstring fix = string(env, error.fix());
    const jobject made = env->NewObject(names().exception, names().exceptionInit, code, what, where, why, fix);
    check(env);
    env->Throw(static_cast<jthrowable>(made));
  } catch (const Pending&) {
  } catch (const std::bad_alloc&) {
    const jclass thrown = env->FindClass("java/lang/OutOfMemoryError");
    if (thrown != nullptr) env->ThrowNew(thrown, "for saying what failed");
  }
}

void requireThere(JNIEnv* env, const void* argument, const char* name) {
  if (argument != nullptr) return;
  const jclass thrown = env->FindClass("java/lang/NullPointerException");
  if (thrown != nullptr) env->ThrowNew(thrown, name);
  throw Pending();
}

std::string text(JNIEnv* env, jstring given, const char* name) {
  requireThere(env, given, name);
  std::vector<jchar> units(static_cast<std::size_t>(env->GetStringLength(given)));
  env->GetStringRegion(given, 0, static_cast<jsize>(units.size()), units.data());
  check(env);
  std::string made;
  made.reserve(units.size());
  for (std::size_t i = 0; i < units.size(); ++i) {
    char32_t code = units[i];
    if (isHigh(units[i]) && i + 1 < units.size() && isLow(units[i + 1])) {
      code = 0x10000 + (static_cast<char32_t>(units[i] - 0xD800) << 10) + (units[i + 1] - 0xDC00);
      ++i;
    }
    utf8::append(made, code);
  }
  return made;
}

jstring string(JNIEnv* env, std::string_view text) {
  std::vector<jchar> units;
  units.reserve(text.size());
  for (std::size_t at = 0; at < text.size();) {
    const utf8::Step step = utf8::next(text, at);
    const char32_t code = step.valid ? step.code : 0xFFFD;
    at += step.length;
    if (code < 0x10000) {
      units.push_back(static_cast<jchar>(code));
    } else {
      units.push_back(static_cast<jchar>(0xD800 + ((code - 0x10000) >> 10)));
      units.push_back(static_cast<jchar>(0xDC00 + ((code - 0x10000) & 0x3FF)));
    }
  }
  const jstring made = env->NewString(units.data(), static_cast<jsize>(units.size()));
  check(env);
  return made;
}

jintArray array(JNIEnv* env, const std::vector<std::int32_t>& values) {
  const jintArray made = env->NewIntArray(static_cast<jsize>(values.size()));
  check(env);
  env->SetIntArrayRegion(made, 0, static_cast<jsize>(values.size()), values.data());
  return made;
}

}  // namespace edgeexport::java
