// What an encoder takes of a picture or a sound, by the bundle's contract.
#include "edgeexport/prepare.h"

#include <string>

#include "errors.h"

namespace edgeexport {

EncoderInput prepareImage(const ImageView& image, const Preprocess& contract) {
  EncoderInput made;
  made.component = "vision";
  if (contract.patches) {
    const PatchContract& each = *contract.patches;
    const Grid grid = chooseGrid(image.height, image.width, each);
    made.variant = grid.name();
    made.name = "patches";
    made.values = patches(image, each, grid);
    const std::int64_t count = std::int64_t{grid.rows} * grid.columns;
    made.shape = {count, static_cast<std::int64_t>(made.values.size()) / count};
    made.gridRows = static_cast<std::size_t>(grid.rows / each.mergeSize);
    made.gridColumns = static_cast<std::size_t>(grid.columns / each.mergeSize);
  } else if (contract.pixels) {
    made.name = "pixels";
    made.values = pixels(image, *contract.pixels);
    made.shape = {1, 3, contract.pixels->size, contract.pixels->size};
  } else {
    throw errors::modalityMissing("picture", made.component);
  }
  return made;
}

EncoderInput prepareAudio(const SoundView& sound, const Preprocess& contract) {
  EncoderInput made;
  made.component = "audio";
  if (!contract.audio) throw errors::modalityMissing("sound", made.component);
  made.name = "mel";
  made.values = logMel(sound, *contract.audio);
  made.shape = {1, contract.audio->mels, static_cast<std::int64_t>(contract.audio->frames())};
  return made;
}

}  // namespace edgeexport
