"""Speech synthesised by eSpeak NG, for training and judging: the library that the package `espeakng-loader` brings."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from edgeexport import errors
from edgeexport.session.audio import Sound

SYNCHRONOUS, UTF8 = 2, 1
RATE, PITCH = 1, 3
"""Of speak_lib.h: an output mode, a flag of espeak_Synth, and two parameters."""


Request = tuple[str, str, int, int]
"""Text, voice, speed and pitch, as `speak` takes them."""


def speak_all(requests: Sequence[Request]) -> list[Sound]:
    """One sound for each request: the same every time, since eSpeak NG says them in a process of their own, from its
    first word on. Voices that breathe (f4, f5, klatt, klatt2) still differ a little from process to process.

    Raises: ToolError `missing-package`.
    """
    if importlib.util.find_spec("espeakng_loader") is None:
        raise errors.missing_package("espeakng-loader", "train")
    command = [sys.executable, "-m", "edgeexport.families.autoglm_phone.speech"]
    done = subprocess.run(command, input=msgspec.json.encode(list(requests)), stdout=subprocess.PIPE, check=True)
    answer = msgspec.msgpack.decode(done.stdout, type=list[tuple[int, bytes]])
    return [Sound(np.frombuffer(data, np.float32), rate) for rate, data in answer]


def speak(text: str, voice: str, speed: int, pitch: int) -> Sound:
    """`text` as float32 samples at 22,050 Hz, by a voice (`en-us+f2`) at a speed in words per minute (80..450) and a
    pitch (0..99). What was said before in this process changes the samples a little: see `speak_all`.

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


def _main() -> None:
    requests = msgspec.json.decode(sys.stdin.buffer.read(), type=list[Request])
    sounds = [speak(*request) for request in requests]
    answer = [(sound.rate, sound.samples.tobytes()) for sound in sounds]
    sys.stdout.buffer.write(msgspec.msgpack.encode(answer))


if __name__ == "__main__":
    _main()
