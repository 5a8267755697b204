// Choosing the next token out of logits, as edgeexport/session/generate.py does it.
#include "edgeexport/sampling.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include "errors.h"
#include "input_errors.h"

namespace edgeexport {

namespace {

// The place of the largest, the first of equal ones; of the first NaN, if there is one.
std::size_t largest(const float* values, std::size_t count) {
  std::size_t best = 0;
  for (std::size_t i = 0; i < count; ++i) {
    if (std::isnan(values[i])) return i;
    if (values[i] > values[best]) best = i;
  }
  return best;
}

// numpy's SeedSequence: four words of state out of a seed.
std::array<std::uint64_t, 4> seedWords(std::uint64_t seed) {
  constexpr std::size_t kPool = 4;
  std::uint32_t factor = 0x43b0d7e5;
  const auto hashed = [&factor](std::uint32_t value) {
    value ^= factor;
    factor *= 0x931e8875;
    value *= factor;
    return value ^ value >> 16;
  };
  std::array<std::uint32_t, kPool> pool{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)};
  for (std::uint32_t& each : pool) each = hashed(each);
  for (std::size_t from = 0; from < kPool; ++from) {
    for (std::size_t to = 0; to < kPool; ++to) {
      if (from == to) continue;
      const std::uint32_t mixed = 0xca01f9dd * pool[to] - 0x4973f715 * hashed(pool[from]);
      pool[to] = mixed ^ mixed >> 16;
    }
  }
  std::uint32_t last = 0x8b51f9dd;
  std::array<std::uint64_t, 4> words{};
  for (std::size_t i = 0; i < 2 * words.size(); ++i) {
    std::uint32_t value = pool[i % kPool] ^ last;
    last *= 0x58f38ded;
    value *= last;
    value ^= value >> 16;
    words[i / 2] |= std::uint64_t{value} << (32 * (i % 2));
  }
  return words;
}

std::uint64_t highProduct(std::uint64_t a, std::uint64_t b) {
  const std::uint64_t aLow = a & 0xFFFFFFFF, aHigh = a >> 32, bLow = b & 0xFFFFFFFF, bHigh = b >> 32;
  const std::uint64_t middle = aHigh * bLow + (aLow * bLow >> 32);
  const std::uint64_t other = aLow * bHigh + (middle & 0xFFFFFFFF);
  return aHigh * bHigh + (middle >> 32) + (other >> 32);
}

void require(bool good, const char* option, double value, const char* allowed) {
  if (!good) throw errors::badSampling(option, value, allowed);  // a NaN is not good
}

}  // namespace

// 128-bit arithmetic of two halves: 32-bit ABIs have no __int128.
Pcg64::Wide Pcg64::product(const Wide& a, const Wide& b) {
  return {highProduct(a.low, b.low) + a.high * b.low + a.low * b.high, a.low * b.low};
}

Pcg64::Wide Pcg64::sum(const Wide& a, const Wide& b) {
  const std::uint64_t low = a.low + b.low;
  return {a.high + b.high + (low < a.low ? 1 : 0), low};
}

Pcg64::Pcg64(std::uint64_t seed) {
  const auto words = seedWords(seed);
  increment_ = {words[2] << 1 | words[3] >> 63, words[3] << 1 | 1};
  step();
  state_ = sum(state_, {words[0], words[1]});
  step();
}

void Pcg64::step() {
  state_ = sum(product(state_, {2549297995355413924U, 4865540595714422341U}), increment_);
}

double Pcg64::unit() {
  step();
  const std::uint64_t folded = state_.high ^ state_.low;
  const unsigned turn = static_cast<unsigned>(state_.high >> 58);
  const std::uint64_t bits = folded >> turn | folded << (-turn & 63);
  return static_cast<double>(bits >> 11) / 9007199254740992.0;  // 2^53
}

Chooser::Chooser(const Sampling& sampling, std::size_t vocab, const std::vector<std::int32_t>& prompt)
    : sampling_(sampling), vocab_(vocab),
      penalised_(sampling.repetitionPenalty != 1.0F || sampling.frequencyPenalty != 0.0F), random_(sampling.seed) {
  require(std::isfinite(sampling.temperature) && sampling.temperature >= 0, "temperature", sampling.temperature,
          "0 (greedy) and above");
  require(sampling.topP > 0 && sampling.topP <= 1, "top_p", sampling.topP, "above 0, up to 1");
  require(std::isfinite(sampling.repetitionPenalty) && sampling.repetitionPenalty > 0, "repetition_penalty",
          static_cast<double>(sampling.repetitionPenalty), "above 0; 1 is none");
  require(std::isfinite(sampling.frequencyPenalty), "frequency_penalty",
          static_cast<double>(sampling.frequencyPenalty), "any finite number; 0 is none");
  if (penalised_) {
    seen_.resize(vocab);
    counts_.resize(vocab);
    changed_.resize(vocab);
    for (const std::int32_t id : prompt) {
      if (id < 0 || static_cast<std::size_t>(id) >= vocab) throw errors::badToken(std::to_string(id) + " is none");
      seen_[static_cast<std::size_t>(id)] = true;
    }
  }
  if (sampling.temperature > 0) {
    order_.resize(vocab);
    weights_.resize(vocab);
  }
}

std::int32_t Chooser::choose(const float* logits, std::size_t position) {
  std::size_t best = largest(logits, vocab_);
  if (!std::isfinite(logits[best])) throw errors::nonfiniteLogits(position);
  if (penalised_) {
    for (std::size_t i = 0; i < vocab_; ++i) {
      const float factor = sampling_.repetitionPenalty;
      const float value = !seen_[i] ? logits[i] : logits[i] < 0 ? logits[i] * factor : logits[i] / factor;
      const float penalty = counts_[i] * sampling_.frequencyPenalty;
      changed_[i] = value - penalty;
    }
    logits = changed_.data();
    best = largest(logits, vocab_);
  }
  if (sampling_.temperature > 0) best = drawn(logits);
  if (penalised_) {
    seen_[best] = true;
    counts_[best] += 1;
  }
  return static_cast<std::int32_t>(best);
}

// Draws among the topK largest, of those the fewest whose probabilities reach topP.
std::size_t Chooser::drawn(const float* logits) {
  std::iota(order_.begin(), order_.end(), 0U);
  const auto before = [logits](std::uint32_t a, std::uint32_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  };
  const std::size_t count = sampling_.topK > 0 ? std::min(sampling_.topK, vocab_) : vocab_;
  const auto begin = order_.begin();
  const auto end = begin + static_cast<std::ptrdiff_t>(count);
  if (count < vocab_) std::nth_element(begin, end, order_.end(), before);
  std::sort(begin, end, before);
  const double top = static_cast<double>(logits[order_[0]]) / sampling_.temperature;
  const auto weigh = [&](std::size_t some) {
    double sum = 0.0;
    for (std::size_t i = 0; i < some; ++i) {
      weights_[i] = std::exp(static_cast<double>(logits[order_[i]]) / sampling_.temperature - top);
      sum += weights_[i];
    }
    return sum;
  };
  const double total = weigh(count);
  std::size_t kept = 0;
  for (double sum = 0.0; kept < count && sum < sampling_.topP; ++kept) sum += weights_[kept] / total;
  // ids in ascending order share the numbers from 0 to 1 among them
  std::sort(begin, begin + static_cast<std::ptrdiff_t>(kept));
  double left = weigh(kept) * random_.unit();
  for (std::size_t i = 0; i + 1 < kept; ++i) {
    left -= weights_[i];
    if (left < 0) return order_[i];
  }
  return order_[kept - 1];
}

}  // namespace edgeexport
