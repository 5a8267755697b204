// TensorRT and TensorRT-RTX as an engine of the loader: two functions for engine.cpp's choice by the manifest's
// backends `tensorrt` and `tensorrt-kit`.
#pragma once

#include "edgeexport/engine.h"

namespace edgeexport {

std::unique_ptr<DecoderEngine> openTensorRtDecoder(const Bundle& bundle, const Component& component,
                                                   const RuntimeOptions& options);
std::unique_ptr<GraphEngine> openTensorRtGraph(const Bundle& bundle, const Component& component,
                                               const std::string& variant, const RuntimeOptions& options);

}  // namespace edgeexport
