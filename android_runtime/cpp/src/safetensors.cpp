// Reads safetensors: a length, a JSON header, then the tensors' bytes (little-endian, as every Android device is).
#include "edgeexport/safetensors.h"

#include <cstring>

#include "edgeexport/json.h"

namespace edgeexport {
namespace {

constexpr std::size_t kLength = 8;

// Bytes of one element; 0 for a type that is not known.
std::size_t elementBytes(const std::string& dtype) {
  static const std::map<std::string, std::size_t> sizes = {
      {"F64", 8}, {"I64", 8}, {"U64", 8}, {"F32", 4}, {"I32", 4}, {"U32", 4},  {"F16", 2},
      {"BF16", 2}, {"I16", 2}, {"U16", 2}, {"I8", 1},  {"U8", 1},  {"BOOL", 1}};
  const auto found = sizes.find(dtype);
  return found == sizes.end() ? 0 : found->second;
}

Safetensors::Tensor tensor(const Json& entry, std::size_t begin, std::size_t size) {
  Safetensors::Tensor made;
  made.dtype = entry.at("dtype").string();
  std::size_t bytes = elementBytes(made.dtype);
  if (bytes == 0) throw JsonError("its dtype is " + made.dtype);
  for (const Json& each : entry.at("shape").array()) {
    const std::int64_t length = each.integer();
    if (length < 0 || __builtin_mul_overflow(bytes, static_cast<std::size_t>(length), &bytes)) {
      throw JsonError("its shape is impossible");
    }
    made.shape.push_back(length);
  }
  const std::vector<Json>& offsets = entry.at("data_offsets").array();
  if (offsets.size() != 2) throw JsonError("it has no two offsets");
  const std::int64_t from = offsets[0].integer();
  const std::int64_t to = offsets[1].integer();
  if (from < 0 || to < from || static_cast<std::uint64_t>(to) > size || static_cast<std::size_t>(to - from) != bytes) {
    throw JsonError("its offsets are not those of its shape in this file");
  }
  made.offset = begin + static_cast<std::size_t>(from);
  made.bytes = bytes;
  return made;
}

}  // namespace

Safetensors Safetensors::parse(std::string file) {
  if (file.size() < kLength) throw SafetensorsError("it is shorter than its header's length");
  std::uint64_t header = 0;
  std::memcpy(&header, file.data(), kLength);
  if (header > file.size() - kLength) throw SafetensorsError("its header ends behind the file");
  const std::size_t begin = kLength + static_cast<std::size_t>(header);
  Safetensors made;
  try {
    const Json found = Json::parse(std::string_view(file).substr(kLength, static_cast<std::size_t>(header)));
    for (const auto& [name, entry] : found.members()) {
      if (name != "__metadata__") made.tensors_[name] = tensor(entry, begin, file.size() - begin);
    }
  } catch (const JsonError& problem) {
    throw SafetensorsError(std::string("its header is not one: ") + problem.what());
  }
  made.file_ = std::move(file);
  return made;
}

const Safetensors::Tensor& Safetensors::at(const std::string& name, const std::string& dtype, std::size_t rank) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) throw SafetensorsError(name + " is missing");
  if (found->second.dtype != dtype || found->second.shape.size() != rank || found->second.bytes == 0) {
    throw SafetensorsError(name + " is not " + dtype + " of rank " + std::to_string(rank) + ", or empty");
  }
  return found->second;
}

std::vector<std::int64_t> Safetensors::integers(const std::string& name, std::size_t rank) const {
  const Tensor& found = at(name, "I64", rank);
  std::vector<std::int64_t> values(found.bytes / sizeof(std::int64_t));
  std::memcpy(values.data(), file_.data() + found.offset, found.bytes);
  return values;
}

std::vector<float> Safetensors::floats(const std::string& name, std::size_t rank) const {
  const Tensor& found = at(name, "F32", rank);
  std::vector<float> values(found.bytes / sizeof(float));
  std::memcpy(values.data(), file_.data() + found.offset, found.bytes);
  return values;
}

}  // namespace edgeexport
