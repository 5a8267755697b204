// Compares replayed golden vectors with the bundle's gates, and writes what was measured as a report.
#include "edgeexport/self_check.h"

#include <algorithm>
#include <cmath>
#include <ctime>
#include <functional>
#include <locale>
#include <optional>
#include <sstream>
#include <vector>

#include "edgeexport/conversations.h"
#include "edgeexport/json.h"
#include "errors.h"

namespace edgeexport {
namespace {

constexpr std::size_t kMaxLabel = 200;  // what a report's reader takes
constexpr std::size_t kMaxReason = 1000;

// Text that may stand in a report: no control characters, valid UTF-8 by leaving out what is beyond ASCII.
std::string printable(const std::string& text, std::size_t limit) {
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

// The rows of a report, all on the same units.
class Rows {
 public:
  explicit Rows(const std::string& units) : units_(units) {}

  // `golden` names what was replayed; "" where nothing was.
  void add(const std::string& level, const std::string& golden, const std::string& metrics = "") {
    append(level, golden, metrics.empty() ? "" : ", \"metrics\": {" + metrics + "}");
  }

  // Runs what adds rows of its own, or adds one that says why it failed.
  void measured(const std::string& level, const std::string& golden, const std::function<void()>& measure) {
    try {
      measure();
    } catch (const Error& problem) {
      append(level, golden, ", \"failure\": {\"code\": " + jsonQuoted(problem.code()) + ", \"what\": " +
                                jsonQuoted(printable(problem.problem() + ": " + problem.why(), kMaxReason)) + "}");
    }
  }

  const std::string& json() const { return json_; }

 private:
  void append(const std::string& level, const std::string& golden, const std::string& rest) {
    json_ += std::string(json_.empty() ? "" : ",") + "\n    {\"level\": \"" + level + "\", \"units\": " +
             jsonQuoted(units_);
    if (!golden.empty()) json_ += ", \"golden\": " + jsonQuoted(printable(golden, kMaxLabel));
    json_ += rest + "}";
  }

  const std::string units_;
  std::string json_;
};

// Throws golden-mismatch, golden-unusable.
void compareWithGates(const GoldenComparison& found, const Golden& golden, const std::string& where) {
  const bool own = found.maxAbs && golden.maxAbs;
  const std::optional<double> gate = own ? golden.maxAbs : golden.kl;
  if (!gate) throw errors::goldenUnusable(where, "there is no gate for the logits, so nothing was compared");
  const double value = own ? *found.maxAbs : found.kl;
  if (!(value <= *gate)) {  // a NaN is never below a gate
    throw errors::goldenMismatch(where, std::string(own ? "max_abs" : "kl") + " is " + number(value) +
                                            ", the gate is " + number(*gate));
  }
}

}  // namespace

GoldenComparison selfCheck(const Bundle& bundle, Session& session) {
  checkConversations(bundle);
  GoldenComparison all;
  all.top1 = 1;
  for (const Golden::Case& each : goldenCases(bundle)) {
    const GoldenComparison found = replay(bundle, each, session);
    compareWithGates(found, bundle.manifest().golden, each.file);
    all.steps += found.steps;
    if (found.maxAbs) all.maxAbs = std::max(all.maxAbs.value_or(0), *found.maxAbs);
    all.kl = std::max(all.kl, found.kl);
    all.top1 = std::min(all.top1, found.top1);
  }
  return all;
}

std::string deviceReport(const Bundle& bundle, const RuntimeOptions& options, const Device& device) {
  const Component* decoder = bundle.manifest().component("decoder");
  Rows rows((decoder == nullptr ? "unknown" : printable(decoder->backend, kMaxLabel - 4)) + " cpu");
  rows.measured("L1", "chat", [&] {
    if (checkConversations(bundle)) rows.add("L1", "chat");
  });
  std::unique_ptr<Session> session;
  rows.measured("L1", "", [&] {
    session = Session::open(bundle, options);
    rows.add("L1", "");
  });
  std::vector<Golden::Case> cases;
  if (session) rows.measured("L5", "text", [&] { cases = goldenCases(bundle); });
  for (const Golden::Case& each : cases) {
    rows.measured("L5", each.name, [&] {
      const GoldenComparison found = replay(bundle, each, *session);
      const std::string steps = "\"steps\": " + std::to_string(found.steps);
      if (found.maxAbs) rows.add("L4", each.name, steps + ", \"max_abs\": " + number(*found.maxAbs));
      rows.add("L5", each.name, steps + ", \"kl\": " + number(found.kl) + ", \"top1\": " + number(found.top1));
    });
  }
  return "{\n  \"schema\": \"edgeexport.device-parity/1\",\n  \"bundle\": \"" + bundle.digest() +
         "\",\n  \"bundle_title\": " + jsonQuoted(printable(bundle.manifest().title(), kMaxLabel)) +
         ",\n  \"component\": \"decoder\",\n  \"device\": {\"model\": " +
         jsonQuoted(printable(device.model, kMaxLabel)) + ", \"system\": " +
         jsonQuoted(printable(device.system, kMaxLabel)) + "},\n  \"date\": \"" + now() + "\",\n  \"rows\": [" +
         rows.json() + "\n  ]\n}\n";
}

}  // namespace edgeexport
