// Embeds tokens, joins what encoders made of pictures and sound to them, and counts M-RoPE positions.
#include "edgeexport/inputs.h"

#include <algorithm>
#include <numeric>
#include <string_view>

#include "errors.h"
#include "input_errors.h"
#include "interface.h"
#include "named.h"
#include "stopwatch.h"

namespace edgeexport {
namespace {

constexpr const char* kEmbed = "embed";
constexpr const char* kFusion = "fusion";
constexpr const char* kVision = "vision";
constexpr const char* kAudio = "audio";
constexpr const char* kIds = "input_ids";
constexpr const char* kEmbeddings = "inputs_embeds";
constexpr const char* kFeatures = "features";
constexpr const char* kFused = "fused";
constexpr std::string_view kCount = "_count";  // behind the name of an input that LiteRT pads

// What the manifest says of the components that make a decoder's embeddings, compared with each other and with the
// contract: memory is laid out by it. Each throws bundle-bad-manifest.
class Promised {
 public:
  Promised(const Component& component, const Signature& signature) : component_(component), signature_(signature) {}

  // It takes these and no others.
  void takes(const std::vector<std::string>& names) const {
    for (const TensorSpec& each : signature_.inputs) {
      const std::size_t stem = each.name.size() - std::min(each.name.size(), kCount.size());
      const bool counts = each.name.compare(stem, std::string::npos, kCount) == 0;
      const auto taken = [&](const std::string& name) { return inputOf(signature_, name) == &each; };
      if (!counts && std::none_of(names.begin(), names.end(), taken)) refuse("nothing is given to its " + each.name);
    }
  }

  const TensorSpec& input(const std::string& name, std::size_t rank) const {
    return checked(inputOf(signature_, name), name, rank);
  }
  // Gives the last size of a value of floats.
  std::int64_t width(const TensorSpec& spec) const {
    const Dim& last = spec.shape.back();
    if (spec.dtype != "float32" || last.min != last.max) refuse(spec.name + " has no fixed width of floats");
    return last.max;
  }
  const TensorSpec& output(const std::string& name, std::size_t rank) const {
    if (signature_.outputs.size() != 1) refuse("it has other outputs than " + name);
    return checked(outputOf(signature_, name), name, rank);
  }

  // A value whose width another component shares.
  void requireWidth(const TensorSpec& spec, std::size_t wanted) const {
    if (static_cast<std::size_t>(width(spec)) != wanted) refuse(spec.name + " has another width than what is joined to it");
  }

  // An input of this very shape.
  void requireShape(const TensorSpec& spec, const std::vector<std::int64_t>& wanted) const {
    const auto same = [](const Dim& dim, std::int64_t size) { return dim.min <= size && size <= dim.max; };
    if (spec.dtype == "float32" &&
        std::equal(spec.shape.begin(), spec.shape.end(), wanted.begin(), wanted.end(), same)) {
      return;
    }
    refuse(spec.name + " is not what preprocess.json makes");
  }

 private:
  [[noreturn]] void refuse(const std::string& problem) const {
    throw errors::bundleBadManifest(component_.name + ", signature " + signature_.name, problem);
  }
  const TensorSpec& checked(const TensorSpec* found, const std::string& name, std::size_t rank) const {
    if (found == nullptr || found->shape.size() != rank) refuse("it has no " + name + " of the rank that is fed");
    return *found;
  }

