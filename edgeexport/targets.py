"""targets/*.toml -> Target: strict, with every problem of a file in one report."""

from __future__ import annotations

import dataclasses
import re
import tomllib
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from edgeexport import errors
from edgeexport.core import LEVELS, Finding, Target
from edgeexport.errors import UsageError
from edgeexport.limits import UNTRUSTED

PLATFORMS = ("android", "host", "ios", "jetson", "rtx")
PRECISIONS = ("float16", "float32")
MAX_FILE_BYTES = 1 << 16

GATES: Mapping[str, tuple[str, ...]] = {
    "L1": (),
    "L2": ("features", "max_abs"),
    "L3": ("min_snr_db",),
    "L4": ("features", "kl", "max_abs", "shipped_features"),
    "L5": ("features", "kl", "max_abs", "near_tie", "top1"),
}
"""The gates of each level that a target may override, with a `why`."""


Check = Callable[[Any], str | None]
"""Says what is wrong with a value, or None."""


def folder() -> Path:
    """Where the targets are: inside the installed package, or beside it in the source tree."""
    package = Path(__file__).parent
    installed = package / "targets_data"
    return installed if installed.is_dir() else package.parent / "targets"


def names() -> list[str]:
    """The names of all targets: the stems of the files."""
    return sorted(path.stem for path in folder().glob("*.toml"))


def load(name: str) -> Target:
    """The target of this name, or of this path if it ends in .toml.

    Raises: UsageError with `unknown-target`, or with every `unknown-key` and `bad-target` of the file.
    """
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise errors.unknown_target(name, names())
    elif name in names():
        path = folder() / f"{name}.toml"
    else:
        raise errors.unknown_target(name, names())
    if path.stat().st_size > MAX_FILE_BYTES:
        raise errors.bad_target(str(path), f"it has {path.stat().st_size} bytes; {MAX_FILE_BYTES} are the most")
    try:
        source = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise errors.bad_target(str(path), str(error)) from error
    return parse(path.stem, source, str(path))


def parse(name: str, source: str, file: str) -> Target:
    """The target in this TOML text; `file` is where errors say it is.

    Raises: UsageError with every problem of the text.
    """
    if max(map(len, source.splitlines()), default=0) > UNTRUSTED.line:
        raise errors.bad_target(file, f"a line has more than {UNTRUSTED.line} characters")
    try:
        table = tomllib.loads(source)
    except (ValueError, RecursionError) as error:  # no TOML; a whole number of thousands of digits
        raise errors.bad_target(file, str(error)[:400]) from error
    reader = _Reader(file, source)
    text = reader.values(table, _TOP, required=_REQUIRED, sections=_SECTIONS)
    sections = {section: reader.section(table, section) for section in _SECTIONS}
    _check_sections(reader, sections)
    _check_options(reader, text.get("backend"), sections["options"])
    if reader.findings:
        raise UsageError(*reader.findings)
    values: dict[str, Any] = {**text, **sections, "requires": tuple(text.get("requires", ()))}
    return Target(name=name, source=source, **values)


# checks of single values


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) and value.strip() else "a text that is not empty is needed"


def _texts(value: Any) -> str | None:
    good = isinstance(value, list) and all(_text(item) is None for item in value)
    return None if good else "a list of texts is needed"


def _artifact(value: Any) -> str | None:
    good = isinstance(value, str) and re.fullmatch(r"\.[a-z]+", value)
    return None if good else 'a file ending such as ".onnx" is needed'


def _whole(low: int, high: int) -> Check:
    def check(value: Any) -> str | None:
        good = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return None if good else f"a whole number from {low} to {high} is needed"

    return check


def _number(low: float, high: float) -> Check:
    def check(value: Any) -> str | None:
        good = isinstance(value, int | float) and not isinstance(value, bool) and low < value <= high
        return None if good else f"a number above {low:g} and up to {high:g} is needed"

    return check


def _sizes(value: Any) -> str | None:
    """Pairs of height and width."""
    side = _whole(1, 1 << 16)
    good = (
        isinstance(value, list)
        and value
        and all(isinstance(pair, list) and len(pair) == 2 and not any(map(side, pair)) for pair in value)
    )
    return None if good else "a list of [height, width] pairs in pixels is needed"


def _one_of(known: Callable[[], Iterable[str]]) -> Check:
    def check(value: Any) -> str | None:
        choices = list(known())
        if not isinstance(value, str):
            return f"one of {', '.join(choices)} is needed"
        return None if value in choices else errors.suggest(value[:80], choices)

    return check


def _backends() -> Iterable[str]:
    from edgeexport import backends

    return backends.known()


def _schemes() -> Iterable[str]:
    from edgeexport.quant import OWN_SCHEMES, SCHEMES

    return [*SCHEMES, *OWN_SCHEMES]


_REQUIRED: Mapping[str, Check] = {
    "title": _text,
    "platform": _one_of(lambda: PLATFORMS),
    "backend": _one_of(_backends),
    "artifact": _artifact,
    "precision": _one_of(lambda: PRECISIONS),
    "quant": _one_of(_schemes),
    "context": _whole(1, 1 << 24),
}
_TOP: Mapping[str, Check] = {**_REQUIRED, "requires": _texts}
_SECTIONS = ("shapes", "limits", "parity", "options", "devices")
_VISION: Mapping[str, Check] = {"max_pixels": _whole(784, 1 << 26), "screens": _sizes}
_LIMITS: Mapping[str, Check] = {"max_file_bytes": _whole(1, 1 << 50)}
_DEVICE: Mapping[str, Check] = {
    "title": _text,
    "ram_gb": _number(0, 4096),
    "usable": _number(0, 1),
    "bandwidth_gbs": _number(0, 100_000),
    "source": _text,
}


