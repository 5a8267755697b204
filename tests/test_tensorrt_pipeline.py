"""The whole walk to TensorRT engines on tiny random models, and what a bundle says of engines that nothing has run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import onnx
import pytest
from factories import with_tokenizer
from graphs import write_checkpoint
from test_coreml_pipeline import small

from edgeexport import build, errors, families, open_bundle
from edgeexport.bundle.verify import verify
from edgeexport.core import ParityResult, Verdict, worst
from edgeexport.parity import report_file

CONTEXT = 96
WIDE = {**families.find("llama").tiny, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
"""So wide that a row has whole blocks of 128."""


def for_sm(capabilities: str, folder: Path) -> str:
    """rtx-trt for small models and these compute capabilities."""
    path = Path(small("rtx-trt", 32, folder))
    path.write_text(re.sub(r'^sm = "[^"]*"', f'sm = "{capabilities}"', path.read_text(), flags=re.MULTILINE))
    return str(path)


def capabilities_of(engine: Path) -> list[str]:
    """What an engine was built for."""
    told: dict[str, Any] = json.loads(engine.with_name(f"{engine.name}.json").read_bytes())
    found: list[str] = told["compute_capabilities"]
    return found


def test_no_row_about_the_engine_is_green_where_no_gpu_ran_it() -> None:
    def row(level: str, verdict: Verdict, *, stand_in: bool = False) -> ParityResult:
        return ParityResult("decoder", level, "logits", {}, {}, verdict, "", stand_in)

    below = [row(level, Verdict.PASS) for level in ("L1", "L2", "L3")]
    graph = [row("L4", Verdict.PASS, stand_in=True), row("L5", Verdict.PASS, stand_in=True)]
    engine = [row("L4", Verdict.NOT_RUN), row("L5", Verdict.NOT_RUN)]
    assert worst(below) is Verdict.PASS
    assert worst([*below, *graph, *engine]) is Verdict.NOT_RUN
    assert worst([*below, *graph, row("L4", Verdict.FAIL, stand_in=True)]) is Verdict.FAIL
    assert worst([*below, *graph, *engine, row("L4", Verdict.PASS), row("L5", Verdict.PASS)]) is Verdict.PASS


def test_a_model_walks_to_engines_and_the_bundle_says_what_ran(tmp_path: Path) -> None:
    """It sees, hears and takes embeddings: every kind of component, in float16 and in int4."""
    checkpoint = with_tokenizer(write_checkpoint(tmp_path / "phone", families.find("autoglm_phone").tiny))
    made = build(str(checkpoint), small("rtx-trt", 32, tmp_path), tmp_path / "out", quant="int4-b32", context=CONTEXT)
    manifest = open_bundle(made.bundle).manifest
    parts = [component.name for component in manifest.components]
    assert {"engine-not-run"} == {finding.code for finding in made.findings if finding.severity == "warning"}
    assert manifest.parity == {"L1": "PASS", "L2": "PASS", "L3": "PASS", "L4": "NOT_RUN", "L5": "NOT_RUN"}
    assert manifest.tools["tensorrt-rtx-cu13-bindings"]
    for component in manifest.components:
        assert all(signature.file.endswith(".engine") for signature in component.signatures)
    ran = [row for row in made.results if row.level in ("L4", "L5")]
    assert {row.verdict for row in ran if row.stand_in} <= {Verdict.PASS, Verdict.AMBIGUOUS}
    assert all("not the engine" in row.note for row in ran if row.stand_in)
    silent = [row for row in ran if not row.stand_in and "GPU" in row.note]
    assert [(row.level, row.component) for row in silent] == [(level, part) for level in ("L4", "L5") for part in parts]
    report = (made.bundle / "parity.json").read_bytes()
    assert json.loads(report)["verdict"] == "NOT_RUN"
    assert report_file.read(report, made.bundle).rows() == made.results
    checked = verify(made.bundle)
    assert checked.ok
    assert "not by the engine" in checked.note
    with (made.bundle / "decoder.engine").open("r+b") as file:
        file.seek(5000)
        held = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([held ^ 1]))
    assert [finding.code for finding in verify(made.bundle).findings] == ["bundle-file-changed"]


def test_every_part_of_a_model_that_sees_becomes_an_engine(tmp_path: Path) -> None:
    checkpoint = with_tokenizer(write_checkpoint(tmp_path / "glm4v", families.find("glm4v").tiny))
    target = small("rtx-trt", 32, tmp_path)
    made = build(str(checkpoint), target, tmp_path / "out", quant="int8", context=CONTEXT, parity="L3")
    assert {row.verdict for row in made.results if row.level in ("L1", "L2", "L3")} == {Verdict.PASS}
    parts = {component.name: component for component in open_bundle(made.bundle).manifest.components}
    assert parts.keys() == {"decoder", "embed", "vision"}
    assert len(parts["vision"].signatures) == 2  # a screen upright, and on its side
    engines = [made.bundle / signature.file for part in parts.values() for signature in part.signatures]
    assert len({engine.name for engine in engines}) == 4
    for engine in engines:
        assert engine.suffix == ".engine"
        assert capabilities_of(engine) == ["8.0", "8.6", "8.9", "12.0"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama that is wide enough for blocks of 128."""
    return with_tokenizer(write_checkpoint(tmp_path_factory.mktemp("wide") / "llama", WIDE))


