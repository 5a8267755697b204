// Reads manifest.json: what the loader relies on is checked, what it does not know is left alone.
#include <algorithm>
#include <cmath>
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

[[noreturn]] void refuse(const std::string& problem) { throw JsonError(problem); }

std::int64_t count(const Json& value, std::int64_t least = 0) {
  const std::int64_t found = value.integer();
  if (found < least) refuse("a number is below " + std::to_string(least));
  return found;
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

TensorSpec tensor(const Json& found) {
  TensorSpec made;
  made.name = text(found, "name");
  made.dtype = text(found, "dtype");
  made.shape = listed<Dim>(found, "shape", [](const Json& size) {
    if (size.isInteger()) return Dim{"", count(size), count(size)};
    Dim dim{text(size, "name"), count(size.at("min")), count(size.at("max"))};
    if (dim.min > dim.max) refuse("a dimension's min is above its max");
    return dim;
  });
  return made;
}

Signature signature(const Json& found) {
  Signature made;
  made.name = text(found, "name");
  if (const Json* file = found.find("file")) made.file = file->string();
  made.inputs = listed<TensorSpec>(found, "inputs", tensor);
  made.outputs = listed<TensorSpec>(found, "outputs", tensor);
  return made;
}

bool names(const std::vector<Signature>& signatures, const std::string& wanted, bool output) {
  for (const Signature& each : signatures) {
    for (const TensorSpec& spec : output ? each.outputs : each.inputs) {
      if (spec.name == wanted) return true;
    }
  }
  return false;
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
  if (const Json* kv = found.find("kv"); kv != nullptr && !kv->isNull()) {
    made.kv = KvLayout{count(kv->at("layers"), 1), count(kv->at("kv_heads"), 1), count(kv->at("head_dim"), 1),
                       count(kv->at("context"), 1), text(*kv, "dtype")};
  }
  for (const std::string& file : made.files) {
    if (files.count(file) == 0) refuse("component " + made.name + " names a file that is not listed: " + file);
  }
  for (const Signature& each : made.signatures) {
    if (!each.file.empty() && std::count(made.files.begin(), made.files.end(), each.file) == 0) {
      refuse("signature " + each.name + " is in a file that is not the component's: " + each.file);
    }
  }
  for (const auto& [source, replacement] : made.state) {
    if (!names(made.signatures, source, false) || !names(made.signatures, replacement, true)) {
      refuse("component " + made.name + " has a state that is no input and output: " + source);
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
  for (std::size_t i = 0; i < made.components.size(); ++i) {
    if (made.component(made.components[i].name) != &made.components[i]) refuse("two components have the same name");
  }
  made.golden = golden(found.at("golden"));
  for (const auto& file : {made.golden.file, made.golden.chat}) {
    if (file && made.files.count(*file) == 0) refuse("golden names a file that is not listed: " + *file);
  }
  for (const Golden::Case& each : made.golden.shown) {
    if (made.files.count(each.file) == 0) refuse("golden names a file that is not listed: " + each.file);
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
