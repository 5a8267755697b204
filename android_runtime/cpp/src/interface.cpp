// What a manifest promises of an artifact: whether it suffices to run it, and whether the runtime reports the same.
#include "interface.h"

#include <algorithm>
#include <initializer_list>
#include <map>

#include "errors.h"
#include "named.h"

namespace edgeexport {
namespace {

constexpr std::size_t kFree = 0;  // in place of a size: any
constexpr const char* kTurns = "rope_positions";
constexpr const char* kLogits = "logits";

std::string textOf(const std::string& dtype, const std::vector<std::int64_t>& shape) {
  std::string made = dtype + " [";
  for (const std::int64_t size : shape) made += (made.back() == '[' ? "" : ", ") + std::to_string(size);
  return made + "]";
}

bool matches(const Dim& promised, std::int64_t found) {
  return found == -1 || (found >= promised.min && found <= promised.max);
}

// The values of a decoder's signature, and where they are not a decoder's.
class Promises {
 public:
  Promises(const Component& component, const Signature& signature)
      : where_(component.name + ", signature " + signature.name),
        inputs_(byName(signature.inputs)),
        outputs_(byName(signature.outputs)) {}

  [[noreturn]] void refuse(const std::string& problem) const { throw errors::bundleBadManifest(where_, problem); }

  bool takes(const std::string& name) const { return inputs_.count(name) > 0; }
  bool gives(const std::string& name) const { return outputs_.count(name) > 0; }

  using Dtypes = std::initializer_list<const char*>;
  using Shape = std::initializer_list<std::size_t>;  // kFree may be any size

  // Each throws unless the value is there with one of these dtypes and this shape.
  const TensorSpec& input(const std::string& name, Dtypes dtypes, Shape shape) const {
    return checked(inputs_, name, dtypes, shape);
  }
  const TensorSpec& output(const std::string& name, Dtypes dtypes, Shape shape) const {
    return checked(outputs_, name, dtypes, shape);
  }

  // A size that is the same in every call.
  std::size_t fixed(const TensorSpec& spec, std::size_t axis) const {
    const Dim& dim = spec.shape[axis];
    if (dim.min != dim.max) refuse("the sizes of " + spec.name + " are not fixed");
    return static_cast<std::size_t>(dim.max);
  }

 private:
  using Specs = std::map<std::string, const TensorSpec*>;

  static Specs byName(const std::vector<TensorSpec>& specs) {
    Specs made;
    for (const TensorSpec& each : specs) made[each.name] = &each;
    return made;
  }

  const TensorSpec& checked(const Specs& specs, const std::string& name, Dtypes dtypes, Shape shape) const {
    const auto place = specs.find(name);
    if (place == specs.end()) refuse("it has no " + name);
    const TensorSpec& found = *place->second;
    const auto fits = [](const Dim& dim, std::size_t wanted) {
      return wanted == kFree || (dim.min == dim.max && static_cast<std::size_t>(dim.max) == wanted);
    };
    const bool known = std::find(dtypes.begin(), dtypes.end(), found.dtype) != dtypes.end();
    if (!known || !std::equal(found.shape.begin(), found.shape.end(), shape.begin(), shape.end(), fits)) {
      refuse(name + " has another type or shape than a decoder's");
    }
    return found;
  }

  const std::string where_;
  const Specs inputs_;
  const Specs outputs_;
};

}  // namespace

std::string liteRtName(const std::string& canonical) {
  if (canonical == kCanonicalForm.tokens) return kLiteRtForm.tokens;
  if (canonical == kCanonicalForm.embeddings) return kLiteRtForm.embeddings;
  return canonical;
}

void requirePromised(const Signature& promised, const std::vector<ReportedValue>& inputs,
                     const std::vector<ReportedValue>& outputs, const std::string& path, const char* runtime) {
  const auto compare = [&](const char* kind, const std::vector<TensorSpec>& specs,
                           const std::vector<ReportedValue>& reported) {
    const auto refuse = [&](const std::string& name, const std::string& problem) {
      throw errors::artifactDoesNotOpen(path, runtime,
                                        "signature " + promised.name + ", " + kind + " " + name + ": " + problem);
    };
    std::map<std::string, const ReportedValue*> found;
    for (const ReportedValue& each : reported) found[each.name] = &each;
    for (const TensorSpec& spec : specs) {
      const auto place = found.find(spec.name);
      if (place == found.end()) refuse(spec.name, "the manifest names it, the artifact does not");
      const ReportedValue& value = *place->second;
      const bool same = value.dtype == spec.dtype && std::equal(spec.shape.begin(), spec.shape.end(),
                                                                value.shape.begin(), value.shape.end(), matches);
      if (!same) {
        refuse(spec.name, "the artifact's is " + textOf(value.dtype, value.shape) + ", the manifest says otherwise");
      }
      found.erase(place);
    }
    if (!found.empty()) refuse(found.begin()->first, "the artifact names it, the manifest does not");
  };
  compare("input", promised.inputs, inputs);
  compare("output", promised.outputs, outputs);
}

DecoderShape decoderShape(const Component& component, const Signature& signature, const DecoderForm& form,
                          std::size_t length) {
  const Promises promises(component, signature);
  const char* const half = form.halves ? "float16" : "float32";
  DecoderShape made;
  std::size_t inputs = 2 + component.state.size();
  std::size_t outputs = component.state.size();
  if (promises.takes(form.embeddings)) {
    made.width = promises.fixed(promises.input(form.embeddings, {"float32"}, {1, length, kFree}), 2);
  } else {
    promises.input(form.tokens, {form.whole}, {1, length});
  }
  promises.input(form.position, {form.whole}, {form.perToken ? length : 1});
  if (promises.takes(kTurns)) {
    promises.input(kTurns, {form.whole}, {3, 1, length});
    made.turns = true;
    ++inputs;
  }
  if (component.state.empty()) promises.refuse("its component has no state, so no cache");
  for (const auto& [past, present] : component.state) {
    const TensorSpec& cache = promises.input(past, {"float32", half}, {1, made.heads, made.context, made.headWidth});
    made.heads = promises.fixed(cache, 1);
    made.context = promises.fixed(cache, 2);
    made.headWidth = promises.fixed(cache, 3);
    const std::size_t added = form.perToken && present != past ? length : made.context;
    promises.output(present, {"float32", half}, {1, made.heads, added, made.headWidth});
  }
  if (promises.gives(kLogits)) {
    made.vocab = promises.fixed(promises.output(kLogits, {"float32"}, {1, 1, kFree}), 2);
    ++outputs;
  }
  if (signature.inputs.size() != inputs || signature.outputs.size() != outputs) {
    promises.refuse("it has inputs or outputs that no decoder has");
  }
  if (component.kv) {
    const KvLayout& kv = *component.kv;
    const bool same = 2 * static_cast<std::size_t>(kv.layers) == component.state.size() &&
                      static_cast<std::size_t>(kv.kvHeads) == made.heads &&
                      static_cast<std::size_t>(kv.headDim) == made.headWidth &&
                      static_cast<std::size_t>(kv.context) == made.context;
    if (!same) promises.refuse("its caches are not those of kv");
  }
  return made;
}

const TensorSpec* inputOf(const Signature& signature, const std::string& name) {
  const TensorSpec* found = named(signature.inputs, name);
  return found != nullptr ? found : named(signature.inputs, liteRtName(name));
}

const TensorSpec* outputOf(const Signature& signature, const std::string& name) {
  const TensorSpec* found = named(signature.outputs, name);
  return found != nullptr ? found : named(signature.outputs, liteRtName(name));
}

}  // namespace edgeexport
