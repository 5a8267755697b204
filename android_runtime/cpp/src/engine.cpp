// Picks the engine of a component by the backend that the manifest names. Another engine is two functions in engines.h
// and a row here.
#include "edgeexport/engine.h"

#include <new>

#include "engines.h"
#include "errors.h"
#ifdef EDGEEXPORT_MNN
#include "mnn_engine.h"
#endif

namespace edgeexport {

std::unique_ptr<DecoderEngine> openDecoder(const Bundle& bundle, const RuntimeOptions& options) {
  const Component& component = bundle.component("decoder");
  try {
    if (component.backend == "onnxruntime") return openOnnxDecoder(bundle, component, options);
    if (component.backend == "litert") return openLiteRtDecoder(bundle, component, options);
#ifdef EDGEEXPORT_MNN
    if (component.backend == "mnn") return openMnnDecoder(bundle, component, options);
#endif
  } catch (const std::bad_alloc&) {  // a runtime's too
    throw errors::outOfMemory("to open " + component.name);
  }
  throw errors::backendNotBuilt(component.name, component.backend);
}

std::unique_ptr<GraphEngine> openGraph(const Bundle& bundle, const std::string& name, const std::string& variant,
                                       const RuntimeOptions& options) {
  const Component& component = bundle.component(name);
  try {
    if (component.backend == "onnxruntime") return openOnnxGraph(bundle, component, variant, options);
    if (component.backend == "litert") return openLiteRtGraph(bundle, component, variant, options);
#ifdef EDGEEXPORT_MNN
    if (component.backend == "mnn") return openMnnGraph(bundle, component, variant, options);
#endif
  } catch (const std::bad_alloc&) {  // a runtime's too
    throw errors::outOfMemory("to open " + component.name);
  }
  throw errors::backendNotBuilt(component.name, component.backend);
}

}  // namespace edgeexport
