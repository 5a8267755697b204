"""Sizes and times, as people write and read them."""

from __future__ import annotations

import re

_FACTORS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)


def parse_size(text: str) -> int | None:
    """Bytes of "1.5G", "900M", "2GiB" or "4096" (powers of 1024); None when the text is not a positive size."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        return None
    return int(float(match[1]) * _FACTORS[match[2].lower()]) or None


def format_bytes(count: int | float) -> str:
    """Three significant digits and a unit of 1024: 144182 becomes "141 KiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def format_seconds(seconds: float) -> str:
    """ "0.42 s", "12.3 s", "4 min 05 s"."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def format_number(value: float | int) -> str:
    """Whole numbers as they are, others with four significant digits."""
    return str(value) if isinstance(value, int) else f"{value:.4g}"
