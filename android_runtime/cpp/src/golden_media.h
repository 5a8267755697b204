// The pictures and sounds of golden vectors, out of the plain files in which a build writes them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "edgeexport/images.h"
#include "edgeexport/mel.h"

namespace edgeexport {

struct GoldenPicture {
  std::vector<std::uint8_t> rgb;
  std::size_t height = 0;
  std::size_t width = 0;

  ImageView view() const { return {rgb.data(), height, width}; }
};

struct GoldenSound {
  std::vector<float> samples;
  int rate = 0;

  SoundView view() const { return {samples.data(), samples.size(), rate}; }
};

// A Windows bitmap: uncompressed, 24 bits a pixel, the lowest row first. `where` is for messages.
// Throws golden-unusable for anything else.
GoldenPicture readBitmap(const std::string& file, const std::string& where);

// A RIFF/WAVE file: one channel of 16-bit samples, nothing before them but their format. Throws golden-unusable.
GoldenSound readWave(const std::string& file, const std::string& where);

}  // namespace edgeexport