  const Component& component_;
  const Signature& signature_;
};

std::size_t rowsOf(const std::vector<Features>& features) {
  return std::accumulate(features.begin(), features.end(), std::size_t{0},
                         [](std::size_t sum, const Features& each) { return sum + each.rows; });
}

}  // namespace

Preprocess contractOf(const Bundle& bundle) {
  const std::optional<std::string>& file = bundle.manifest().preprocess;
  if (!file) throw errors::bundleBadPreprocess(bundle.folder(), "the manifest does not name one");
  return Preprocess::parse(bundle.read(*file, Preprocess::kMaxBytes));
}

Inputs::Inputs(const Bundle& bundle, const RuntimeOptions& options, std::size_t width, std::size_t context)
    : bundle_(bundle), options_(options), width_(width), contract_(contractOf(bundle)) {
  ropeAt_.reserve(context + 1);
  ropeAt_.push_back(0);
  embedInputs_ = {{kIds, TensorView::Type::kInt64, {1, 0}, nullptr}};
  const auto columns = static_cast<std::int64_t>(width);
  embedOutput_ = {kEmbeddings, TensorView::Type::kFloat32, {1, 0, columns}, nullptr};
  fusionInputs_ = {{kEmbeddings, TensorView::Type::kFloat32, {1, 0, columns}, nullptr},
                   {kFeatures, TensorView::Type::kFloat32, {1, 0, 0}, nullptr}};
  fusionOutput_ = {kFused, TensorView::Type::kFloat32, {1, 0, columns}, nullptr};
  checkPromises();
  graph(kEmbed, "");
}

Inputs::~Inputs() = default;

void Inputs::checkPromises() const {
  const Manifest& manifest = bundle_.manifest();
  const auto each = [&](const char* name, auto check) {
    const Component* component = manifest.component(name);
    if (component == nullptr) return;
    for (const Signature& signature : component->signatures) check(signature, Promised(*component, signature));
  };
  each(kEmbed, [&](const Signature&, const Promised& embed) {
    embed.takes({kIds});
    embed.input(kIds, 2);
    embed.requireWidth(embed.output(kEmbeddings, 3), width_);
  });
  std::size_t shown = width_;  // the width of features, where they are spliced in
  each(kFusion, [&](const Signature&, const Promised& fusion) {
    fusion.takes({kEmbeddings, kFeatures});
    fusion.requireWidth(fusion.input(kEmbeddings, 3), width_);
    fusion.requireWidth(fusion.output(kFused, 3), width_);
    const TensorSpec& features = fusion.input(kFeatures, 3);
    if (shown != width_) fusion.requireWidth(features, shown);
    if (!contract_.splices) shown = static_cast<std::size_t>(fusion.width(features));
  });
  const auto encodes = [&](const Signature& signature, const Promised& encoder, const char* fed,
                           const std::vector<std::int64_t>& shape) {
    encoder.takes({fed});
    encoder.requireShape(encoder.input(fed, shape.size()), shape);
    const TensorSpec* features = outputOf(signature, kFeatures);
    const bool batched = features != nullptr && features->shape.size() == 3;
    encoder.requireWidth(encoder.output(kFeatures, batched ? 3 : 2), shown);
  };
  each(kAudio, [&](const Signature& signature, const Promised& audio) {
    if (!contract_.audio) return;  // modality-missing, when a sound is given
    const auto frames = static_cast<std::int64_t>(contract_.audio->frames());
    encodes(signature, audio, "mel", {1, contract_.audio->mels, frames});
  });
  std::map<std::string, Grid> grids;
  for (const Grid& grid : contract_.patches ? contract_.patches->grids : std::vector<Grid>()) grids[grid.name()] = grid;
  each(kVision, [&](const Signature& signature, const Promised& vision) {
    if (contract_.pixels) {
      const std::int64_t size = contract_.pixels->size;
      encodes(signature, vision, "pixels", {1, 3, size, size});
    } else if (const auto found = grids.find(signature.name); found != grids.end()) {  // others are never asked for
      const std::int64_t count = std::int64_t{found->second.rows} * found->second.columns;
      encodes(signature, vision, "patches", {count, contract_.patches->patchValues()});
    }
  });
}

GraphEngine& Inputs::graph(const std::string& component, const std::string& variant) {
  std::unique_ptr<GraphEngine>& found = graphs_[component + "/" + variant];
  if (!found) found = openGraph(bundle_, component, variant, options_);
  return *found;
}

Features Inputs::encode(const EncoderInput& input) {
  const bool sound = input.component == kAudio;
  const Component* component = bundle_.manifest().component(input.component);
  if (component == nullptr || !(sound || input.component == kVision)) {
    throw errors::modalityMissing(sound ? "sound" : "picture", input.component);
  }
  const Signature* signature = component->signature(input.variant.empty() ? "step" : input.variant);
  if (signature == nullptr) throw errors::bundleNoVariant(input.component, input.variant);
  const TensorSpec* made = outputOf(*signature, kFeatures);
  if (made == nullptr || made->shape.empty()) throw errors::bundleNoVariant(input.component, kFeatures);
  GraphEngine& encoder = graph(input.component, input.variant);  // its artifact is what the manifest says from here on
  TensorView output{kFeatures, TensorView::Type::kFloat32, {}, nullptr};
  std::size_t total = 1;
  for (const Dim& dim : made->shape) {
    output.shape.push_back(dim.max);
    total *= static_cast<std::size_t>(dim.max);
  }
  Features features;
  features.component = input.component;
  features.width = static_cast<std::size_t>(made->shape.back().max);
  features.rows = total / features.width;
  features.values.resize(total);
  features.gridRows = input.gridRows;
  features.gridColumns = input.gridColumns;
  output.data = features.values.data();
  // the runtime reads the input and does not write it
  const TensorView view{input.name, TensorView::Type::kFloat32, input.shape, const_cast<float*>(input.values.data())};
  encoder.run({view}, output);
  return features;
}

std::vector<std::int32_t> Inputs::expand(const std::vector<std::int32_t>& tokens,
                                         const std::vector<Features>& features) const {
  if (!contract_.splices || !contract_.imageTokenId) return tokens;
  const auto places = static_cast<std::size_t>(std::count(tokens.begin(), tokens.end(), *contract_.imageTokenId));
  std::vector<const Features*> pictures;
  for (const Features& each : features) {
    if (each.component == kVision) pictures.push_back(&each);
  }
  if (places != pictures.size()) throw errors::imageTokensMismatch(places, pictures.size());
  std::vector<std::int32_t> expanded;
  auto waiting = pictures.begin();
  for (const std::int32_t each : tokens) {
    expanded.insert(expanded.end(), each == *contract_.imageTokenId ? (*waiting++)->rows : 1, each);
  }
  return expanded;
}

Piece Inputs::feed(const std::int32_t* tokens, std::size_t count, const std::vector<Features>& features, bool written,
                   std::size_t position) {
  ids_.assign(tokens, tokens + count);
  embeddings_.resize(count * width_);
  const auto length = static_cast<std::int64_t>(count);
  embedInputs_[0].shape[1] = length;
  embedInputs_[0].data = ids_.data();
  embedOutput_.shape[1] = length;
  embedOutput_.data = embeddings_.data();
  {
    const Stopwatch watch(seconds_);
    graph(kEmbed, "").run(embedInputs_, embedOutput_);
  }
  const std::int64_t start = ropeAt_[position];
  nextRope_ = start + length;
  Piece piece;
  piece.count = count;
  if (!contract_.splices) {
    attend(count, features.empty() ? attended_ : features);
  } else {
    splice(tokens, written ? 0 : count, features);
    if (turns()) {
      turn(tokens, count, features, written, start);
      piece.rope = rope_.data();
      piece.ropeStride = count;
    }
  }
  piece.embeddings = embeddings_.data();
  return piece;
}

// What was shown stays in sight of all that follows it: the embeddings attend to it, once per call.
void Inputs::attend(std::size_t count, const std::vector<Features>& features) {
  if (features.empty()) return;
  const std::size_t rows = rowsOf(features);
  const auto& signatures = bundle_.component(kFusion).signatures;  // of other lengths, but of one width
  const TensorSpec* taken = signatures.empty() ? nullptr : named(signatures.front().inputs, fusionInputs_[1].name);
  if (taken == nullptr || taken->shape.empty()) throw errors::bundleNoVariant(kFusion, fusionInputs_[1].name);
  const auto width = static_cast<std::size_t>(taken->shape.back().max);
  shown_.clear();
  shown_.reserve(rows * width);
  for (const Features& each : features) {
    if (each.width != width) throw errors::runtimeFailed("edgeexport", "features of another width");
    shown_.insert(shown_.end(), each.values.begin(), each.values.end());
  }
  fused_.resize(count * width_);
  const auto length = static_cast<std::int64_t>(count);
  fusionInputs_[0].shape[1] = length;
  fusionInputs_[0].data = embeddings_.data();
  fusionInputs_[1].shape[1] = static_cast<std::int64_t>(rows);
  fusionInputs_[1].shape[2] = static_cast<std::int64_t>(width);
  fusionInputs_[1].data = shown_.data();
  fusionOutput_.shape[1] = length;
  fusionOutput_.data = fused_.data();
  GraphEngine& fusion = graph(kFusion, "");
  const Stopwatch watch(seconds_);
  fusion.run(fusionInputs_, fusionOutput_);
  embeddings_.swap(fused_);
}

// A picture's features take the places of its tokens.
void Inputs::splice(const std::int32_t* tokens, std::size_t count, const std::vector<Features>& features) {
  const std::int64_t picture = contract_.imageTokenId.value_or(-1);  // no token has this id
  const auto places = static_cast<std::size_t>(std::count(tokens, tokens + count, picture));
  if (places != rowsOf(features)) throw errors::imageTokensMismatch(places, rowsOf(features));
  std::size_t at = 0;
  for (const Features& each : features) {
    if (each.width != width_) throw errors::runtimeFailed("edgeexport", "features of another width");
    for (std::size_t row = 0; row < each.rows; ++row, ++at) {
      while (tokens[at] != picture) ++at;
      std::copy_n(each.values.data() + row * width_, width_, embeddings_.data() + at * width_);
    }
  }
}

// M-RoPE positions [3, count] (time, row, column). Text counts on in all three; a picture stands still in time, counts
// its own rows and columns, and moves what follows on by the larger of the two.
// Source: transformers 5.23, Glm4vModel.get_rope_index.
void Inputs::turn(const std::int32_t* tokens, std::size_t count, const std::vector<Features>& features, bool written,
                  std::int64_t start) {
  rope_.resize(3 * count);
  std::int64_t current = start;
  auto waiting = features.begin();
  for (std::size_t at = 0; at < count;) {
    if (written || !contract_.imageTokenId || tokens[at] != *contract_.imageTokenId) {
      for (std::size_t row = 0; row < 3; ++row) rope_[row * count + at] = current;
      ++at;
      ++current;
      continue;
    }
    const auto isPicture = [&](std::int32_t token) { return token == *contract_.imageTokenId; };
    const std::int32_t* const end = std::find_if_not(tokens + at, tokens + count, isPicture);
    const auto places = static_cast<std::size_t>(end - (tokens + at));  // of this picture and of those right behind it
    if (waiting == features.end()) throw errors::imageTokensMismatch(places, 0);
    const Features& picture = *waiting++;
    if (picture.rows == 0 || picture.gridRows * picture.gridColumns != picture.rows || picture.rows > places) {
      throw errors::imageTokensMismatch(places, picture.rows);
    }
    for (std::size_t i = 0; i < picture.rows; ++i, ++at) {
      rope_[at] = current;
      rope_[count + at] = current + static_cast<std::int64_t>(i / picture.gridColumns);
      rope_[2 * count + at] = current + static_cast<std::int64_t>(i % picture.gridColumns);
    }
    current += static_cast<std::int64_t>(std::max(picture.gridRows, picture.gridColumns));
  }
  nextRope_ = current;
}

void Inputs::accept(std::size_t position, std::size_t count, const std::vector<Features>& features) {
  if (!contract_.splices && !features.empty()) {
    attended_ = features;
    attendedFrom_ = position;
  }
  while (ropeAt_.size() <= position + count) ropeAt_.push_back(static_cast<std::int64_t>(ropeAt_.size()));
  for (std::size_t i = 0; turns() && i + 1 < count; ++i) {  // inside a picture there is no place where text could go on
    ropeAt_[position + i + 1] = std::max({rope_[i], rope_[count + i], rope_[2 * count + i]}) + 1;
  }
  ropeAt_[position + count] = nextRope_;
}

void Inputs::truncate(std::size_t length) {
  if (length <= attendedFrom_) attended_.clear();
}

}  // namespace edgeexport
