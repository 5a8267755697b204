// Runs the parts that work without an engine, for tests: one request as JSON per line in, one answer as JSON per line
// out. Arrays of numbers go through files of raw float32 or bytes.
#include <array>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <sstream>
#include <vector>

#include "edgeexport/chat.h"
#include "edgeexport/conversations.h"
#include "edgeexport/error.h"
#include "edgeexport/governor.h"
#include "edgeexport/json.h"
#include "edgeexport/prepare.h"
#include "edgeexport/response_cache.h"
#include "edgeexport/sampling.h"
#include "edgeexport/tokenizer.h"

namespace {

using namespace edgeexport;

std::string readFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::vector<float> readFloats(const std::string& path) {
  const std::string bytes = readFile(path);
  std::vector<float> made(bytes.size() / sizeof(float));
  bytes.copy(reinterpret_cast<char*>(made.data()), made.size() * sizeof(float));
  return made;
}

void writeFloats(const std::string& path, const std::vector<float>& values) {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(float)));
}

template <typename Values>
std::string listed(const Values& values) {
  std::ostringstream out;
  out.precision(17);
  out << "[";
  const char* comma = "";
  for (const auto& each : values) {
    out << comma << each;
    comma = ",";
  }
  out << "]";
  return out.str();
}

std::vector<std::int32_t> idsOf(const Json& list) {
  std::vector<std::int32_t> ids;
  for (const Json& each : list.array()) ids.push_back(static_cast<std::int32_t>(each.integer()));
  return ids;
}

std::size_t sizeOf(const Json& value) { return static_cast<std::size_t>(value.integer()); }

class Tool {
 public:
  std::string answer(const Json& request) {
    const std::string& what = request.at("do").string();
    if (what == "read tokenizer") return read(request);
    if (what == "encode") {
      return listed(tokenizer_->encode(request.at("text").string(), request.at("special").boolean()));
    }
    if (what == "encode bytes") return listed(tokenizer_->encode(readFile(request.at("file").string())));
    if (what == "decode") return jsonQuoted(tokenizer_->decode(idsOf(request.at("ids")), request.at("skip").boolean()));
    if (what == "stream") return stream(request);
    if (what == "read chat") return readChat(request);
    if (what == "chat") return chat(request);
    if (what == "check chat") return check(request);
    if (what == "image") return image(request);
    if (what == "sound") return sound(request);
    if (what == "resample") return resampled(request);
    if (what == "govern") return govern(request);
    if (what == "sample") return sample(request);
    if (what == "uniform") return uniform(request);
    return cache(request);
  }

 private:
  std::string read(const Json& request) {
    tokenizer_ = std::make_unique<Tokenizer>(Tokenizer::parse(readFile(request.at("file").string())));
    return std::to_string(tokenizer_->vocab());
  }

  std::string stream(const Json& request) {
    TextStream stream = tokenizer_->stream(request.at("skip").boolean());
    std::vector<std::string> pieces;
    for (const auto id : idsOf(request.at("ids"))) pieces.push_back(jsonQuoted(stream.push(id)));
    pieces.push_back(jsonQuoted(stream.flush()));
    return listed(pieces);
  }

  std::string readChat(const Json& request) {
    template_ = std::make_unique<ChatTemplate>(ChatTemplate::parse(readFile(request.at("file").string())));
    return "null";
  }

  std::string chat(const Json& request) {
    return jsonQuoted(template_->render(messagesOf(request.at("messages"))));
  }

  std::string check(const Json& request) {
    checkConversations(readFile(request.at("file").string()), *template_, *tokenizer_);
    return "null";
  }

  std::string written(const Json& request, const EncoderInput& made) {
    writeFloats(request.at("to").string(), made.values);
    return "{\"variant\":" + jsonQuoted(made.variant) + ",\"name\":" + jsonQuoted(made.name) +
           ",\"shape\":" + listed(made.shape) + ",\"grid\":" + listed(std::array{made.gridRows, made.gridColumns}) +
           "}";
  }

