// Reads manifest.json: what the loader relies on is checked, what it does not know is left alone.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <set>
#include <string_view>

#include "edgeexport/bundle.h"
#include "edgeexport/json.h"
#include "errors.h"
#include "named.h"

namespace edgeexport {
namespace {

constexpr std::string_view kSchema = "edgeexport.bundle/1";
constexpr std::string_view kSchemas = "edgeexport.bundle/";
constexpr std::size_t kMaxPath = 1024;
constexpr std::size_t kMaxName = 255;  // bytes, what file systems take

// What no tensor of a model that runs on one device exceeds. Sizes of memory are worked out from these numbers, in
// bytes and over all tensors, without a further look.
constexpr std::size_t kMaxRank = 8;
constexpr std::int64_t kMaxSize = INT32_MAX;
constexpr std::int64_t kMaxElements = std::int64_t{1} << 36;

constexpr std::string_view kDtypes[] = {"float64", "float32", "float16", "bfloat16", "int64", "int32",
                                        "int16",   "int8",    "uint8",   "bool",     "int4"};

[[noreturn]] void refuse(const std::string& problem) { throw JsonError(problem); }

std::int64_t count(const Json& value) {
  const std::int64_t found = value.integer();
  if (found < 0) refuse("a number is below 0");
  return found;
}

// The length of an axis.
std::int64_t size(const Json& value) {
  const std::int64_t found = value.integer();
  if (found < 1 || found > kMaxSize) refuse("a size is not in 1.." + std::to_string(kMaxSize));
  return found;
}

// Throws where there are more elements than any tensor has.
template <typename Sizes, typename SizeOf>
void checkElements(const std::string& name, const Sizes& sizes, SizeOf sizeOf) {
  std::int64_t elements = 1;
  for (const auto& each : sizes) {
    if (sizeOf(each) > kMaxElements / elements) refuse(name + " has more elements than any tensor");
    elements *= sizeOf(each);
  }
}

std::string text(const Json& object, std::string_view key) {
  const std::string& found = object.at(key).string();
  if (found.empty()) refuse("\"" + std::string(key) + "\" is empty");
  return found;
}

template <typename Made, typename Make>
std::vector<Made> listed(const Json& object, std::string_view key, Make make) {
  std::vector<Made> made;
  if (const Json* found = object.find(key)) {
    for (const Json& each : found->array()) made.push_back(make(each));
  }
  return made;
}

std::optional<std::string> optionalText(const Json& object, std::string_view key) {
  const Json* found = object.find(key);
  if (found == nullptr || found->isNull()) return std::nullopt;
  return found->string();
}

void checkPath(const std::string& path) {
  const auto bad = [&](const char* why) { refuse("the path \"" + path + "\" " + why); };
  if (path.empty() || path.size() > kMaxPath) bad("is empty or too long");
  for (const char letter : path) {
    const auto byte = static_cast<unsigned char>(letter);
    if (byte < 0x20 || byte == 0x7F || letter == '\\' || letter == ':') {
      bad("has a control character, a backslash or a colon");
    }
  }
  for (std::size_t start = 0; start <= path.size();) {
    const std::size_t end = std::min(path.find('/', start), path.size());
    const std::string_view part = std::string_view(path).substr(start, end - start);
    if (part.empty() || part == "." || part == "..") bad("has an empty part, . or ..");
    if (part.size() > kMaxName) bad("has a part that is too long");
    start = end + 1;
  }
}

std::string dtype(const Json& object) {
  const std::string found = text(object, "dtype");
  if (std::find(std::begin(kDtypes), std::end(kDtypes), found) == std::end(kDtypes)) refuse("no dtype: " + found);
  return found;
}

TensorSpec tensor(const Json& found) {
  TensorSpec made;
  made.name = text(found, "name");
  made.dtype = dtype(found);
  made.shape = listed<Dim>(found, "shape", [](const Json& axis) {
    if (axis.isInteger()) return Dim{"", size(axis), size(axis)};
    Dim dim{text(axis, "name"), size(axis.at("min")), size(axis.at("max"))};
    if (dim.min > dim.max) refuse("a dimension's min is above its max");
    return dim;
  });
  if (made.shape.size() > kMaxRank) refuse(made.name + " has more than " + std::to_string(kMaxRank) + " dimensions");
  checkElements(made.name, made.shape, [](const Dim& dim) { return dim.max; });
  return made;
}

// The names of a signature's inputs or outputs, each of them once.
std::set<std::string> namesOf(const std::string& signature, const std::vector<TensorSpec>& specs) {
  std::set<std::string> names;
  for (const TensorSpec& spec : specs) {
    if (!names.insert(spec.name).second) refuse("signature " + signature + " has two values named " + spec.name);
  }
  return names;
}

Signature signature(const Json& found) {
  Signature made;
  made.name = text(found, "name");
  if (const Json* file = found.find("file")) made.file = file->string();
  made.inputs = listed<TensorSpec>(found, "inputs", tensor);
  made.outputs = listed<TensorSpec>(found, "outputs", tensor);
  return made;
}

KvLayout layout(const Json& kv) {
  const KvLayout made{size(kv.at("layers")), size(kv.at("kv_heads")), size(kv.at("head_dim")), size(kv.at("context")),
                      dtype(kv)};
  checkElements("the cache", std::initializer_list<std::int64_t>{made.layers, made.kvHeads, made.headDim, made.context},
                [](std::int64_t each) { return each; });
  return made;
}

Component component(const Json& found, const std::map<std::string, FileEntry>& files) {
  Component made;
  made.name = text(found, "name");
  made.backend = text(found, "backend");
  made.files = listed<std::string>(found, "files", [](const Json& each) { return each.string(); });
  made.signatures = listed<Signature>(found, "signatures", signature);
  made.state = listed<std::pair<std::string, std::string>>(found, "state", [](const Json& pair) {
    if (pair.array().size() != 2) refuse("a state is no pair");
    return std::pair(pair.array()[0].string(), pair.array()[1].string());
  });
  if (const Json* kv = found.find("kv"); kv != nullptr && !kv->isNull()) made.kv = layout(*kv);
  const std::set<std::string> own(made.files.begin(), made.files.end());
  for (const std::string& file : made.files) {
    if (files.count(file) == 0) refuse("component " + made.name + " names a file that is not listed: " + file);
  }
  std::set<std::string> known;
  std::set<std::string> inputs;
  std::set<std::string> outputs;
  for (const Signature& each : made.signatures) {
    if (!known.insert(each.name).second) refuse("component " + made.name + " has two signatures named " + each.name);
    if (!each.file.empty() && own.count(each.file) == 0) {
      refuse("signature " + each.name + " is in a file that is not the component's: " + each.file);
    }
    inputs.merge(namesOf(each.name, each.inputs));
    outputs.merge(namesOf(each.name, each.outputs));
  }
  std::set<std::string> caches;
  std::set<std::string> replacements;
  for (const auto& [source, replacement] : made.state) {
    if (inputs.count(source) == 0 || outputs.count(replacement) == 0) {
      refuse("component " + made.name + " has a state that is no input and output: " + source);
    }
    if (!caches.insert(source).second || !replacements.insert(replacement).second) {
      refuse("component " + made.name + " has a state twice: " + source);
    }
  }
  return made;
}

Golden golden(const Json& found) {
  Golden made;
  made.file = optionalText(found, "file");
  made.chat = optionalText(found, "chat");
  if (const Json* reason = found.find("not_run")) made.notRun = reason->string();
  made.shown = listed<Golden::Case>(found, "shown", [](const Json& each) {
    return Golden::Case{text(each, "name"), text(each, "file"),
                        listed<Golden::Medium>(each, "media", [](const Json& medium) {
                          const std::string kind = text(medium, "kind");
                          if (kind != "image" && kind != "audio") refuse("a medium is of another kind: " + kind);
                          return Golden::Medium{kind, text(medium, "file")};
                        })};
  });
  if (const Json* gates = found.find("gates")) {
    const auto gate = [&](std::string_view key) -> std::optional<double> {
      const Json* value = gates->find(key);
      if (value == nullptr || value->isNull()) return std::nullopt;
      if (!(value->number() >= 0)) refuse("a gate is below 0");
      return value->number();
    };
    made.maxAbs = gate("max_abs");
    made.kl = gate("kl");
  }
  return made;
}

Manifest manifest(const Json& found) {
  Manifest made;
  made.modelName = text(found.at("model"), "name");
  made.targetName = text(found.at("target"), "name");
  made.quantisation = text(found, "quantisation");
  for (const auto& [path, entry] : found.at("files").members()) {
    checkPath(path);
    FileEntry file{count(entry.at("size")), text(entry, "sha256")};
    const bool hex = file.sha256.find_first_not_of("0123456789abcdef") == std::string::npos;
    if (file.sha256.size() != 64 || !hex) refuse("the sha256 of " + path + " is none");
    made.files.emplace(path, std::move(file));
  }
  made.components =
      listed<Component>(found, "components", [&](const Json& each) { return component(each, made.files); });
  std::set<std::string> names;
  for (const Component& each : made.components) {
    if (!names.insert(each.name).second) refuse("two components are named " + each.name);
  }
  made.golden = golden(found.at("golden"));
  for (const auto& file : {made.golden.file, made.golden.chat}) {
    if (file && made.files.count(*file) == 0) refuse("golden names a file that is not listed: " + *file);
  }
  for (const Golden::Case& each : made.golden.shown) {
    if (made.files.count(each.file) == 0) refuse("golden names a file that is not listed: " + each.file);
    for (const Golden::Medium& medium : each.media) {
      if (made.files.count(medium.file) == 0) refuse("golden names a file that is not listed: " + medium.file);
    }
  }
  if (const Json* contract = found.find("text"); contract != nullptr && !contract->isNull()) {
    made.stopIds = listed<std::int64_t>(*contract, "stop_ids", [](const Json& id) { return count(id); });
  }
  made.preprocess = optionalText(found, "preprocess");
  if (made.preprocess && made.files.count(*made.preprocess) == 0) refuse("preprocess names a file that is not listed");
  return made;
}

}  // namespace

std::string Manifest::title() const { return modelName + ", " + targetName + ", " + quantisation; }

const Signature* Component::signature(const std::string& wanted) const { return named(signatures, wanted); }

const Component* Manifest::component(const std::string& name) const { return named(components, name); }

Manifest Manifest::parse(const std::string& text, const std::string& where) {
  try {
    const Json found = Json::parse(text);
    const std::string& schema = found.at("schema").string();
    if (schema != kSchema && schema.compare(0, kSchemas.size(), kSchemas) == 0) {
      throw errors::bundleTooNew(where, schema, std::string(kSchema));
    }
    if (schema != kSchema) refuse("its schema is \"" + schema + "\", not " + std::string(kSchema));
    return manifest(found);
  } catch (const JsonError& problem) {
    throw errors::bundleBadManifest(where, problem.what());
  }
}

}  // namespace edgeexport
