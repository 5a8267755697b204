// Between Java and C++: text, arrays, exceptions.
#pragma once

#include <jni.h>

#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "edgeexport/error.h"
#include "errors.h"

namespace edgeexport::java {

// Thrown where a Java exception is pending already.
struct Pending {};

// Classes and members that are looked up once, while the library is loaded.
struct Names {
  jclass exception = nullptr;
  jmethodID exceptionInit = nullptr;
  jclass features = nullptr;
  jmethodID featuresInit = nullptr;
  jfieldID component = nullptr;
  jfieldID rows = nullptr;
  jfieldID width = nullptr;
  jfieldID values = nullptr;
  jfieldID gridRows = nullptr;
  jfieldID gridColumns = nullptr;

  // False where one is missing; a Java exception says which.
  bool find(JNIEnv* env);
  void release(JNIEnv* env);
};
Names& names();

void throwError(JNIEnv* env, const Error& error);

// Throws Pending where the last call of JNI failed.
inline void check(JNIEnv* env) {
  if (env->ExceptionCheck() == JNI_TRUE) throw Pending();
}

// Throws Pending, with a NullPointerException, where an argument is null.
void requireThere(JNIEnv* env, const void* argument, const char* name);

// Characters as UTF-8; half a surrogate pair becomes what is no UTF-8, and is refused as such. Throws Pending.
std::string text(JNIEnv* env, jstring given, const char* name);
// Bytes that are no UTF-8 become U+FFFD. Throws Pending.
jstring string(JNIEnv* env, std::string_view text);

template <typename Element, typename Array>
std::vector<Element> elements(JNIEnv* env, Array array, void (JNIEnv::*copy)(Array, jsize, jsize, Element*),
                              const char* name) {
  requireThere(env, array, name);
  std::vector<Element> made(static_cast<std::size_t>(env->GetArrayLength(array)));
  (env->*copy)(array, 0, static_cast<jsize>(made.size()), made.data());
  check(env);
  return made;
}
inline std::vector<jint> ints(JNIEnv* env, jintArray array, const char* name) {
  return elements<jint>(env, array, &JNIEnv::GetIntArrayRegion, name);
}
inline std::vector<jfloat> floats(JNIEnv* env, jfloatArray array, const char* name) {
  return elements<jfloat>(env, array, &JNIEnv::GetFloatArrayRegion, name);
}
inline std::vector<jbyte> bytes(JNIEnv* env, jbyteArray array, const char* name) {
  return elements<jbyte>(env, array, &JNIEnv::GetByteArrayRegion, name);
}

jintArray array(JNIEnv* env, const std::vector<std::int32_t>& values);

// Runs what a native method does; what it throws becomes a Java exception, and the result 0 or null.
template <typename Work>
auto guarded(JNIEnv* env, Work work) noexcept -> decltype(work()) {
  using Result = decltype(work());
  try {
    return work();
  } catch (const Pending&) {
  } catch (const Error& error) {
    throwError(env, error);
  } catch (const std::bad_alloc&) {
    throwError(env, errors::outOfMemory("for this call"));
  } catch (const std::length_error&) {
    throwError(env, errors::outOfMemory("for this call"));
  } catch (const std::exception& error) {
    throwError(env, errors::internalError(error.what()));
  } catch (...) {
    throwError(env, errors::internalError("something that is no std::exception"));
  }
  return Result();
}

}  // namespace edgeexport::java
