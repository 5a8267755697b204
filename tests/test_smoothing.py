"""Outliers of activations in the weights: no bit of a float32 result changes, what is rounded loses less, and the
ladder sees through it."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from factories import with_tokenizer
from graphs import CONTEXT, FAMILIES, Traced, Zoo, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeexport import build, calibrate, errors, families, open_bundle, quant, smooth
from edgeexport.canonical.dialect import classes
from edgeexport.canonical.streaming import Rows, StreamedGraph
from edgeexport.checkpoint import WeightReader
from edgeexport.core import Array, CanonicalModel, Dim, QuantPlan, Traits
from edgeexport.pipeline import BuildResult, parity
from edgeexport.quant.repack import Lattice, to_codes
from edgeexport.quant.schemes import FORMATS, INT8_CHANNEL
from edgeexport.quant.smoothing import FILE, MOST, Fold, Reader, Smoothing, choose
from edgeexport.quant.source import PlannedWeights
from edgeexport.quant.weights import dequantize_codes

LITERT = Traits(positive_scales=True, shifts=("int8",), token_scales=True)
LOUD = 3
"""Channels of each norm of the model with outliers that are loud."""


def planned(found: Traced, scheme: str = "int8") -> QuantPlan:
    model = found.model
    shapes = {name: ref.shape for name, ref in model.weights.items()}
    return quant.plan(shapes, classes(model.graph, model.weights, "decoder"), scheme, LITERT)


def call(model: CanonicalModel, tokens: int = 12) -> dict[str, Array]:
    """A decoder's inputs, its cache apart."""
    rng, fed = np.random.default_rng(3), dict[str, Array]()
    for spec in model.inputs:
        shape = [tokens if isinstance(size, Dim) else size for size in spec.shape]
        if spec.name == "input_ids":
            fed[spec.name] = rng.integers(3, 250, shape)
        elif spec.name == "inputs_embeds":
            fed[spec.name] = rng.standard_normal(shape, np.float32)
        elif spec.name == "position":
            fed[spec.name] = np.zeros(shape, np.int64)
        elif spec.name == "rope_positions":
            fed[spec.name] = np.broadcast_to(np.arange(tokens), shape).copy()
    return fed


def logits(model: CanonicalModel, rows: Rows) -> Array:
    made: Array = StreamedGraph(model, slots=CONTEXT).run([call(model)], rows).outputs[0]["logits"]
    return made


