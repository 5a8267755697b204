"""Stands in for engines that the device has yet to build: see tensorrt_runner.py, which does the same beside one."""

from __future__ import annotations

from edgeexport.backends.tensorrt_runner import open_decoder, open_graph, read_signature
from edgeexport.core import StandIn

__all__ = ["RUNTIME", "STAND_IN", "open_decoder", "open_graph", "read_signature"]

RUNTIME = "computed in ONNX Runtime from the graph that the device builds its engine from, not by an engine"
STAND_IN = StandIn(
    opens="the graph opens in ONNX Runtime",
    runs="the graph that the device builds its engine from, in ONNX Runtime; not the engine",
    why="the engine is built on the device, and nothing of it has run here",
)
