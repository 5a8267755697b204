"""Index checkpoints that come quantised: their parts become logical matrices, `<module>.weight` of shape [N, K].

`quantization_config` in config.json names the method; which modules are quantised, and how, is what their tensors say:
a module that has a plain `weight` is plain, whatever a list of exceptions (`modules_to_not_convert`, `ignore`) says.
Dtype and shape of every part are compared with the others', and group numbers are read and checked, before anything
else relies on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeexport import errors
from edgeexport.checkpoint.packed import FLOATS, encoding_of
from edgeexport.checkpoint.weights import WeightReader
from edgeexport.core import Packing, TensorRef

KEYS = ("quantization_config", "compression_config")
"""Where config.json has it; the second is an old name of compressed-tensors."""

PACKED_SUFFIXES = (".qweight", ".weight_packed")
"""What only checkpoints that come quantised have."""

OF_ACTIVATIONS = (
    ".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point", ".activation_scale",
    ".q_scale", ".k_scale", ".v_scale",
)  # fmt: skip
"""Tensors that say how activations or the cache were to be rounded, which is another runtime's affair: no weight
depends on them."""

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense", "mixed-precision")
"""Those of compressed-tensors that can be read; of the last, each group names its own."""


def settings_of(config: Mapping[str, Any]) -> Any:
    """What config.json says of the quantisation; None where it says nothing."""
    inner = config.get("text_config")
    for place in (config, inner if isinstance(inner, dict) else {}):
        for key in KEYS:
            if place.get(key):
                return place[key]
    return None


def without_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the logical model: nothing downstream is to prepare another runtime's layers."""
    kept = {key: value for key, value in config.items() if key not in KEYS}
    inner = config.get("text_config")
    if isinstance(inner, dict):
        kept["text_config"] = {key: value for key, value in inner.items() if key not in KEYS}
    return kept


def logical(tensors: Mapping[str, TensorRef], settings: Any, config_path: Path) -> dict[str, TensorRef]:
    """The index with one tensor for each matrix, whatever its parts; what is plain stays as it is.

    Raises: CheckpointError `unknown-quantisation`, `quantisation-option`, `bad-quantised-weight`.
    """
    if settings is None:
        if any(name.endswith(PACKED_SUFFIXES) for name in tensors):
            raise errors.unknown_quantisation(config_path, "a method that config.json does not name", sorted(METHODS))
        return dict(tensors)
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if method == "compressed_tensors":
        method = "compressed-tensors"
    if not isinstance(settings, dict) or not isinstance(method, str) or method not in METHODS:
        named = method if isinstance(method, str) and method else "a method that config.json does not name"
        raise errors.unknown_quantisation(config_path, f"{named:.80}", sorted(METHODS))
    with WeightReader() as reader:
        found = METHODS[method](_Index(tensors, config_path, method, settings, reader))
    return {name: ref for name, ref in found.items() if not name.endswith(OF_ACTIVATIONS)}


