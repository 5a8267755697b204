"""MNN-LLM's engine on this computer, opened over a bundle's files and told nothing but what they say of the model."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeexport import errors
from edgeexport.backends.mnn_llm import WEIGHT_BYTES
from edgeexport.backends.mnn_names import CONFIG, LLM_CONFIG, TOKENIZER
from edgeexport.core import Array
from edgeexport.plainfile import read_plain

ENGINE = "MNN"
LARGEST_CONFIG = 16 << 20
EXACT = {"precision": "high", "memory": "high"}
"""float32 throughout: weights are widened when they are loaded, and activations are not rounded to int8."""
FACTS = (
    "hidden_size",
    "layer_nums",
    "attention_mask",
    "attention_type",
    "key_value_shape",
    "tie_embeddings",
    "is_mrope",
)
SETTINGS = ("backend_type", "precision", "memory", "dynamic_option", "sampler_type", "max_all_tokens", "reuse_kv")
"""What the engine is told of a bundle's two files; no path among them."""
NO_TOKENIZER = "430 1\n0 1 0\n0\n1\nYQ==\n"
"""The engine does not load without one. This one knows a single token, and is never asked: the runner feeds ids."""
NO_TABLE = {"weight_offset": 1, "alpha_offset": 1, "alpha_size": 0, "quant_bit": 16, "quant_block": 0}
"""Nor without a table. This one is never asked: the runner feeds embeddings."""


@dataclass(frozen=True)
class Described:
    """What a bundle's configurations say: the files by MNN's names for them, how to run them, the model's facts."""

    files: Mapping[str, str]
    settings: Mapping[str, Any]
    facts: Mapping[str, Any]


def described(folder: Path, names: tuple[str, str]) -> Described:
    """The configurations `names` in `folder`, whose files are there and whole.

    Raises: BundleError `artifact-does-not-open`.
    """
    given, facts = (_read(folder, name) for name in names)
    files = {key: str(given.get(key, "")) for key in ("llm_model", "llm_weight")}
    for name in files.values():
        if Path(name).name != name or not (folder / name).is_file():
            raise errors.artifact_does_not_open(str(folder / names[0]), ENGINE, f"there is no file {name!r} beside it")
    weights = folder / files["llm_weight"]
    if weights.stat().st_size != facts.get(WEIGHT_BYTES):
        raise errors.artifact_does_not_open(
            str(weights), ENGINE, "the weight file has not the size it was written with"
        )
    settings = {key: given[key] for key in SETTINGS if key in given}
    return Described(files, settings, {key: facts[key] for key in FACTS if key in facts})


def load(folder: Path, here: Path, threads: int | None, names: tuple[str, str], *, exact: bool, looks_up: bool) -> Any:
    """The engine over the files in `folder` that the configurations `names` tell of. They are linked into the empty
    folder `here`, beside a configuration of this module's.

    Raises: BundleError `artifact-does-not-open`; ToolError `missing-package`.
    """
    found = described(folder, names)
    config = {**found.settings, **(EXACT if exact else {}), "thread_num": threads or os.cpu_count() or 1}
    told = {**found.facts, **({} if looks_up else {"tie_embeddings": NO_TABLE})}
    with hushed() as said:
        try:
            import _mnncengine.llm as engine
        except ImportError as problem:
            raise errors.missing_package("MNN", "mnn") from problem
        for key, name in found.files.items():
            (here / key).symlink_to((folder / name).resolve())
            config[key] = key
        config |= {"tokenizer_file": TOKENIZER, "embedding_file": "llm_weight"}
        (here / TOKENIZER).write_text(NO_TOKENIZER)
        (here / LLM_CONFIG).write_text(json.dumps(told))
        (here / CONFIG).write_text(json.dumps(config))
        llm = engine.create(str(here / CONFIG), False)
        if not llm.load():
            raise errors.artifact_does_not_open(str(folder), ENGINE, said() or "it gave no reason")
        llm.generate_init(None, None)
    return llm


def value_of(array: Array) -> Any:
    """An array as MNN takes it: float32, or int32."""
    from MNN import expr

    whole = array.dtype.kind == "i"
    plain = np.asarray(array, np.int32 if whole else np.float32, order="C")
    return expr.const(plain, list(plain.shape), expr.NCHW, expr.int if whole else expr.float)


def open_module(
    graph: Path, weights: Path, here: Path, inputs: Sequence[str], outputs: Sequence[str], threads: int
) -> Any:
    """A graph by itself in MNN's runtime. The file is linked into the empty folder `here` beside its weights, which are
    read when they are first used.

    Raises: BundleError `artifact-does-not-open`; ToolError `missing-package`.
    """
    with hushed() as said:
        try:
            import _mnncengine._nn as native
            from MNN import expr
        except ImportError as problem:
            raise errors.missing_package("MNN", "mnn") from problem
        manager = native.create_runtime_manager(({"backend": "CPU", "numThread": threads},))
        (here / "graph").symlink_to(graph.resolve())
        (here / "graph.weight").symlink_to(weights.resolve())
        modes = (expr.Backend.CPU, expr.MemoryMode.Normal, expr.PowerMode.Normal, expr.PrecisionMode.Normal, 1)
        try:
            return native.load_module_from_file(
                manager, list(inputs), list(outputs), str(here / "graph"), False, True, False, *modes
            )
        except (SystemError, RuntimeError) as problem:
            raise errors.artifact_does_not_open(str(graph), ENGINE, said() or str(problem)) from problem


def _read(folder: Path, name: str) -> dict[str, Any]:
    """A configuration file. Raises: BundleError `artifact-does-not-open`."""
    try:
        found = json.loads(read_plain(folder / name, LARGEST_CONFIG, follow=True))
    except (OSError, ValueError, RecursionError) as problem:
        raise errors.artifact_does_not_open(str(folder / name), ENGINE, str(problem)) from problem
    if not isinstance(found, dict):
        raise errors.artifact_does_not_open(str(folder / name), ENGINE, "it is not a table of settings")
    return found


@contextmanager
def hushed() -> Iterator[Any]:
    """What MNN prints goes to a file instead of the process' standard output; gives a function that reads its last
    lines."""
    sys.stdout.flush()
    native = ctypes.CDLL(None)
    native.fflush(None)
    kept = os.dup(1)
    with tempfile.TemporaryFile() as file:

        def said() -> str:
            native.fflush(None)
            file.seek(0)
            lines = file.read().decode("utf-8", "replace").splitlines()
            return " | ".join(line for line in lines if not line.startswith("The device supports"))

        os.dup2(file.fileno(), 1)
        try:
            yield said
        finally:
            native.fflush(None)
            os.dup2(kept, 1)
            os.close(kept)
