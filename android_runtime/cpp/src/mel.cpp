// Sound prepared for an audio component: a windowed-sinc resampler, a Fourier transform, Slaney's mel filters.
#include "edgeexport/mel.h"

#include <algorithm>
#include <cmath>
#include <complex>
#include <numeric>
#include <string>

#include "input_errors.h"

namespace edgeexport {

namespace {

using Complex = std::complex<double>;

constexpr double kPi = 3.14159265358979323846;
constexpr int kMinRate = 4000, kMaxRate = 384000;
constexpr double kMaxSeconds = 600.0;
constexpr float kMaxMagnitude = 16.0F;

constexpr double kMaxHz = 8000.0;  // upper end of the highest filter
constexpr double kFloor = 1e-10;   // smallest power of a band before its logarithm
constexpr double kRange = 8.0;     // log10 of the loudest band's power over the quietest's

constexpr double kSideTaps = 40;    // half the length of the filter, in samples of the lower rate
constexpr double kCutoff = 0.9375;  // as a part of the lower rate's Nyquist frequency
constexpr double kKaiserBeta = 7.857;

void requireRate(int rate) {
  if (rate < kMinRate || rate > kMaxRate) throw errors::badSampleRate(rate, kMinRate, kMaxRate);
}

void requireSound(const SoundView& sound) {
  requireRate(sound.rate);
  if (sound.samples == nullptr || sound.count == 0) throw errors::badSound("there are none");
  const double seconds = static_cast<double>(sound.count) / sound.rate;
  if (seconds > kMaxSeconds) throw errors::soundTooLong(seconds, kMaxSeconds);
  // NaN is not within bounds either
  const auto good = [](float value) { return std::abs(value) <= kMaxMagnitude; };
  if (!std::all_of(sound.samples, sound.samples + sound.count, good)) {
    throw errors::badSound("one is not finite or far from full scale, which is 1");
  }
}

// The modified Bessel function I0, by its power series: Android's libc++ has no std::cyl_bessel_i.
double bessel(double x) {
  double sum = 1.0;
  double term = 1.0;
  for (int k = 1; term > 1e-17 * sum; ++k) {
    term *= x * x / (4.0 * k * k);
    sum += term;
  }
  return sum;
}

// Weights of the 2 * side samples around a position that lies `fraction` after sample side - 1.
std::vector<float> tapsFor(double fraction, int side, double cutoff) {
  std::vector<double> taps;
  for (int i = 1 - side; i <= side; ++i) {
    const double distance = i - fraction;
    const double part = distance / side;
    const double x = kPi * cutoff * distance;
    const double sinc = x == 0.0 ? 1.0 : std::sin(x) / x;
    taps.push_back(sinc * bessel(kKaiserBeta * std::sqrt(std::max(0.0, 1.0 - part * part))));
  }
  const double sum = std::accumulate(taps.begin(), taps.end(), 0.0);
  std::vector<float> made;
  for (const double tap : taps) made.push_back(static_cast<float>(tap / sum));
  return made;
}

// The discrete Fourier transform of a fixed length: halved while that is even, then summed up as it is defined.
class Fourier {
 public:
  explicit Fourier(std::size_t size) : roots_(size), work_(size) {
    for (std::size_t i = 0; i < size; ++i) {
      roots_[i] = std::polar(1.0, -2.0 * kPi * static_cast<double>(i) / static_cast<double>(size));
    }
  }

  // `from` and `to` have the length that was given.
  void transform(const Complex* from, Complex* to) { part(from, 1, to, work_.data(), roots_.size()); }

 private:
  // `size` values that lie `stride` apart; `work` has room for as many.
  void part(const Complex* from, std::size_t stride, Complex* to, Complex* work, std::size_t size) {
    if (size % 2 == 1) {
      for (std::size_t k = 0; k < size; ++k) {
        to[k] = 0;
        for (std::size_t i = 0; i < size; ++i) to[k] += from[i * stride] * roots_[i * k % size * stride];
      }
      return;
    }
    const std::size_t half = size / 2;
    part(from, 2 * stride, work, to, half);
    part(from + stride, 2 * stride, work + half, to + half, half);
    for (std::size_t k = 0; k < half; ++k) {
      const Complex turned = work[half + k] * roots_[k * stride];
      to[k] = work[k] + turned;
      to[half + k] = work[k] - turned;
    }
  }

