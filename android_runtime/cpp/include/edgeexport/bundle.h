// A bundle on disk: its manifest as structs, and its files behind their sizes and hashes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace edgeexport {

struct FileEntry {
  std::int64_t size = 0;  // bytes
  std::string sha256;     // hex
};

// A size, or the bounds of a symbolic one; a fixed size has min == max and no name.
struct Dim {
  std::string name;
  std::int64_t min = 0;
  std::int64_t max = 0;
};

struct TensorSpec {
  std::string name;
  std::string dtype;
  std::vector<Dim> shape;
};

struct Signature {
  std::string name;
  std::string file;
  std::vector<TensorSpec> inputs;
  std::vector<TensorSpec> outputs;
};

// Per layer a key and a value [1, kvHeads, context, headDim].
struct KvLayout {
  std::int64_t layers = 0;
  std::int64_t kvHeads = 0;
  std::int64_t headDim = 0;
  std::int64_t context = 0;
  std::string dtype;
};

struct Component {
  std::string name;
  std::string backend;
  std::vector<std::string> files;
  std::vector<Signature> signatures;
  std::vector<std::pair<std::string, std::string>> state;  // cache input, and the output that replaces it
  std::optional<KvLayout> kv;

  const Signature* signature(const std::string& wanted) const;
};

struct Golden {
  struct Medium {
    std::string kind;  // image or audio
    std::string file;
  };
  struct Case {
    std::string name;
    std::string file;
    std::vector<Medium> media;
  };
  std::optional<std::string> file;  // of text alone
  std::optional<std::string> chat;  // conversations
  std::vector<Case> shown;          // of pictures and sound
  std::optional<double> maxAbs;     // gates
  std::optional<double> kl;
  std::string notRun;
};

struct Manifest {
  std::string modelName;
  std::string targetName;
  std::string quantisation;
  std::vector<Component> components;
  std::map<std::string, FileEntry> files;
  Golden golden;
  std::vector<std::int64_t> stopIds;  // ascending
  std::optional<std::string> preprocess;

  // For people: the model, the target and the quantisation.
  std::string title() const;
  const Component* component(const std::string& name) const;

  // Reads manifest.json. `where` is for messages. Throws bundle-bad-manifest, bundle-too-new.
  static Manifest parse(const std::string& text, const std::string& where);
};

class Bundle {
 public:
  // Reads the manifest. Throws bundle-not-found, bundle-unsafe-path, and what Manifest::parse throws.
  static Bundle open(const std::string& folder);

  const Manifest& manifest() const noexcept { return manifest_; }
  const std::string& folder() const noexcept { return folder_; }
  // sha256 of manifest.json, which lists the hashes of all other files.
  const std::string& digest() const noexcept { return digest_; }

  // Throws bundle-no-component.
  const Component& component(const std::string& name) const;
  // The path of a listed file, of the manifest's size, reached through no symbolic link. Its content is not read.
  // Throws bundle-file-missing, bundle-file-changed, bundle-unsafe-path.
  std::string path(const std::string& name) const;
  // A listed file's bytes, whose hash is the manifest's. Throws as path does; bundle-file-changed beyond `limit` bytes.
  std::string read(const std::string& name, std::size_t limit) const;
  // Reads every listed file and compares its hash. Throws as path does.
  void verify() const;
  // The same of one listed file.
  void verify(const std::string& name) const;

 private:
  std::string folder_;
  std::string digest_;
  Manifest manifest_;
};

}  // namespace edgeexport
