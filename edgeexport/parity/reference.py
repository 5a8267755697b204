"""The oracle: transformers' unmodified model, its weights coming and going one module at a time.

The model's own `forward` runs, on modules without storage; a hook fills a module just before it is called and
empties it just after. So the oracle of a model of any size needs the memory of its largest matrix, and of that only
a part: a Linear beyond `LARGE_BYTES` is multiplied in row chunks.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeexport.canonical.streaming import LARGE_BYTES, Rows
from edgeexport.core import Array, Example, OracleModel


@dataclass(frozen=True)
class Answer:
    """Logits float32 [positions, V] of one sequence from `first` on, row i being the logits after token first + i."""

    first: int
    logits: Array


class Reference:
    """A family's unmodified model over weights that `rows` gives by checkpoint name. float32, no cache."""

    def __init__(self, oracle: OracleModel, rows: Rows) -> None:
        self._oracle = oracle
        self._rows = rows
        self._hidden: dict[str, Array] = {}
        self._made: dict[str, list[Array]] = {component: [] for component in oracle.encoders}
        model = oracle.model
        known: dict[int, str] = {}  # a tied weight has one name: the first
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            known.setdefault(id(tensor), name)
        for module in model.modules():
            names = {key: known[id(p)] for key, p in module._parameters.items() if p is not None}
            # a buffer of the checkpoint (a norm's running mean) is a weight here; others were made with storage, or
            # count what only training counts
            meta = {key: b for key, b in module._buffers.items() if b is not None and b.is_meta}
            kept = {key: b for key, b in meta.items() if b.dtype.is_floating_point}
            names |= {key: known[id(b)] for key, b in kept.items()}
            if names:
                self._attach(module, names)
        for i, layer in enumerate(oracle.layers):
            layer.register_forward_hook(self._keep_hidden(f"layers.{i}"))
        for component, (module, read) in oracle.encoders.items():
            module.register_forward_hook(self._keep_made(component, read))

    def answers(self, examples: Sequence[Example], firsts: Sequence[int], threads: int = 0) -> list[Answer]:
        """Logits of every example's tokens (int64 [T]) after token `first` and each later one, in one pass where the
        model takes a batch.

        Sequences are padded at the end; a causal model's earlier positions cannot see that. `threads` that multiply; 0
        leaves it to torch: one for each core.
        """
        self._hidden.clear()
        for made in self._made.values():
            made.clear()
        with torch.no_grad(), _torch_threads(threads):
            logits = self._oracle.logits(examples, firsts)
        return [Answer(first, rows) for first, rows in zip(firsts, logits, strict=True)]

    def hidden(self, length: int) -> dict[str, Array]:
        """The last pass's hidden state of the first example after each layer: float32 [length, hidden], by stage
        name."""
        return {name: states[:length] for name, states in self._hidden.items()}

    def made(self, component: str) -> list[Array]:
        """What a component without state gave in the last pass, call by call: float32 [.., width] each."""
        return self._made[component]

    def _attach(self, module: nn.Module, names: Mapping[str, str]) -> None:
        """Let `module` find its weights when it is called, and none at other times."""
        if type(module) is nn.Embedding and module.weight.shape[0] > 4096:
            module.forward = types.MethodType(_embed(names["weight"], self._rows), module)
        elif isinstance(module, nn.Linear) and 4 * module.weight.numel() > LARGE_BYTES:
            module.forward = types.MethodType(_chunked_linear(names, self._rows), module)
        else:
            empty = {key: tensor for key, tensor in module._parameters.items() if tensor is not None}
            buffers = {key: tensor for key, tensor in module._buffers.items() if tensor is not None}

            def fill(module: nn.Module, _: Any) -> None:
                for key, name in names.items():
                    shape = (empty if key in empty else buffers)[key].shape
                    held = torch.from_numpy(self._rows(name, 0, shape[0] if shape else 1)).reshape(shape)
                    if key in empty:
                        module._parameters[key] = nn.Parameter(held, requires_grad=False)
                    else:
                        module._buffers[key] = held

            def drain(module: nn.Module, _: Any, __: Any) -> None:
                module._parameters.update(empty)
                module._buffers.update(buffers)

            caller = self._oracle.read_by.get(module, module)
            caller.register_forward_pre_hook(lambda _, args: fill(module, args))
            caller.register_forward_hook(lambda _, args, output: drain(module, args, output))

    def _keep_hidden(self, name: str) -> Any:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            self._hidden[name] = states[0].numpy().copy()  # a view would keep the whole batch

        return keep

    def _keep_made(self, component: str, read: Any) -> Any:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            self._made[component] += [np.asarray(each) for each in read(output)]

        return keep


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """torch multiplies with so many threads; 0 changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
