// The engines that are compiled in: one pair of functions each, for engine.cpp's choice by the manifest.
#pragma once

#include "edgeexport/engine.h"

namespace edgeexport {

std::unique_ptr<DecoderEngine> openOnnxDecoder(const Bundle& bundle, const Component& component,
                                               const RuntimeOptions& options);
std::unique_ptr<GraphEngine> openOnnxGraph(const Bundle& bundle, const Component& component, const std::string& variant,
                                           const RuntimeOptions& options);
std::unique_ptr<DecoderEngine> openLiteRtDecoder(const Bundle& bundle, const Component& component,
                                                 const RuntimeOptions& options);
std::unique_ptr<GraphEngine> openLiteRtGraph(const Bundle& bundle, const Component& component,
                                             const std::string& variant, const RuntimeOptions& options);

}  // namespace edgeexport
