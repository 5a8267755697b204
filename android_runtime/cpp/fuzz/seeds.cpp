// Small inputs that the readers read, for a fuzzer to begin with.
#include "seeds.h"

#include <cstdint>
#include <cstring>

namespace edgeexport::fuzz {
namespace {

std::string little(std::uint64_t value, std::size_t size = 4) {
  std::string made;
  for (std::size_t i = 0; i < size; ++i) made.push_back(static_cast<char>(value >> (8 * i)));
  return made;
}

std::string numbers(const std::vector<std::uint32_t>& values) {
  std::string made;
  for (const std::uint32_t each : values) made += little(each);
  return made;
}

std::string padded(std::string text) {
  text.resize((text.size() + 3) / 4 * 4, '\0');
  return text;
}

std::string floats(const std::vector<float>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)};
}

std::string tensor(const std::string& name, const std::string& dtype, const std::string& shape) {
  return R"({"name": ")" + name + R"(", "dtype": ")" + dtype + R"(", "shape": )" + shape + "}";
}

// A decoder of one layer in the names of a backend.
std::string manifest(const std::string& backend, const std::string& signature, const std::string& inputs,
                     const std::string& outputs, const std::string& state) {
  return R"({"schema": "edgeexport.bundle/1", "quantisation": "fp32", "model": {"name": "m"}, "target": {"name": "t"},
  "files": {"decoder.bin": {"size": 4, "sha256": ")" + std::string(64, 'a') + R"("}}, "text": {"stop_ids": [2]},
  "golden": {"file": null, "not_run": "L1", "gates": {"kl": 0.5, "max_abs": null}}, "preprocess": null,
  "components": [{"name": "decoder", "backend": ")" + backend + R"(", "files": ["decoder.bin"],
  "kv": {"layers": 1, "kv_heads": 2, "head_dim": 4, "context": 8, "dtype": "float32"}, "state": )" + state + R"(,
  "signatures": [{"name": ")" + signature + R"(", "file": "decoder.bin", "inputs": [)" + inputs +
         R"(], "outputs": [)" + outputs + "]}]}]}";
}

}  // namespace

std::vector<std::string> jsonSeeds() {
  return {R"({"a": [1, -2.5e1, true, null], "b": {"c": "\u00e9\ud83d\ude00\n"}})", "[[[[]]], {}, \"\", 0, -0.0]"};
}

std::vector<std::string> manifestSeeds() {
  const std::string tokens = R"([1, {"name": "T", "min": 1, "max": 8}])";
  return {manifest("onnxruntime", "step",
                   tensor("input_ids", "int64", tokens) + "," + tensor("position", "int64", "[1]") + "," +
                       tensor("past_key.0", "float32", "[1, 2, 8, 4]") + "," +
                       tensor("past_value.0", "float32", "[1, 2, 8, 4]"),
                   tensor("logits", "float32", "[1, 1, 16]") + "," + tensor("present_key.0", "float32", "[1, 2, 8, 4]") +
                       "," + tensor("present_value.0", "float32", "[1, 2, 8, 4]"),
                   R"([["past_key.0", "present_key.0"], ["past_value.0", "present_value.0"]])"),
          manifest("litert", "decode",
                   tensor("embeddings", "float32", "[1, 1, 32]") + "," + tensor("input_pos", "int32", "[1]") + "," +
                       tensor("rope_positions", "int32", "[3, 1, 1]") + "," + tensor("k", "float32", "[1, 2, 8, 4]") +
                       "," + tensor("v", "float32", "[1, 2, 8, 4]"),
                   tensor("logits", "float32", "[1, 1, 16]") + "," + tensor("k", "float32", "[1, 2, 8, 4]") + "," +
                       tensor("slice", "float32", "[1, 2, 1, 4]"),
                   R"([["k", "k"], ["v", "slice"]])")};
}

std::vector<std::string> safetensorsSeeds() {
  const std::string header = R"({"a": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}, "b": {"dtype": "F32",)"
                             R"( "shape": [1, 2], "data_offsets": [8, 16]}, "__metadata__": {"x": "y"}})";
  return {little(header.size(), 8) + header + std::string(16, '\1')};
}

// A flatbuffer whose model has one buffer, which lies behind it.
std::vector<std::string> tfliteSeeds() {
  const auto field = [](std::uint16_t at) { return little(at, 2); };
  std::string made = little(24) + "TFL3";                                           // the root table lies at 24
  made += field(14) + field(8);                                                     // 8: its vtable of five fields
  for (const std::uint16_t at : {0, 0, 0, 0, 4}) made += field(at);                 // the fifth is the buffers
  made += field(0);                                                                 // 22
  made += little(24 - 8) + little(4);                                               // 24: the table; 28: its field
  made += little(1) + little(16);                                                   // 32: one buffer, whose table is at 52
  made += field(10) + field(24) + field(0) + field(8) + field(16) + field(0);       // 40: its vtable of three fields
  made += little(52 - 40) + little(0) + little(76, 8) + little(4, 8) + "data";      // 52; offset at 60, size at 68
  return {made};
}

std::vector<std::string> mediaSeeds() {
  const std::string bitmap = "BM" + little(78) + little(0) + little(54) + little(40) + little(3) + little(2) +
                             little(1, 2) + little(24, 2) + std::string(24, '\0') + std::string(24, '\7');
  const std::string wave = "RIFF" + little(40) + "WAVEfmt " + little(16) + little(1, 2) + little(1, 2) + little(16000) +
                           little(32000) + little(2, 2) + little(16, 2) + "data" + little(4) + little(0x8000, 2) +
                           little(0x4000, 2);
  return {bitmap, wave};
}

std::vector<std::string> preprocessSeeds() {
  const std::string levels = R"("mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]})";
  return {R"({"schema": "edgeexport.preprocess/1", "joining": "splice", "image_token_id": 7, "image_ids": [6, 7, 8],)"
          R"( "position_rows": 3, "audio": null, "image": {"kind": "patches", "patch_size": 4, "merge_size": 2,)"
          R"( "temporal_patch_size": 2, "min_pixels": 64, "max_pixels": 4096, "rescale_factor": 0.0039,)"
          R"( "resample": "bicubic", "grids": [[4, 6], [6, 4]], )" + levels + "}",
          R"({"schema": "edgeexport.preprocess/1", "joining": "attend", "image": {"kind": "pixels", "size": 16, )" +
              levels + R"(, "audio": {"kind": "whisper-log-mel", "sample_rate": 16000, "n_fft": 40, "hop_length": 16,)"
          R"( "n_mels": 8, "seconds": 0.01}})"};
}

