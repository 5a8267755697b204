"""The whole walk on tiny random models: every family and scheme, and what must not happen on the way."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import rehash, tree
from factories import tiny_model, with_tokenizer, write_gguf
from graphs import FAMILIES, TEXT_FAMILIES, oracle, reference_logits, write_checkpoint

from edgeexport import build, families, open_bundle, steps
from edgeexport.backends.onnxruntime_runner import OnnxDecoder
from edgeexport.bundle.verify import verify
from edgeexport.core import LEVELS, Verdict
from edgeexport.errors import EdgeExportError
from edgeexport.parity import ladder
from edgeexport.pipeline import BuildResult, export, parity
from edgeexport.quant import SCHEMES

CONTEXT = 96
"""Room for two pictures, a question in bytes and an answer."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random checkpoint of every family."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: with_tokenizer(write_checkpoint(root / name, families.find(name).tiny)) for name in FAMILIES}


@pytest.fixture(scope="module")
def small_target(tmp_path_factory: pytest.TempPathFactory) -> str:
    """host-ort for screens of 56 x 84 pixels, upright and lying."""
    text = (ROOT / "targets" / "host-ort.toml").read_text()
    for key, value in (("screens", [[56, 84], [84, 56]]), ("max_pixels", 56 * 84)):
        text, found = re.subn(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)
        assert found == 1
    path = tmp_path_factory.mktemp("targets") / "small.toml"
    path.write_text(text)
    return str(path)


