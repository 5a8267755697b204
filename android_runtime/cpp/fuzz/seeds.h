// Small inputs that the readers read, for a fuzzer to begin with.
#pragma once

#include <string>
#include <vector>

namespace edgeexport::fuzz {

std::vector<std::string> jsonSeeds();
std::vector<std::string> manifestSeeds();
std::vector<std::string> safetensorsSeeds();
std::vector<std::string> tfliteSeeds();
std::vector<std::string> mediaSeeds();
std::vector<std::string> preprocessSeeds();
std::vector<std::string> tokenizerSeeds();
std::vector<std::string> chatSeeds();
std::vector<std::string> cacheSeeds();
std::vector<std::string> samplingSeeds();

}  // namespace edgeexport::fuzz
