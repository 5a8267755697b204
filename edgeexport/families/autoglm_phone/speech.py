"""Speech synthesised by eSpeak NG, for training and judging: the library that the package `espeakng-loader` brings."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from edgeexport import errors
from edgeexport.session.audio import Sound

SYNCHRONOUS, UTF8 = 2, 1
RATE, PITCH = 1, 3
"""Of speak_lib.h: an output mode, a flag of espeak_Synth, and two parameters."""


def speak(text: str, voice: str, speed: int, pitch: int) -> Sound:
    """`text` as float32 samples at 22,050 Hz. The same text, voice (`en-us+f2`), speed in words per minute (80..450) and
    pitch (0..99) give the same samples.

    Raises: ToolError `missing-package`, `unknown-voice`.
    """
    library, rate = _library()
    pieces: list[Any] = []

    def take(samples: Any, count: int, _: Any) -> int:
        if samples and count > 0:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    callback = _CALLBACK(take)
    library.espeak_SetSynthCallback(callback)
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise errors.unknown_voice(voice)
    library.espeak_SetParameter(RATE, speed, 0)
    library.espeak_SetParameter(PITCH, pitch, 0)
    data = text.encode()
    library.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, 0, 0, UTF8, None, None)
    library.espeak_Synchronize()
    joined = np.concatenate(pieces) if pieces else np.zeros(0, np.int16)
    return Sound(joined.astype(np.float32) / 32768, rate)


_CALLBACK: Callable[..., Any] = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


@functools.cache
def _library() -> tuple[Any, int]:
    """(the library, ready, its sample rate)"""
    try:
        import espeakng_loader
    except ImportError as problem:
        raise errors.missing_package("espeakng-loader", "train") from problem
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    rate = library.espeak_Initialize(SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0)
    return library, int(rate)
