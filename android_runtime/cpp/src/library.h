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