  std::vector<Complex> roots_;
  std::vector<Complex> work_;
};

// Slaney's mel scale read backwards: 200 / 3 Hz a mel up to 1000 Hz, and a factor of 6.4 for 27 mel above.
double hertz(double mel) { return mel < 15.0 ? mel * 200.0 / 3.0 : 1000.0 * std::pow(6.4, (mel - 15.0) / 27.0); }

// A triangle over the bins of a spectrum: weights from bin `first` on.
struct MelFilter {
  std::size_t first = 0;
  std::vector<double> weights;
};

std::vector<MelFilter> melFilters(const AudioContract& contract) {
  const double top = 15.0 + 27.0 * std::log(kMaxHz / 1000.0) / std::log(6.4);
  const int bins = contract.fftSize / 2 + 1;
  const double width = (contract.sampleRate / 2) / static_cast<double>(bins - 1);  // NOLINT: whole Hz, as in Python
  const auto edge = [&](int i) { return hertz(top * i / (contract.mels + 1)); };
  std::vector<MelFilter> made(static_cast<std::size_t>(contract.mels));
  for (int m = 0; m < contract.mels; ++m) {
    const double low = edge(m);
    const double middle = edge(m + 1);
    const double high = edge(m + 2);
    MelFilter& filter = made[static_cast<std::size_t>(m)];
    for (int bin = 0; bin < bins; ++bin) {
      const double at = width * bin;
      const double weight = std::min((at - low) / (middle - low), (high - at) / (high - middle)) * 2.0 / (high - low);
      if (weight <= 0) continue;
      if (filter.weights.empty()) filter.first = static_cast<std::size_t>(bin);
      filter.weights.push_back(weight);
    }
  }
  return made;
}

}  // namespace

std::vector<float> resample(const SoundView& sound, int target) {
  requireSound(sound);
  requireRate(target);
  if (sound.rate == target) return {sound.samples, sound.samples + sound.count};
  const int common = std::gcd(sound.rate, target);
  const auto phases = static_cast<std::size_t>(target / common);
  const auto stride = static_cast<std::size_t>(sound.rate / common);
  const double ratio = static_cast<double>(sound.rate) / target;
  const double cutoff = kCutoff * std::min(1.0, static_cast<double>(target) / sound.rate);
  const auto side = static_cast<std::size_t>(std::ceil(kSideTaps * std::max(1.0, ratio)));
  std::vector<float> padded(side - 1 + sound.count + side, 0.0F);
  std::copy_n(sound.samples, sound.count, padded.begin() + static_cast<std::ptrdiff_t>(side) - 1);
  std::vector<float> made((sound.count * phases + stride - 1) / stride);
  for (std::size_t phase = 0; phase < std::min(phases, made.size()); ++phase) {
    const std::size_t part = phase * stride % phases;
    const double fraction = static_cast<double>(part) / static_cast<double>(phases);
    const std::vector<float> taps = tapsFor(fraction, static_cast<int>(side), cutoff);
    const float* from = padded.data() + phase * stride / phases;
    for (std::size_t i = phase; i < made.size(); i += phases, from += stride) {
      made[i] = static_cast<float>(std::inner_product(taps.begin(), taps.end(), from, 0.0));
    }
  }
  return made;
}

std::vector<float> logMel(const SoundView& sound, const AudioContract& contract) {
  requireSound(sound);
  SoundView heard = sound;  // what lies behind the window and a filter's reach is not resampled
  const double seconds = contract.seconds + 2 * kSideTaps / std::min(sound.rate, contract.sampleRate);
  heard.count = std::min(sound.count, static_cast<std::size_t>(std::ceil(seconds * sound.rate)));
  const std::vector<float> samples = resample(heard, contract.sampleRate);
  const auto size = static_cast<std::size_t>(contract.fftSize);
  const auto hop = static_cast<std::size_t>(contract.hopLength);
  const std::size_t count = contract.samples();
  const std::size_t frames = contract.frames();

  // the window, mirrored at both ends by half a frame
  const std::size_t half = size / 2;
  std::vector<double> window(count + size, 0.0);
  double* middle = window.data() + half;
  std::copy_n(samples.begin(), std::min(samples.size(), count), middle);
  for (std::size_t i = 1; i <= half; ++i) {
    *(middle - i) = middle[i];
    middle[count - 1 + i] = middle[count - 1 - i];
  }
  std::vector<double> hann(size);
  for (std::size_t i = 0; i < size; ++i) {
    hann[i] = 0.5 - 0.5 * std::cos(2 * kPi * static_cast<double>(i) / static_cast<double>(size));
  }

  const std::vector<MelFilter> filters = melFilters(contract);
  Fourier fourier(size);
  std::vector<Complex> frame(size);
  std::vector<Complex> spectrum(size);
  std::vector<double> power(half + 1);
  std::vector<float> made(filters.size() * frames);
  for (std::size_t t = 0; t < frames; ++t) {
    for (std::size_t i = 0; i < size; ++i) frame[i] = window[t * hop + i] * hann[i];
    fourier.transform(frame.data(), spectrum.data());
    for (std::size_t i = 0; i <= half; ++i) power[i] = std::norm(spectrum[i]);
    for (std::size_t m = 0; m < filters.size(); ++m) {
      const auto& weights = filters[m].weights;
      const double band = std::inner_product(weights.begin(), weights.end(), power.data() + filters[m].first, 0.0);
      made[m * frames + t] = static_cast<float>(std::log10(std::max(kFloor, band)));
    }
  }
  const double lowest = *std::max_element(made.begin(), made.end()) - kRange;
  for (float& value : made) value = static_cast<float>((std::max<double>(value, lowest) + 4.0) / 4.0);
  return made;
}

}  // namespace edgeexport
