"""autoglm-phone-mini: a checkpoint put together from installed packages and the trained adaptor."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from edgeexport import errors
from edgeexport.checkpoint import open_checkpoint
from edgeexport.checkpoint.digest import file_sha256, header_digest
from edgeexport.checkpoint.models import find_installed
from edgeexport.checkpoint.safetensors import read_header
from edgeexport.checkpoint.weights import WeightReader
from edgeexport.core import Array, Checkpoint, TensorRef
from edgeexport.families.autoglm_phone.config import MODEL_TYPE, PRESETS, preset
from edgeexport.families.autoglm_phone.towers import AUDIO, VISION, read_audio, read_vision
from edgeexport.paths import cache_dir, write_whole

NAME: Final = "autoglm-phone-mini"
DECODER: Final = "smollm2-135m"
ADAPTOR: Final = Path(__file__).with_name("adaptor.safetensors")
TEMPLATE: Final = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's own without the system message that it puts in front of a conversation that has none: the adaptor was
trained on questions alone."""
LAYOUT: Final = "1"
"""Changes when what is written to the cache does."""


def open_model() -> Checkpoint:
    """The checkpoint of `autoglm-phone-mini`.

    Vision, audio, alignment and fusion lie in one file in the cache, written once; the decoder's tensors stay where
    they are, in the GGUF file of its package, and only get the prefix "decoder.".

    Raises: CheckpointError `model-not-installed`, `model-differs`, `bad-tower`.
    """
    config = dict(PRESETS["mini"])
    text = open_checkpoint(DECODER)
    weights = _cached_weights()
    tensors = {**read_header(weights), **_decoder_tensors(text)}
    files = (weights, *text.files)
    return Checkpoint(
        path=weights.parent,
        name=NAME,
        format="safetensors",
        model_type=MODEL_TYPE,
        config=config,
        generation=text.generation,
        tensors=tensors,
        files=files,
        processor={},
        read_tokenizer=partial(_tokenizer_files, text),
        header_digest=header_digest(config, text.generation, tensors, files),
    )


def _decoder_tensors(text: Checkpoint) -> dict[str, TensorRef]:
    return {f"decoder.{name}": dataclasses.replace(ref, name=f"decoder.{name}") for name, ref in text.tensors.items()}


def _tokenizer_files(text: Checkpoint) -> dict[str, bytes]:
    return {**text.read_tokenizer(), "chat_template.jinja": TEMPLATE.encode()}


def tokenizer_files() -> dict[str, bytes]:
    """mini's tokenizer and chat template."""
    return _tokenizer_files(open_checkpoint(DECODER))


def decoder_weights() -> dict[str, Array]:
    """The decoder's tensors as float32 by their own names, decoded out of the GGUF file."""
    with WeightReader() as reader:
        return {name: reader.read(ref) for name, ref in open_checkpoint(DECODER).tensors.items()}


def _cached_weights() -> Path:
    """The safetensors file of everything but the decoder. Its folder is named after what goes into it."""
    adaptor = file_sha256(ADAPTOR)
    key = hashlib.sha256("\n".join((LAYOUT, VISION.sha256, AUDIO.sha256, adaptor)).encode()).hexdigest()
    path = cache_dir() / "models" / f"{NAME}-{key[:16]}" / "model.safetensors"
    if not _intact(path):
        _write(path, tower_weights() | adaptor_weights())
    return path.resolve()


def _intact(path: Path) -> bool:
    """Whether the file is the one that was written: its digest lies beside it."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == _digest_of(path).read_text("ascii")
    except (OSError, UnicodeDecodeError):
        return False


def _digest_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def tower_weights() -> dict[str, Array]:
    """vision.* float32 and audio.* float16, as their packages have them. Needs torch.

    Raises: CheckpointError `model-not-installed`, `model-differs`, `bad-tower`.
    """
    vision = read_vision(find_installed(NAME, VISION))
    audio = read_audio(find_installed(NAME, AUDIO), preset("mini").audio_config)
    return {f"vision.{name}": value for name, value in vision.items()} | {
        f"audio.{name}": value for name, value in audio.items()
    }


def adaptor_weights() -> dict[str, Array]:
    """align.* and fusion.* float16, as they were trained."""
    with WeightReader() as reader:
        return {name: reader.raw(ref, 0, ref.shape[0]) for name, ref in read_header(ADAPTOR).items()}


def _write(path: Path, weights: Mapping[str, Array]) -> None:
    """Whole or not at all, the same bytes every time. Raises: ToolError `cache-not-writable`."""
    from safetensors.numpy import save

    data = save({name: np.ascontiguousarray(value) for name, value in weights.items()})
    try:
        write_whole(path, data)
        write_whole(_digest_of(path), hashlib.sha256(data).hexdigest().encode("ascii"))
    except OSError as problem:
        raise errors.cache_not_writable(path.parent, problem.strerror or str(problem)) from problem