@pytest.fixture(scope="module")
def built(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    """The tiny Llama in float32, built once for the tests that only look at it."""
    return build(str(checkpoints["llama"]), "host-ort", tmp_path_factory.mktemp("built"), quant="fp32", context=CONTEXT)


ROOT = Path(__file__).parent.parent
ALL_MODALITIES = {"picture", "sound", "picture and sound"}


def code_of(run: Any) -> tuple[str, int]:
    with pytest.raises(EdgeExportError) as caught:
        run()
    return caught.value.findings[0].code, caught.value.exit_code


SEEING = tuple(name for name in FAMILIES if name not in TEXT_FAMILIES)
WALKS = sorted(
    {(family, "fp32") for family in FAMILIES}
    | {(names[i % len(names)], scheme) for i, scheme in enumerate(SCHEMES) for names in (TEXT_FAMILIES, SEEING)}
)
"""Every family, and every scheme with a model of text and one that sees."""


@pytest.mark.parametrize(("family", "scheme"), WALKS)
def test_every_family_and_scheme_walks_to_a_bundle(
    family: str, scheme: str, checkpoints: dict[str, Path], small_target: str, tmp_path: Path
) -> None:
    """That all families compute in all schemes what they must is in test_backends_contract.py, for less."""
    result = build(str(checkpoints[family]), small_target, tmp_path, quant=scheme, context=CONTEXT)
    assert {row.level for row in result.results} == set(LEVELS)
    assert not [row for row in result.results if row.verdict in (Verdict.FAIL, Verdict.NOT_RUN)]
    assert verify(result.bundle).golden is Verdict.PASS
    bundle = open_bundle(result.bundle)
    for component in bundle.manifest.components:
        assert {row.level for row in result.results if row.component == component.name} >= set(LEVELS)
    modalities = {"glm4v": {"picture"}, "glm46v": {"picture"}, "autoglm_phone": ALL_MODALITIES}.get(family, set())
    assert {case.name for case in bundle.manifest.golden.shown} == modalities
    tokens = np.arange(3, 20)
    with bundle.session() as session:
        logits = session.prefill(tokens).copy()
    expected = reference_logits(oracle(checkpoints[family]), tokens)[-1]
    if scheme == "fp32":
        assert np.abs(logits - expected).max() < 1e-3
    else:
        assert np.corrcoef(logits, expected)[0, 1] > 0.9


def test_what_its_runtime_refuses_to_run_is_no_bundle(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

    def refuse(*_: Any) -> Any:
        raise InvalidArgument("head_size must be a multiple of 8")

    monkeypatch.setattr(OnnxDecoder, "step", refuse)
    with pytest.raises(EdgeExportError, match="parity-failed") as caught:
        build(str(checkpoints["llama"]), "host-ort", tmp_path / "out", context=CONTEXT, parity="L1")
    (finding,) = caught.value.findings
    assert "head_size must be a multiple of 8" in finding.why and "--quant" not in finding.fix
    assert caught.value.exit_code == 6 and tree(tmp_path) == {}


def test_a_large_artifact_is_run_where_that_is_asked_for(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder, "LOADED", 0)
    result = build(str(checkpoints["llama"]), "host-ort", tmp_path, context=CONTEXT, parity="L3")
    (row,) = [row for row in result.results if row.output == "runs"]
    assert row.verdict is Verdict.NOT_RUN and "--parity L4" in row.note
    result = build(str(checkpoints["llama"]), "host-ort", tmp_path, context=CONTEXT, parity="L4", force=True)
    (row,) = [row for row in result.results if row.output == "runs"]
    assert row.verdict is Verdict.PASS and row.metrics["calls"] > 8


def test_greedy_tokens_equal_transformers(built: BuildResult, checkpoints: dict[str, Path]) -> None:
    model = oracle(checkpoints["llama"])
    tokens = [5, 6, 7, 8]
    with open_bundle(built.bundle).session() as session:
        logits = session.prefill(np.array(tokens))
        for _ in range(40):
            token = int(np.argmax(logits))
            assert token == int(reference_logits(model, np.array(tokens))[-1].argmax())
            tokens.append(token)
            logits = session.decode(token)


def test_session_truncates_and_resets(built: BuildResult) -> None:
    with open_bundle(built.bundle).session() as session:
        first = session.prefill(np.array([3, 4, 5])).copy()
        session.decode(9)
        session.truncate(2)
        assert session.position == 2
        assert np.allclose(session.decode(5), first, atol=1e-5)
        session.reset()
        assert np.array_equal(session.prefill(np.array([3, 4, 5])), first)


def test_two_builds_have_the_same_bytes(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = shutil.copytree(checkpoints["qwen3"], tmp_path / "elsewhere" / "qwen3")
    trees = []
    for name, source in (("one", checkpoints["qwen3"]), ("two", elsewhere)):
        monkeypatch.setenv("EDGEEXPORT_CACHE_DIR", str(tmp_path / f"cache-{name}"))
        result = build(str(source), "android-ort", tmp_path / name, quant="int4-b32", context=CONTEXT)
        trees.append(tree(result.bundle))
    assert trees[0].keys() == trees[1].keys() > {"tokenizer/bpe.bin"}  # which the native loader tokenises with
    assert [name for name in trees[0] if trees[0][name] != trees[1][name]] == []


def test_second_build_is_up_to_date_and_another_target_reuses_the_trace(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEEXPORT_CACHE_DIR", str(tmp_path / "cache"))
    traced: list[str] = []
    from edgeexport.canonical import trace as module

    original = module.trace

    def counting(*arguments: Any, **options: Any) -> Any:
        traced.append("trace")
        return original(*arguments, **options)

    monkeypatch.setattr(module, "trace", counting)
    source = str(checkpoints["llama"])
    first = build(source, "host-ort", tmp_path, quant="int8", context=CONTEXT, parity="L3")
    again = build(source, "host-ort", tmp_path, quant="int8", context=CONTEXT, parity="L3")
    assert (first.up_to_date, again.up_to_date) == (False, True)
    assert again.results == first.results
    assert (again.size, again.ideal_bytes) == (first.size, first.ideal_bytes)
    build(source, "android-ort", tmp_path, quant="int8", context=CONTEXT, parity="L1")
    assert traced == ["trace"]


def test_an_existing_folder_is_not_replaced_unasked(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source, folder = str(checkpoints["llama"]), tmp_path / "llama-host-ort"
    folder.mkdir()
    (folder / "thesis.txt").write_text("do not lose me")
    assert code_of(lambda: build(source, "host-ort", tmp_path, parity="L1")) == ("output-exists", 2)
    assert (folder / "thesis.txt").exists()
    assert build(source, "host-ort", tmp_path, parity="L1", force=True).bundle == folder
    assert not (folder / "thesis.txt").exists()


@pytest.mark.parametrize("moment", ["trace", "compile", "bundle"])
def test_a_killed_build_leaves_no_half_bundle_and_the_next_one_succeeds(
    moment: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """kill -9 while the step works: a switch in the child's sitecustomize stops it there, for good."""
    stops = {
        "trace": "import edgeexport.canonical.trace as m; m.stamp = hold",
        "compile": "import edgeexport.backends.storage as m; m._write_block = hold",
        "bundle": "import edgeexport.bundle.writer as m; m.BundleWriter.commit = hold",
    }
    ready = tmp_path / "ready"
    program = (
        "import sys, time, pathlib\n"
        f"def hold(*a, **k): pathlib.Path({str(ready)!r}).touch(); time.sleep(600)\n"
        f"{stops[moment]}\n"
        "from edgeexport.cli_edge import execute\n"
        "sys.exit(execute(sys.argv[1:]))\n"
    )
    command = ["build", str(checkpoints["glm4"]), "--target", "host-ort", "-o", str(tmp_path / "out"), "--parity", "L1"]
    environment = {**os.environ, "EDGEEXPORT_CACHE_DIR": str(tmp_path / "cache")}
    child = subprocess.Popen([sys.executable, "-c", program, *command], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not ready.exists():
        assert child.poll() is None, "the build ended before the step"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "out" / "glm4-host-ort").exists()
    done = subprocess.run([sys.executable, "-m", "edgeexport", *command], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert verify(tmp_path / "out" / "glm4-host-ort", golden=False).ok
    assert [path.name for path in (tmp_path / "out").iterdir() if "partial" in path.name] == []


def test_every_flipped_bit_is_found(built: BuildResult, tmp_path: Path) -> None:
    copy = shutil.copytree(built.bundle, tmp_path / "bundle")
    rng = np.random.default_rng(0)
    for path in sorted(p for p in copy.rglob("*") if p.is_file()):
        before = path.read_bytes()
        for position in {0, len(before) - 1, int(rng.integers(len(before)))}:
            data = bytearray(before)
            data[position] ^= 1 << int(rng.integers(8))
            path.write_bytes(data)
            try:
                found = verify(copy, golden=False).findings
            except EdgeExportError as error:
                found = error.findings
            assert found, f"{path.name} at byte {position}"
        path.write_bytes(before)
    assert verify(copy).ok


@pytest.mark.parametrize("scheme", ["fp32", "int4-b32"])
def test_another_models_weights_are_refused_by_golden_vectors(
    scheme: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    other = with_tokenizer(write_checkpoint(tmp_path / "other" / "llama", families.find("llama").tiny, seed=7))
    mine = build(str(checkpoints["llama"]), "host-ort", tmp_path / "mine", quant=scheme, context=CONTEXT).bundle
    theirs = build(str(other), "host-ort", tmp_path / "theirs", quant=scheme, context=CONTEXT, parity="L1").bundle
    weights = "decoder.onnx.data"
    (mine / weights).unlink()
    shutil.copy(theirs / weights, mine / weights)
    rehash(mine)
    report = verify(mine)
    assert not report.ok
    assert "golden-mismatch" in {finding.code for finding in report.findings}


def damage(folder: Path, name: str) -> None:
    """Zero one weight of a compiled artifact."""
    weights = json.loads((folder / "artifact.json").read_bytes())["weights"]
    entry = weights[name]
    with (folder / entry["file"]).open("r+b") as file:
        file.seek(entry["scales_offset"] if entry["scales_offset"] >= 0 else entry["offset"])
        file.write(bytes(64))


@pytest.mark.parametrize(
    ("broken", "level"),
    [("zeroed weight", "L3"), ("wrong scale", "L4"), ("wrong norm", "L4"), ("stale graph", "L2")],
)
def test_what_is_broken_on_purpose_fails_and_leaves_no_bundle(
    broken: str, level: str, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEEXPORT_CACHE_DIR", str(tmp_path / "cache"))
    if broken == "zeroed weight":
        original = steps.compile

        def compile_and_damage(*arguments: Any) -> Any:
            parts = original(*arguments)
            damage(parts[-1].folder, "model.layers.1.mlp.down_proj.weight")
            return parts

        monkeypatch.setattr(steps, "compile", compile_and_damage)
    elif broken in ("wrong scale", "wrong norm"):
        import onnx_ir as ir

        serialize = ir.serde.serialize_model
        attribute, op = ("scale", "GroupQueryAttention") if broken == "wrong scale" else ("epsilon", "LayerNorm")

        def sabotage(model: Any) -> Any:
            proto = serialize(model)
            for node in proto.graph.node:
                for found in node.attribute:
                    if found.name == attribute and op in node.op_type:
                        found.f = found.f * 0.9 if broken == "wrong scale" else 0.3
            return proto

        monkeypatch.setattr(ir.serde, "serialize_model", sabotage)
    else:
        from edgeexport.families import stages

        tables = stages.rope_tables

        def other_theta(text: Any, context: int) -> Any:
            return {name: table[::-1].copy() for name, table in tables(text, context).items()}

        monkeypatch.setattr(stages, "rope_tables", other_theta)
    with pytest.raises(EdgeExportError) as caught:
        build(str(checkpoints["llama"]), "host-ort", tmp_path / "out", quant="fp16", context=CONTEXT)
    assert caught.value.exit_code == 6
    assert {finding.where for finding in caught.value.findings} == {f"decoder {level}"}
    assert not list((tmp_path / "out").glob("*"))


def test_nan_weights_are_named(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(checkpoints["llama"], tmp_path / "nan")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(EdgeExportError) as caught:
        build(str(folder), "host-ort", tmp_path / "out", context=CONTEXT)
    assert caught.value.exit_code == 3
    assert caught.value.findings[0].code == "nonfinite-weight"
    assert "up_proj" in caught.value.findings[0].where + caught.value.findings[0].what
    assert not list((tmp_path / "out").glob("*"))


def test_a_shape_that_config_contradicts_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints["llama"], tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 161}))
    assert code_of(lambda: build(str(folder), "host-ort", tmp_path / "out")) == ("shape-mismatch", 3)


def test_a_missing_tokenizer_is_said_before_the_weights_are_touched(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(checkpoints["llama"], tmp_path / "no-tokenizer")
    (folder / "tokenizer.json").unlink()
    monkeypatch.setattr(steps, "trace", lambda *_: pytest.fail("the work had begun"))
    assert code_of(lambda: build(str(folder), "host-ort", tmp_path / "out"))[1] == 3


def test_stop_ids_come_from_config_where_nothing_else_names_them(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints["llama"], tmp_path / "bare")
    for name in ("tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink(missing_ok=True)
    result = build(str(folder), "host-ort", tmp_path / "one", context=CONTEXT, parity="L1")
    assert open_bundle(result.bundle).stop_ids == (families.find("llama").tiny["eos_token_id"],)
    assert result.findings == []
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    result = build(str(folder), "host-ort", tmp_path / "two", context=CONTEXT, parity="L1")
    assert [finding.code for finding in result.findings] == ["no-stop-token"]


def test_a_context_beyond_the_model_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    run = lambda: build(str(checkpoints["llama"]), "host-ort", tmp_path, context=100_000)  # noqa: E731
    assert code_of(run) == ("context-too-long", 2)


def test_too_little_memory_is_said_before_the_work(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    run = lambda: build(str(checkpoints["llama"]), "host-ort", tmp_path, max_rss=1 << 20)  # noqa: E731
    assert code_of(run) == ("max-rss-too-small", 2)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KB. Needs the right to mount."""
    place = tmp_path / "full"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a tmpfs here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_leaves_nothing(checkpoints: dict[str, Path], full_disk: Path) -> None:
    run = lambda: build(str(checkpoints["llama"]), "host-ort", full_disk, context=CONTEXT, parity="L1")  # noqa: E731
    assert code_of(run) == ("output-not-writable", 2)
    assert [path.name for path in full_disk.iterdir() if not path.name.endswith(".lock")] == []


@pytest.mark.parametrize("kind", ["Q8_0", "F16"])
def test_a_gguf_file_builds(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "Tiny.gguf"
    write_gguf(path, tiny_model("llama", num_key_value_heads=4), quantize=kind)
    result = build(str(path), "host-ort", tmp_path / "out", quant="fp32", context=CONTEXT)
    assert not [row for row in result.results if row.verdict is Verdict.FAIL]


def test_parity_climbs_again_over_a_bundle(built: BuildResult, checkpoints: dict[str, Path]) -> None:
    rows = parity(built.bundle, str(checkpoints["llama"]), level="L4")
    assert [row for row in rows if row.level in ("L1", "L2", "L3", "L4") and row.verdict is not Verdict.PASS] == []
    assert code_of(lambda: parity(built.bundle, str(checkpoints["qwen2"]))) == ("bundle-of-another-model", 8)


@pytest.mark.parametrize("reference", [False, True])
def test_export_gives_an_onnx_that_onnxruntime_runs(
    reference: bool, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    import onnxruntime as ort

    source = checkpoints["qwen2"]
    result = export(str(source), tmp_path / "out", context=CONTEXT, reference_weights=reference)
    session = ort.InferenceSession(str(result.path), providers=["CPUExecutionProvider"])
    tokens = np.arange(4, 15)
    feeds = {
        each.name: np.zeros(each.shape, np.float32) for each in session.get_inputs() if each.name.startswith("past")
    }
    feeds |= {"input_ids": tokens[None], "position": np.zeros(1, np.int64)}
    logits = session.run(["logits"], feeds)[0].reshape(-1)
    assert np.abs(logits - reference_logits(oracle(source), tokens)[-1]).max() < 1e-4
    weights = tmp_path / "out" / "model.safetensors"
    assert weights.exists() is reference
    if reference:
        assert weights.samefile(source / "model.safetensors")


def test_dump_writes_the_graph_of_each_step(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    build(str(checkpoints["llama"]), "host-ort", tmp_path / "out", context=CONTEXT, parity="L1", dump=tmp_path / "dump")
    names = {path.name for path in (tmp_path / "dump").iterdir()}
    assert {"decoder.canonical.onnx", "decoder.lowered.onnx", "decoder.plan.json"} <= names
