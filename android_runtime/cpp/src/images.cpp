// Pictures prepared for a vision component: Pillow's bicubic resize, normalising, patches.
#include "edgeexport/images.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>

#include "input_errors.h"

namespace edgeexport {

namespace {

constexpr std::size_t kMaxImagePixels = 100000000;
constexpr int kMaxAspect = 200;
// Weights are 32-bit numbers with this many bits behind the point: Pillow's Resample.c, PRECISION_BITS.
constexpr int kPrecision = 32 - 8 - 2;
constexpr double kSupport = 2.0;

using Bytes = std::vector<std::uint8_t>;
using Levels = std::array<std::array<float, 256>, 3>;

void requirePicture(std::size_t height, std::size_t width) {
  if (height == 0 || width == 0) throw errors::notAnImage("it has no pixels");
  if (height > kMaxImagePixels / width) {
    throw errors::imageTooLarge(std::to_string(height) + " x " + std::to_string(width) + " pixels", kMaxImagePixels);
  }
}

// Keys' cubic with a = -0.5.
double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

// For each place of one side after the resize, the first place before it and the weights from there on.
struct Weights {
  std::vector<std::size_t> first;
  std::vector<std::size_t> starts{0};  // of each place's weights
  std::vector<std::int32_t> values;
};

Weights weightsFor(std::size_t before, std::size_t after) {
  const double scale = static_cast<double>(before) / static_cast<double>(after);
  const double stretch = std::max(scale, 1.0);  // a kernel that widens when it shrinks is antialiased
  const double support = kSupport * stretch;
  Weights made;
  std::vector<double> row;
  for (std::size_t place = 0; place < after; ++place) {
    const double center = (static_cast<double>(place) + 0.5) * scale;
    const auto low = static_cast<std::size_t>(std::max(0.0, center - support + 0.5));
    const std::size_t high = std::min(static_cast<std::size_t>(center + support + 0.5), before);
    row.clear();
    double sum = 0.0;
    for (std::size_t x = low; x < high; ++x) {
      row.push_back(bicubic((static_cast<double>(x) - center + 0.5) * (1.0 / stretch)));
      sum += row.back();
    }
    for (const double weight : row) {
      const double fixed = (sum != 0.0 ? weight / sum : weight) * (1 << kPrecision);
      made.values.push_back(static_cast<std::int32_t>(fixed + (weight < 0 ? -0.5 : 0.5)));
    }
    made.first.push_back(low);
    made.starts.push_back(made.values.size());
  }
  return made;
}

// One row of one colour through the weights: values lie `stride` bytes apart.
std::uint8_t weighted(const std::uint8_t* from, std::size_t stride, const Weights& weights, std::size_t place) {
  std::int32_t sum = 1 << (kPrecision - 1);
  const std::uint8_t* value = from + weights.first[place] * stride;
  for (std::size_t i = weights.starts[place]; i < weights.starts[place + 1]; ++i, value += stride) {
    sum += *value * weights.values[i];
  }
  return static_cast<std::uint8_t>(std::clamp(sum >> kPrecision, 0, 255));
}

Bytes resized(const ImageView& image, std::size_t height, std::size_t width) {
  if (image.rgb == nullptr) throw errors::notAnImage("there are no bytes");
  requirePicture(image.height, image.width);
  Bytes wide;
  const std::uint8_t* from = image.rgb;
  if (width != image.width) {
    const Weights weights = weightsFor(image.width, width);
    wide.resize(image.height * width * 3);
    for (std::size_t y = 0; y < image.height; ++y) {
      for (std::size_t x = 0; x < width; ++x) {
        for (std::size_t c = 0; c < 3; ++c) {
          wide[(y * width + x) * 3 + c] = weighted(from + y * image.width * 3 + c, 3, weights, x);
        }
      }
    }
    from = wide.data();
  }
  if (height == image.height) return wide.empty() ? Bytes(from, from + height * width * 3) : wide;
  const Weights weights = weightsFor(image.height, height);
  Bytes made(height * width * 3);
  for (std::size_t y = 0; y < height; ++y) {
    for (std::size_t x = 0; x < width * 3; ++x) made[y * width * 3 + x] = weighted(from + x, width * 3, weights, y);
  }
  return made;
}

// What each byte becomes, in transformers' precisions: the product in float64, the rest in float32.
Levels levelsOf(double factor, const std::array<double, 3>& mean, const std::array<double, 3>& std) {
  Levels made{};
  for (std::size_t c = 0; c < 3; ++c) {
    for (std::size_t level = 0; level < 256; ++level) {
      const auto value = static_cast<float>(static_cast<double>(level) * factor);
      made[c][level] = (value - static_cast<float>(mean[c])) / static_cast<float>(std[c]);
    }
  }
  return made;
}

}  // namespace

Grid smartGrid(std::size_t height, std::size_t width, const PatchContract& contract) {
  requirePicture(height, width);
  const double factor = contract.factor();
  const double frames = contract.temporalPatchSize;
  auto tall = static_cast<double>(height);
  auto wide = static_cast<double>(width);
  if (tall < factor || wide < factor) {
    const double scale = std::max(factor / tall, factor / wide);
    tall = std::trunc(tall * scale);
    wide = std::trunc(wide * scale);
  }
  if (std::max(tall, wide) / std::min(tall, wide) > kMaxAspect) throw errors::imageTooNarrow(height, width, kMaxAspect);
  // nearbyint rounds halves to the even number, as Python does
  double rows = std::nearbyint(tall / factor);
  double columns = std::nearbyint(wide / factor);
  const double size = frames * rows * factor * columns * factor;
  if (size > static_cast<double>(contract.maxPixels)) {
    const double shrink = std::sqrt(frames * tall * wide / static_cast<double>(contract.maxPixels));
    rows = std::max(1.0, std::floor(tall / shrink / factor));
    columns = std::max(1.0, std::floor(wide / shrink / factor));
  } else if (size < static_cast<double>(contract.minPixels)) {
    const double grow = std::sqrt(static_cast<double>(contract.minPixels) / (frames * tall * wide));
    rows = std::ceil(tall * grow / factor);
    columns = std::ceil(wide * grow / factor);
  }
  return {static_cast<int>(rows) * contract.mergeSize, static_cast<int>(columns) * contract.mergeSize};
}

Grid chooseGrid(std::size_t height, std::size_t width, const PatchContract& contract) {
  const Grid smart = smartGrid(height, width, contract);
  if (contract.grids.empty()) throw errors::gridNotBuilt(smart.name());
  if (std::find(contract.grids.begin(), contract.grids.end(), smart) != contract.grids.end()) return smart;
  const auto distance = [&](const Grid& grid) {
    const double rows = grid.rows;
    const double columns = grid.columns;
    const double shape = rows * static_cast<double>(width) / (columns * static_cast<double>(height));
    const double size = rows * columns / (static_cast<double>(smart.rows) * smart.columns);
    return std::make_tuple(std::abs(std::log(shape)), std::abs(std::log(size)), grid.rows);
  };
  return *std::min_element(contract.grids.begin(), contract.grids.end(),
                           [&](const Grid& a, const Grid& b) { return distance(a) < distance(b); });
}

std::vector<float> patches(const ImageView& image, const PatchContract& contract, const Grid& grid) {
  if (std::find(contract.grids.begin(), contract.grids.end(), grid) == contract.grids.end()) {
    throw errors::gridNotBuilt(grid.name());
  }
  const auto patch = static_cast<std::size_t>(contract.patchSize);
  const auto merge = static_cast<std::size_t>(contract.mergeSize);
  const auto frames = static_cast<std::size_t>(contract.temporalPatchSize);
  const auto rows = static_cast<std::size_t>(grid.rows);
  const auto columns = static_cast<std::size_t>(grid.columns);
  const std::size_t width = columns * patch;
  const Bytes bytes = resized(image, rows * patch, width);
  const Levels levels = levelsOf(contract.rescaleFactor, contract.mean, contract.std);
  std::vector<float> made;
  made.reserve(rows * columns * 3 * frames * patch * patch);
  const auto appendPatch = [&](std::size_t row, std::size_t column) {
    for (std::size_t c = 0; c < 3; ++c) {
      for (std::size_t frame = 0; frame < frames; ++frame) {
        for (std::size_t y = row * patch; y < (row + 1) * patch; ++y) {
          const std::uint8_t* value = &bytes[(y * width + column * patch) * 3 + c];
          for (std::size_t x = 0; x < patch; ++x) made.push_back(levels[c][value[3 * x]]);
        }
      }
    }
  };
  // merge x merge blocks from left to right and top to bottom, within a block the same
  for (std::size_t top = 0; top < rows; top += merge) {
    for (std::size_t left = 0; left < columns; left += merge) {
      for (std::size_t i = 0; i < merge * merge; ++i) appendPatch(top + i / merge, left + i % merge);
    }
  }
  return made;
}

std::vector<float> pixels(const ImageView& image, const PixelContract& contract) {
  const auto size = static_cast<std::size_t>(contract.size);
  const Bytes bytes = resized(image, size, size);
  const Levels levels = levelsOf(1.0 / 255.0, contract.mean, contract.std);
  std::vector<float> made(3 * size * size);
  for (std::size_t i = 0; i < made.size(); ++i) {
    const std::size_t c = i / (size * size);
    made[i] = levels[c][bytes[i % (size * size) * 3 + c]];
  }
  return made;
}

}  // namespace edgeexport