class _Index:
    """The tensors of a checkpoint on their way to logical ones, and the settings that they come with."""

    def __init__(
        self, tensors: Mapping[str, TensorRef], path: Path, method: str, settings: Mapping[str, Any],
        reader: WeightReader,
    ) -> None:  # fmt: skip
        self.tensors = dict(tensors)
        self.path = path
        self.method = method
        self.settings = settings
        self.reader = reader

    def refuse(self, option: str, why: str) -> errors.CheckpointError:
        """An error that names an option."""
        return errors.quantisation_option(self.path, self.method, f"{option:.120}", why)

    def modules(self, suffix: str) -> list[str]:
        """Modules that have a tensor of this suffix."""
        return [name.removesuffix(suffix) for name in list(self.tensors) if name.endswith(suffix)]

    def take(self, name: str) -> TensorRef | None:
        """A tensor that will not stand for itself any more."""
        return self.tensors.pop(name, None)

    def need(self, module: str, part: str) -> TensorRef:
        """As `take`, of a part that must be there."""
        found = self.take(f"{module}.{part}")
        if found is None:
            raise errors.bad_quantised_weight(self.path, f"{module}.weight", f"there is no {module}.{part}")
        return found

    def put(self, module: str, codes: TensorRef, shape: tuple[int, int], how: Packing) -> None:
        """A matrix whose parts have been taken."""
        name = f"{module}.weight"
        if name in self.tensors:
            raise errors.bad_quantised_weight(codes.file, name, f"it is there twice: plain, and as {codes.name}")
        self.tensors[name] = replace(codes, name=name, encoding=encoding_of(how, shape[1]), shape=shape, packing=how)

    def number(self, key: str, default: int | None = None) -> int:
        """A whole number of the settings."""
        value = self.settings.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.refuse(f"{key} {value!a:.40}", "a whole number is needed")
        return value

    def groups(self, module: str, part: str, width: int, group: int, count: int) -> TensorRef | None:
        """The group numbers of a matrix, None where there are none or where they are runs of `group` elements."""
        ref = self.take(f"{module}.{part}")
        if ref is None:
            return None
        name = f"{module}.weight"
        check(name, ref, ("I32", "I64"), [(width,)])
        found = self.reader.groups(ref, count, name)
        return None if np.array_equal(found, np.arange(width) // group) else ref


def check(name: str, ref: TensorRef, encodings: Iterable[str], shapes: Iterable[tuple[int, ...]]) -> None:
    """Raises: CheckpointError `bad-quantised-weight` for a part of another dtype or shape."""
    encodings, shapes = tuple(encodings), tuple(shapes)
    if ref.encoding not in encodings or ref.shape not in shapes or not all(ref.shape):
        wanted = f"{' or '.join(encodings)} {' or '.join(str(list(shape)) for shape in shapes)}"
        raise errors.bad_quantised_weight(
            ref.file, name, f"{ref.name} is {ref.encoding} {list(ref.shape)}; {wanted} is needed"
        )


def _matrix(name: str, ref: TensorRef, encodings: Iterable[str]) -> tuple[int, int]:
    """The two sizes of a part, both above zero. Raises as `check`."""
    if len(ref.shape) != 2 or not all(ref.shape) or ref.encoding not in tuple(encodings):
        raise errors.bad_quantised_weight(
            ref.file, name,
            f"{ref.name} is {ref.encoding} {list(ref.shape)}; {' or '.join(encodings)} of two sizes is needed",
        )  # fmt: skip
    return ref.shape[0], ref.shape[1]


def _gptq(index: _Index) -> dict[str, TensorRef]:
    """AutoGPTQ's and GPTQModel's: qweight, qzeros, scales, g_idx."""
    bits, group_size = index.number("bits"), index.number("group_size", -1)
    form = index.settings.get("checkpoint_format") or index.settings.get("format") or "gptq"
    if bits not in (4, 8):
        raise index.refuse(f"bits {bits}", "4 and 8 bits can be")
    if form not in ("gptq", "gptq_v2"):
        raise index.refuse(f"checkpoint_format {form!a:.40}", "gptq and gptq_v2 can be")
    if group_size != -1 and group_size < 1:
        raise index.refuse(f"group_size {group_size}", "-1 and numbers above 0 can be")
    rules = index.settings.get("dynamic") or {}
    if not isinstance(rules, dict) or any(not str(rule).startswith("-") for rule in rules):
        raise index.refuse("rules for single modules (dynamic)", "one number of bits for all modules can be")
    for module in index.modules(".qweight"):
        name, codes = f"{module}.weight", index.need(module, "qweight")
        words, rows = _matrix(name, codes, ["I32"])
        width = words * 32 // bits
        group = width if group_size == -1 else min(group_size, width)
        count = -(-width // group)
        if rows * bits % 32:
            raise errors.bad_quantised_weight(codes.file, name, f"{rows} rows of {bits} bits do not fill words")
        zeros, scales = index.need(module, "qzeros"), index.need(module, "scales")
        check(name, zeros, ["I32"], [(count, rows * bits // 32)])
        check(name, scales, FLOATS, [(count, rows)])
        groups = index.groups(module, "g_idx", width, group, count)
        how = Packing(
            "gptq", bits, group, scales, zeros, groups,
            one_less=form == "gptq", centred=index.settings.get("sym") is True,
        )  # fmt: skip
        index.put(module, codes, (rows, width), how)
    return index.tensors


def _awq(index: _Index) -> dict[str, TensorRef]:
    """AutoAWQ's: qweight, qzeros, scales."""
    bits, group_size = index.number("bits", 4), index.number("group_size", 128)
    version = index.settings.get("version") or index.settings.get("format") or "gemm"
    if bits != 4:
        raise index.refuse(f"bits {bits}", "4 bits can be")
    if str(version).lower() != "gemm":
        raise index.refuse(f"version {version!a:.40}", "gemm can be")
    if index.settings.get("zero_point", True) is not True:
        raise index.refuse("zero_point false", "codes with zero points can be")
    if group_size != -1 and group_size < 1:
        raise index.refuse(f"group_size {group_size}", "-1 and numbers above 0 can be")
    for module in index.modules(".qweight"):
        name, codes = f"{module}.weight", index.need(module, "qweight")
        width, words = _matrix(name, codes, ["I32"])
        rows, group = words * 8, width if group_size == -1 else group_size
        if width % group:
            raise errors.bad_quantised_weight(codes.file, name, f"rows of {width} are not groups of {group}")
        zeros, scales = index.need(module, "qzeros"), index.need(module, "scales")
        check(name, zeros, ["I32"], [(width // group, words)])
        check(name, scales, FLOATS, [(width // group, rows)])
        index.put(module, codes, (rows, width), Packing("awq", bits, group, scales, zeros))
    return index.tensors


def _compressed(index: _Index) -> dict[str, TensorRef]:
    """compressed-tensors': weight_packed and weight_shape, or weight; weight_scale; weight_zero_point, weight_g_idx."""
    schemes = _compressed_schemes(index)
    if not schemes and index.modules(".weight_packed"):
        raise index.refuse("no config_groups", "they say how many bits a word's integers have")
    for module in index.modules(".weight_packed"):
        name, codes = f"{module}.weight", index.need(module, "weight_packed")
        rows, words = _matrix(name, codes, ["I32"])
        shape = index.need(module, "weight_shape")
        check(name, shape, ["I32", "I64"], [(2,)])
        stated, width = (int(size) for size in index.reader.sizes(shape))
        bits = {int(scheme["num_bits"]) for scheme in schemes if -(-width * int(scheme["num_bits"]) // 32) == words}
        if stated != rows or width < 1 or len(bits) != 1:
            raise errors.bad_quantised_weight(
                codes.file,
                name,
                f"{shape.name} says [{stated}, {width}], which {codes.name} {list(codes.shape)} is not",
            )
        scales = index.need(module, "weight_scale")
        group = _group_of(name, scales, rows, width, schemes)
        count = -(-width // group)
        zeros = index.take(f"{module}.weight_zero_point")
        each = bits.pop()
        if zeros is not None:
            wanted = [(-(-rows * each // 32), count)] if zeros.encoding == "I32" else [(rows, count)]
            check(name, zeros, ["I32", "I8"], wanted)
        groups = index.groups(module, "weight_g_idx", width, group, count)
        index.put(module, codes, (rows, width), Packing("words", each, group, scales, zeros, groups))
    _bytes(index, ("weight_scale",), _blocks(index, schemes), schemes)
    return index.tensors


def _fp8(index: _Index) -> dict[str, TensorRef]:
    """DeepSeek's and transformers' float8: weight and weight_scale_inv, by which it is multiplied all the same."""
    blocks = index.settings.get("weight_block_size")
    if blocks is not None and not _is_block(blocks):
        raise index.refuse(f"weight_block_size {blocks!a:.40}", "two numbers above 0 can be")
    _bytes(index, ("weight_scale_inv", "weight_scale"), [(blocks[0], blocks[1])] if blocks else [], [])
    return index.tensors


def _bytes(
    index: _Index, scale_names: Iterable[str], blocks: list[tuple[int, int]], schemes: list[Mapping[str, Any]]
) -> None:
    """Matrices whose codes are a byte each, int8 or float8."""
    for module in index.modules(".weight"):
        name = f"{module}.weight"
        codes = index.tensors[name]
        if codes.encoding == "F8_E5M2":
            raise index.refuse("float8 of 5 exponent bits (e5m2)", "e4m3 can be")
        if codes.encoding not in ("I8", "F8_E4M3") or codes.packing is not None:
            continue
        rows, width = _matrix(name, codes, ["I8", "F8_E4M3"])
        del index.tensors[name]
        float8 = codes.encoding == "F8_E4M3"
        held = [part for part in scale_names if f"{module}.{part}" in index.tensors]
        scales = index.need(module, held[0] if held else next(iter(scale_names)))
        zeros = index.take(f"{module}.weight_zero_point")
        groups = None
        tall, group = next(
            (each for each in blocks if float8 and scales.shape == (-(-rows // each[0]), -(-width // each[1]))), (1, 0)
        )
        if group:
            check(name, scales, FLOATS, [scales.shape])
            tall, group = min(tall, rows), min(group, width)
        else:
            group = _group_of(name, scales, rows, width, schemes)
            groups = index.groups(module, "weight_g_idx", width, group, -(-width // group))
        if zeros is not None and float8:
            zeros = None  # a float has none; what was written is zero
        if zeros is not None:
            count = -(-width // group)
            check(name, zeros, ["I8"], [(rows, count), (rows,)] if count == 1 else [(rows, count)])
        how = Packing("bytes", 8, group, scales, zeros, groups, tall, float8)
        index.put(module, codes, (rows, width), how)


def _group_of(name: str, scales: TensorRef, rows: int, width: int, schemes: list[Mapping[str, Any]]) -> int:
    """How many elements of a row share one of these scales: all, where there is one for each row or for all."""
    if scales.shape in ((), (1,), (1, 1), (rows,), (rows, 1)):
        check(name, scales, FLOATS, [scales.shape])
        return width
    sizes = {int(scheme["group_size"]) for scheme in schemes if _is_size(scheme.get("group_size"))}
    fitting = [size for size in sorted(sizes) if -(-width // size) > 1]
    check(name, scales, FLOATS, [(rows, 1), *((rows, -(-width // size)) for size in fitting)])
    return next(size for size in fitting if -(-width // size) == scales.shape[1])


def _compressed_schemes(index: _Index) -> list[Mapping[str, Any]]:
    """How the groups of modules in `config_groups` store weights. Raises `quantisation-option`."""
    listed = index.settings.get("config_groups")
    groups = list(listed.values()) if isinstance(listed, dict) else []
    forms = [index.settings.get("format"), *(each.get("format") for each in groups if isinstance(each, dict))]
    for form in forms:
        if form is not None and form not in FORMATS:
            raise index.refuse(f"format {form!a:.40}", f"{', '.join(FORMATS)} can be")
    sparsity = index.settings.get("sparsity_config")
    sparse = sparsity.get("format", "dense") if isinstance(sparsity, dict) else "dense"
    if sparse != "dense":
        raise index.refuse(f"sparsity {sparse!a:.40}", "weights that are all there can be")
    schemes = []
    for each in groups:
        weights = each.get("weights") if isinstance(each, dict) else None
        if weights is None:
            continue
        bits, kind = (weights.get("num_bits"), weights.get("type", "int")) if isinstance(weights, dict) else (None, "")
        if (kind, bits) not in (("int", 4), ("int", 8), ("float", 8)):
            raise index.refuse(
                f"weights of {bits!a:.20} bits of the type {kind!a:.20}", "int 4, int 8 and float 8 can be"
            )
        if weights.get("strategy") not in (None, "tensor", "channel", "group", "block"):
            raise index.refuse(
                f"the strategy {weights['strategy']!a:.40}", "scales of tensors, channels, groups and blocks can be"
            )
        schemes.append(weights)
    return schemes


def _blocks(index: _Index, schemes: list[Mapping[str, Any]]) -> list[tuple[int, int]]:
    found = [scheme["block_structure"] for scheme in schemes if scheme.get("block_structure") is not None]
    for each in found:
        if not _is_block(each):
            raise index.refuse(f"block_structure {each!a:.40}", "two numbers above 0 can be")
    return [(each[0], each[1]) for each in found]


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_block(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_size, value))


METHODS: Mapping[str, Callable[[_Index], dict[str, TensorRef]]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    "fp8": _fp8,
}
"""Methods by their names in config.json."""
