"""The door by which a checkpoint's configuration enters transformers: what it makes torch or transformers raise is said
of the configuration, and how much it may ask for is bounded."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig

from edgeexport import errors
from edgeexport.limits import UNTRUSTED

NEUTRAL = frozenset(
    {
        "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "_commit_hash",
        "_experts_implementation", "_experts_implementation_internal", "_name_or_path", "architectures",
        "attn_implementation", "chunk_size_feed_forward", "dtype", "experts_implementation", "finetuning_task",
        "gradient_checkpointing", "id2label", "initializer_range", "is_decoder", "label2id", "name_or_path",
        "num_labels", "output_attentions", "output_hidden_states", "problem_type", "return_dict",
        "task_specific_params", "tokenizer_class", "torch_dtype", "torchscript", "transformers_version", "use_bfloat16",
        "use_cache", "use_return_dict",
    }
)  # fmt: skip
"""Keys of a config.json, and of its sections, that say how someone trained, loaded or called the model, and nothing
about its arithmetic in float32: transformers never sees them."""

_DEPTH = re.compile(r"(.*\.)?(depth|(num_|n_)?(\w+_)?layers?)")
_TORCHS_WORDS = {"padding_idx": "pad_token_id"}


def transformers_config(config: Mapping[str, Any]) -> Any:
    """transformers' configuration object from config.json's values; no remote code, no class guessed.

    Raises: CheckpointError `bad-config` where the class refuses them.
    """
    values = {key: value for key, value in _arithmetic(config).items() if key != "model_type"}
    for place, value in _places(config, ""):
        if _DEPTH.fullmatch(place) and isinstance(value, int) and value > UNTRUSTED.layers:
            raise errors.bad_config(place, value, f"no model has more than {UNTRUSTED.layers} layers")
    with blamed(config):
        return AutoConfig.for_model(config["model_type"], **values)


def _arithmetic(values: Any) -> Any:
    """A deep copy without `NEUTRAL` keys, its sections' too."""
    if isinstance(values, Mapping):
        return {key: _arithmetic(item) for key, item in values.items() if key not in NEUTRAL}
    return copy.deepcopy(values)


@contextmanager
def blamed(config: Mapping[str, Any]) -> Iterator[None]:
    """Within, transformers makes something of `config` and of nothing else: any exception is said of the key that it
    names or holds. Nothing of ours but constructors belongs in it, for a fault of ours would be said of the user.

    Raises: CheckpointError `bad-config`.
    """
    count = 0

    def bounded(module: nn.Module, name: str, _: nn.Parameter) -> None:
        nonlocal count
        count += 1
        if count > UNTRUSTED.parameters:
            raise ValueError(f"the model would have more than {UNTRUSTED.parameters} tensors")

    hook = register_module_parameter_registration_hook(bounded)
    try:
        yield
    except (errors.EdgeExportError, MemoryError, ImportError):
        raise
    except Exception as problem:
        key, value = _culprit(config, problem)
        raise errors.bad_config(key, value, _said(problem)) from problem
    finally:
        hook.remove()


def _said(problem: Exception) -> str:
    """The last sentence of an exception's text: transformers wraps the reason in where it was found."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return f"{type(problem).__name__}: {lines[-1] if lines else 'no message'}"[:400]


def _culprit(config: Mapping[str, Any], problem: Exception) -> tuple[str, Any]:
    """The key that an exception is about, dotted, and its value: one that its text names, in words or as it is
    written, else one whose value it quotes; `values` where it tells neither."""
    places = dict(_places(config, ""))
    text = str(problem)
    words = set(re.findall(r"\w+", text))
    words |= {key for word, key in _TORCHS_WORDS.items() if word in text.lower()}
    plain = text.lower()

    def name(place: str) -> str:
        return place.rpartition(".")[2]

    named = [place for place in places if name(place) in words and name(place) not in ("type", "model_type")]
    spoken = [p for p in places if "_" in name(p) and name(p).removeprefix("num_").replace("_", " ") in plain]
    quoted = [p for p, value in places.items() if isinstance(value, str) and len(value) > 2 and value in text]
    for found in (named, quoted, spoken):
        if found:
            place = max(found, key=lambda each: len(name(each)))
            return place, places[place]
    return "values", "..."


def _places(config: Mapping[str, Any], at: str) -> Iterator[tuple[str, Any]]:
    """Every key of the configuration and of its sections, dotted, with its value."""
    for key, value in config.items():
        yield f"{at}{key}", value
        if isinstance(value, Mapping):
            yield from _places(value, f"{at}{key}.")
