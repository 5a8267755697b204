"""A folder, a GGUF file or a known name becomes a `Checkpoint`: configuration and tensor index, no weight read."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from edgeexport import errors
from edgeexport.checkpoint.digest import content_digest, header_digest
from edgeexport.checkpoint.weights import WeightReader
from edgeexport.core import Checkpoint

__all__ = ["WeightReader", "content_digest", "open_checkpoint"]

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})


def open_checkpoint(model: str | Path) -> Checkpoint:
    """The checkpoint that `model` names: a folder as transformers writes it, a .gguf file, or a name of `MODELS`.

    What exists as a path is a path. Raises a CheckpointError for anything that is missing, damaged, dangerous or not
    supported, and a ToolError when a package that is needed to read it is not installed.
    """
    path = Path(model)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as problem:  # no permission, a name that is too long, or a null character in it
        raise errors.not_a_checkpoint(path, str(problem)) from problem
    if is_folder:
        from edgeexport.checkpoint.folder import open_folder

        return open_folder(path, _clean_name(path.resolve().name))
    if exists and path.suffix.lower() == ".gguf":
        return _open_gguf(path, _clean_name(path.stem))
    if exists:
        raise _wrong_file(path)
    from edgeexport.checkpoint.models import find_model

    found = find_model(str(model))
    return _open_gguf(found, str(model)) if isinstance(found, Path) else found.open()


def _wrong_file(path: Path) -> errors.CheckpointError:
    if path.suffix == ".safetensors":
        return errors.not_a_checkpoint(
            path, "weights alone are not enough: give the folder that has config.json as well"
        )
    if path.suffix in PICKLE_SUFFIXES:
        return errors.pickled_weights(path.parent, [path.name])
    return errors.not_a_checkpoint(path, "it is a file, but not a .gguf file")


def _open_gguf(path: Path, name: str) -> Checkpoint:
    from edgeexport.checkpoint.gguf import read_header
    from edgeexport.checkpoint.gguf_architectures import read_model
    from edgeexport.checkpoint.gguf_tokenizer import read_tokenizer

    file = path.resolve()
    config, generation, tensors = read_model(read_header(file))
    return Checkpoint(
        path=path,
        name=name,
        format="gguf",
        model_type=config["model_type"],
        config=config,
        generation=generation,
        tensors=tensors,
        files=(file,),
        processor={},
        read_tokenizer=partial(read_tokenizer, file),
        header_digest=header_digest(config, generation, tensors, (file,)),
    )


def _clean_name(name: str) -> str:
    """The name in lower case, with - for every character that could trouble a shell, a URL or a file system."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.") or "model"
