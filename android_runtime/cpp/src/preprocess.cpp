// preprocess.json, read as strictly as edgeexport/session/preprocess.py does it.
#include "edgeexport/preprocess.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "edgeexport/json.h"
#include "input_errors.h"

namespace edgeexport {

namespace {

constexpr double kMaxPixels = 1 << 26;
constexpr double kMaxId = 2147483648.0;
constexpr std::size_t kMaxGrids = 1024;
// Ten minutes in windows of 10 ms with 256 mels; Whisper's 30 s are 240,000 values and 30 million products.
constexpr double kMaxMelValues = 1 << 24;
constexpr double kMaxTransforms = 1 << 30;

void require(bool good, const std::string& problem) {
  if (!good) throw JsonError(problem);
}

double number(const Json& value, const char* name, double low, double high) {
  const double found = value.number();
  require(found >= low && found <= high, std::string(name) + " is out of bounds");
  return found;
}

std::int64_t integer(const Json& value, const char* name, double low, double high) {
  const std::int64_t found = value.integer();
  const auto plain = static_cast<double>(found);
  require(plain >= low && plain <= high, std::string(name) + " is out of bounds");
  return found;
}

int whole(const Json& value, const char* name, double low, double high) {
  return static_cast<int>(integer(value, name, low, high));
}

std::array<double, 3> triple(const Json& value, const char* name, double low) {
  require(value.array().size() == 3, std::string(name) + " has not three numbers");
  std::array<double, 3> found{};
  for (std::size_t i = 0; i < 3; ++i) found[i] = number(value.array()[i], name, low, 1000.0);
  return found;
}

void requireKeys(const Json& object, std::initializer_list<std::string_view> known) {
  for (const auto& [name, value] : object.members()) {
    require(std::find(known.begin(), known.end(), name) != known.end(), "it has an unknown key " + name);
  }
}

void requireBicubic(const Json& image) {
  const Json* resample = image.find("resample");
  require(resample == nullptr || resample->string() == "bicubic", "resample is not bicubic");
}

PatchContract patchesOf(const Json& image) {
  requireKeys(image, {"kind", "patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels",
                      "rescale_factor", "mean", "std", "grids", "resample"});
  requireBicubic(image);
  PatchContract made;
  made.patchSize = whole(image.at("patch_size"), "patch_size", 1, 256);
  made.temporalPatchSize = whole(image.at("temporal_patch_size"), "temporal_patch_size", 1, 16);
  made.mergeSize = whole(image.at("merge_size"), "merge_size", 1, 16);
  made.minPixels = integer(image.at("min_pixels"), "min_pixels", 1, kMaxPixels);
  made.maxPixels = integer(image.at("max_pixels"), "max_pixels", 1, kMaxPixels);
  require(made.minPixels <= made.maxPixels, "min_pixels is more than max_pixels");
  made.rescaleFactor = number(image.at("rescale_factor"), "rescale_factor", 1e-6, 1000.0);
  made.mean = triple(image.at("mean"), "mean", -1000.0);
  made.std = triple(image.at("std"), "std", 1e-6);
  require(static_cast<double>(made.temporalPatchSize) * made.factor() * made.factor() <= kMaxPixels,
          "one merged patch has too many pixels");
  if (const Json* grids = image.find("grids")) {
    require(grids->array().size() <= kMaxGrids, "it has too many grids");
    for (const Json& each : grids->array()) {
      require(each.array().size() == 2, "a grid is not rows and columns");
      const Grid grid{whole(each.array()[0], "grids", 1, 4096), whole(each.array()[1], "grids", 1, 4096)};
      require(grid.rows % made.mergeSize == 0 && grid.columns % made.mergeSize == 0,
              "a grid is not a multiple of merge_size");
      const double pixels = static_cast<double>(grid.rows) * grid.columns * made.patchSize * made.patchSize;
      require(pixels * made.temporalPatchSize <= kMaxPixels, "a grid has too many pixels");
      require(std::find(made.grids.begin(), made.grids.end(), grid) == made.grids.end(), "a grid is named twice");
      made.grids.push_back(grid);
    }
  }
  return made;
}

PixelContract pixelsOf(const Json& image) {
  requireKeys(image, {"kind", "size", "mean", "std", "resample"});
  requireBicubic(image);
  return {whole(image.at("size"), "size", 1, 4096), triple(image.at("mean"), "mean", -1000.0),
          triple(image.at("std"), "std", 1e-6)};
}

AudioContract audioOf(const Json& audio) {
  requireKeys(audio, {"kind", "sample_rate", "n_fft", "hop_length", "n_mels", "seconds"});
  require(audio.at("kind").string() == "whisper-log-mel", "audio is of an unknown kind");
  AudioContract made;
  made.sampleRate = whole(audio.at("sample_rate"), "sample_rate", 16000, 48000);
  made.fftSize = whole(audio.at("n_fft"), "n_fft", 32, 4096);
  made.hopLength = whole(audio.at("hop_length"), "hop_length", 16, 4096);
  made.mels = whole(audio.at("n_mels"), "n_mels", 1, 256);
  made.seconds = number(audio.at("seconds"), "seconds", 1e-6, 600.0);
  require(made.fftSize % 2 == 0, "n_fft is odd");
  const auto samples = static_cast<double>(made.samples());
  require(std::abs(made.seconds * made.sampleRate - samples) <= 1e-6 &&
              made.samples() % static_cast<std::size_t>(made.hopLength) == 0,
          "seconds are not whole hops");
  require(made.samples() > static_cast<std::size_t>(made.fftSize), "the window is shorter than n_fft");
  require(static_cast<double>(made.frames()) * made.mels <= kMaxMelValues, "its windows and mels are too many");
  int odd = made.fftSize;
  while (odd % 2 == 0) odd /= 2;
  // halving takes the square of what is left odd
  require(static_cast<double>(made.frames()) * made.fftSize * odd <= kMaxTransforms, "its windows take too long");
  return made;
}

}  // namespace

std::size_t AudioContract::samples() const noexcept {
  return static_cast<std::size_t>(std::nearbyint(seconds * sampleRate));
}

Preprocess Preprocess::parse(std::string_view json) {
  try {
    const Json file = Json::parse(json, {kMaxBytes, 8});
    requireKeys(file, {"image", "audio", "joining", "image_token_id", "image_ids", "position_rows", "schema"});
    require(file.at("schema").string() == "edgeexport.preprocess/1", "its schema is not edgeexport.preprocess/1");
    Preprocess made;
    if (const Json* image = file.find("image"); image != nullptr && !image->isNull()) {
      const std::string& kind = image->at("kind").string();
      require(kind == "patches" || kind == "pixels", "image is of an unknown kind");
      if (kind == "patches") made.patches = patchesOf(*image);
      else made.pixels = pixelsOf(*image);
    }
    if (const Json* audio = file.find("audio"); audio != nullptr && !audio->isNull()) made.audio = audioOf(*audio);
    if (const Json* joining = file.find("joining")) {
      require(joining->string() == "splice" || joining->string() == "attend", "joining is unknown");
      made.splices = joining->string() == "splice";
    }
    if (const Json* id = file.find("image_token_id"); id != nullptr && !id->isNull()) {
      made.imageTokenId = integer(*id, "image_token_id", 0, kMaxId);
    }
    if (const Json* ids = file.find("image_ids")) {
      for (const Json& each : ids->array()) made.imageIds.push_back(integer(each, "image_ids", 0, kMaxId));
    }
    if (const Json* rows = file.find("position_rows")) {
      made.positionRows = whole(*rows, "position_rows", 1, 3);
      require(made.positionRows != 2, "position_rows is neither 1 nor 3");
    }
    return made;
  } catch (const JsonError& error) {
    throw errors::bundleBadPreprocess(kFile, error.what());
  }
}

}  // namespace edgeexport
