// Sound prepared for an audio component: resampled, then Whisper's log-mel, as edgeexport/session/audio.py does it.
#pragma once

#include <cstddef>
#include <vector>

#include "edgeexport/preprocess.h"

namespace edgeexport {

// Samples of one channel, full scale -1 to 1. They belong to the caller.
struct SoundView {
  const float* samples = nullptr;
  std::size_t count = 0;
  int rate = 0;  // Hz
};

// float32 [ceil(count * target / rate)] at `target` Hz; sample 0 stays in place.
// Throws bad-sound, bad-sample-rate, sound-too-long.
std::vector<float> resample(const SoundView& sound, int target);

// float32 [1, mels, frames] of a sound at any rate. Longer sounds are cut at the window's end, shorter ones filled with
// silence. Throws as resample.
std::vector<float> logMel(const SoundView& sound, const AudioContract& contract);

}  // namespace edgeexport