def random_smoothing(model: CanonicalModel, plan: QuantPlan) -> Smoothing:
    rng = np.random.default_rng(5)
    return Smoothing(
        [
            Fold(
                site.producer,
                site.consumers,
                rng.integers(-MOST, MOST + 1, model.weights[site.consumers[0]].shape[1]).astype(np.int8),
            )
            for site in smooth.sites(model, plan)
        ]
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_no_bit_of_a_result_changes(name: str, zoo: Zoo) -> None:
    found = zoo.traced(name)
    model, plan = found.model, planned(found)
    smoothing = random_smoothing(model, plan)
    layers = sum(stage.startswith("layers.") for stage in model.stages)
    # a layer has two norms and a gated product; of GLM-4, gate and up are one matrix, whose rows are no site
    assert len(smoothing.folds) == layers * (3 if name in ("llama", "qwen2", "qwen3") else 2)
    with WeightReader() as reader:
        rows = calibrate.rows_of(model, reader.rows)
        wanted = logits(model, rows)
        moved = logits(model, lambda weight, a, b: smoothing.smoothed(weight, a, rows(weight, a, b)))
        np.testing.assert_array_equal(moved, wanted)
        broken = Smoothing(smoothing.folds[1:])  # the norm of one, the columns of none
        half = Smoothing([Fold(smoothing.folds[0].producer, (), smoothing.folds[0].exponents), *broken.folds])
        assert (logits(model, lambda weight, a, b: half.smoothed(weight, a, rows(weight, a, b))) != wanted).any()


def test_what_is_moved_is_undone_to_the_bit_in_any_rows(zoo: Zoo) -> None:
    found = zoo.traced("llama")
    smoothing = Smoothing.from_json(random_smoothing(found.model, planned(found)).to_json())
    assert smoothing.digest == pickle.loads(pickle.dumps(smoothing)).digest  # noqa: S301 - its own pickle, as worker processes get it
    assert Smoothing().digest == "" and not Smoothing()
    with WeightReader() as reader:
        changed = 0
        for name, ref in found.model.weights.items():
            whole = reader.rows(ref, 0, ref.shape[0])
            moved = smoothing.smoothed(name, 0, whole)
            changed += (moved != whole).any()
            np.testing.assert_array_equal(smoothing.restored(name, 0, moved), whole)
            np.testing.assert_array_equal(smoothing.smoothed(name, 5, whole[5:9]), moved[5:9])
        assert changed == 3 * 8  # of each layer all but o_proj


@pytest.mark.parametrize("positive", [False, True])
def test_integers_that_are_carried_over_stay(positive: bool) -> None:
    from dataclasses import replace

    rng = np.random.default_rng(2)
    fmt = replace(FORMATS["int4-b32-o8"], positive=positive)
    scales = rng.choice([-0.25, 0.5, 1.0], (8, 4)).astype(np.float32)
    lattice = Lattice(rng.integers(-8, 8, (8, 128)).astype(np.int8), scales, scales * np.float32(3))
    before = to_codes(lattice, fmt)
    rows, columns = rng.integers(-4, 5, 8).astype(np.int8), np.repeat(rng.integers(-4, 5, 4), 32).astype(np.int8)
    smoothing = Smoothing([Fold("w", (), rows), Fold("norm", ("w",), columns)])
    after = smoothing.codes("w", 0, before, fmt)
    np.testing.assert_array_equal(after.integers, before.integers)
    assert after.offsets is not None and before.offsets is not None

    def meaning(codes: Any) -> Array:
        blocks = codes.integers.reshape(8, 4, 32) * codes.scales.astype(np.float32)[..., None]
        return np.asarray((blocks + codes.offsets[..., None]).reshape(8, 128))

    np.testing.assert_array_equal(meaning(after), smoothing.smoothed("w", 0, meaning(before)))
    part = smoothing.codes("w", 3, to_codes(Lattice(*(each[3:6] for each in lattice if each is not None)), fmt), fmt)
    np.testing.assert_array_equal(part.scales, after.scales[3:6])
    with pytest.raises(AssertionError, match="move together"):
        Smoothing([Fold("norm", ("w",), np.arange(128).astype(np.int8) % 5)]).codes("w", 0, before, fmt)


def rounded(x: Array) -> Array:
    """int8 with one scale and zero point for each row, as XNNPACK's qd8: float32 of the same shape."""
    low, high = np.minimum(x.min(1, keepdims=True), 0), np.maximum(x.max(1, keepdims=True), 0)
    scale = (high - low) / np.float32(255)
    zero = np.rint(-128 - low / scale)
    return np.asarray((np.clip(np.rint(x / scale) + zero, -128, 127) - zero) * scale)


@pytest.mark.parametrize(("scheme", "carried", "share"), [("int8-channel", False, 0.1), ("int4-b32-o8", True, 0.7)])
def test_what_is_chosen_loses_less(scheme: str, carried: bool, share: float) -> None:
    """Over rows that were not shown: the error of the product, activations and weights rounded."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((400, 128), np.float32)
    x[:, [5, 70, 71]] *= 60
    weight = rng.standard_normal((96, 128), np.float32) * np.float32(0.1)
    weight[:, [5, 70, 71]] *= np.float32(0.05)
    fmt = INT8_CHANNEL if scheme == "int8-channel" else FORMATS[scheme]
    found = choose(x[:200], [Reader(weight, len(weight), fmt, carried)])
    assert found is not None and found.dtype == np.int8
    assert min(found[5], found[70]) > np.median(found)
    if carried:
        assert (found.reshape(-1, 32) == found.reshape(-1, 32)[:, :1]).all()

    def lost(exponents: Array) -> float:
        moved = np.ldexp(weight, exponents)
        if not carried:
            from edgeexport.quant.weights import encode_rows

            moved = dequantize_codes(encode_rows(moved, fmt), fmt)
        return float(np.square(rounded(np.ldexp(x[200:], -exponents)) @ moved.T - x[200:] @ weight.T).sum())

    assert lost(found.astype(np.int32)) < share * lost(np.zeros(128, np.int32))


def test_nothing_is_moved_where_all_channels_are_alike() -> None:
    rng = np.random.default_rng(7)
    x = rng.choice([-1, 1], (100, 64)).astype(np.float32)
    weight = rng.choice([-1, 1], (32, 64)).astype(np.float32)
    assert choose(x, [Reader(weight, 32, INT8_CHANNEL, False)]) is None


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with outliers: `LOUD` channels of each norm are 40 times as loud, what reads them weak."""
    from safetensors.numpy import load_file, save_file

    folder = write_checkpoint(tmp_path_factory.mktemp("loud") / "llama", families.find("llama").tiny)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if "layernorm" in name:
            weight[:LOUD] *= np.float32(40)
        elif name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            weight[:, :LOUD] /= np.float32(40)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return with_tokenizer(folder)


@pytest.fixture(scope="module")
def built(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, BuildResult]:
    return {
        method: build(
            str(checkpoint), "android-tflite", tmp_path_factory.mktemp(method), quant="int8", context=96,
            parity="L4", calibrate_method=method,
        )
        for method in ("none", "gptq")
    }  # fmt: skip


def test_a_built_bundle_says_what_was_moved_and_is_closer(built: dict[str, BuildResult]) -> None:
    assert not (built["none"].bundle / f"decoder.{FILE}").exists()
    file = built["gptq"].bundle / f"decoder.{FILE}"
    assert file.name in open_bundle(built["gptq"].bundle).manifest.files
    folds = Smoothing.from_json(file.read_bytes()).folds
    assert len(folds) >= 6
    norms = [fold for fold in folds if "layernorm" in fold.producer]
    assert all(fold.exponents[:LOUD].min() > np.median(fold.exponents) for fold in norms)
    shipped = {
        method: next(row for row in result.results if row.output == "logits, as shipped")
        for method, result in built.items()
    }
    assert shipped["gptq"].metrics["snr_db"] > shipped["none"].metrics["snr_db"] + 3
    norm = next(row for row in built["gptq"].results if row.output == "other fp32")
    assert norm.metrics["min_snr_db"] == np.inf


def test_the_ladder_of_a_bundle_sees_what_does_not_belong(
    built: dict[str, BuildResult], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert parity(built["gptq"].bundle, str(checkpoint), level="L3")
    monkeypatch.setattr(Smoothing, "restored", lambda self, name, start, rows: rows)
    with pytest.raises(errors.ParityError):
        parity(built["gptq"].bundle, str(checkpoint), level="L3")


def test_other_backends_move_nothing(checkpoint: Path, tmp_path: Path) -> None:
    found = build(str(checkpoint), "host-ort", tmp_path, quant="int8", context=96, parity="L3", calibrate_method="gptq")
    assert not (found.bundle / f"decoder.{FILE}").exists()


def test_the_number_of_threads_changes_nothing(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    found, made = zoo.traced("llama"), onnxruntime.InferenceSession
    texts = [b""]
    for threads in (1, 2):

        def session(graph: bytes, options: Any, threads: int = threads, **settings: Any) -> Any:
            options.intra_op_num_threads = threads
            return made(graph, options, **settings)

        monkeypatch.setattr(onnxruntime, "InferenceSession", session)
        with WeightReader() as reader:
            rows, plan = calibrate.rows_of(found.model, reader.rows), planned(found)
            texts.append(smooth.run(found.model, plan, [call(found.model)] * 3, rows, lambda *_: None).to_json())
    assert texts[1] == texts[2] != Smoothing().to_json()


@given(st.binary(max_size=200) | st.sampled_from(
    [b"{}", b"[1]", b'[{"producer": "a", "consumers": [], "exponents": "!"}]', b'[{"producer": "a"}]',
     b'[{"producer": "a", "consumers": [], "exponents": "fw=="}]', b"[" * 100_000]
))  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_a_file_that_nobody_wrote_is_refused(text: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert not Smoothing.from_json(text)  # an empty list


def test_exponents_of_other_weights_do_not_fit(zoo: Zoo) -> None:
    found = zoo.traced("llama")
    shapes = {name: ref.shape for name, ref in found.model.weights.items()}
    smoothing = random_smoothing(found.model, planned(found))
    assert smoothing.fit(shapes)
    assert not smoothing.fit({name: (*shape[:-1], shape[-1] + 1) for name, shape in shapes.items()})
    assert not smoothing.fit({})


def test_smoothed_weights_are_rounded_as_they_are_stored(zoo: Zoo) -> None:
    found = zoo.traced("llama")
    plan = planned(found)
    smoothing = random_smoothing(found.model, plan)
    name = smoothing.folds[0].consumers[0]
    with WeightReader() as reader:
        source = PlannedWeights(reader, found.model.weights, plan, smoothing=smoothing)
        count = found.model.weights[name].shape[0]
        assert source.compare(name, 0, count, source.stored_rows(name, 0, count)).snr_db > 25
