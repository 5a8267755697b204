// Runs .tflite artifacts in LiteRT; all signatures of a decoder share one buffer per key and value, updated in place by
// the graph, or, in bundles for NNAPI, here.
#include <algorithm>
#include <map>
#include <memory>

#include "arena.h"
#include "engines.h"
#include "litert_model.h"
#include "stopwatch.h"

namespace edgeexport {
namespace {

using litert::Call;
using litert::Model;
using litert::ModelSignature;
using litert::SignatureName;
using litert::Value;

constexpr const char* kDecode = "decode";
constexpr const char* kStep = "step";
constexpr const char* kCount = "_count";  // behind the name of an input that is padded: how many of its rows count
constexpr std::size_t kWorthPadding = 8;  // a piece is padded where it fills this part, one eighth, of a signature

std::string modelFile(const Component& component, const std::string& signature) {
  const Signature* found = component.signature(signature);
  if (found == nullptr) throw errors::bundleNoVariant(component.name, signature);
  return found->file;
}

// Memory for values by name: those of the same name share it, as large as the largest of them.
class SharedMemory {
 public:
  void want(const ModelSignature& signature) {
    for (const auto* values : {&signature.inputs, &signature.outputs}) {
      for (const Value& value : *values) {
        std::size_t& bytes = bytes_[value.name];
        bytes = std::max(bytes, value.bytes());
      }
    }
  }
  void allocate() {
    std::size_t total = 0;
    for (const auto& each : bytes_) total += Arena::room(each.second);
    arena_ = std::make_unique<Arena>(std::max<std::size_t>(total, 1));
    for (const auto& [name, bytes] : bytes_) memory_[name] = arena_->take<std::uint8_t>(bytes);
  }
  void* at(const std::string& name) const {
    const auto found = memory_.find(name);
    return found == memory_.end() ? nullptr : found->second;
  }
  // A call over this memory.
  Call call(Model& model, const ModelSignature& signature) const {
    return Call(model, signature, [this](const Value& value) { return at(value.name); });
  }

 private:
  std::map<std::string, std::size_t> bytes_;
  std::map<std::string, std::uint8_t*> memory_;
  std::unique_ptr<Arena> arena_;
};

class LiteRtDecoder final : public DecoderEngine {
 public:
  LiteRtDecoder(const std::string& path, const std::string& digest, const Component& component,
                const RuntimeOptions& options)
      : model_(path, digest, options) {
    const ModelSignature* decode = model_.signature(kDecode);
    if (decode == nullptr || component.state.empty()) model_.refuse("it has no signature decode with a cache");
    const Value* logits = decode->output("logits");
    const Value* cache = decode->input(component.state[0].first);
    if (logits == nullptr || cache == nullptr || cache->type.rank != 4 || logits->type.rank != 3) {
      model_.refuse("its signature decode has no logits or no cache");
    }
    vocab_ = logits->size(2);
    context_ = cache->size(2);
    const Value* embeddings = decode->input("embeddings");
    if (embeddings != nullptr) width_ = embeddings->size(2);
    rope_ = decode->input("rope_positions") != nullptr;
    for (const ModelSignature& each : model_.signatures()) {
      if (SignatureName::parse(each.name).length == 0) continue;
      check(each, component, *cache);
      memory_.want(each);
    }
    memory_.allocate();
    for (const ModelSignature& each : model_.signatures()) {
      const SignatureName name = SignatureName::parse(each.name);
      if (name.length == 0) continue;
      const std::size_t window = name.window > 0 ? name.window : context_;
      calls_.push_back({name.length, window, memory_.call(model_, each)});
      if (name.length > 1) pieces_.push_back(name.length);
    }
    std::sort(calls_.begin(), calls_.end(), [](const Entry& a, const Entry& b) { return a.window < b.window; });
    std::sort(pieces_.rbegin(), pieces_.rend());
    pieces_.erase(std::unique(pieces_.begin(), pieces_.end()), pieces_.end());
    tokens_ = static_cast<std::int32_t*>(memory_.at("tokens"));
    embeddings_ = static_cast<float*>(memory_.at("embeddings"));
    positions_ = static_cast<std::int32_t*>(memory_.at("input_pos"));
    turns_ = static_cast<std::int32_t*>(memory_.at("rope_positions"));
    logits_ = static_cast<const float*>(memory_.at("logits"));
    for (const auto& [past, added] : component.state) {
      if (added == past) continue;  // the graph writes into the cache itself
      added_.push_back({static_cast<float*>(memory_.at(past)), static_cast<const float*>(memory_.at(added))});
    }
    heads_ = cache->size(1);
    headWidth_ = cache->size(3);
  }

  std::size_t context() const noexcept override { return context_; }
  std::size_t vocab() const noexcept override { return vocab_; }
  std::size_t width() const noexcept override { return width_; }
  double runtimeSeconds() const noexcept override { return seconds_; }

