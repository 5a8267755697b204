"""Encoders with int8 activations for NNAPI: what is stored, what is computed, and how far rounding moves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases.ops import OpCase, Weight, ints, normal
from graphs import FAMILIES, Graph, Traced, Zoo, assert_stores, positive, stored_weights, written
from test_backend_ops import build, oracle

from edgeexport import errors, families, samples, targets
from edgeexport.backends import litert_nnapi, litert_nnapi_ops, litert_nnapi_runner
from edgeexport.backends import litert_nnapi_static as static
from edgeexport.backends.litert_nnapi_lint import lint, read
from edgeexport.core import Array, Artifact, CanonicalModel
from edgeexport.quant.source import no_samples
from edgeexport.session.image_contract import PatchContract, PixelContract
from edgeexport.session.image_file import read_image

TARGET = targets.load("android-nnapi")
WINDOW = "kernel_shape = [3, 3], strides = [2, 1], pads = [1, 0, 1, 2]"
SEEN = [name for name in FAMILIES if "vision_config" in families.find(name).tiny or name == "autoglm_phone"]
CONV = {"w": Weight((6, 4, 3, 3), "int8-channel"), "b": Weight((6,))}
NORM = {name: Weight((6,)) for name in "gsm"}  # the factors are random, so that some are negative
VARIANCE = {"v": np.linspace(0.2, 3, 6, dtype=np.float32)}
LINEAR = {"w": Weight((24, 32), "int8-channel"), "b": Weight((24,))}

CASES = [
    OpCase("Conv", "with a bias", f"y = Conv <{WINDOW}> (x, w, b)", {"x": normal(1, 4, 9, 8)}, weights=CONV),
    OpCase(
        "Conv", "over time", "y = Conv <kernel_shape = [3], strides = [2], pads = [1, 1]> (x, w)",
        {"x": normal(1, 5, 12)}, weights={"w": Weight((7, 5, 3), "int8-channel")},
    ),
    OpCase(
        "Conv", "of each channel by itself", f"y = Conv <{WINDOW}, group = 6> (x, w)", {"x": normal(1, 6, 9, 8)},
        weights={"w": Weight((6, 1, 3, 3), "int8-channel")}, becomes=("DEPTHWISE_CONV_2D",),
    ),
    OpCase(
        "Conv", "in float16", f"y = Conv <{WINDOW}> (x, w, b)", {"x": normal(1, 4, 9, 8)},
        weights={"w": Weight((6, 4, 3, 3), "fp16"), "b": Weight((6,))}, gone=("QUANTIZE",),
    ),
    OpCase(
        "BatchNormalization", "in the convolution before it",
        f"h = Conv <{WINDOW}> (x, w, b)\ny = BatchNormalization <epsilon = 0.001> (h, g, s, m, v)",
        {"x": normal(1, 4, 9, 8)}, weights={**CONV, **NORM}, constants=VARIANCE, gone=("MUL", "ADD"),
    ),
    OpCase(
        "BatchNormalization", "of each channel by itself",
        f"h = Conv <{WINDOW}, group = 6> (x, w)\ny = BatchNormalization <epsilon = 0.001> (h, g, s, m, v)",
        {"x": normal(1, 6, 9, 8)}, weights={"w": Weight((6, 1, 3, 3), "int8-channel"), **NORM}, constants=VARIANCE,
        gone=("MUL", "ADD"),
    ),
    OpCase(
        "BatchNormalization", "by itself", "y = BatchNormalization <epsilon = 0.001> (x, g, s, m, v)",
        {"x": normal(1, 6, 9, 8)}, weights=NORM, constants=VARIANCE, becomes=("MUL",), gone=("QUANTIZE",),
    ),
    *(
        OpCase(
            "Clip", f"between 0 and {high:g} in the convolution before it",
            f"h = Conv <{WINDOW}> (x, w, b)\ny = Clip (h, low, high)", {"x": 3 * normal(1, 4, 9, 8)}, weights=CONV,
            constants={"low": np.float32(0), "high": np.float32(high)}, gone=("RELU6",) if high == 6 else (),
        )
        for high in (6, 5)
    ),
    OpCase(
        "Add", "of two convolutions",
        f"h = Conv <{WINDOW}> (x, w, b)\nk = Conv <{WINDOW}> (x, u)\ny = Add (h, k)", {"x": normal(1, 4, 9, 8)},
        weights={**CONV, "u": Weight((6, 4, 3, 3), "int8-channel")}, becomes=("ADD",), gone=("MUL",),
    ),
    OpCase(
        "Add", "of what was not computed in int8", "y = Add (x, z)", {"x": normal(1, 3, 8), "z": normal(1, 3, 8)},
        gone=("QUANTIZE",),
    ),
    OpCase(
        "MatMul", "with a bias", "t = Transpose <perm = [1, 0]> (w)\nh = MatMul (x, t)\ny = Add (h, b)",
        {"x": normal(1, 5, 32)}, weights=LINEAR, becomes=("CONV_2D",), gone=("ADD",),
    ),
    OpCase(
        "MatMul", "of rows that are a kernel's already", "t = Transpose <perm = [1, 0]> (w)\ny = MatMul (x, t)",
        {"x": normal(1, 5, 1, 32)}, weights={"w": LINEAR["w"]}, becomes=("CONV_2D",), gone=("RESHAPE",),
    ),
    OpCase(
        "MatMul", "of two activations", "y = MatMul (x, z)", {"x": normal(2, 3, 8), "z": normal(2, 8, 4)},
        gone=("QUANTIZE",),
    ),
    OpCase(
        "Reshape", "and Transpose between a convolution and a multiplication",
        f"h = Conv <{WINDOW}> (x, w)\nr = Reshape (h, flat)\nt = Transpose <perm = [0, 2, 1]> (r)\n"
        "u = Transpose <perm = [1, 0]> (a)\ny = MatMul (t, u)",
        {"x": normal(1, 4, 9, 8)}, constants={"flat": ints(1, 32, -1)}, gone=("ADD",),
        weights={"w": Weight((32, 4, 3, 3), "int8-channel"), "a": Weight((24, 32), "int8-channel")},
    ),
    OpCase(
        "Transpose", "of a convolution", f"h = Conv <{WINDOW}> (x, w, b)\ny = Transpose <perm = [0, 2, 3, 1]> (h)",
        {"x": normal(1, 4, 9, 8)}, weights=CONV,
    ),
    OpCase(
        "Squeeze", "and Unsqueeze of a multiplication",
        "t = Transpose <perm = [1, 0]> (w)\nh = MatMul (x, t)\nk = Squeeze (h, zero)\ny = Unsqueeze (k, two)",
        {"x": normal(1, 5, 32)}, weights={"w": LINEAR["w"]}, constants={"zero": ints(0), "two": ints(2)},
    ),
    OpCase(
        "Unsqueeze", "of what was not computed in int8", "y = Unsqueeze (x, two)", {"x": normal(1, 5, 32)},
        constants={"two": ints(2)}, gone=("QUANTIZE",),
    ),
]  # fmt: skip


def test_every_row_of_our_own_has_a_case() -> None:
    own = {row.op for row in static.OPS if row is not litert_nnapi_ops.OPS.get(row.op)}
    assert own == {case.op for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_op_computes_what_it_means(case: OpCase, tmp_path: Path) -> None:
    model, plan = build(case, tmp_path)
    plan = replace(positive(plan), scheme=litert_nnapi.STATIC)
    model = replace(model, component="vision")
    given = [{name: seed * array for name, array in case.inputs.items()} for seed in (0.5, 1)]
    artifact = written(litert_nnapi, [model], TARGET, plan, tmp_path / "out", lambda _: given)
    expected = oracle(case, model, plan)["y"]
    for exact, tolerance in ((True, 1e-3), (False, 0.03)):
        (got,) = opened(tmp_path / "out", artifact, exact=exact).run(case.inputs).values()
        assert got.shape == expected.shape
        assert off(expected, got) < tolerance
    ops = [op.op for op in dict(read(tmp_path / "out" / "vision.tflite"))["step"]]
    assert set(case.becomes) <= set(ops)
    assert not set(case.gone) & set(ops)
    assert set(artifact.weights) == set(model.weights)


def test_a_channel_that_training_left_dead_gives_its_bias(tmp_path: Path) -> None:
    case = CASES[0]
    model, plan = build(case, tmp_path)
    model, plan = replace(model, component="vision"), replace(positive(plan), scheme=litert_nnapi.STATIC)
    path, kernel, bias = tmp_path / "weights.bin", model.weights["w"], model.weights["b"]
    raw = np.fromfile(path, np.float32)
    held = raw[: kernel.elements].reshape(kernel.shape)
    held[2], held[4] = 0, 1e-9 * held[4]
    raw.tofile(path)
    artifact = written(litert_nnapi, [model], TARGET, plan, tmp_path / "out", lambda _: [case.inputs])
    (got,) = opened(tmp_path / "out", artifact).run(case.inputs).values()
    wanted = raw[bias.offset // 4 :][: bias.elements]
    for channel in (2, 4):
        np.testing.assert_allclose(got[:, channel], wanted[channel], atol=0.05)  # a step of the output is 0.035


ENCODERS = [(name, part) for name in SEEN for part in ("vision", "audio") if part == "vision" or "phone" in name]


@pytest.mark.parametrize(("name", "component"), ENCODERS)
def test_an_encoder_is_stored_as_planned_and_computes_what_its_graph_computes(
    name: str, component: str, zoo: Zoo, tmp_path: Path
) -> None:
    found = zoo.traced(name)
    weights = stored_weights(found, litert_nnapi.STATIC, positive)
    artifact = encoder(found, component, tmp_path)
    assert_stores(tmp_path, {component: artifact}, found, weights)
    for model in found.variants(component):
        inputs = next(drawn(model))
        want = Graph(model, weights).run(inputs)["features"]
        for exact, tolerance in ((True, 0.01), (False, 0.25)):
            (got,) = opened(tmp_path, artifact, model.variant, exact=exact).run(inputs).values()
            assert off(want, got) < tolerance
    for share in lint(tmp_path / f"{component}.tflite", 6):
        assert (share.of_operators, share.runs) == (1, 1)
    for _, operations in read(tmp_path / f"{component}.tflite"):
        kernels = [op for op in operations if op.op in ("CONV_2D", "DEPTHWISE_CONV_2D")]
        multiplied = [op.inputs[1] for op in kernels]
        assert {held.dtype for held in multiplied if held is not None} == {"int8"}
        assert all(op.inputs[0] is not None and op.inputs[0].dtype == "int8" for op in kernels)


def test_a_network_of_convolutions_is_int8_throughout(zoo: Zoo, tmp_path: Path) -> None:
    encoder(zoo.traced("autoglm_phone"), "vision", tmp_path)
    ((_, operations),) = read(tmp_path / "vision.tflite")
    floats = [op.op for op in operations if op.outputs[0].dtype == "float32"]
    first = floats.index("DEQUANTIZE")
    assert first == 0, "nothing is computed in float32 before the projection's norm"
    assert not set(floats) & {"CONV_2D", "DEPTHWISE_CONV_2D", "RELU6"}


def test_without_samples_the_build_says_what_it_needs(zoo: Zoo, tmp_path: Path) -> None:
    found = zoo.traced("autoglm_phone")
    with pytest.raises(errors.UsageError) as caught:
        encoder(found, "audio", tmp_path, no_samples)
    assert caught.value.findings[0].code == "samples-missing"
    assert "--samples" in caught.value.findings[0].fix


def test_a_folder_of_samples_gives_each_encoder_its_own(zoo: Zoo, tmp_path: Path) -> None:
    from PIL import Image

    from edgeexport.parity.examples import chirp, drawing

    contract = zoo.traced("autoglm_phone").contract
    assert contract is not None and contract.audio is not None and isinstance(contract.image, PixelContract)
    Image.fromarray(drawing(40, 60)).save(tmp_path / "b.png")
    (tmp_path / "a.wav").write_bytes(chirp(contract.audio.sample_rate))
    (tmp_path / "notes.txt").write_text("left alone")
    found = samples.find(tmp_path)
    assert [path.name for path in found.paths] == ["a.wav", "b.png"]
    for component, name in (("vision", "pixels"), ("audio", "mel")):
        (made,) = found.inputs(contract, component, "")
        assert made.keys() == {name}
    before = found.digest
    (tmp_path / "a.wav").write_bytes(chirp(contract.audio.sample_rate, 0.5))
    assert samples.find(tmp_path).digest != before


def test_a_picture_calibrates_the_grid_it_is_resized_to(zoo: Zoo, tmp_path: Path) -> None:
    from PIL import Image

    from edgeexport.parity.examples import drawing

    contract = zoo.traced("glm4v").contract
    assert contract is not None and isinstance(contract.image, PatchContract)
    Image.fromarray(drawing(56, 84)).save(tmp_path / "wide.png")
    assert read_image(tmp_path / "wide.png").width == 84
    given = samples.find(tmp_path)
    assert [len(list(given.inputs(contract, "vision", f"{r}x{c}"))) for r, c in contract.grids] == [1, 0]


@pytest.mark.parametrize("files", [0, samples.MOST + 1])
def test_a_folder_with_no_samples_or_too_many_is_refused(files: int, tmp_path: Path) -> None:
    for k in range(files):
        (tmp_path / f"{k}.png").touch()
    with pytest.raises(errors.UsageError, match="the samples cannot be used"):
        samples.find(tmp_path)
    with pytest.raises(errors.UsageError, match="the samples cannot be used"):
        samples.find(tmp_path / "nowhere")


def drawn(model: CanonicalModel) -> Iterator[Mapping[str, Array]]:
    """Random inputs of an encoder; the first ones calibrate, and are computed."""
    for seed in range(4):
        yield {
            spec.name: np.random.default_rng(seed).standard_normal(spec.shape, np.float32)  # type: ignore[arg-type]
            for spec in model.inputs
        }


def encoder(found: Traced, component: str, folder: Path, given: Callable[[str], object] | None = None) -> Artifact:
    """An encoder with activations calibrated on random inputs, or as `given`."""
    models = {model.variant: model for model in found.variants(component)}
    plan = positive(found.plan(litert_nnapi.STATIC, component))
    calibrate = given or (lambda variant: drawn(models[variant]))
    return written(litert_nnapi, list(models.values()), TARGET, plan, folder, calibrate)  # type: ignore[arg-type]


def opened(folder: Path, artifact: Artifact, variant: str = "", *, exact: bool = False) -> Any:
    return litert_nnapi_runner.open_graph(folder, artifact, variant, threads=1, exact=exact)


def off(want: Array, got: Array) -> float:
    """Root mean square of the difference over that of what is wanted."""
    return float(np.sqrt(np.mean((want - got) ** 2) / np.mean(want**2)))
