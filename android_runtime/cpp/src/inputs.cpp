// Embeds tokens, joins what encoders made of pictures and sound to them, and counts M-RoPE positions.
#include "edgeexport/inputs.h"

#include <algorithm>
#include <numeric>

#include "errors.h"
#include "input_errors.h"
#include "named.h"
#include "stopwatch.h"

namespace edgeexport {
namespace {

constexpr const char* kEmbed = "embed";
constexpr const char* kFusion = "fusion";

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
  ropeAt_.resize(context + 1);
  std::iota(ropeAt_.begin(), ropeAt_.end(), 0);
  embedInputs_ = {{"input_ids", TensorView::Type::kInt64, {1, 0}, nullptr}};
  const auto columns = static_cast<std::int64_t>(width);
  embedOutput_ = {"inputs_embeds", TensorView::Type::kFloat32, {1, 0, columns}, nullptr};
  fusionInputs_ = {{"inputs_embeds", TensorView::Type::kFloat32, {1, 0, columns}, nullptr},
                   {"features", TensorView::Type::kFloat32, {1, 0, 0}, nullptr}};
  fusionOutput_ = {"fused", TensorView::Type::kFloat32, {1, 0, columns}, nullptr};
  graph(kEmbed, "");
}

Inputs::~Inputs() = default;

GraphEngine& Inputs::graph(const std::string& component, const std::string& variant) {
  std::unique_ptr<GraphEngine>& found = graphs_[component + "/" + variant];
  if (!found) found = openGraph(bundle_, component, variant, options_);
  return *found;
}

Features Inputs::encode(const EncoderInput& input) {
  const bool sound = input.component == "audio";
  const Component* component = bundle_.manifest().component(input.component);
  if (component == nullptr || !(sound || input.component == "vision")) {
    throw errors::modalityMissing(sound ? "sound" : "picture", input.component);
  }
  const Signature* signature = component->signature(input.variant.empty() ? "step" : input.variant);
  if (signature == nullptr) throw errors::bundleNoVariant(input.component, input.variant);
  const TensorSpec* made = named(signature->outputs, "features");
  if (made == nullptr || made->shape.empty()) throw errors::bundleNoVariant(input.component, "features");
  TensorView output{"features", TensorView::Type::kFloat32, {}, nullptr};
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
  graph(input.component, input.variant).run({view}, output);
  return features;
}

std::vector<std::int32_t> Inputs::expand(const std::vector<std::int32_t>& tokens,
                                         const std::vector<Features>& features) const {
  if (!contract_.splices || !contract_.imageTokenId) return tokens;
  const auto places = static_cast<std::size_t>(std::count(tokens.begin(), tokens.end(), *contract_.imageTokenId));
  std::vector<const Features*> pictures;
  for (const Features& each : features) {
    if (each.component == "vision") pictures.push_back(&each);
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
    const Features& picture = *waiting++;
    if (picture.gridRows * picture.gridColumns != picture.rows || at + picture.rows > count) {
      throw errors::imageTokensMismatch(count - at, picture.rows);
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
  for (std::size_t i = 0; turns() && i + 1 < count; ++i) {  // inside a picture there is no place where text could go on
    ropeAt_[position + i + 1] = std::max({rope_[i], rope_[count + i], rope_[2 * count + i]}) + 1;
  }
  ropeAt_[position + count] = nextRope_;
}

void Inputs::truncate(std::size_t length) {
  if (length <= attendedFrom_) attended_.clear();
}

}  // namespace edgeexport
