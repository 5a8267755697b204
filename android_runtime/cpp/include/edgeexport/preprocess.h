// preprocess.json: what must happen to pictures, sound and prompts before the model sees them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace edgeexport {

// Rows and columns of patches.
struct Grid {
  int rows = 0;
  int columns = 0;

  bool operator==(const Grid& other) const noexcept { return rows == other.rows && columns == other.columns; }
  // Of the signature that was built for it.
  std::string name() const { return std::to_string(rows) + "x" + std::to_string(columns); }
};

// RGB bytes, resized as Pillow's bicubic does it, then (byte * rescaleFactor - mean) / std, then patches.
struct PatchContract {
  int patchSize = 0;
  int temporalPatchSize = 0;
  int mergeSize = 0;
  std::int64_t minPixels = 0;  // of temporalPatchSize * height * width after the resize
  std::int64_t maxPixels = 0;
  double rescaleFactor = 0;
  std::array<double, 3> mean{};
  std::array<double, 3> std{};
  std::vector<Grid> grids;  // those that were built

  int factor() const noexcept { return patchSize * mergeSize; }
  std::int64_t patchValues() const noexcept { return std::int64_t{3} * temporalPatchSize * patchSize * patchSize; }
};

// RGB bytes, stretched to size x size as Pillow's bicubic does it, then (byte / 255 - mean) / std.
struct PixelContract {
  int size = 0;
  std::array<double, 3> mean{};
  std::array<double, 3> std{};
};

// Mono sound at `sampleRate`, cut or filled with silence to `seconds`, as Whisper's log-mel.
struct AudioContract {
  int sampleRate = 0;
  int fftSize = 0;
  int hopLength = 0;
  int mels = 0;
  double seconds = 0;

  std::size_t samples() const noexcept;  // of the window
  std::size_t frames() const noexcept { return samples() / static_cast<std::size_t>(hopLength); }
};

struct Preprocess {
  static constexpr const char* kFile = "preprocess.json";
  static constexpr std::size_t kMaxBytes = std::size_t{1} << 20;

  std::optional<PatchContract> patches;  // one of these two at most
  std::optional<PixelContract> pixels;
  std::optional<AudioContract> audio;
  bool splices = true;  // features go into the embeddings; else every token attends to them, through `fusion`
  std::optional<std::int64_t> imageTokenId;
  std::vector<std::int64_t> imageIds;  // what stands for one picture, its placeholder once among them
  int positionRows = 1;                // 3 for M-RoPE

  // Throws bundle-bad-preprocess.
  static Preprocess parse(std::string_view json);
};

}  // namespace edgeexport
