// Reads bitmaps and wave files of one kind each, checking every size against the bytes that are there.
#include "golden_media.h"

#include "errors.h"

namespace edgeexport {
namespace {

constexpr std::size_t kBitmapHeader = 54;  // BITMAPFILEHEADER and BITMAPINFOHEADER
constexpr std::size_t kWaveHeader = 44;    // RIFF, "fmt " of PCM, and the head of "data"
constexpr std::uint32_t kLongestSide = 1 << 15;
constexpr std::uint32_t kHighestRate = 384000;

// Numbers of a header, little-endian.
class Header {
 public:
  Header(const std::string& file, std::size_t size, const std::string& where) : file_(file), where_(where) {
    require(file.size() >= size, "it ends within its header");
  }

  void require(bool good, const char* problem) const {
    if (!good) throw errors::goldenUnusable(where_, problem);
  }
  bool says(std::size_t at, const std::string& text) const { return file_.compare(at, text.size(), text) == 0; }
  std::uint32_t two(std::size_t at) const { return byte(at) | byte(at + 1) << 8; }
  std::uint32_t four(std::size_t at) const { return two(at) | two(at + 2) << 16; }

 private:
  std::uint32_t byte(std::size_t at) const { return static_cast<unsigned char>(file_[at]); }

  const std::string& file_;
  const std::string& where_;
};

}  // namespace

GoldenPicture readBitmap(const std::string& file, const std::string& where) {
  const Header header(file, kBitmapHeader, where);
  const std::uint32_t width = header.four(18);
  const std::uint32_t height = header.four(22);  // above the longest side where it is negative: the highest row first
  header.require(header.says(0, "BM") && header.four(10) == kBitmapHeader && header.four(14) == 40 &&
                     header.two(28) == 24 && header.four(30) == 0,
                 "it is no uncompressed bitmap of 24 bits a pixel");
  header.require(width > 0 && width <= kLongestSide && height > 0 && height <= kLongestSide,
                 "its sides are not those of a picture");
  const std::size_t stride = (std::size_t{3} * width + 3) / 4 * 4;
  header.require(file.size() == kBitmapHeader + stride * height, "its pixels are not as many as it says");
  GoldenPicture made{{}, height, width};
  made.rgb.reserve(std::size_t{3} * height * width);
  for (std::size_t row = height; row > 0; --row) {
    const char* bgr = file.data() + kBitmapHeader + (row - 1) * stride;
    for (std::size_t x = 0; x < width; ++x, bgr += 3) {
      for (const int colour : {2, 1, 0}) made.rgb.push_back(static_cast<std::uint8_t>(bgr[colour]));
    }
  }
  return made;
}

GoldenSound readWave(const std::string& file, const std::string& where) {
  const Header header(file, kWaveHeader, where);
  const std::uint32_t rate = header.four(24);
  header.require(header.says(0, "RIFF") && header.says(8, "WAVEfmt ") && header.four(16) == 16 && header.two(20) == 1 &&
                     header.two(22) == 1 && header.two(34) == 16 && header.says(36, "data"),
                 "it is no wave file of 16-bit samples of one channel");
  const std::size_t bytes = file.size() - kWaveHeader;
  header.require(header.four(40) == bytes && bytes % 2 == 0, "its samples are not as many as it says");
  header.require(rate > 0 && rate <= kHighestRate, "its rate is none of sound");
  GoldenSound made{{}, static_cast<int>(rate)};
  made.samples.reserve(bytes / 2);
  for (std::size_t at = kWaveHeader; at < file.size(); at += 2) {
    const auto sample = static_cast<std::int16_t>(static_cast<std::uint16_t>(header.two(at)));
    made.samples.push_back(static_cast<float>(sample) / 32768.0F);
  }
  return made;
}

}  // namespace edgeexport