  std::string image(const Json& request) {
    const std::string bytes = readFile(request.at("file").string());
    const ImageView view{reinterpret_cast<const std::uint8_t*>(bytes.data()), sizeOf(request.at("height")),
                         sizeOf(request.at("width"))};
    return written(request, prepareImage(view, Preprocess::parse(request.at("contract").string())));
  }

  std::string sound(const Json& request) {
    const std::vector<float> samples = readFloats(request.at("file").string());
    const SoundView view{samples.data(), samples.size(), static_cast<int>(request.at("rate").integer())};
    return written(request, prepareAudio(view, Preprocess::parse(request.at("contract").string())));
  }

  std::string resampled(const Json& request) {
    const std::vector<float> samples = readFloats(request.at("file").string());
    const SoundView view{samples.data(), samples.size(), static_cast<int>(request.at("rate").integer())};
    writeFloats(request.at("to").string(), resample(view, static_cast<int>(request.at("target").integer())));
    return "null";
  }

  std::string govern(const Json& request) {
    GovernorOptions options;
    if (const Json* slowest = request.find("slowest")) options.slowest = slowest->number();
    if (const Json* high = request.find("high")) options.high = high->number();
    Governor governor(request.at("budget").number(), options);
    std::vector<double> rates;
    for (const Json& each : request.at("readings").array()) {
      const auto& pair = each.array();
      const double reading = pair[1].isNull() ? std::stod("nan") : pair[1].number();
      rates.push_back(governor.update(pair[0].number(), reading));
    }
    return "{\"rates\":" + listed(rates) + ",\"pause\":" + listed(std::array{governor.pause(1.0)}) + "}";
  }

  std::string sample(const Json& request) {
    Sampling sampling;
    sampling.temperature = request.at("temperature").number();
    sampling.topP = request.at("top_p").number();
    sampling.topK = sizeOf(request.at("top_k"));
    sampling.repetitionPenalty = static_cast<float>(request.at("repetition_penalty").number());
    sampling.frequencyPenalty = static_cast<float>(request.at("frequency_penalty").number());
    sampling.seed = static_cast<std::uint64_t>(request.at("seed").integer());
    const std::size_t vocab = sizeOf(request.at("vocab"));
    Chooser chooser(sampling, vocab, idsOf(request.at("prompt")));
    const std::vector<float> logits = readFloats(request.at("file").string());
    std::vector<std::int32_t> chosen;
    for (std::size_t at = 0; at < logits.size(); at += vocab) chosen.push_back(chooser.choose(&logits[at], at / vocab));
    return listed(chosen);
  }

  static std::string uniform(const Json& request) {
    Pcg64 random(static_cast<std::uint64_t>(request.at("seed").integer()));
    std::array<double, 8> drawn{};
    for (double& each : drawn) each = random.unit();
    return listed(drawn);
  }

  std::string cache(const Json& request) {
    const std::string& what = request.at("do").string();
    if (what == "limit cache") {
      cache_ = ResponseCache({sizeOf(request.at("entries")), sizeOf(request.at("bytes")),
                              request.at("seconds").number()});
      return "null";
    }
    if (what == "fresh") return std::to_string(static_cast<int>(ResponseCache::freshness(request.at("text").string())));
    const auto& key = request.at("key").array();
    const std::string& prompt = key[2].string();
    const PromptKey made{key[0].string(), key[1].string(), prompt, ResponseCache::normalised(prompt)};
    const auto& moment = request.at("now").array();
    const Moment now{moment[0].number(), moment[1].integer()};
    if (what == "store") return cache_.store(made, request.at("answer").string(), now) ? "true" : "false";
    const auto found = cache_.find(made, now);
    return found ? jsonQuoted(*found) : "null";
  }

  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<ChatTemplate> template_;
  ResponseCache cache_;
};

}  // namespace

int main() {
  Tool tool;
  std::string line;
  while (std::getline(std::cin, line)) {
    try {
      std::cout << tool.answer(Json::parse(line)) << "\n";
    } catch (const Error& error) {
      std::cout << "{\"code\":" << jsonQuoted(error.code()) << ",\"why\":" << jsonQuoted(error.why()) << "}\n";
    }
  }
  return 0;
}
