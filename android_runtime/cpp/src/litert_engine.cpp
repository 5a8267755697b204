// Runs .tflite artifacts in LiteRT; all signatures of a decoder share one buffer per key and value, updated in place by
// the graph, or, in bundles for NNAPI, here.
#include <algorithm>
#include <map>
#include <memory>

#include "arena.h"
#include "engines.h"
#include "interface.h"
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

const Signature& promisedBy(const Component& component, const std::string& signature) {
  const Signature* found = component.signature(signature);
  if (found == nullptr) throw errors::bundleNoVariant(component.name, signature);
  return *found;
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
  LiteRtDecoder(const Bundle& bundle, const Component& component, const RuntimeOptions& options)
      : shape_(decoderShape(component, promisedBy(component, kDecode), kLiteRtForm, 1)),
        calls_(promised(component)),
        model_(bundle, promisedBy(component, kDecode).file, options) {
    if (shape_.vocab == 0) model_.refuse("its signature decode gives no logits");
    for (const Entry& each : calls_) memory_.want(model_.signature(*each.promised));
    memory_.allocate();
    for (Entry& each : calls_) {
      each.call = std::make_unique<Call>(memory_.call(model_, model_.signature(*each.promised)));
      if (each.length > 1) pieces_.push_back(each.length);
    }
    std::sort(calls_.begin(), calls_.end(), [](const Entry& a, const Entry& b) { return a.window < b.window; });
    std::sort(pieces_.rbegin(), pieces_.rend());
    pieces_.erase(std::unique(pieces_.begin(), pieces_.end()), pieces_.end());
    tokens_ = static_cast<std::int32_t*>(memory_.at(kLiteRtForm.tokens));
    embeddings_ = static_cast<float*>(memory_.at(kLiteRtForm.embeddings));
    positions_ = static_cast<std::int32_t*>(memory_.at(kLiteRtForm.position));
    turns_ = static_cast<std::int32_t*>(memory_.at("rope_positions"));
    logits_ = static_cast<const float*>(memory_.at("logits"));
    for (const auto& [past, added] : component.state) {
      if (added == past) continue;  // the graph writes into the cache itself
      added_.push_back({static_cast<float*>(memory_.at(past)), static_cast<const float*>(memory_.at(added))});
    }
  }

  std::size_t context() const noexcept override { return shape_.context; }
  std::size_t vocab() const noexcept override { return shape_.vocab; }
  std::size_t width() const noexcept override { return shape_.width; }
  bool turns() const noexcept override { return shape_.turns; }
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
    const Signature* promised;
    std::size_t length;
    std::size_t window;
    std::unique_ptr<Call> call;
  };

  // What a call adds to a cache [1, heads, context, width]: [1, heads, length, width].
  struct Added {
    float* cache;
    const float* slice;
  };

  // The signatures of a decoder, one of them decode itself. Memory is shared by name and filled without looking, so each
  // must take and give what decode does.
  std::vector<Entry> promised(const Component& component) const {
    std::vector<Entry> made;
    for (const Signature& each : component.signatures) {
      const SignatureName name = SignatureName::parse(each.name);
      if (name.length == 0) continue;
      const DecoderShape shape = decoderShape(component, each, kLiteRtForm, name.length);
      if (!shape.continues(shape_) || (shape.vocab > 0 && shape.vocab != shape_.vocab)) {
        throw errors::bundleBadManifest(component.name + ", signature " + each.name, "it is not over what decode is");
      }
      made.push_back({&each, name.length, name.window > 0 ? name.window : shape_.context, nullptr});
    }
    return made;
  }

  // The signature of this length, over the narrowest window that holds so many tokens; null where there is none.
  const Entry* entryFor(std::size_t length, std::size_t tokens) const {
    const auto fits = [&](const Entry& each) { return each.length == length && tokens <= each.window; };
    const auto found = std::find_if(calls_.begin(), calls_.end(), fits);
    return found == calls_.end() ? nullptr : &*found;
  }

  // Length of the signature for the next of `left` tokens: the longest that they fill or are worth padding for, and
  // that ends inside the cache (behind it the runtime would move the whole piece to the front).
  std::size_t pieceLength(std::size_t left, std::size_t position) const {
    for (const std::size_t length : pieces_) {
      const bool fits = position + length <= shape_.context &&
                        entryFor(length, position + std::min(left, length)) != nullptr;
      if (fits && (left >= length || (length == pieces_.back() && left * kWorthPadding >= length))) return length;
    }
    return 1;
  }

  // One call over tokens start..start+count. What pads it is written behind the tokens, where nothing attends to it
  // before it is overwritten.
  void run(std::size_t length, const Piece& piece, std::size_t start, std::size_t count, std::size_t base) {
    const std::size_t position = base + start;
    const Entry* entry = entryFor(length, position + count);
    if (entry == nullptr) throw errors::runtimeFailed(litert::kRuntime, "no signature takes these tokens");
    const std::size_t width = shape_.width;
    if (width > 0) {
      std::copy_n(piece.embeddings + start * width, count * width, embeddings_);
      std::fill_n(embeddings_ + count * width, (length - count) * width, 0.0F);
    } else {
      std::copy_n(piece.tokens + start, count, tokens_);
      std::fill_n(tokens_ + count, length - count, 0);
    }
    for (std::size_t i = 0; i < length; ++i) positions_[i] = static_cast<std::int32_t>(position + i);
    for (std::size_t row = 0; shape_.turns && row < 3; ++row) {
      const std::int64_t* given = piece.rope + row * piece.ropeStride + start;
      for (std::size_t i = 0; i < length; ++i) {
        turns_[row * length + i] = i < count ? static_cast<std::int32_t>(given[i]) : 0;
      }
    }
    {
      const Stopwatch watch(seconds_);
      entry->call->run();
    }
    for (const Added& each : added_) {  // but for what pads the piece
      for (std::size_t head = 0; head < shape_.heads; ++head) {
        std::copy_n(each.slice + head * length * shape_.headWidth, count * shape_.headWidth,
                    each.cache + (head * shape_.context + position) * shape_.headWidth);
      }
    }
  }

  const DecoderShape shape_;
  std::vector<Entry> calls_;  // the narrowest window first
  Model model_;
  SharedMemory memory_;
  std::vector<std::size_t> pieces_;  // lengths above 1, the longest first
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
  // `signatures` are over so many tokens each, one of them over a single one; or there is one, over none.
  LiteRtGraph(const Bundle& bundle, const std::vector<const Signature*>& signatures, const RuntimeOptions& options)
      : model_(bundle, signatures.front()->file, options) {
    for (const Signature* each : signatures) memory_.want(model_.signature(*each));
    memory_.allocate();
    for (const Signature* each : signatures) {
      const ModelSignature& signature = model_.signature(*each);
      for (const Value& value : signature.inputs) {
        if (void* rows = memory_.at(value.name + kCount)) rows_[value.name] = static_cast<std::int32_t*>(rows);
      }
      calls_.push_back({SignatureName::parse(each->name).length, &signature, memory_.call(model_, signature)});
    }
    std::sort(calls_.begin(), calls_.end(), [](const Entry& a, const Entry& b) { return a.length > b.length; });
    if (calls_.back().length > 1) model_.refuse("no signature of it takes a single token");
  }

  void run(const std::vector<TensorView>& inputs, const TensorView& output) override {
    if (calls_.back().length == 0) {
      runPart(calls_.back(), inputs, output, 0, 0);
      return;
    }
    const auto total = static_cast<std::size_t>(output.shape[1]);
    for (std::size_t start = 0; start < total;) {
      const auto fits = [&](const Entry& each) { return each.length <= total - start; };
      Entry& entry = *std::find_if(calls_.begin(), calls_.end(), fits);  // there is one: the last has length 1
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

  // One call; `start` of `total` tokens are done already (0 of 0 where the component is not over tokens).
  void runPart(Entry& entry, const std::vector<TensorView>& inputs, const TensorView& output, std::size_t start,
               std::size_t total) {
    for (const TensorView& input : inputs) {
      const Value* value = entry.signature->input(liteRtName(input.name));
      const std::int32_t type = input.type == TensorView::Type::kInt64 ? litert::kInt32 : litert::kFloat32;
      if (value == nullptr || value->type.element != type) model_.refuse("it has no input " + input.name);
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
      const std::size_t room = value->bytes() / sizeof(float);
      if (count > room || (rows == nullptr && count != room)) {
        if (rows == nullptr || input.shape.size() < 2) model_.refuse("its " + input.name + " has another shape");
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
    const Value* made = entry.signature->output(liteRtName(output.name));
    const std::size_t all = output.count();
    const std::size_t count = total > 0 ? all / total * entry.length : all;
    if (made == nullptr || made->type.element != litert::kFloat32 || count * sizeof(float) != made->bytes()) {
      model_.refuse("its output is not " + output.name);
    }
    entry.call.run();
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
  return std::make_unique<LiteRtDecoder>(bundle, component, options);
}

std::unique_ptr<GraphEngine> openLiteRtGraph(const Bundle& bundle, const Component& component,
                                             const std::string& variant, const RuntimeOptions& options) {
  std::vector<const Signature*> signatures;
  for (const Signature& each : component.signatures) {
    if (variant.empty() && SignatureName::parse(each.name).length > 0) signatures.push_back(&each);
  }
  if (signatures.empty()) signatures.push_back(&promisedBy(component, variant.empty() ? kStep : variant));
  return std::make_unique<LiteRtGraph>(bundle, signatures, options);
}

}  // namespace edgeexport
