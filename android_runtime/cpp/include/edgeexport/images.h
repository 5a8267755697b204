// Pictures prepared for a vision component, equal to edgeexport/session/images.py to the last bit of each byte.
#pragma once

#include <cstdint>
#include <vector>

#include "edgeexport/preprocess.h"

namespace edgeexport {

// A decoded picture that stands upright: height * width * 3 bytes RGB, row by row from the top, without gaps. The bytes
// belong to the caller.
struct ImageView {
  const std::uint8_t* rgb = nullptr;
  std::size_t height = 0;
  std::size_t width = 0;
};

// The grid of a picture after transformers' `smart_resize`. Throws image-too-narrow, not-an-image, image-too-large.
Grid smartGrid(std::size_t height, std::size_t width, const PatchContract& contract);

// The built grid that suits a picture best: the smart one; else the nearest in shape, of those the nearest in size, of
// those the one with fewer rows. Throws as smartGrid; grid-not-built where none is.
Grid chooseGrid(std::size_t height, std::size_t width, const PatchContract& contract);

// float32 [rows * columns, 3 * temporal * patch * patch] for a grid out of the built ones, in the order of the merger.
// Throws grid-not-built, not-an-image, image-too-large.
std::vector<float> patches(const ImageView& image, const PatchContract& contract, const Grid& grid);

// float32 [1, 3, size, size]. Throws not-an-image, image-too-large.
std::vector<float> pixels(const ImageView& image, const PixelContract& contract);

}  // namespace edgeexport
