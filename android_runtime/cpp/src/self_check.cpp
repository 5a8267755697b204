// Golden vectors: what the reference was asked is asked again, and the answers are compared.
#include "edgeexport/self_check.h"

#include <algorithm>
#include <cmath>
#include <ctime>
#include <limits>
#include <locale>
#include <sstream>

#include "edgeexport/json.h"
#include "edgeexport/safetensors.h"
#include "errors.h"

namespace edgeexport {
namespace {

constexpr std::size_t kMaxVectors = std::size_t{1} << 30;
constexpr std::size_t kMaxLabel = 200;   // what a report's reader takes
constexpr std::size_t kMaxReason = 1000;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// The larger of two, and NaN as soon as one is NaN or infinite.
double worst(double one, double other) {
  if (!std::isfinite(one) || !std::isfinite(other)) return kNaN;
  return std::max(one, other);
}

double maxDifference(const float* one, const float* other, std::size_t count) {
  double found = 0;
  for (std::size_t i = 0; i < count; ++i) found = worst(found, std::abs(double{one[i]} - double{other[i]}));
  return found;
}

// The logarithm of softmax's denominator.
double logSum(const float* logits, std::size_t count) {
  const double top = *std::max_element(logits, logits + count);
  double sum = 0;
  for (std::size_t i = 0; i < count; ++i) sum += std::exp(double{logits[i]} - top);
  return top + std::log(sum);
}

// KL(softmax(reference) || softmax(other)) in nats.
double divergence(const float* reference, const float* other, std::size_t count) {
  const double ofReference = logSum(reference, count);
  const double ofOther = logSum(other, count);
  double sum = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const double one = double{reference[i]} - ofReference;
    sum += std::exp(one) * (one - (double{other[i]} - ofOther));
  }
  return std::isfinite(sum) ? sum : kNaN;
}

// Text that may stand in a report: no control characters, valid UTF-8 by leaving out what is beyond ASCII.
std::string shown(const std::string& text, std::size_t limit) {
  std::string made;
  for (const char letter : text) {
    if (letter >= 0x20 && letter < 0x7F && made.size() < limit) made.push_back(letter);
  }
  return made.empty() ? "unknown" : made;
}

// A number as the report's schema has it: JSON knows neither NaN nor infinity.
std::string number(double value) {
  if (std::isnan(value)) return "\"NaN\"";
  if (std::isinf(value)) return "\"Infinity\"";
  std::ostringstream stream;
  stream.imbue(std::locale::classic());
  stream.precision(17);
  stream << value;
  return stream.str();
}

std::string now() {
  const std::time_t seconds = std::time(nullptr);
  std::tm utc{};
  ::gmtime_r(&seconds, &utc);
  char text[sizeof("2026-01-01T00:00:00Z")];
  std::strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%SZ", &utc);
  return text;
}

std::string row(const std::string& level, const std::string& units, const std::string& rest) {
  return "{\"level\": \"" + level + "\", \"units\": " + jsonQuoted(units) + rest + "}";
}

std::string failureRow(const std::string& level, const std::string& units, const Error& problem) {
  return row(level, units, ", \"failure\": {\"code\": " + jsonQuoted(problem.code()) + ", \"what\": " +
                               jsonQuoted(shown(problem.problem() + ": " + problem.why(), kMaxReason)) + "}");
}

}  // namespace

GoldenVectors GoldenVectors::read(const Bundle& bundle, const std::string& file) {
  const std::string where = bundle.folder() + "/" + file;
  try {
    const Safetensors tensors = Safetensors::parse(bundle.read(file, kMaxVectors));
    const auto shape = [&](const char* name) { return tensors.tensors().at(name).shape; };
    const std::vector<std::int64_t> split = tensors.integers("prefill", 1);
    const std::vector<std::int64_t> tokens = tensors.integers("tokens", 1);
    GoldenVectors made;
    made.reference = tensors.floats("reference_logits", 2);
    made.steps = static_cast<std::size_t>(shape("reference_logits")[0]);
    made.vocab = static_cast<std::size_t>(shape("reference_logits")[1]);
    if (tensors.tensors().count("artifact_logits") > 0) {
      made.artifact = tensors.floats("artifact_logits", 2);
      if (shape("artifact_logits") != shape("reference_logits")) {
        throw SafetensorsError("artifact_logits and reference_logits differ in shape");
      }
    }
    if (split.size() != 1 || split[0] < 1 || static_cast<std::size_t>(split[0]) > tokens.size()) {
      throw SafetensorsError("prefill is no length of the prompt");
    }
    const auto prompt = static_cast<std::size_t>(split[0]);
    if (made.steps != tokens.size() - prompt + 1) throw SafetensorsError("the rows of logits are not one per call");
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      if (tokens[i] < 0 || static_cast<std::size_t>(tokens[i]) >= made.vocab) {
        throw SafetensorsError("a token is not in the vocabulary");
      }
      (i < prompt ? made.prompt : made.answer).push_back(static_cast<std::int32_t>(tokens[i]));
    }
    return made;
  } catch (const SafetensorsError& problem) {
    throw errors::goldenUnusable(where, problem.what());
  }
}