  // The last token goes through `decode`, which alone gives logits; those before it in pieces of the other signatures'
  // lengths.
  const float* step(const Piece& piece, std::size_t position) override {
    const std::size_t last = piece.count - 1;
    std::size_t start = 0;
    while (start < last) {
      const std::size_t length = pieceLength(last - start, position + start);
      const std::size_t stop = std::min(start + length, last);
      run(length, piece, start, stop - start, position);
      start = stop;
    }
    run(1, piece, last, 1, position);
    return logits_;
  }

 private:
  struct Entry {
    std::size_t length;
    std::size_t window;
    Call call;
  };

  // What a call adds to a cache [1, heads, context, width]: [1, heads, length, width].
  struct Added {
    float* cache;
    const float* slice;
  };

  // Memory is filled by name and without looking: every signature must take and give what `decode` does.
  void check(const ModelSignature& signature, const Component& component, const Value& cache) const {
    const std::size_t length = SignatureName::parse(signature.name).length;
    const Value* fed = signature.input(width_ > 0 ? "embeddings" : "tokens");
    const Value* positions = signature.input("input_pos");
    const Value* turns = signature.input("rope_positions");
    const std::size_t wanted = length * (width_ > 0 ? width_ : 1) * sizeof(std::int32_t);
    const bool fits = fed != nullptr && fed->bytes() == wanted && positions != nullptr &&
                      positions->bytes() == length * sizeof(std::int32_t) && (turns != nullptr) == rope_ &&
                      (turns == nullptr || turns->bytes() == 3 * length * sizeof(std::int32_t));
    if (!fits) model_.refuse("its signature " + signature.name + " does not take what decode takes");
    const std::size_t row = cache.size(1) * cache.size(3) * sizeof(float);
    for (const auto& [past, added] : component.state) {
      const Value* from = signature.input(past);
      const Value* to = signature.output(added);
      const bool same = from != nullptr && to != nullptr && from->bytes() == cache.bytes() &&
                        to->bytes() == row * (added == past ? context_ : length);
      if (!same) model_.refuse("its signature " + signature.name + " has another cache than decode");
    }
  }

  // Length of the signature for the next of `left` tokens: the longest that they fill or are worth padding for, and
  // that ends inside the cache (behind it the runtime would move the whole piece to the front).
  std::size_t pieceLength(std::size_t left, std::size_t position) const {
    for (const std::size_t length : pieces_) {
      const bool fits = position + length <= context_;
      if (fits && (left >= length || (length == pieces_.back() && left * kWorthPadding >= length))) return length;
    }
    return 1;
  }

  // One call over tokens start..start+count. What pads it is written behind the tokens, where nothing attends to it
  // before it is overwritten.
  void run(std::size_t length, const Piece& piece, std::size_t start, std::size_t count, std::size_t base) {
    const std::size_t position = base + start;
    const auto fits = [&](const Entry& each) { return each.length == length && position + count <= each.window; };
    const auto entry = std::find_if(calls_.begin(), calls_.end(), fits);  // the narrowest window that holds them
    if (width_ > 0) {
      std::copy_n(piece.embeddings + start * width_, count * width_, embeddings_);
      std::fill_n(embeddings_ + count * width_, (length - count) * width_, 0.0F);
    } else {
      std::copy_n(piece.tokens + start, count, tokens_);
      std::fill_n(tokens_ + count, length - count, 0);
    }
    for (std::size_t i = 0; i < length; ++i) positions_[i] = static_cast<std::int32_t>(position + i);
    for (std::size_t row = 0; rope_ && row < 3; ++row) {
      const std::int64_t* given = piece.rope + row * piece.ropeStride + start;
      for (std::size_t i = 0; i < length; ++i) {
        turns_[row * length + i] = i < count ? static_cast<std::int32_t>(given[i]) : 0;
      }
    }
    {
      const Stopwatch watch(seconds_);
      entry->call.run();
    }
    for (const Added& each : added_) {  // but for what pads the piece
      for (std::size_t head = 0; head < heads_; ++head) {
        std::copy_n(each.slice + head * length * headWidth_, count * headWidth_,
                    each.cache + (head * context_ + position) * headWidth_);
      }
    }
  }

  Model model_;
  SharedMemory memory_;
  std::vector<Entry> calls_;         // the narrowest window first
  std::vector<std::size_t> pieces_;  // lengths above 1, the longest first
  std::size_t vocab_ = 0;
  std::size_t context_ = 0;
  std::size_t width_ = 0;
  std::size_t heads_ = 0;
  std::size_t headWidth_ = 0;
  bool rope_ = false;
  double seconds_ = 0;
  std::vector<Added> added_;  // where the loader writes the cache
  std::int32_t* tokens_ = nullptr;
  float* embeddings_ = nullptr;
  std::int32_t* positions_ = nullptr;
  std::int32_t* turns_ = nullptr;
  const float* logits_ = nullptr;
};

// A component without state. Where it has a signature for each of several lengths, its inputs are cut along their
// tokens; those of another free size are padded to the one that was built.
class LiteRtGraph final : public GraphEngine {
 public:
  LiteRtGraph(const std::string& path, const std::string& digest, const std::vector<std::string>& signatures,
              const RuntimeOptions& options)
      : model_(path, digest, options) {
    for (const std::string& name : signatures) {
      const ModelSignature* signature = model_.signature(name);
      if (signature == nullptr) model_.refuse("it has no signature " + name);
      memory_.want(*signature);
    }
    memory_.allocate();
    for (const std::string& name : signatures) {
      const ModelSignature& signature = *model_.signature(name);
      for (const Value& value : signature.inputs) {
        if (void* rows = memory_.at(value.name + kCount)) rows_[value.name] = static_cast<std::int32_t*>(rows);
      }
      calls_.push_back({SignatureName::parse(name).length, &signature, memory_.call(model_, signature)});
    }
    std::sort(calls_.begin(), calls_.end(), [](const Entry& a, const Entry& b) { return a.length > b.length; });
  }

