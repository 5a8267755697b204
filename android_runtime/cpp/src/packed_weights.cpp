// Where the packed weights of a model file lie while LiteRT opens it.
#include "packed_weights.h"

#include <sys/stat.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <optional>
#include <random>
#include <string>

#include "edgeexport/sha256.h"
#include "file.h"

namespace edgeexport::litert {
namespace {

constexpr const char* kForm = "edgeexport.packed/2 ";

// What a file is without reading it: nobody but the system can set the time of its last change of status.
std::string identity(const std::string& path) {
  struct stat found {};
  if (::stat(path.c_str(), &found) != 0) return "";
  const auto text = [](const timespec& time) { return std::to_string(time.tv_sec) + "." + std::to_string(time.tv_nsec); };
  return std::to_string(found.st_dev) + " " + std::to_string(found.st_ino) + " " + std::to_string(found.st_size) + " " +
         text(found.st_mtim) + " " + text(found.st_ctim);
}

std::string digestOf(const std::string& kept) { return kept + ".sha256"; }

// Whether these are the bytes that were kept.
bool intact(const std::string& kept) {
  std::ifstream beside(digestOf(kept), std::ios::binary);
  const std::string wanted{std::istreambuf_iterator<char>(beside), {}};
  return wanted.size() == 64 && sha256File(kept) == wanted;
}

std::string randomName() {
  std::random_device random;
  return std::to_string(random()) + "-" + std::to_string(random());
}

}  // namespace

PackedWeights::PackedWeights(const Bundle& bundle, const std::string& model, const std::string& library,
                             const RuntimeOptions& options) {
  if (options.cacheFolder.empty()) return;
  const std::string path = bundle.path(model);
  const std::string content = options.verify ? "sha256 " + bundle.manifest().files.at(model).sha256
                                             : "file " + identity(path);
  kept_ = options.cacheFolder + "/" + sha256Hex(kForm + content + " " + identity(library)) + ".xnnpack";
  used_ = intact(kept_) ? kept_ : kept_ + "." + randomName();  // of this session alone until it is whole
}

PackedWeights::~PackedWeights() {
  if (used_ != kept_) std::remove(used_.c_str());
}

void PackedWeights::keep() {
  if (used_ == kept_) return;
  const std::optional<std::string> digest = sha256File(used_);
  std::remove(digestOf(kept_).c_str());  // without its digest beside it, a kept file is as good as not there
  if (!digest || std::rename(used_.c_str(), kept_.c_str()) != 0) return;
  const std::string partial = digestOf(used_);
  std::ofstream beside(partial, std::ios::binary);
  beside << *digest;
  beside.close();
  if (!beside || std::rename(partial.c_str(), digestOf(kept_).c_str()) != 0) std::remove(partial.c_str());
  used_ = kept_;
}

}  // namespace edgeexport::litert