GoldenComparison measure(Session& session, const GoldenVectors& vectors) {
  if (session.vocab() != vectors.vocab) {
    throw errors::goldenMismatch("golden vectors", "the artifact has " + std::to_string(session.vocab()) +
                                                       " logits, the reference " + std::to_string(vectors.vocab));
  }
  std::vector<float> logits(vectors.vocab);
  GoldenComparison found;
  found.steps = vectors.steps;
  if (!vectors.artifact.empty()) found.maxAbs = 0;
  session.reset();
  for (std::size_t step = 0; step < vectors.steps; ++step) {
    if (step == 0) {
      session.prefill(vectors.prompt.data(), vectors.prompt.size(), logits.data());
    } else {
      session.decode(vectors.answer[step - 1], logits.data());
    }
    const float* reference = vectors.reference.data() + step * vectors.vocab;
    if (found.maxAbs) {
      const float* artifact = vectors.artifact.data() + step * vectors.vocab;
      found.maxAbs = worst(*found.maxAbs, maxDifference(artifact, logits.data(), vectors.vocab));
    }
    found.kl += divergence(reference, logits.data(), vectors.vocab) / static_cast<double>(vectors.steps);
    const auto best = [&](const float* row) { return std::max_element(row, row + vectors.vocab) - row; };
    if (best(reference) == best(logits.data())) found.top1 += 1.0 / static_cast<double>(vectors.steps);
  }
  session.reset();
  found.kl = std::max(found.kl, 0.0);  // rounding may leave a little less than nothing; a NaN stays
  found.top1 = std::min(found.top1, 1.0);
  return found;
}

GoldenComparison selfCheck(const Bundle& bundle, Session& session) {
  const Golden& golden = bundle.manifest().golden;
  if (!golden.file) throw errors::goldenUnusable(bundle.folder(), golden.notRun);
  const GoldenComparison found = measure(session, GoldenVectors::read(bundle, *golden.file));
  const bool own = found.maxAbs && golden.maxAbs;
  const std::optional<double> gate = own ? golden.maxAbs : golden.kl;
  if (!gate) throw errors::goldenUnusable(*golden.file, "there is no gate for the logits, so nothing was compared");
  const double value = own ? *found.maxAbs : found.kl;
  if (!(value <= *gate)) {  // a NaN is never below a gate
    throw errors::goldenMismatch(*golden.file, std::string(own ? "max_abs" : "kl") + " is " + number(value) +
                                                   ", the gate is " + number(*gate));
  }
  return found;
}

std::string deviceReport(const Bundle& bundle, const RuntimeOptions& options, const Device& device) {
  const Component* decoder = bundle.manifest().component("decoder");
  const std::string units = (decoder == nullptr ? "unknown" : shown(decoder->backend, kMaxLabel - 4)) + " cpu";
  std::vector<std::string> rows;
  std::string level = "L1";
  try {
    const auto session = Session::open(bundle, options);
    rows.push_back(row("L1", units, ""));
    level = "L5";
    const Golden& golden = bundle.manifest().golden;
    if (!golden.file) throw errors::goldenUnusable(bundle.folder(), golden.notRun);
    const GoldenComparison found = measure(*session, GoldenVectors::read(bundle, *golden.file));
    const std::string steps = ", \"metrics\": {\"steps\": " + std::to_string(found.steps);
    if (found.maxAbs) rows.push_back(row("L4", units, steps + ", \"max_abs\": " + number(*found.maxAbs) + "}"));
    rows.push_back(
        row("L5", units, steps + ", \"kl\": " + number(found.kl) + ", \"top1\": " + number(found.top1) + "}"));
  } catch (const Error& problem) {
    rows.push_back(failureRow(level, units, problem));
  }
  std::string json = "{\n  \"schema\": \"edgeexport.device-parity/1\",\n  \"bundle\": \"" + bundle.digest() +
                     "\",\n  \"component\": \"decoder\",\n  \"device\": {\"model\": " +
                     jsonQuoted(shown(device.model, kMaxLabel)) + ", \"system\": " +
                     jsonQuoted(shown(device.system, kMaxLabel)) + "},\n  \"date\": \"" + now() + "\",\n  \"rows\": [";
  for (std::size_t i = 0; i < rows.size(); ++i) json += (i == 0 ? "\n    " : ",\n    ") + rows[i];
  return json + "\n  ]\n}\n";
}

}  // namespace edgeexport
