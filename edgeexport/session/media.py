"""The bytes of a picture or a sound that a user names: read once, within a limit."""

from __future__ import annotations

import os
from pathlib import Path

from edgeexport import errors

MAX_BYTES = 256 << 20
"""No file is read that is larger. Ten minutes of 16-bit stereo at 48 kHz have 115 MB."""


def read_media(source: Path | bytes) -> tuple[bytes, str]:
    """The bytes, and what to call them in an error: the path, or how many bytes were given.

    Raises: UsageError `media-unreadable`, `media-too-large`.
    """
    if isinstance(source, bytes):
        where = f"the {len(source)} bytes given"
        if len(source) > MAX_BYTES:
            raise errors.media_too_large(where, MAX_BYTES)
        return source, where
    try:
        if not source.is_file():  # a pipe or a device could be read for ever
            raise errors.media_unreadable(source, "it is not a file" if source.exists() else "there is no such file")
        with source.open("rb") as file:
            large = os.fstat(file.fileno()).st_size > MAX_BYTES
            data = b"" if large else file.read(MAX_BYTES)
    except OSError as error:
        raise errors.media_unreadable(source, error.strerror or str(error)) from error
    except ValueError as error:  # a null byte in the path
        raise errors.media_unreadable(source, str(error)) from error
    if large:
        raise errors.media_too_large(str(source), MAX_BYTES)
    return data, str(source)
