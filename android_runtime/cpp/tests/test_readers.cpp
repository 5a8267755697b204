// The readers of untrusted files: examples, then mutated ones, of which every one must be read or refused.
// Files that are given as arguments are mutated as well; small ones make a thorough test.
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "edgeexport/bundle.h"
#include "edgeexport/json.h"
#include "edgeexport/preprocess.h"
#include "edgeexport/safetensors.h"
#include "edgeexport/sha256.h"
#include "golden_media.h"
#include "splitting.h"
#include "tflite_check.h"

namespace {

using edgeexport::Json;
using edgeexport::JsonError;
using edgeexport::Manifest;
using edgeexport::Safetensors;
using edgeexport::SafetensorsError;

constexpr int kMutations = 4000;

bool isJson(const std::string& text) {
  try {
    Json::parse(text);
    return true;
  } catch (const JsonError&) {
    return false;
  }
}

void testJson() {
  const Json found = Json::parse(" {\"a\": [1, -2.5e1, true, null], \"b\": {\"c\": \"\\u00e9\\ud83d\\ude00\\n\"}} ");
  CHECK(found.at("a").array()[0].integer() == 1);
  CHECK(found.at("a").array()[1].number() == -25);
  CHECK(found.at("a").array()[2].boolean());
  CHECK(found.at("a").array()[3].isNull());
  CHECK(found.at("b").at("c").string() == "\xC3\xA9\xF0\x9F\x98\x80\n");
  CHECK(found.find("d") == nullptr);
  CHECK(Json::parse("9223372036854775807").integer() == INT64_MAX);
  CHECK(Json::parse("{\"z\": 1, \"a\": 2}").members()[0].first == "z");
  for (const char* good : {"0", "-0", "\"\"", "[]", "{}", "1e-3", "[[[]]]"}) CHECK(isJson(good));
  for (const char* bad :
       {"", "01", "1.", ".5", "+1", "nul", "[1,]", "{\"a\":1,}", "{\"a\":1,\"a\":2}", "\"\\ud800\"", "\"\n\"", "NaN",
        "1e999", "9223372036854775808", "[1] 2", "{a:1}", "\"\xff\"", "\"\xc0\x80\"", "\"\xed\xa0\x80\"", "\"",
        "{\"a\"", "[", "\"\\x\"", "\"\\u12\""}) {
    CHECK(!isJson(bad));
  }
  CHECK(isJson(std::string(64, '[') + std::string(64, ']')));
  CHECK(!isJson(std::string(100000, '[')));
  CHECK(edgeexport::jsonQuoted("a\"\\\x01") == "\"a\\\"\\\\\\u0001\"");
  CHECK(Json::parse(edgeexport::jsonQuoted("a\"\\\x01\xC3\xA9")).string() == "a\"\\\x01\xC3\xA9");
}

// FIPS 180-4's examples, and lengths around the block's.
void testSha256() {
  CHECK(edgeexport::sha256Hex("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(edgeexport::sha256Hex("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(edgeexport::sha256Hex(std::string(1000000, 'a')) ==
        "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  for (const std::size_t size : {55U, 56U, 63U, 64U, 65U, 129U}) {
    edgeexport::Sha256 hash;
    for (std::size_t i = 0; i < size; ++i) hash.update("x", 1);
    CHECK(hash.hex() == edgeexport::sha256Hex(std::string(size, 'x')));
  }
}

std::string safetensors(const std::string& header, const std::string& data) {
  const std::uint64_t size = header.size();
  std::string made(sizeof(size), '\0');
  std::memcpy(made.data(), &size, sizeof(size));
  return made + header + data;
}

bool isSafetensors(const std::string& file) {
  try {
    Safetensors::parse(file);
    return true;
  } catch (const SafetensorsError&) {
    return false;
  }
}

const char* const kTensor = "{\"a\": {\"dtype\": \"I64\", \"shape\": [1], \"data_offsets\": [0, 8]}}";

void testSafetensors() {
  const std::string good = safetensors(kTensor, std::string("\x05\0\0\0\0\0\0\0", 8));
  CHECK(Safetensors::parse(good).integers("a", 1)[0] == 5);
  for (std::size_t cut = 0; cut < good.size(); ++cut) CHECK(!isSafetensors(good.substr(0, cut)));
  for (const char* bad :
       {"{\"a\": {\"dtype\": \"I64\", \"shape\": [2], \"data_offsets\": [0, 8]}}",
        "{\"a\": {\"dtype\": \"I64\", \"shape\": [-1], \"data_offsets\": [0, 8]}}",
        "{\"a\": {\"dtype\": \"I64\", \"shape\": [4611686018427387904, 4], \"data_offsets\": [0, 0]}}",
        "{\"a\": {\"dtype\": \"I64\", \"shape\": [1], \"data_offsets\": [8, 16]}}",
        "{\"a\": {\"dtype\": \"I64\", \"shape\": [1], \"data_offsets\": [8, 0]}}",
        "{\"a\": {\"dtype\": \"X9\", \"shape\": [1], \"data_offsets\": [0, 8]}}", "[]", "{\"a\": 1}"}) {
    CHECK(!isSafetensors(safetensors(bad, std::string(8, '\0'))));
  }
}

void testManifest() {
  const auto code = [](const std::string& text) { return codeOf([&] { Manifest::parse(text, "manifest.json"); }); };
  CHECK(code("{\"schema\": \"edgeexport.bundle/2\"}") == "bundle-too-new");
  CHECK(code("{\"schema\": \"edgeexport.bundle/1\"}") == "bundle-bad-manifest");
  CHECK(code("{\"schema\": \"other/1\"}") == "bundle-bad-manifest");
  CHECK(code("{") == "bundle-bad-manifest");
  const std::string rest =
      ": {\"size\": 1, \"sha256\": \"" + std::string(64, 'a') + "\"}}, \"golden\": {\"not_run\": \"none\"}, "
      "\"components\": [], \"model\": {\"name\": \"m\"}, \"target\": {\"name\": \"t\"}, \"quantisation\": \"q\", "
      "\"schema\": \"edgeexport.bundle/1\"}";
  CHECK(code("{\"files\": {\"a/b.bin\"" + rest).empty());
  const std::string tensor =
      "{\"schema\": \"edgeexport.bundle/1\", \"files\": {}, \"golden\": {\"not_run\": \"none\"}, \"model\": {\"name\": "
      "\"m\"}, \"target\": {\"name\": \"t\"}, \"quantisation\": \"q\", \"components\": [{\"name\": \"c\", \"backend\": "
      "\"b\", \"signatures\": [{\"name\": \"s\", \"inputs\": [{\"name\": \"i\", \"dtype\": \"float32\", \"shape\": ";
  for (const char* shape : {"[]", "[1]", "[2147483647]", "[{\"name\": \"T\", \"min\": 1, \"max\": 9}]"}) {
    CHECK(code(tensor + shape + "}]}]}]}").empty());
  }
  for (const char* shape :
       {"[0]", "[-1]", "[2147483648]", "[9223372036854775807, 2]", "[2147483647, 2147483647, 2147483647]", "[1.0]",
        "[65536, 65536, 65536, 65536]", "[1,1,1,1,1,1,1,1,1]", "[{\"name\": \"T\", \"min\": 0, \"max\": 9}]", "7"}) {
    CHECK(code(tensor + shape + "}]}]}]}") == "bundle-bad-manifest");
  }
  for (const char* path : {"", "/a", "../a", "a/../b", "a//b", "./a", "a/", "a\\\\b", "c:a", "a\\u0000b", "a\\u007f"}) {
    CHECK(code("{\"files\": {\"" + std::string(path) + "\"" + rest) == "bundle-bad-manifest");
  }
}

std::string little(std::uint32_t value, std::size_t size = 4) {
  return std::string(reinterpret_cast<const char*>(&value), size);  // this machine's order is the file's
}

// Two rows of three pixels, each filled up to twelve bytes.
std::string bitmap() {
  std::string made = "BM" + little(78) + little(0) + little(54) + little(40) + little(3) + little(2) + little(1, 2) +
                     little(24, 2) + std::string(24, '\0');
  for (char byte = 0; byte < 24; ++byte) made.push_back(byte);
  return made;
}

std::string wave() {
  return "RIFF" + little(40) + "WAVEfmt " + little(16) + little(1, 2) + little(1, 2) + little(16000) + little(32000) +
         little(2, 2) + little(16, 2) + "data" + little(4) + little(0x8000, 2) + little(0x4000, 2);
}

void testMedia() {
  const edgeexport::GoldenPicture picture = edgeexport::readBitmap(bitmap(), "");
  CHECK(picture.height == 2 && picture.width == 3);
  CHECK((picture.rgb == std::vector<std::uint8_t>{14, 13, 12, 17, 16, 15, 20, 19, 18, 2, 1, 0, 5, 4, 3, 8, 7, 6}));
  const edgeexport::GoldenSound sound = edgeexport::readWave(wave(), "");
  CHECK(sound.rate == 16000);
  CHECK((sound.samples == std::vector<float>{-1.0F, 0.5F}));
  for (std::size_t cut = 0; cut < bitmap().size(); ++cut) {
    CHECK(codeOf([&] { edgeexport::readBitmap(bitmap().substr(0, cut), ""); }) == "golden-unusable");
  }
  for (std::size_t cut = 0; cut < wave().size(); ++cut) {
    CHECK(codeOf([&] { edgeexport::readWave(wave().substr(0, cut), ""); }) == "golden-unusable");
  }
}

std::string numbers(const std::vector<std::uint32_t>& values) {
  std::string made;
  for (const std::uint32_t each : values) made += little(each);
  return made;
}

// A pre-tokeniser over two classes of characters: spaces are 1, all others 0.
edgeexport::SplittingStep splitting(const std::vector<std::vector<std::array<std::uint32_t, 4>>>& alternatives) {
  std::vector<std::uint32_t> table = {3, 0, 0x20 << 8 | 1, 0x21 << 8, static_cast<std::uint32_t>(alternatives.size())};
  for (const auto& items : alternatives) {
    table.push_back(static_cast<std::uint32_t>(items.size()));
    for (const auto& [absent, classes, least, most] : items) table.insert(table.end(), {absent, classes, 0, least, most});
  }
  const std::string bytes = numbers(table);
  edgeexport::NumbersReader reader(bytes, "test");
  return edgeexport::SplittingStep(reader);
}

void testSplitting() {
  constexpr std::uint32_t kMany = 0xFFFFFFFF;
  std::vector<std::uint8_t> classes;
  const auto pieces = [&](const edgeexport::SplittingStep& step, const std::u32string& text) {
    return step.split({text.begin(), text.end()}, {{0, text.size()}}, classes).size();
  };
  // \s+(?!\S)|\s?\S+|\s+, as GPT-2 has it
  const auto usual = splitting({{{0, 2, 1, kMany}, {1, 1, 0, 1}}, {{0, 2, 0, 1}, {0, 1, 1, kMany}}, {{0, 2, 1, kMany}}});
  CHECK(pieces(usual, U"a bc  d") == 4);
  CHECK(pieces(usual, std::u32string(300000, U' ')) == 1);
  CHECK(pieces(usual, std::u32string(300000, U'a')) == 1);
  CHECK(pieces(usual, std::u32string(300000, U' ') + U"a") == 2);
  // (\S*){30}\s: every way to share 40 characters out is tried
  std::vector<std::array<std::uint32_t, 4>> bomb(30, {0, 1, 0, kMany});
  bomb.push_back({0, 2, 1, 1});
  const auto bombed = splitting({bomb});
  CHECK(codeOf([&] { pieces(bombed, std::u32string(40, U'a')); }) == "tokenizer-unusable");
}

// Files that are small and ask for much.
void testBombs() {
  CHECK(!isJson("[" + std::string(4 << 20, '0') + "]"));
  std::string many = "[0";
  for (int i = 0; i < 3 << 20; ++i) many += ",0";
  CHECK(!isJson(many + "]"));
  CHECK(!isJson("0." + std::string(1 << 20, '1')));
  const auto contract = [](const std::string& audio) {
    return codeOf([&] { edgeexport::Preprocess::parse("{\"schema\": \"edgeexport.preprocess/1\", \"audio\": {" + audio + "}}"); });
  };
  const std::string rest = "\"kind\": \"whisper-log-mel\", \"sample_rate\": 16000, ";
  CHECK(contract(rest + "\"n_fft\": 400, \"hop_length\": 160, \"n_mels\": 128, \"seconds\": 30").empty());
  CHECK(contract(rest + "\"n_fft\": 400, \"hop_length\": 16, \"n_mels\": 256, \"seconds\": 600") ==
        "bundle-bad-preprocess");
  CHECK(contract(rest + "\"n_fft\": 4094, \"hop_length\": 100, \"n_mels\": 8, \"seconds\": 600") ==
        "bundle-bad-preprocess");
}

// Feeds one text to every reader: each reads or refuses it.
void readAll(const std::string& text) {
  isJson(text);
  isSafetensors(text);
  codeOf([&] { Manifest::parse(text, "mutated"); });
  codeOf([&] { edgeexport::readBitmap(text, "mutated"); });
  codeOf([&] { edgeexport::readWave(text, "mutated"); });
  edgeexport::tfliteDamage(text.data(), text.size());
}

void mutate(const std::string& seed) {
  std::mt19937 random(20261121);
  const auto below = [&](std::size_t bound) { return static_cast<std::size_t>(random() % bound); };
  static const std::string kAlphabet = "{}[]\",:0123456789.-eE\\u\x00\xff";
  for (int i = 0; i < kMutations; ++i) {
    std::string text = seed;
    for (std::size_t edits = 1 + below(4); edits > 0 && !text.empty(); --edits) {
      const std::size_t at = below(text.size());
      switch (below(4)) {
        case 0: text[at] = static_cast<char>(random()); break;
        case 1: text[at] = kAlphabet[below(kAlphabet.size())]; break;
        case 2: text.erase(at, 1 + below(8)); break;
        default: text.insert(at, text.substr(below(text.size()), below(16)));
      }
    }
    if (below(8) == 0) text.resize(below(text.size() + 1));
    readAll(text);
  }
}

}  // namespace

// test-readers [FILE...]
int main(int count, char** values) {
  testJson();
  testSha256();
  testSafetensors();
  testManifest();
  testMedia();
  testSplitting();
  testBombs();
  std::vector<std::string> seeds = {"{\"a\": [1, -2.5e1, true, null], \"b\": {\"c\": \"\\u00e9\\ud83d\\ude00\"}}",
                                    safetensors(kTensor, std::string(8, '\1')), bitmap(), wave()};
  for (int i = 1; i < count; ++i) {
    std::ifstream file(values[i], std::ios::binary);
    seeds.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    CHECK(!seeds.back().empty());
  }
  for (const std::string& seed : seeds) mutate(seed);
  std::printf("%zu mutated files were read or refused\n", seeds.size() * kMutations);
}
