"""What may be spent on bytes that nobody has vetted: one budget for every reader, far above what honest files need."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of what is derived from a file. A file's own size is bounded where it is read."""

    depth: int = 100
    """Nesting of a document."""
    items: int = 8_000_000
    """Values of a document. A tokenizer of 256,000 words has 2 million."""
    line: int = 4096
    """Characters of a line of TOML, so parts of its longest key."""
    path_parts: int = 32
    """Folders that a path in a bundle goes through."""
    listed: int = 20
    """Problems of one kind that are listed one by one."""

    layers: int = 1 << 10
    heads: int = 1 << 12
    head_dim: int = 1 << 13
    size: int = (1 << 31) - 1
    parameters: int = 1 << 12
    """What a configuration may ask for before it is compared with the weights: layers are listed one by one, rotary
    tables have a column for every two of a head's numbers. The deepest model that is known, Llama 3.1 405B, has 126
    layers and 1,138 tensors; `size` is any other dimension."""

    fourier: int = 1 << 26
    """Numbers that the Fourier transforms of one sound take: frames times their length. 600 s, as Whisper cuts them,
    are 24 million."""
    spectrum: int = 1 << 24
    """Numbers of one spectrogram: mel bands times frames."""

    steps: int = 2_000_000
    """Steps of a template: loop turns, calls, list elements, and one for each 256 characters that are copied."""
    text: int = 4 << 20
    """Longest text, in characters, that a template may be, write or hold."""
    width: int = 100_000
    """Largest width, indent or count that a filter or method may be given; jinja2's own bound for range()."""
    cpu_seconds: float = 1.5
    wall_seconds: float = 30.0
    memory_bytes: int = 512 << 20
    """Of the process in which templates render. Ten megabytes of a conversation take 0.2 s and 150 MB."""


UNTRUSTED = Limits()
