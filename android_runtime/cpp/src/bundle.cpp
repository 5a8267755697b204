// Opens a bundle, and gives out its files behind their sizes and hashes.
#include "edgeexport/bundle.h"

#include <sys/stat.h>

#include <cerrno>
#include <cstring>

#include "edgeexport/sha256.h"
#include "errors.h"
#include "file.h"

namespace edgeexport {
namespace {

constexpr const char* kManifest = "manifest.json";
constexpr const char* kDigest = "manifest.json.sha256";
constexpr std::size_t kMaxManifest = std::size_t{16} << 20;

// Reads a listed file, compares its size and hash, and hands its bytes on.
void readChecked(const Bundle& bundle, const std::string& name, const File::Take& take) {
  const FileEntry& entry = bundle.manifest().files.at(name);
  const std::string path = bundle.path(name);
  File file(path);
  Sha256 hash;
  std::size_t total = 0;
  const std::size_t limit = static_cast<std::size_t>(entry.size) + 1;
  const auto hashed = [&](const char* data, std::size_t size) {
    hash.update(data, size);
    take(data, size);
  };
  if (!file.opened() || !file.each(limit, total, hashed)) {
    throw errors::bundleFileChanged(path, name, std::string("it cannot be read: ") + std::strerror(errno));
  }
  if (total != static_cast<std::size_t>(entry.size) || hash.hex() != entry.sha256) {
    throw errors::bundleFileChanged(path, name, "its sha256 is not the one in the manifest");
  }
}

}  // namespace

Bundle Bundle::open(const std::string& folder) {
  Bundle bundle;
  bundle.folder_ = folder;
  const std::string place = folder + "/" + kManifest;
  struct stat found {};
  if (::lstat(place.c_str(), &found) != 0) throw errors::bundleNotFound(folder);
  if (!S_ISREG(found.st_mode)) throw errors::bundleUnsafePath(place, kManifest, "it is no plain file");
  File file(place);
  std::string text;
  std::size_t total = 0;
  if (!file.opened() || !file.each(kMaxManifest + 1, total, [&](auto data, auto size) { text.append(data, size); })) {
    throw errors::bundleBadManifest(place, std::string("it cannot be read: ") + std::strerror(errno));
  }
  bundle.manifest_ = Manifest::parse(text, place);
  bundle.digest_ = sha256Hex(text);
  return bundle;
}

const Component& Bundle::component(const std::string& name) const {
  const Component* found = manifest_.component(name);
  if (found == nullptr) throw errors::bundleNoComponent(folder_, name);
  return *found;
}

std::string Bundle::path(const std::string& name) const {
  const std::string whole = folder_ + "/" + name;
  const auto entry = manifest_.files.find(name);
  if (entry == manifest_.files.end()) throw errors::bundleFileMissing(whole, name);
  struct stat found {};
  for (std::size_t end = name.find('/'); end != std::string::npos; end = name.find('/', end + 1)) {
    const std::string part = folder_ + "/" + name.substr(0, end);
    if (::lstat(part.c_str(), &found) != 0) throw errors::bundleFileMissing(whole, name);
    if (!S_ISDIR(found.st_mode)) throw errors::bundleUnsafePath(part, name, "a part of its path is no plain folder");
  }
  if (::lstat(whole.c_str(), &found) != 0) throw errors::bundleFileMissing(whole, name);
  if (!S_ISREG(found.st_mode)) throw errors::bundleUnsafePath(whole, name, "it is no plain file");
  if (found.st_size != entry->second.size) {
    throw errors::bundleFileChanged(whole, name,
                                    "its size is " + std::to_string(found.st_size) + " bytes, the manifest says " +
                                        std::to_string(entry->second.size));
  }
  return whole;
}

std::string Bundle::read(const std::string& name, std::size_t limit) const {
  const std::string whole = path(name);
  const std::int64_t size = manifest_.files.at(name).size;
  if (static_cast<std::uint64_t>(size) > limit) {
    throw errors::bundleFileChanged(whole, name, "it has more than " + std::to_string(limit) + " bytes");
  }
  std::string text;
  text.reserve(static_cast<std::size_t>(size));
  readChecked(*this, name, [&](const char* data, std::size_t count) { text.append(data, count); });
  return text;
}

void Bundle::verify() const {
  std::string beside;
  std::size_t total = 0;
  File digest(folder_ + "/" + kDigest);
  if (!digest.opened()) throw errors::bundleFileMissing(folder_ + "/" + kDigest, kDigest);
  digest.each(digest_.size() + 2, total, [&](const char* data, std::size_t count) { beside.append(data, count); });
  if (beside != digest_ + "\n") {
    throw errors::bundleFileChanged(folder_ + "/" + kManifest, kManifest, "its sha256 is not the one beside it");
  }
  for (const auto& each : manifest_.files) verify(each.first);
}

void Bundle::verify(const std::string& name) const {
  readChecked(*this, name, [](const char*, std::size_t) {});
}

}  // namespace edgeexport
