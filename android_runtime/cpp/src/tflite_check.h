// Whether a .tflite file is whole: the runtime trusts the offsets of weights that lie behind its flatbuffer.
#pragma once

#include <cstddef>
#include <string>

namespace edgeexport {

// What is wrong with the file, or nothing. Reads its flatbuffer's table of buffers, not the weights.
std::string tfliteDamage(const std::string& path);
// The same of a file's bytes.
std::string tfliteDamage(const void* data, std::size_t size);

}  // namespace edgeexport
