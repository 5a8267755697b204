// A shared library opened at run time. It stays open: runtimes leave threads behind that need their code.
#pragma once

#include <dlfcn.h>

#include <cstring>
#include <string>

#include "errors.h"

namespace edgeexport {

class Library {
 public:
  explicit Library(const std::string& name) : name_(name), handle_(::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    if (handle_ == nullptr) {
      const char* problem = ::dlerror();
      throw errors::runtimeMissing(name, problem != nullptr ? problem : "dlopen failed");
    }
  }

  const std::string& name() const { return name_; }

  // Where it lies, as far as the system says: in an app, it may be within a package.
  std::string path(const char* symbol) const {
    Dl_info found{};
    void* const place = ::dlsym(handle_, symbol);
    const bool known = place != nullptr && ::dladdr(place, &found) != 0 && found.dli_fname != nullptr;
    return known ? found.dli_fname : "";
  }

  // Sets a function pointer. Throws runtime-too-old when the library has no such symbol.
  template <typename Function>
  void find(Function*& function, const char* symbol) const {
    void* found = ::dlsym(handle_, symbol);
    if (found == nullptr) throw errors::runtimeTooOld(name_, std::string("it has no ") + symbol);
    std::memcpy(&function, &found, sizeof(function));
  }

 private:
  std::string name_;
  void* handle_;
};

}  // namespace edgeexport
