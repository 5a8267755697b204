// Picks the engine of a component by the backend that the manifest names. Another engine is two functions in engines.h
// and a row here.
#include "edgeexport/engine.h"

#include <algorithm>
#include <iterator>
#include <new>

#include "engines.h"
#include "errors.h"
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

// What `open` makes of a component with its engine.
template <typename Open>
auto opened(const Component& component, Open open) {
  const auto wanted = [&](const Engine& each) { return component.backend == each.backend; };
  const auto* const engine = std::find_if(std::begin(kEngines), std::end(kEngines), wanted);
  if (engine == std::end(kEngines)) throw errors::backendNotBuilt(component.name, component.backend);
  try {
    return open(*engine);
  } catch (const std::bad_alloc&) {  // a runtime's too
    throw errors::outOfMemory("to open " + component.name);
  }
}

}  // namespace

std::unique_ptr<DecoderEngine> openDecoder(const Bundle& bundle, const RuntimeOptions& options) {
  const Component& component = bundle.component("decoder");
  return opened(component, [&](const Engine& engine) { return engine.openDecoder(bundle, component, options); });
}

std::unique_ptr<GraphEngine> openGraph(const Bundle& bundle, const std::string& name, const std::string& variant,
                                       const RuntimeOptions& options) {
  const Component& component = bundle.component(name);
  return opened(component, [&](const Engine& engine) { return engine.openGraph(bundle, component, variant, options); });
}

}  // namespace edgeexport
