"""weights.json of a bundle: where an artifact keeps each weight, read strictly, whoever wrote it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from edgeexport import errors, strict_json
from edgeexport.backends.storage import misplaced
from edgeexport.core import Format, Shift, StoredWeight
from edgeexport.quant.schemes import KNOWN

MAX_BYTES = 64 << 20
"""A weight takes about 600 bytes; the largest models have some thousands."""

Place = Annotated[int, Meta(ge=-1, le=2**62)]
Size = Annotated[int, Meta(ge=1, le=2**40)]


class _Format(Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    bits: int
    integer: bool
    block: int = 0
    positive: bool = False
    palette: bool = False
    float8: bool = False
    shift: Shift = ""


class _Stored(Struct, frozen=True, forbid_unknown_fields=True):
    """`StoredWeight`, with bounds."""

    file: str
    offset: Annotated[int, Meta(ge=0, le=2**62)]
    scales_offset: Place
    format: _Format
    shape: Annotated[tuple[Size, ...], Meta(max_length=8)]
    signed: bool = False
    scale_bits: Annotated[int, Meta(ge=16, le=32)] = 16
    order: Annotated[tuple[Annotated[int, Meta(ge=0, le=7)], ...], Meta(max_length=8)] = ()
    high_first: bool = False
    palettes_offset: Place = -1
    shift_offset: Place = -1
    shift_scales_offset: Place = -1
    paired: bool = False
    dense: bool = False


def from_json(
    data: bytes, where: Path, files: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, StoredWeight]:
    """Where the weights of `shapes` lie. `files` are the component's with their sizes in bytes: none other is read.

    Raises: BundleError `bundle-bad-weights`.
    """
    try:
        read = msgspec.convert(strict_json.parse(data), dict[str, _Stored])
    except (ValueError, OverflowError) as problem:  # msgspec's ValidationError is a ValueError
        raise errors.bundle_bad_weights(where, str(problem)) from problem
    found = {name: _weight(each) for name, each in read.items()}
    for contradiction in _contradictions(found, files, shapes):
        raise errors.bundle_bad_weights(where, contradiction)
    return found


def _weight(read: _Stored) -> StoredWeight:
    fields = {name: getattr(read, name) for name in read.__struct_fields__}
    return StoredWeight(**fields | {"format": Format(**msgspec.structs.asdict(read.format))})


def _contradictions(
    found: Mapping[str, StoredWeight], files: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    """What the types cannot say."""
    for name in sorted(shapes.keys() ^ found.keys()):
        yield f"{name} is {'not in it' if name in shapes else 'no weight of the model'}"
    for name, weight in found.items():
        fmt = weight.format
        if weight.shape != shapes[name]:
            yield f"{name} has the shape {list(weight.shape)}, the model's is {list(shapes[name])}"
        if weight.file not in files:
            yield f"{name} is in {weight.file!r}, which is no file of the component"
        elif replace(fmt, positive=False) != KNOWN.get(fmt.name):
            yield f"{name} has a format that is not known: {fmt.name!r}"
        elif weight.scale_bits not in (16, 32) or (weight.paired and fmt.shift != "half"):
            yield f"{name} has scales that its format does not have"
        elif weight.order and sorted(weight.order) != list(range(len(weight.shape))):
            yield f"{name} has its axes in no order: {list(weight.order)}"
        else:
            yield from (f"{name}: {problem}" for problem in misplaced(weight, files[weight.file]))
