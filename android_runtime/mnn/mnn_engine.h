// MNN-LLM as an engine of the loader: two functions for engine.cpp's choice by the manifest's backend `mnn`.
#pragma once

#include "edgeexport/engine.h"

namespace edgeexport {

std::unique_ptr<DecoderEngine> openMnnDecoder(const Bundle& bundle, const Component& component,
                                              const RuntimeOptions& options);
std::unique_ptr<GraphEngine> openMnnGraph(const Bundle& bundle, const Component& component, const std::string& variant,
                                          const RuntimeOptions& options);

}  // namespace edgeexport
