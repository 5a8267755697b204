// Replays golden vectors: the loader's own preprocessing is compared half-way, then the logits.
#include "edgeexport/golden.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "edgeexport/prepare.h"
#include "edgeexport/safetensors.h"
#include "errors.h"
#include "golden_media.h"

namespace edgeexport {
namespace {

constexpr std::size_t kMaxVectors = std::size_t{1} << 30;
constexpr std::size_t kMaxMedium = std::size_t{1} << 28;
constexpr const char* kInput = "input.";
constexpr std::size_t kSampledRows = 32;  // as edgeexport/bundle/conformance.py has it, and the next
constexpr float kTolerance = 1e-4F;
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

// Every row of an encoder's input whose index is a multiple of the step between some 32 of them.
std::vector<float> sampledRows(const EncoderInput& input) {
  const auto width = static_cast<std::size_t>(input.shape.back());
  const std::size_t rows = input.values.size() / width;
  std::vector<float> made;
  for (std::size_t row = 0; row < rows; row += std::max<std::size_t>(1, rows / kSampledRows)) {
    const float* values = input.values.data() + row * width;
    made.insert(made.end(), values, values + width);
  }
  return made;
}

void checkPrepared(const GoldenVectors& vectors, std::size_t index, const EncoderInput& input,
                   const std::string& where) {
  const std::string name = kInput + std::to_string(index) + "." + input.name;
  const auto wanted = vectors.prepared.find(name);
  const std::vector<float> found = sampledRows(input);
  if (wanted == vectors.prepared.end() || wanted->second.size() != found.size()) {
    throw errors::goldenMismatch(where, name + " is missing or has another shape");
  }
  const double difference = maxDifference(wanted->second.data(), found.data(), found.size());
  if (!(difference <= kTolerance)) {
    throw errors::goldenMismatch(where, name + " differs by " + std::to_string(difference));
  }
}

// What the bundle's encoders make of a case's pictures and sounds.
std::vector<Features> encoded(const Bundle& bundle, const Golden::Case& golden, const GoldenVectors& vectors,
                              Session& session) {
  std::vector<Features> made;
  if (golden.media.empty()) return made;
  const Preprocess contract = contractOf(bundle);
  for (std::size_t i = 0; i < golden.media.size(); ++i) {
    const std::string& name = golden.media[i].file;
    const std::string file = bundle.read(name, kMaxMedium);
    if (golden.media[i].kind == "image") {
      const GoldenPicture picture = readBitmap(file, name);
      checkPrepared(vectors, i, prepareImage(picture.view(), contract), golden.file);
      made.push_back(session.encodeImage(picture.view()));
    } else {
      const GoldenSound sound = readWave(file, name);
      checkPrepared(vectors, i, prepareAudio(sound.view(), contract), golden.file);
      made.push_back(session.encodeAudio(sound.view()));
    }
  }
  return made;
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
    for (const auto& each : tensors.tensors()) {
      if (each.first.rfind(kInput, 0) == 0) made.prepared[each.first] = tensors.floats(each.first, 2);
    }
    return made;
  } catch (const SafetensorsError& problem) {
    throw errors::goldenUnusable(where, problem.what());
  }
}

std::vector<Golden::Case> goldenCases(const Bundle& bundle) {
  const Golden& golden = bundle.manifest().golden;
  if (!golden.file) throw errors::goldenUnusable(bundle.folder(), golden.notRun);
  std::vector<Golden::Case> made{{"text", *golden.file, {}}};
  made.insert(made.end(), golden.shown.begin(), golden.shown.end());
  return made;
}

GoldenComparison replay(const Bundle& bundle, const Golden::Case& golden, Session& session) {
  const GoldenVectors vectors = GoldenVectors::read(bundle, golden.file);
  if (session.vocab() != vectors.vocab) {
    throw errors::goldenMismatch(golden.file, "the artifact has " + std::to_string(session.vocab()) +
                                                  " logits, the reference " + std::to_string(vectors.vocab));
  }
  const std::vector<Features> features = encoded(bundle, golden, vectors, session);
  std::vector<float> logits(vectors.vocab);
  GoldenComparison found;
  found.steps = vectors.steps;
  if (!vectors.artifact.empty()) found.maxAbs = 0;
  session.reset();
  for (std::size_t step = 0; step < vectors.steps; ++step) {
    if (step == 0) {
      session.prefill(vectors.prompt.data(), vectors.prompt.size(), logits.data(), features);
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

}  // namespace edgeexport
