// The fuzzed readers without libFuzzer: inputs that random numbers of a fixed seed make of the seeds.
//
//   fuzz-driver                      prints the names of the targets
//   fuzz-driver TARGET RUNS [SEED]   reads so many inputs
//   fuzz-driver TARGET --seeds DIR   writes the seeds, for libFuzzer to begin with
#include <chrono>
#include <cstdio>
#include <fstream>
#include <random>

#include "targets.h"

namespace {

using edgeexport::fuzz::Target;

constexpr double kMaxSeconds = 20;  // for one input: two on a quiet machine and without the sanitizers

class Mutations {
 public:
  Mutations(std::vector<std::string> seeds, unsigned seed) : pool_(std::move(seeds)), random_(seed) {}

  std::string next() {
    static const std::string kAlphabet("{}[]\",:0123456789.-eE\\u\x00\x01\x7f\x80\xff", 29);
    std::string text = pool_[below(pool_.size())];
    for (std::size_t edits = 1 + below(5); edits > 0; --edits) {
      const std::size_t at = below(text.size() + 1);
      const std::string& other = pool_[below(pool_.size())];
      switch (below(8)) {
        case 0: replace(text, at, static_cast<char>(random_())); break;
        case 1: replace(text, at, kAlphabet[below(kAlphabet.size())]); break;
        case 2: text.erase(at, 1 + below(8)); break;
        case 3: text.insert(at, text.substr(below(text.size() + 1), below(64))); break;
        case 4: text.insert(at, other.substr(below(other.size() + 1), below(64))); break;
        case 5: number(text, at); break;
        case 6: word(text, at / 4 * 4); break;
        default: text.resize(below(8) == 0 ? at : text.size());
      }
    }
    if (pool_.size() < kPool && below(64) == 0) pool_.push_back(text);  // changes upon changes
    return text;
  }

 private:
  static constexpr std::size_t kPool = 256;

  std::size_t below(std::size_t bound) { return static_cast<std::size_t>(random_() % bound); }
  static void replace(std::string& text, std::size_t at, char byte) {
    if (at < text.size()) text[at] = byte;
  }
  // A number in digits becomes another one.
  void number(std::string& text, std::size_t at) {
    static const char* const kNumbers[] = {"0", "-1", "1", "2147483648", "9223372036854775807", "1e308", "0.5", "65536"};
    at = text.find_first_of("0123456789", at);
    if (at == std::string::npos) return;
    const std::size_t end = text.find_first_not_of("0123456789", at);
    text.replace(at, (end == std::string::npos ? text.size() : end) - at, kNumbers[below(8)]);
  }
  // Four bytes become another number.
  void word(std::string& text, std::size_t at) {
    static const std::uint32_t kWords[] = {0, 1, 0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 0x10000, 64, 0x110000};
    if (at + 4 > text.size()) return;
    const std::uint32_t value = kWords[below(8)];
    for (std::size_t i = 0; i < 4; ++i) text[at + i] = static_cast<char>(value >> (8 * i));
  }

  std::vector<std::string> pool_;
  std::mt19937 random_;
};

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

int run(const Target& target, unsigned long runs, unsigned seed) {
  Mutations mutations(target.seeds(), seed);
  for (const std::string& each : target.seeds()) {
    if (target.read(each)) continue;
    std::fprintf(stderr, "%s: a seed was refused\n", target.name);
    return 1;
  }
  for (unsigned long i = 0; i < runs; ++i) {
    const std::string text = mutations.next();
    const double started = seconds();
    target.read(text);
    if (seconds() - started > kMaxSeconds) {
      std::fprintf(stderr, "%s: input %lu took %.1f s\n", target.name, i, seconds() - started);
      return 1;
    }
  }
  std::printf("%s: %lu inputs were read or refused\n", target.name, runs);
  return 0;
}

int write(const Target& target, const std::string& folder) {
  int number = 0;
  for (const std::string& each : target.seeds()) {
    std::ofstream file(folder + "/seed-" + std::to_string(number++), std::ios::binary);
    file << each;
    if (!file.flush()) return 1;
  }
  return 0;
}

}  // namespace

int main(int count, char** values) {
  if (count == 1) {
    for (const Target& each : edgeexport::fuzz::all()) std::puts(each.name);
    return 0;
  }
  const Target* target = edgeexport::fuzz::target(values[1]);
  if (target == nullptr || count < 3) return 2;
  if (values[2] == std::string("--seeds")) return count == 4 ? write(*target, values[3]) : 2;
  return run(*target, std::stoul(values[2]), count > 3 ? static_cast<unsigned>(std::stoul(values[3])) : 20261201U);
}
