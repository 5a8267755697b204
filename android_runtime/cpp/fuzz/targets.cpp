// The readers that are fuzzed. An Error or JsonError refuses an input; everything else that is thrown ends the process.
#include "targets.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>

#include "edgeexport/bundle.h"
#include "edgeexport/chat.h"
#include "edgeexport/conversations.h"
#include "edgeexport/error.h"
#include "edgeexport/json.h"
#include "edgeexport/prepare.h"
#include "edgeexport/response_cache.h"
#include "edgeexport/safetensors.h"
#include "edgeexport/sampling.h"
#include "edgeexport/tokenizer.h"
#include "golden_media.h"
#include "interface.h"
#include "seeds.h"
#include "tflite_check.h"

namespace edgeexport::fuzz {
namespace {

constexpr double kSmall = 1 << 18;  // samples or pixels: more of them are the same again

template <typename Work>
bool done(Work work) {
  try {
    work();
    return true;
  } catch (const Error&) {
    return false;
  } catch (const JsonError&) {
    return false;
  } catch (const SafetensorsError&) {
    return false;
  }
}

bool readJson(std::string_view text) {
  return done([&] { Json::parse(text); });
}

bool readManifest(std::string_view text) {
  return done([&] {
    const Manifest manifest = Manifest::parse(std::string(text), "fuzz");
    for (const Component& component : manifest.components) {
      for (const Signature& each : component.signatures) {
        for (const DecoderForm& form : {kCanonicalForm, kTensorRtForm, kLiteRtForm}) {
          done([&] { decoderShape(component, each, form, form.perToken ? 1 : 0); });
        }
      }
    }
  });
}

bool readSafetensors(std::string_view text) {
  return done([&] {
    const Safetensors found = Safetensors::parse(std::string(text));
    for (const auto& each : found.tensors()) {
      done([&] { found.integers(each.first, each.second.shape.size()); });
      done([&] { found.floats(each.first, each.second.shape.size()); });
    }
  });
}

bool readTflite(std::string_view text) { return tfliteDamage(text.data(), text.size()).empty(); }

bool readMedia(std::string_view text) {
  const bool picture = done([&] { readBitmap(std::string(text), "fuzz"); });
  return done([&] { readWave(std::string(text), "fuzz"); }) || picture;
}

// A contract, and what it makes of a small picture and a short sound.
bool readPreprocess(std::string_view text) {
  return done([&] {
    const Preprocess contract = Preprocess::parse(text);
    std::vector<std::uint8_t> rgb(48 * 36 * 3, 100);
    double work = contract.pixels ? contract.pixels->size * contract.pixels->size : 0;
    for (const Grid& grid : contract.patches ? contract.patches->grids : std::vector<Grid>()) {
      work = std::max(work, static_cast<double>(contract.patches->patchValues()) * grid.rows * grid.columns);
    }
    if (work < kSmall) done([&] { prepareImage({rgb.data(), 48, 36}, contract); });
    if (!contract.audio) return;
    const double frames = static_cast<double>(contract.audio->frames());
    if (frames * contract.audio->fftSize * contract.audio->fftSize > 16 * kSmall) return;
    std::vector<float> samples(4000, 0.25F);
    done([&] { prepareAudio({samples.data(), samples.size(), 8000}, contract); });
  });
}

bool readTokenizer(std::string_view text) {
  return done([&] {
    const Tokenizer tokenizer = Tokenizer::parse(text);
    for (const char* each :
         {"", "Hello,  the in<|end|>  1234\n\n", "\xC3\xA9\xE4\xBD\xA0 a\xCC\x81 \xED\x95\x9C", "\xff"}) {
      done([&] { tokenizer.decode(tokenizer.encode(each, true)); });
    }
    TextStream stream = tokenizer.stream(false);
    const std::size_t count = std::min<std::size_t>(tokenizer.vocab(), 300);
    for (std::size_t id = 0; id < count; ++id) done([&] { stream.push(static_cast<std::int32_t>(id)); });
    stream.flush();
  });
}

// A chat table, conversations, or both behind each other, as a bundle's golden/chat.json has them.
bool readChat(std::string_view text) {
  static const ChatTemplate usual = ChatTemplate::parse(chatSeeds().front());
  static const Tokenizer tokenizer = Tokenizer::parse(tokenizerSeeds().front());
  static const std::vector<Message> conversation = {{"system", {{"  Be brief. "}}},
                                                    {"user", {{"Hi"}, {"", true}}},
                                                    {"assistant", {{"<think>a</think>\n b"}}},
                                                    {"user", {{"\xff"}}}};
  const bool table = done([&] { ChatTemplate::parse(text).render(conversation); });
  const bool messages = done([&] { usual.render(messagesOf(Json::parse(text))); });
  return done([&] { checkConversations(text, usual, tokenizer); }) || table || messages;
}

// A cache under commands: each byte stores, asks, ages or forgets, with a prompt of what follows.
bool readCache(std::string_view text) {
  ResponseCache cache({4, 400, 1000.0});
  Moment now{0, 0};
  while (!text.empty()) {
    const auto command = static_cast<unsigned char>(text[0]);
    const std::string_view said = text.substr(1, command >> 3);
    text.remove_prefix(1 + said.size());
    const PromptKey key{"bundle", "template", std::string(said), ResponseCache::normalised(said)};
    if ((command & 7) == 0) cache.clear();
    if ((command & 7) == 1) now.seconds += 300;
    if ((command & 7) == 2) now.day += 1;
    if ((command & 7) == 3) now.seconds -= 100;
    if ((command & 7) >= 4 && (command & 1) == 0) cache.store(key, std::string(said.size() % 7, 'x'), now);
    if ((command & 7) >= 4 && (command & 1) == 1) cache.find(key, now);
    if (cache.size() > 4 || cache.bytes() > 400) throw std::logic_error("a cache beyond its limits");
  }
  return true;
}

// Settings and logits.
bool readSampling(std::string_view text) {
  constexpr std::size_t kVocab = 8;
  std::array<float, 5> settings{};
  if (text.size() < sizeof(settings)) return false;
  std::memcpy(settings.data(), text.data(), sizeof(settings));
  text.remove_prefix(sizeof(settings));
  return done([&] {
    Sampling sampling;
    sampling.temperature = settings[0];
    sampling.topP = settings[1];
    sampling.topK = static_cast<unsigned char>(text.empty() ? 0 : text[0]);
    sampling.repetitionPenalty = settings[2];
    sampling.frequencyPenalty = settings[3];
    Chooser chooser(sampling, kVocab, {1, 2});
    std::array<float, kVocab> logits{};
    for (std::size_t step = 0; text.size() >= sizeof(logits); ++step) {
      std::memcpy(logits.data(), text.data(), sizeof(logits));
      text.remove_prefix(sizeof(logits));
      const std::int32_t chosen = chooser.choose(logits.data(), step);
      if (chosen < 0 || static_cast<std::size_t>(chosen) >= kVocab) throw std::logic_error("a token that there is not");
    }
  });
}

}  // namespace

const std::vector<Target>& all() {
  static const std::vector<Target> targets = {
      {"json", readJson, jsonSeeds},
      {"manifest", readManifest, manifestSeeds},
      {"safetensors", readSafetensors, safetensorsSeeds},
      {"tflite", readTflite, tfliteSeeds},
      {"media", readMedia, mediaSeeds},
      {"preprocess", readPreprocess, preprocessSeeds},
      {"tokenizer", readTokenizer, tokenizerSeeds},
      {"chat", readChat, chatSeeds},
      {"cache", readCache, cacheSeeds},
      {"sampling", readSampling, samplingSeeds},
  };
  return targets;
}

const Target* target(const std::string& name) {
  const auto found = std::find_if(all().begin(), all().end(), [&](const Target& each) { return each.name == name; });
  return found == all().end() ? nullptr : &*found;
}

}  // namespace edgeexport::fuzz
