// The session over an engine that is a table: its contract, its misuse, several threads at once.
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "edgeexport/session.h"
#include "errors.h"

namespace {

using edgeexport::Piece;
using edgeexport::Session;

constexpr std::size_t kContext = 2000;
constexpr std::size_t kVocab = 17;

// Logits are the sum of the cached tokens' rows of a table, so that they depend on the whole cache and its order.
class TableEngine final : public edgeexport::DecoderEngine {
 public:
  std::size_t context() const noexcept override { return kContext; }
  std::size_t vocab() const noexcept override { return kVocab; }
  std::size_t width() const noexcept override { return 0; }
  double runtimeSeconds() const noexcept override { return 0; }

  const float* step(const Piece& piece, std::size_t position) override {
    CHECK(!running_.exchange(true));  // never two at once
    if (fails) {
      running_ = false;
      throw edgeexport::errors::runtimeFailed("table", "no memory");
    }
    if (piece.count > longest) longest = piece.count;
    entered = true;
    if (pause.count() > 0) std::this_thread::sleep_for(pause);
    for (std::size_t i = 0; i < piece.count; ++i) cache_[position + i] = piece.tokens[i];
    for (std::size_t id = 0; id < kVocab; ++id) {
      logits_[id] = 0;
      for (std::size_t i = 0; i < position + piece.count; ++i) {
        logits_[id] += static_cast<float>((static_cast<std::size_t>(cache_[i]) * 7 + id * 3 + i) % 11);
      }
    }
    if (nan) logits_[3] = NAN;
    running_ = false;
    return logits_;
  }

  std::chrono::microseconds pause{0};
  bool fails = false;
  bool nan = false;
  std::size_t longest = 0;
  std::atomic<bool> entered{false};

 private:
  std::atomic<bool> running_{false};
  std::int32_t cache_[kContext] = {};
  float logits_[kVocab] = {};
};

struct Opened {
  TableEngine* engine;
  Session session;

  explicit Opened(std::unique_ptr<TableEngine> made = std::make_unique<TableEngine>())
      : engine(made.get()), session(std::move(made)) {}
};

void testContract() {
  Opened whole;
  Opened parts;
  const std::vector<std::int32_t> prompt = {1, 5, 2, 7};
  std::vector<float> one(kVocab);
  std::vector<float> other(kVocab);
  whole.session.prefill(prompt.data(), 4, one.data());
  for (const std::int32_t token : prompt) parts.session.decode(token, other.data());
  CHECK(one == other);
  CHECK(whole.session.position() == 4);
  std::int32_t best = 0;
  for (std::int32_t id = 1; id < static_cast<std::int32_t>(kVocab); ++id) {
    if (one[static_cast<std::size_t>(id)] > one[static_cast<std::size_t>(best)]) best = id;
  }
  CHECK(whole.session.greedy() == best);
  whole.session.decode(3, nullptr);
  whole.session.truncate(2);
  CHECK(whole.session.position() == 2);
  whole.session.prefill(prompt.data() + 2, 2, other.data());
  CHECK(one == other);
  whole.session.reset();
  CHECK(whole.session.position() == 0);
  const std::vector<std::int32_t> longPrompt(1500, 4);
  whole.session.prefill(longPrompt.data(), longPrompt.size(), one.data());
  CHECK(whole.engine->longest == edgeexport::kLongestPiece);
  parts.session.reset();
  for (const std::int32_t token : longPrompt) parts.session.decode(token, other.data());
  CHECK(one == other);
}

void testMisuse() {
  Opened opened;
  Session& session = opened.session;
  const std::int32_t good = 1;
  const auto prefill = [&](const std::int32_t* tokens, std::size_t count) {
    return codeOf([&] { session.prefill(tokens, count, nullptr); });
  };
  CHECK(codeOf([&] { session.greedy(); }) == "bad-token");
  CHECK(prefill(nullptr, 1) == "bad-token");
  CHECK(prefill(&good, 0) == "bad-token");
  CHECK(codeOf([&] { session.decode(-1, nullptr); }) == "bad-token");
  CHECK(codeOf([&] { session.decode(static_cast<std::int32_t>(kVocab), nullptr); }) == "bad-token");
  CHECK(session.position() == 0);
  const std::vector<std::int32_t> full(kContext, 2);
  CHECK(codeOf([&] { session.truncate(1); }) == "bad-truncate");
  CHECK(codeOf([&] { session.truncate(-1); }) == "bad-truncate");
  CHECK(codeOf([&] { session.encodeImage({}); }) == "modality-missing");
  CHECK(codeOf([&] { session.prefill(&good, 1, nullptr, {edgeexport::Features{}}); }) == "modality-missing");
  CHECK(prefill(full.data(), full.size()).empty());
  CHECK(codeOf([&] { session.decode(1, nullptr); }) == "context-full");
  session.truncate(10);
  CHECK(prefill(full.data(), kContext - 9) == "context-full");
  opened.engine->fails = true;
  CHECK(codeOf([&] { session.decode(1, nullptr); }) == "runtime-failed");
  CHECK(session.position() == 10);
  opened.engine->fails = false;
  opened.engine->nan = true;
  session.decode(1, nullptr);
  CHECK(codeOf([&] { session.greedy(); }) == "nonfinite-logits");
  session.close();
  session.close();
  CHECK(codeOf([&] { session.decode(1, nullptr); }) == "session-closed");
  CHECK(codeOf([&] { session.greedy(); }) == "session-closed");
  CHECK(codeOf([&] { session.reset(); }) == "session-closed");
  CHECK(codeOf([&] { session.runtimeSeconds(); }) == "session-closed");
}

// Calls from several threads: each is made or refused, and those that were made are in the cache.
void testThreads() {
  Opened opened;
  opened.engine->pause = std::chrono::microseconds(20);
  std::atomic<std::size_t> made{0};
  std::atomic<std::size_t> refused{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      std::vector<float> logits(kVocab);
      for (int k = 0; k < 300; ++k) {
        const std::string code = codeOf([&] { opened.session.decode(k % 17, logits.data()); });
        CHECK(code.empty() || code == "session-busy");
        ++(code.empty() ? made : refused);
        codeOf([&] { opened.session.greedy(); });
        CHECK(opened.session.position() <= kContext);
      }
    });
  }
  for (std::thread& each : threads) each.join();
  CHECK(opened.session.position() == made);
  CHECK(refused > 0);
}

void testCloseWhileDecoding() {
  for (const std::size_t count : {std::size_t{1}, kContext}) {
    Opened opened;
    opened.engine->pause = std::chrono::milliseconds(20);
    std::string code;
    std::thread decoding([&] {
      const std::vector<std::int32_t> prompt(count, 1);
      code = codeOf([&] { opened.session.prefill(prompt.data(), count, nullptr); });
    });
    while (!opened.engine->entered) std::this_thread::yield();
    opened.session.close();
    decoding.join();
    CHECK(code == "session-closed");
  }
}

}  // namespace

int main() {
  testContract();
  testMisuse();
  testThreads();
  testCloseWhileDecoding();
  std::printf("session: all held\n");
}