@pytest.mark.parametrize(
    ("scheme", "sm", "stored", "engines"),
    [
        ("int4-b128", "80 86 89 120", "INT4", ["decoder.engine"]),
        ("fp8", "89 120", "FLOAT8E4M3FN", ["decoder.engine"]),
        ("fp16", "75 80 86 89 120", "FLOAT16", ["decoder.engine", "decoder.sm75.engine"]),
    ],
)
def test_a_model_walks_to_an_engine_for_each_format_and_all_that_take_it(
    scheme: str, sm: str, stored: str, engines: list[str], wide: Path, tmp_path: Path
) -> None:
    made = build(str(wide), for_sm(sm, tmp_path), tmp_path / "out", quant=scheme, context=CONTEXT, parity="L3")
    assert {row.verdict for row in made.results if row.level in ("L1", "L2", "L3")} == {Verdict.PASS}
    graph = onnx.load(made.bundle / "decoder.onnx", load_external_data=False).graph
    kinds = {held.name: onnx.TensorProto.DataType.Name(held.data_type) for held in graph.initializer}
    products = {name: kind for name, kind in kinds.items() if name.endswith("proj.weight")}
    values = {products.pop(name) for name in list(products) if name.endswith("v_proj.weight")}
    assert (set(products.values()), values) == ({stored}, {"INT8" if stored == "INT4" else stored})
    blocks = {each.i for node in graph.node for each in node.attribute if each.name == "block_size"}
    assert blocks == ({128} if stored == "INT4" else set())
    assert sorted(path.name for path in made.bundle.glob("*.engine")) == engines
    found = [capability for name in engines for capability in capabilities_of(made.bundle / name)]
    assert sorted(found, key=float) == [f"{int(each) / 10:.1f}" for each in sm.split()]


def test_int4_for_the_capability_that_has_none_ends_before_anything_is_written(wide: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.LoweringError, match="op-not-lowered") as caught:
        build(str(wide), for_sm("75 80", tmp_path), tmp_path / "out", quant="int4-b128", context=CONTEXT)
    assert "take 75 out" in caught.value.findings[0].fix
    assert not list(tmp_path.glob("out/**/*.engine"))


def test_the_android_bundle_runs_in_litert_and_says_that_its_engines_do_not(tmp_path: Path) -> None:
    checkpoint = with_tokenizer(write_checkpoint(tmp_path / "llama", families.find("llama").tiny))
    target = small("android-trt", 32, tmp_path)
    made = build(str(checkpoint), target, tmp_path / "out", quant="int4-b32", context=CONTEXT)
    assert "engine-without-runtime" in {finding.code for finding in made.findings}
    bundle = open_bundle(made.bundle)
    assert "no phone has" in bundle.manifest.target.title
    assert bundle.manifest.parity["L4"] == bundle.manifest.parity["L5"] == "NOT_RUN"
    assert {row.verdict for row in made.results if row.stand_in} <= {Verdict.PASS, Verdict.AMBIGUOUS}
    component = bundle.component("decoder")
    assert component.backend == "litert"  # which the Android loader knows
    assert component.files == ("decoder.tflite", "engines/decoder.engine", "engines/decoder.json")
    choice = json.loads((made.bundle / "engines" / "decoder.json").read_bytes())
    assert [each["file"] for each in choice["engines"]] == ["decoder.engine"]
    assert choice["otherwise"] == {"backend": "litert", "files": ["decoder.tflite"]}
    assert "Android" in choice["why_otherwise"]
    assert not list((made.bundle / "engines").glob("*.onnx*"))
    with bundle.session(threads=1) as session:
        assert session.prefill([1, 2, 3]).shape == (320,)
    assert verify(made.bundle).ok
