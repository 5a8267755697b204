// edgeexport-run BUNDLE [options]: decodes greedily on this device, or replays the golden vectors, and prints JSON.
//
//   --tokens 1,2,3     a prompt's token ids; may be given several times, each is answered by itself
//   --picture FILE HEIGHT WIDTH, --sound FILE RATE
//                      raw RGB bytes, or raw float32 samples, that every prompt shows, in order
//   --keep N           prompts after the first go behind the first N tokens of what is in the cache, and show nothing
//   --logits FILE      where the logits go that each token was chosen from: raw float32, one answer after the other
//   --max-tokens N     length of each answer (16); a stop id ends it
//   --threads N        0: the runtime chooses
//   --onnxruntime PATH, --litert PATH, --cache FOLDER, --engines FOLDER
//   --check            makes the conversations anew, and compares golden vectors with the bundle's gates
//   --report           prints the report that `edgeexport parity BUNDLE --import` reads
//   --verify           reads every file of the bundle and compares its hash
//   --verified         they were: opens the session without reading them again
#include <chrono>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "edgeexport/bundle.h"
#include "edgeexport/error.h"
#include "edgeexport/json.h"
#include "edgeexport/self_check.h"
#include "edgeexport/session.h"

namespace {

using edgeexport::Session;

struct Medium {
  bool picture;
  std::string file;
  std::int32_t first;   // height, or rate
  std::int32_t second;  // width
};

struct Arguments {
  std::string bundle;
  std::vector<Medium> media;
  std::vector<std::vector<std::int32_t>> prompts;
  std::optional<std::int64_t> keep;
  std::string logits;
  std::size_t maxTokens = 16;
  bool check = false;
  bool report = false;
  bool verify = false;
  edgeexport::RuntimeOptions runtime;
};

std::int32_t number(const std::string& text) {
  std::size_t used = 0;
  const int value = std::stoi(text, &used);
  if (used != text.size()) throw std::invalid_argument(text);
  return value;
}

// Throws std::invalid_argument, std::out_of_range.
Arguments parse(int count, char** values) {
  Arguments made;
  for (int i = 1; i < count; ++i) {
    const std::string name = values[i];
    const auto value = [&]() -> std::string {
      if (++i >= count) throw std::invalid_argument(name);
      return values[i];
    };
    if (name == "--tokens") {
      std::vector<std::int32_t> prompt;
      std::istringstream text(value());
      for (std::string id; std::getline(text, id, ',');) prompt.push_back(number(id));
      made.prompts.push_back(prompt);
    } else if (name == "--picture") {
      const std::string file = value();
      const std::int32_t height = number(value());
      made.media.push_back({true, file, height, number(value())});
    } else if (name == "--sound") {
      const std::string file = value();
      made.media.push_back({false, file, number(value()), 0});
    } else if (name == "--keep") {
      made.keep = number(value());
    } else if (name == "--logits") {
      made.logits = value();
    } else if (name == "--max-tokens") {
      made.maxTokens = static_cast<std::size_t>(number(value()));
    } else if (name == "--threads") {
      made.runtime.threads = number(value());
    } else if (name == "--onnxruntime") {
      made.runtime.onnxruntime = value();
    } else if (name == "--litert") {
      made.runtime.litert = value();
    } else if (name == "--cache") {
      made.runtime.cacheFolder = value();
    } else if (name == "--engines") {
      made.runtime.engines = value();
    } else if (name == "--check") {
      made.check = true;
    } else if (name == "--report") {
      made.report = true;
    } else if (name == "--verify") {
      made.verify = true;
    } else if (name == "--verified") {
      made.runtime.verify = false;
    } else if (made.bundle.empty() && name[0] != '-') {
      made.bundle = name;
    } else {
      throw std::invalid_argument(name);
    }
  }
  if (made.bundle.empty()) throw std::invalid_argument("BUNDLE");
  return made;
}

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

bool stops(const edgeexport::Bundle& bundle, std::int32_t token) {
  for (const std::int64_t id : bundle.manifest().stopIds) {
    if (id == token) return true;
  }
  return false;
}

std::string readFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

edgeexport::Features encoded(Session& session, const Medium& medium) {
  const std::string bytes = readFile(medium.file);
  if (medium.picture) {
    const auto height = static_cast<std::size_t>(medium.first);
    const auto width = static_cast<std::size_t>(medium.second);
    if (bytes.size() != height * width * 3) throw std::invalid_argument(medium.file);
    return session.encodeImage({reinterpret_cast<const std::uint8_t*>(bytes.data()), height, width});
  }
  std::vector<float> samples(bytes.size() / sizeof(float));
  std::memcpy(samples.data(), bytes.data(), samples.size() * sizeof(float));
  return session.encodeAudio({samples.data(), samples.size(), medium.first});
}

// One answer as JSON: its tokens, and of each decoded token the whole time and the runtime's share of it. With `logits`
// those that each token was chosen from are written there.
void answer(const edgeexport::Bundle& bundle, Session& session, const std::vector<std::int32_t>& given,
            const std::vector<edgeexport::Features>& features, std::size_t limit, std::ofstream* logits) {
  std::vector<float> row(logits == nullptr ? 0 : session.vocab());
  float* to = row.empty() ? nullptr : row.data();
  const auto choose = [&] {
    if (logits != nullptr) {
      logits->write(reinterpret_cast<const char*>(to), static_cast<std::streamsize>(row.size() * sizeof(float)));
    }
    return session.greedy();
  };
  const double started = seconds();
  const std::vector<std::int32_t> prompt = session.expand(given, features);
  session.prefill(prompt.data(), prompt.size(), to, features);
  const double prefilled = seconds();
  const std::size_t first = session.position();
  const double runtimeBefore = session.runtimeSeconds();
  std::vector<std::int32_t> tokens;
  std::int32_t token = choose();
  while (!stops(bundle, token)) {
    tokens.push_back(token);
    if (tokens.size() == limit || session.position() == session.context()) break;
    session.decode(token, to);
    token = choose();
  }
  const double whole = seconds() - prefilled;
  const double runtime = session.runtimeSeconds() - runtimeBefore;
  std::cout << "{\"tokens\": [";
  for (std::size_t i = 0; i < tokens.size(); ++i) std::cout << (i == 0 ? "" : ", ") << tokens[i];
  std::cout << "], \"prefill_seconds\": " << prefilled - started << ", \"decoded\": " << session.position() - first
            << ", \"decode_seconds\": " << whole << ", \"runtime_seconds\": " << runtime << "}";
}

void run(const Arguments& arguments) {
  const edgeexport::Bundle bundle = edgeexport::Bundle::open(arguments.bundle);
  if (arguments.verify) bundle.verify();
  if (arguments.report) {
    std::cout << edgeexport::deviceReport(bundle, arguments.runtime, {"host", "edgeexport-run"});
    return;
  }
  const double started = seconds();
  const auto session = Session::open(bundle, arguments.runtime);
  std::cout << "{\"bundle\": " << edgeexport::jsonQuoted(bundle.manifest().title())
            << ", \"open_seconds\": " << seconds() - started;
  if (arguments.check) {
    const edgeexport::GoldenComparison found = edgeexport::selfCheck(bundle, *session);
    std::cout << ", \"check\": {\"steps\": " << found.steps << ", \"max_abs\": " << found.maxAbs.value_or(-1)
              << ", \"kl\": " << found.kl << ", \"top1\": " << found.top1 << "}";
  }
  std::vector<edgeexport::Features> features;
  for (const Medium& each : arguments.media) features.push_back(encoded(*session, each));
  std::ofstream logits;
  if (!arguments.logits.empty()) logits.open(arguments.logits, std::ios::binary);
  std::cout << ", \"answers\": [";
  for (std::size_t i = 0; i < arguments.prompts.size(); ++i) {
    std::cout << (i == 0 ? "\n" : ",\n");
    const bool kept = i > 0 && arguments.keep;
    session->truncate(kept ? *arguments.keep : 0);
    answer(bundle, *session, arguments.prompts[i], kept ? std::vector<edgeexport::Features>() : features,
           arguments.maxTokens, logits.is_open() ? &logits : nullptr);
  }
  std::cout << "]}\n";
}

}  // namespace

int main(int count, char** values) {
  Arguments arguments;
  try {
    arguments = parse(count, values);
  } catch (const std::logic_error& problem) {
    std::cerr << "edgeexport-run BUNDLE [--tokens 1,2,3]... [--picture FILE HEIGHT WIDTH] [--sound FILE RATE] "
                 "[--keep N] [--logits FILE] [--max-tokens N] [--threads N] [--onnxruntime PATH] [--litert PATH] "
                 "[--cache FOLDER] [--engines FOLDER] [--check] [--report] [--verify] [--verified]: not understood: "
              << problem.what() << "\n";
    return 2;
  }
  try {
    run(arguments);
  } catch (const edgeexport::Error& problem) {
    std::cerr << problem.what() << "\n";
    return 8;
  } catch (const std::invalid_argument& problem) {
    std::cerr << problem.what() << " has another size\n";
    return 2;
  } catch (const std::exception& problem) {
    std::cerr << "error[internal-error]: " << problem.what() << "\n";
    return 70;
  }
  return 0;
}