class _Reader:
    """Collects the findings of one file."""

    def __init__(self, file: str, source: str) -> None:
        self.file = file
        self.findings: list[Finding] = []
        self._lines = _lines_of(source)

    def values(
        self,
        table: Mapping[str, Any],
        checks: Mapping[str, Check],
        *,
        at: str = "",
        required: Iterable[str] = (),
        sections: Iterable[str] = (),
    ) -> dict[str, Any]:
        """The values of one table that passed their checks. `at` is the table's own name."""
        unknown = [key for key in table if key not in checks and key not in sections]
        for key in unknown[: UNTRUSTED.listed]:
            self._add(errors.unknown_key(self.where(at, key), _dotted(at, key[:80]), [*checks, *sections]))
        if len(unknown) > UNTRUSTED.listed:
            self.bad(at, "", f"{len(unknown) - UNTRUSTED.listed} more keys are unknown")
        for key in required:
            if key not in table:
                self.bad(at, "", f"{_dotted(at, key)} is missing")
        good = {}
        for key, check in checks.items():
            if key not in table:
                continue
            problem = check(table[key])
            if problem is None:
                good[key] = table[key]
            else:
                self.bad(at, key, f"{_dotted(at, key)} is {errors.shown(table[key])}: {problem}")
        return good

    def section(self, table: Mapping[str, Any], name: str) -> dict[str, Any]:
        """A sub-table by name, empty where there is none."""
        value = table.get(name, {})
        if isinstance(value, dict):
            return value
        self.bad("", name, f"{name} is {errors.shown(value)}: a table is needed")
        return {}

    def bad(self, at: str, key: str, problem: str) -> None:
        self._add(errors.bad_target(self.where(at, key), problem))

    def where(self, at: str, key: str) -> str:
        """file:line of a key, or of the section `at` alone, as far as the text tells; the file alone if it does not."""
        line = self._lines.get((at, key)) or (self._lines.get((_dotted(at, key), "")) if key else None)
        return f"{self.file}:{line}" if line else self.file

    def _add(self, error: UsageError) -> None:
        if len(self.findings) < 5 * UNTRUSTED.listed:
            self.findings += error.findings


def _lines_of(source: str) -> dict[tuple[str, str], int]:
    """Where each (section, key) stands first, and each section by itself with no key."""
    found: dict[tuple[str, str], int] = {}
    section = ""
    for number, line in enumerate(source.splitlines(), start=1):
        if header := re.match(r"\s*\[([^\[\]]+)\]", line):
            section = header[1].strip()
            found.setdefault((section, ""), number)
        elif key := re.match(r"\s*[\"']?([\w-]+)[\"']?\s*[=.]", line):
            found.setdefault((section, key[1]), number)
    return found


def _check_sections(reader: _Reader, sections: Mapping[str, dict[str, Any]]) -> None:
    """Every section but [options], which belongs to the backend."""
    reader.values(sections["shapes"], {}, at="shapes", sections=["vision"])
    if "vision" in sections["shapes"]:
        vision = reader.section(sections["shapes"], "vision")
        reader.values(vision, _VISION, at="shapes.vision", required=_VISION)
    reader.values(sections["limits"], _LIMITS, at="limits")
    schemes = _schemes()
    reader.values(sections["parity"], {}, at="parity", sections=[*LEVELS, *schemes])
    _check_gates(reader, sections["parity"], "parity")
    for scheme in (scheme for scheme in schemes if scheme in sections["parity"]):
        own = reader.section(sections["parity"], scheme)
        reader.values(own, {}, at=f"parity.{scheme}", sections=LEVELS)
        _check_gates(reader, own, f"parity.{scheme}")
    for device in sections["devices"]:
        reader.values(reader.section(sections["devices"], device), _DEVICE, at=f"devices.{device}", required=_DEVICE)


def _check_gates(reader: _Reader, levels: Mapping[str, Any], at: str) -> None:
    """The gates of every level that is there, of all schemes or of one."""
    for level in (level for level in LEVELS if level in levels):
        gates = reader.section(levels, level)
        checks = dict.fromkeys(GATES[level], _number(0, 1e9))
        reader.values(gates, {**checks, "why": _text}, at=f"{at}.{level}", required=["why"])


def _check_options(reader: _Reader, backend: str | None, options: Mapping[str, Any]) -> None:
    """[options] against the fields of the backend's OPTIONS, which also judges their ranges."""
    if backend is None:  # already reported
        return
    from edgeexport import backends

    known = backends.load(backend).OPTIONS
    types = typing.get_type_hints(known)
    before = len(reader.findings)
    reader.values(
        options, {field.name: _of_type(types[field.name]) for field in dataclasses.fields(known)}, at="options"
    )
    if len(reader.findings) == before:
        try:
            known(**options)
        except ValueError as error:
            reader.bad("", "options", str(error))


def _of_type(expected: Any) -> Check:
    """Exactly the type: True is no whole number here. A `Literal` lists the values themselves."""

    def check(value: Any) -> str | None:
        choices = typing.get_args(expected) if typing.get_origin(expected) is typing.Literal else ()
        if choices:
            return None if value in choices and type(value) in map(type, choices) else f"one of {choices} is needed"
        return None if type(value) is expected else f"{expected.__name__} is needed"

    return check


def _dotted(at: str, key: str) -> str:
    return f"{at}.{key}" if at else key
