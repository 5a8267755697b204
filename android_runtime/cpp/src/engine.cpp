// Picks the engine of a component by the backend that the manifest names. Another engine is two functions in engines.h
// and a row here.
#include "edgeexport/engine.h"

#include <algorithm>
#include <iterator>
#include <set>
#include <string>

#include "engines.h"
#include "errors.h"
#include "guard.h"
#ifdef EDGEEXPORT_MNN
#include "mnn_engine.h"
#endif
#ifdef EDGEEXPORT_TENSORRT
#include "tensorrt_engine.h"
#endif

namespace edgeexport {
namespace {

struct Engine {
  const char* backend;
  std::unique_ptr<DecoderEngine> (*openDecoder)(const Bundle&, const Component&, const RuntimeOptions&);
  std::unique_ptr<GraphEngine> (*openGraph)(const Bundle&, const Component&, const std::string& variant,
                                            const RuntimeOptions&);
};

constexpr Engine kEngines[] = {
    {"onnxruntime", openOnnxDecoder, openOnnxGraph},
    {"litert", openLiteRtDecoder, openLiteRtGraph},
    {"litert-nnapi", openLiteRtDecoder, openLiteRtGraph},
#ifdef EDGEEXPORT_MNN
    {"mnn", openMnnDecoder, openMnnGraph},
#endif
#ifdef EDGEEXPORT_TENSORRT
    {"tensorrt", openTensorRtDecoder, openTensorRtGraph},
    {"tensorrt-kit", openTensorRtDecoder, openTensorRtGraph},
#endif
};

// Reads the files that the runtime will open for one signature: those of other signatures alone stay closed.
void verify(const Bundle& bundle, const Component& component, const std::string& variant) {
  std::set<std::string> others;
  for (const Signature& each : component.signatures) {
    if (!variant.empty() && each.name != variant) others.insert(each.file);
  }
  if (const Signature* own = component.signature(variant)) others.erase(own->file);
  for (const std::string& file : component.files) {
    if (others.count(file) == 0) bundle.verify(file);
  }
}

// What `open` makes of a component with its engine.
template <typename Open>
auto opened(const Bundle& bundle, const Component& component, const std::string& variant,
            const RuntimeOptions& options, Open open) {
  const auto wanted = [&](const Engine& each) { return component.backend == each.backend; };
  const auto* const engine = std::find_if(std::begin(kEngines), std::end(kEngines), wanted);
  if (engine == std::end(kEngines)) throw errors::backendNotBuilt(component.name, component.backend);
  return guarded("to open the model", [&] {
    if (options.verify) verify(bundle, component, variant);
    return open(*engine);
  });
}

}  // namespace

std::unique_ptr<DecoderEngine> openDecoder(const Bundle& bundle, const RuntimeOptions& options) {
  const Component& component = bundle.component("decoder");
  return opened(bundle, component, "", options,
                [&](const Engine& engine) { return engine.openDecoder(bundle, component, options); });
}

std::unique_ptr<GraphEngine> openGraph(const Bundle& bundle, const std::string& name, const std::string& variant,
                                       const RuntimeOptions& options) {
  const Component& component = bundle.component(name);
  return opened(bundle, component, variant, options,
                [&](const Engine& engine) { return engine.openGraph(bundle, component, variant, options); });
}

}  // namespace edgeexport
