"""Quantisation: which tensor is stored how (schemes, plan), and the arithmetic (weights, stats)."""

from edgeexport.quant.plan import plan, plan_from_names, resolve
from edgeexport.quant.prequantised import findings
from edgeexport.quant.schemes import FORMATS, OWN_SCHEMES, SCHEMES, Scheme, find

__all__ = ["FORMATS", "OWN_SCHEMES", "SCHEMES", "Scheme", "find", "findings", "plan", "plan_from_names", "resolve"]