// The 256 bytes, "ab" and "abc" merged of them, and an added token; pieces of spaces and of others.
std::vector<std::string> tokenizerSeeds() {
  constexpr std::uint32_t kIds = 259;
  std::string bytes;
  std::vector<std::uint32_t> starts;
  std::vector<std::uint32_t> byteIds;
  std::vector<std::uint32_t> mergeStarts;
  for (std::uint32_t id = 0; id < 256; ++id) {
    starts.push_back(static_cast<std::uint32_t>(bytes.size()));
    bytes.push_back(static_cast<char>(id));
    byteIds.push_back(id);
    mergeStarts.push_back(id > 'a' ? 1 : 0);
  }
  for (const char* text : {"ab", "abc", "<|end|>"}) {
    starts.push_back(static_cast<std::uint32_t>(bytes.size()));
    bytes += text;
    mergeStarts.push_back(text == std::string("abc") || text[0] == '<' ? 2 : 1);
  }
  starts.push_back(static_cast<std::uint32_t>(bytes.size()));
  mergeStarts.push_back(2);
  const auto table = [&](std::uint32_t flags, const std::string& normalForm) {
    std::string made = "EEBPE/1\n";
    made += numbers({kIds, static_cast<std::uint32_t>(bytes.size()), 2, 0, 1, 1, 1, 1, flags}) + numbers(starts);
    made += padded(bytes) + numbers(byteIds) + numbers(mergeStarts);
    made += numbers({'b', 'c'}) + numbers({0, 1}) + numbers({256, 257});
    made += numbers({258, 1, 0, 7}) + padded("<|end|>") + numbers({65, 66}) + normalForm;
    made += numbers({3, 0, 0x20 << 8 | 1, 0x21 << 8, 2});
    return made + numbers({1, 0, 2, 0, 1, 0xFFFFFFFF, 2, 0, 2, 0, 0, 1, 0, 1, 0, 1, 0xFFFFFFFF});
  };
  // the normal form: one character of two parts, one combining class, one composition
  return {table(2, ""), table(1, numbers({1, 2, 1, 1, 0xE1, 0, 2, 'a', 0x301, 0x301 << 8 | 230, 'a', 0x301, 0xE1}))};
}

std::vector<std::string> chatSeeds() {
  return {R"({"schema": "edgeexport.chat/1", "image": "<|image|>", "joins": {"start system": "<s>", "start user": "<s>",)"
          R"( "system user": "<u>", "user answer": "<a>", "user assistant": "<a>", "assistant user": "<u>"},)"
          R"( "content": {"system": "strip", "user": "as-is", "assistant": "after-thought-strip"}})",
          R"([{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}],)"
          R"( "text": "<s>a<|image|><a>", "tokens": [60, 115, 62, 97, 60, 124, 105, 109, 97, 103, 101, 124, 62, 60, 97,)"
          R"( 62]}])",
          R"([{"role": "user", "content": "a"}, {"role": "assistant", "content": "</think>b"},)"
          R"( {"role": "user", "content": "c"}])"};
}

std::vector<std::string> cacheSeeds() {
  return {"\x34What? \x35What? \x4CWhat  time \x4D" "a b  c.\x01\x35What? \x02\x35What? \x00", "\x44" "21.11.2026\x45" "21.11.2026"};
}

std::vector<std::string> samplingSeeds() {
  return {floats({0.7F, 0.9F, 1.1F, 0.2F, 0.0F, 1, 2, 3, 4, 5, 6, 7, 8, 3, 1, 4, 1, 5, 9, 2, 6}),
          floats({0.0F, 1.0F, 1.0F, 0.0F, 0.0F, 1, 2, 3, 4, 5, 6, 7, 8})};
}

}  // namespace edgeexport::fuzz
