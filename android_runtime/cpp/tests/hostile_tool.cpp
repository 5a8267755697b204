// Opens a bundle under manifests that anyone could have written and answers a prompt with it, through the C interface.
//
//   hostile-tool BUNDLE ONNXRUNTIME LITERT CACHE_FOLDER TOKENS HEIGHT WIDTH SECONDS [verified]
//
// One case per line in: {"name": file's text, ...}, files that are written into the bundle before it is opened. One
// line out: the logits of the last of three calls, or the code of the error. TOKENS are 1,2,3; a HEIGHT above 0 shows a
// picture, SECONDS above 0 let a sound be heard.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "edgeexport/edgeexport_c.h"
#include "edgeexport/json.h"

namespace {

// The code of an error; it is freed.
std::string codeOf(edgeexport_error* error) {
  const std::string code = std::string(edgeexport_error_code(error)) + ": " + edgeexport_error_why(error);
  edgeexport_error_free(error);
  return code;
}

struct Question {
  edgeexport_options options{};
  std::vector<std::int32_t> tokens;
  std::size_t height = 0;
  std::size_t width = 0;
  double seconds = 0;
};

std::string answerOf(edgeexport_session* session, const Question& question) {
  std::vector<edgeexport_features*> shown;
  std::int32_t* prompt = nullptr;
  std::size_t count = 0;
  edgeexport_error* error = nullptr;
  if (question.height > 0) {
    std::vector<std::uint8_t> rgb(question.height * question.width * 3);
    for (std::size_t i = 0; i < rgb.size(); ++i) rgb[i] = static_cast<std::uint8_t>(i * 7 % 251);
    edgeexport_features* seen = nullptr;
    error = edgeexport_session_encode_image(session, rgb.data(), question.height, question.width, &seen);
    if (error == nullptr) shown.push_back(seen);
  }
  if (error == nullptr && question.seconds > 0) {
    std::vector<float> sound(static_cast<std::size_t>(16000 * question.seconds));
    for (std::size_t i = 0; i < sound.size(); ++i) sound[i] = static_cast<float>(i * 5 % 101) / 101.0F - 0.5F;
    edgeexport_features* heard = nullptr;
    error = edgeexport_session_encode_audio(session, sound.data(), sound.size(), 16000, &heard);
    if (error == nullptr) shown.push_back(heard);
  }
  if (error == nullptr) {
    error = edgeexport_session_expand(session, question.tokens.data(), question.tokens.size(), shown.data(),
                                      shown.size(), &prompt, &count);
  }
  std::vector<float> logits(edgeexport_session_vocab(session));
  if (error == nullptr) {
    error = edgeexport_session_prefill(session, prompt, count, shown.data(), shown.size(), logits.data());
  }
  for (int i = 0; error == nullptr && i < 2; ++i) error = edgeexport_session_decode(session, 7, logits.data());
  edgeexport_free(prompt);
  for (edgeexport_features* each : shown) edgeexport_features_free(each);
  if (error != nullptr) return codeOf(error);
  std::ostringstream made;
  for (const float each : logits) made << each << " ";
  return made.str();
}

std::string answered(const std::string& folder, const Question& question) {
  edgeexport_bundle* bundle = nullptr;
  if (edgeexport_error* error = edgeexport_bundle_open(folder.c_str(), &bundle)) return codeOf(error);
  edgeexport_session* session = nullptr;
  edgeexport_error* error = edgeexport_session_open(bundle, &question.options, &session);
  edgeexport_bundle_free(bundle);
  if (error != nullptr) return codeOf(error);
  const std::string answer = answerOf(session, question);
  edgeexport_session_free(session);
  return answer;
}

}  // namespace

int main(int count, char** values) {
  if (count < 9 || count > 10) return 2;
  const std::string folder = values[1];
  Question question;
  question.options.threads = 1;
  question.options.onnxruntime = values[2];
  question.options.litert = values[3];
  question.options.cache_folder = values[4];
  question.options.verified = count == 10;
  std::istringstream ids(values[5]);
  for (std::string id; std::getline(ids, id, ',');) question.tokens.push_back(std::stoi(id));
  question.height = std::stoul(values[6]);
  question.width = std::stoul(values[7]);
  question.seconds = std::stod(values[8]);
  for (std::string line; std::getline(std::cin, line);) {
    const edgeexport::Json files = edgeexport::Json::parse(line);
    for (const auto& [name, text] : files.members()) {
      std::ofstream(folder + "/" + name, std::ios::binary) << text.string();
    }
    std::cout << answered(folder, question) << std::endl;  // a crash comes after the case before it was written
  }
  return 0;
}
