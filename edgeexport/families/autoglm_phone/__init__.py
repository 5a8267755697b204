"""AutoGLM-Phone's three-modality reference architecture: pictures, speech and text into one decoder."""

from edgeexport.families.autoglm_phone.family import FAMILY

__all__ = ["FAMILY"]