  void run(const std::vector<TensorView>& inputs, const TensorView& output) override {
    if (calls_.back().length == 0) {
      runPart(calls_.back(), inputs, output, 0, 0);
      return;
    }
    const auto total = static_cast<std::size_t>(output.shape[1]);
    for (std::size_t start = 0; start < total;) {
      const auto fits = [&](const Entry& each) { return each.length <= total - start; };
      Entry& entry = *std::find_if(calls_.begin(), calls_.end(), fits);  // the longest first; one has length 1
      runPart(entry, inputs, output, start, total);
      start += entry.length;
    }
  }

 private:
  struct Entry {
    std::size_t length;
    const ModelSignature* signature;
    Call call;
  };

  static const char* givenName(const std::string& canonical) {
    if (canonical == "input_ids") return "tokens";
    if (canonical == "inputs_embeds") return "embeddings";
    return canonical.c_str();
  }

  // One call; `start` of `total` tokens are done already (0 of 0 where the component is not over tokens).
  void runPart(Entry& entry, const std::vector<TensorView>& inputs, const TensorView& output, std::size_t start,
               std::size_t total) {
    for (const TensorView& input : inputs) {
      const Value* value = entry.signature->input(givenName(input.name));
      if (value == nullptr) model_.refuse("it has no input " + input.name);
      auto* memory = static_cast<std::uint8_t*>(memory_.at(value->name));
      const auto padded = rows_.find(value->name);
      std::int32_t* rows = padded == rows_.end() ? nullptr : padded->second;
      const std::size_t all = input.count();
      std::size_t from = 0;
      std::size_t count = all;
      if (rows != nullptr) {
        *rows = static_cast<std::int32_t>(input.shape[1]);
      } else if (total > 0) {
        from = all / total * start;
        count = all / total * entry.length;
      }
      if (count * sizeof(float) > value->bytes() || (rows == nullptr && count * sizeof(float) != value->bytes())) {
        throw errors::tooManyFeatures(static_cast<std::size_t>(input.shape[1]), value->size(1));
      }
      if (input.type == TensorView::Type::kInt64) {
        const auto* given = static_cast<const std::int64_t*>(input.data) + from;
        std::transform(given, given + count, reinterpret_cast<std::int32_t*>(memory),
                       [](std::int64_t each) { return static_cast<std::int32_t>(each); });
      } else {
        std::copy_n(static_cast<const float*>(input.data) + from, count, reinterpret_cast<float*>(memory));
      }
      std::fill(memory + count * sizeof(float), memory + value->bytes(), std::uint8_t{0});
    }
    entry.call.run();
    const Value* made = entry.signature->output(givenName(output.name));
    const std::size_t all = output.count();
    const std::size_t count = total > 0 ? all / total * entry.length : all;
    if (made == nullptr || count * sizeof(float) != made->bytes()) model_.refuse("its output is not " + output.name);
    const auto* values = static_cast<const float*>(memory_.at(made->name));
    std::copy_n(values, count, static_cast<float*>(output.data) + (total > 0 ? all / total * start : 0));
  }

  Model model_;
  SharedMemory memory_;
  std::map<std::string, std::int32_t*> rows_;  // of an input that is padded: where to say how many rows count
  std::vector<Entry> calls_;                   // the longest first
};

}  // namespace

std::unique_ptr<DecoderEngine> openLiteRtDecoder(const Bundle& bundle, const Component& component,
                                                 const RuntimeOptions& options) {
  const std::string file = modelFile(component, kDecode);
  const std::string& digest = bundle.manifest().files.at(file).sha256;
  return std::make_unique<LiteRtDecoder>(bundle.path(file), digest, component, options);
}

std::unique_ptr<GraphEngine> openLiteRtGraph(const Bundle& bundle, const Component& component,
                                             const std::string& variant, const RuntimeOptions& options) {
  std::vector<std::string> names;
  for (const Signature& each : component.signatures) {
    if (variant.empty() && SignatureName::parse(each.name).length > 0) names.push_back(each.name);
  }
  if (names.empty()) names.push_back(variant.empty() ? kStep : variant);
  const std::string file = modelFile(component, names[0]);
  return std::make_unique<LiteRtGraph>(bundle.path(file), bundle.manifest().files.at(file).sha256, names, options);
}

}  // namespace edgeexport
