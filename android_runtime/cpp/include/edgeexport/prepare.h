// What an encoder takes of a picture or a sound, by the bundle's contract.
#pragma once

#include "edgeexport/images.h"
#include "edgeexport/inputs.h"
#include "edgeexport/mel.h"
#include "edgeexport/preprocess.h"

namespace edgeexport {

// Throws modality-missing, and what chooseGrid, patches and pixels throw.
EncoderInput prepareImage(const ImageView& image, const Preprocess& contract);

// Throws modality-missing, and what logMel throws.
EncoderInput prepareAudio(const SoundView& sound, const Preprocess& contract);

}  // namespace edgeexport
