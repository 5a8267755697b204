"""The oracle: transformers' unmodified model, its weights coming and going one module at a time.

The model's own `forward` runs, on modules without storage; a hook fills a module just before it is called and
empties it just after. So the oracle of a model of any size needs the memory of its largest matrix, and of that only
a part: a Linear beyond `LARGE_BYTES` is multiplied in row chunks.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from edgeexport.core import Array
from edgeexport.families.stages import transformers_config
from edgeexport.parity.streaming import LARGE_BYTES, Rows


@dataclass(frozen=True)
class Answer:
    """Logits float32 [positions, V] of one sequence from `first` on, row i being the logits after token first + i."""

    first: int
    logits: Array


class Reference:
    """transformers' model over weights that `rows` gives by checkpoint name. float32, no cache, no sampling."""

    def __init__(self, config: Mapping[str, Any], rows: Rows) -> None:
        settings = transformers_config(config)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
        # Buffers are not weights; they are made anew with storage.
        self._model.model.rotary_emb = type(self._model.model.rotary_emb)(settings)
        self._rows = rows
        self._hidden: dict[str, Array] = {}
        self._model.tie_weights()
        known = {id(p): name for name, p in self._model.named_parameters()}  # a tied weight has one name: the first
        for module in self._model.modules():
            names = {key: known[id(p)] for key, p in module._parameters.items() if p is not None}
            if names:
                self._attach(module, names)
        for i, layer in enumerate(self._model.model.layers):
            layer.register_forward_hook(self._keep_hidden(f"layers.{i}"))

    def answers(self, sequences: Sequence[Array], firsts: Sequence[int]) -> list[Answer]:
        """Logits of every sequence (int64 [T]) after token `first` and each later one, in one pass.

        Sequences are padded at the end; a causal model's earlier positions cannot see that.
        """
        length = max(len(sequence) for sequence in sequences)
        batch = np.zeros((len(sequences), length), np.int64)
        for row, sequence in zip(batch, sequences, strict=True):
            row[: len(sequence)] = sequence
        start = min(firsts)
        self._hidden.clear()
        with torch.no_grad():
            out = self._model(
                input_ids=torch.from_numpy(batch), use_cache=False, logits_to_keep=torch.arange(start, length)
            )
        logits = out.logits.numpy()
        return [
            Answer(first, logits[i, first - start : len(sequence) - start])
            for i, (sequence, first) in enumerate(zip(sequences, firsts, strict=True))
        ]

    def hidden(self, sequence: int, length: int) -> dict[str, Array]:
        """The last pass's hidden state after each layer: float32 [length, hidden], by stage name."""
        return {name: states[sequence, :length] for name, states in self._hidden.items()}

    def _attach(self, module: nn.Module, names: Mapping[str, str]) -> None:
        """Let `module` find its weights when it is called, and none at other times."""
        if isinstance(module, nn.Embedding):
            module.forward = types.MethodType(_embed(names["weight"], self._rows), module)
        elif isinstance(module, nn.Linear) and 4 * module.weight.numel() > LARGE_BYTES:
            module.forward = types.MethodType(_chunked_linear(names, self._rows), module)
        else:
            empty = dict(module._parameters)

            def fill(module: nn.Module, _: Any) -> None:
                for key, name in names.items():
                    shape = empty[key].shape
                    held = torch.from_numpy(self._rows(name, 0, shape[0])).reshape(shape)
                    module._parameters[key] = nn.Parameter(held, requires_grad=False)

            def drain(module: nn.Module, _: Any, __: Any) -> None:
                module._parameters.update(empty)

            module.register_forward_pre_hook(fill)
            module.register_forward_hook(drain)

    def _keep_hidden(self, name: str) -> Any:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            self._hidden[name] = (output[0] if isinstance(output, tuple) else output).numpy()

        return keep


def _embed(name: str, rows: Rows) -> Any:
    def forward(module: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        unique, where = torch.unique(ids, return_inverse=True)
        table = np.concatenate([rows(name, int(i), int(i) + 1) for i in unique])
        return torch.from_numpy(table)[where]

    return forward


def _chunked_linear(names: Mapping[str, str], rows: Rows) -> Any:
    def forward(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        count, width = module.weight.shape
        step = max(1, LARGE_BYTES // (4 * width))
        out = torch.empty(*x.shape[:-1], count)
        for start in range(0, count, step):
            chunk = torch.from_numpy(rows(names["weight"], start, min(count, start + step)))
            out[..., start : start + len(chunk)] = nn.functional.linear(x, chunk)
        if "bias" in names:
            out += torch.from_numpy(rows(names["bias"], 0, count))
        return out

    return forward
