"""The MNN backend: every op and family in MNN's own engine, the weight file, the directory, and what is refused."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from cases.ops import OPS, OpCase, linear
from factories import with_tokenizer
from graphs import (
    FAMILIES,
    TOKENS,
    Decoder,
    Traced,
    Zoo,
    assert_built,
    stored_weights,
    traced,
    write_checkpoint,
    written,
)
from test_backend_ops import build, oracle
from test_backends_contract import LARGER

from edgeexport import errors, families, targets
from edgeexport.backends import mnn, mnn_convert, mnn_native, mnn_runner
from edgeexport.backends.mnn_engine import EXACT, NO_TOKENIZER, value_of
from edgeexport.backends.mnn_graph import Graph
from edgeexport.core import Artifact, CanonicalModel, QuantPlan, Target, TensorSpec
from edgeexport.quant import FORMATS, SCHEMES, plan

LOOKED_UP = tuple(name for name in SCHEMES if name != "fp32")
"""Schemes whose embedding MNN-LLM looks up."""


def target(**options: Any) -> Target:
    found = targets.load("android-mnn")
    return replace(found, options={**found.options, **options})


def compiled(models: list[CanonicalModel], plan: QuantPlan, folder: Path, **options: Any) -> Artifact:
    """What the backend writes of one component into `folder`, which is made."""
    return written(mnn, models, target(**options), plan, folder)


@pytest.fixture
def llama(zoo: Zoo, tmp_path: Path) -> tuple[Artifact, Path]:
    """A tiny decoder's files in int4."""
    found = zoo.traced("llama")
    return compiled([found.model], found.plan("int4-b32"), tmp_path / "llama"), tmp_path / "llama"


def moved(quant: QuantPlan) -> QuantPlan:
    """The plan with an offset for each block of 4-bit integers, those of the embedding too."""
    formats = {
        name: FORMATS[f"{fmt.name}-o16"] if fmt.bits == 4 and fmt.block else fmt for name, fmt in quant.formats.items()
    }
    return replace(quant, formats=formats)


# ops


OWN = [linear(f"a weight in {name}", name) for name in (*(f"int4-b{size}-o16" for size in (16, 32, 128)), "int8-b16")]
OWN += [linear("blocks with offsets, rows that fill no register", "int4-b32-o16", rows=23)]


def is_refused(case: OpCase) -> bool:
    """A cache by itself, and tables of no token ids that are not float32."""
    tables = [weight for weight in case.weights.values() if case.op == "Gather" or case.note[:6] == "a tied"]
    return case.op == "TensorScatter" or any(weight.format != "fp32" for weight in tables)


@pytest.mark.parametrize("case", [case for case in OPS + OWN if not case.attention], ids=str)
def test_the_graph_computes_what_the_op_means(case: OpCase, tmp_path: Path) -> None:
    model, plan = build(case, tmp_path)
    if is_refused(case):
        findings = mnn.check(model, target(), plan)
        assert findings and {finding.code for finding in findings} == {"op-not-lowered"}
        return
    artifact = compiled([model], plan, tmp_path / "out")
    graph = mnn_runner.open_graph(tmp_path / "out", artifact, threads=1, exact=True)
    got = graph.run(case.inputs)
    graph.close()
    expected = oracle(case, model, plan)
    for name in case.outputs:
        assert got[name].shape == expected[name].shape
        assert got[name].dtype == expected[name].dtype
        np.testing.assert_allclose(got[name], expected[name], atol=case.tolerance, rtol=1e-5)


@pytest.mark.parametrize("name", ["int4-b32", "int4-b16-o16", "int4-b32-o16", "int4-b128-o16", "int8-b32", "int8-b16"])
def test_int8_arithmetic_computes_the_same_where_rounding_loses_nothing(name: str, tmp_path: Path) -> None:
    """As it ships, MNN multiplies integers. Here an activation is made of such."""
    import _mnncengine._nn as native
    from MNN import expr

    case = linear("whole numbers", name, rows=64, length=1)
    x = np.random.default_rng(0).integers(-127, 128, case.inputs["x"].shape).astype(np.float32)
    x[..., :2] = -128, 127  # the range that int8 has: a scale of 1
    case = replace(case, inputs={"x": x})
    model, quant = build(case, tmp_path)
    compiled([model], quant, tmp_path)
    modes = (expr.Backend.CPU, expr.MemoryMode.Low, expr.PowerMode.Normal, expr.PrecisionMode.Normal, 1)
    manager = native.create_runtime_manager(({"backend": "CPU", "numThread": 1, "memory": 2},))
    module = native.load_module_from_file(
        manager, ["x"], ["y"], str(tmp_path / "decoder.mnn"), False, True, False, *modes
    )
    got = np.array(expr.convert(module.onForward([value_of(x)])[0], expr.NCHW).read()).reshape(1, 1, 64)
    np.testing.assert_allclose(got, oracle(case, model, quant)["y"], atol=2e-3)  # of sums of some hundreds


@pytest.mark.parametrize("case", [case for case in OPS if case.attention], ids=str)
def test_an_attention_over_a_cache_becomes_mnns_own(case: OpCase, tmp_path: Path) -> None:
    model, _ = build(case, tmp_path)
    assert mnn.OPS.check(model.graph.graph) == []


# families


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *((name, scheme) for name in ("llama", "glm4v", "autoglm_phone") for scheme in LOOKED_UP),
        *((name, "int4-b32") for name in FAMILIES if name not in ("llama", "glm4v", "autoglm_phone")),
    ],
)
def test_every_family_and_scheme_computes_what_the_canonical_graph_computes(
    name: str, scheme: str, zoo: Zoo, tmp_path: Path
) -> None:
    found = zoo.traced(name)
    weights = stored_weights(found, scheme)
    artifacts = parts(found, scheme, tmp_path)
    assert_built(tmp_path, artifacts, found, weights)


def parts(
    found: Traced, scheme: str, folder: Path, as_planned: Callable[[QuantPlan], QuantPlan] = lambda quant: quant
) -> dict[str, Artifact]:
    """Every component's files, in one folder."""
    return {
        component: compiled(found.variants(component), as_planned(found.plan(scheme, component)), folder)
        for component in found.components()
    }


@pytest.mark.parametrize(("name", "scheme"), [("llama", "int4-b32"), ("glm4v", "int4-b64")])
def test_blocks_with_offsets_compute_what_the_canonical_graph_computes(
    name: str, scheme: str, zoo: Zoo, tmp_path: Path
) -> None:
    """One of these looks its embeddings up in the decoder's own file, the other in one of their own."""
    found = zoo.traced(name)
    assert_built(tmp_path, parts(found, scheme, tmp_path, moved), found, stored_weights(found, scheme, moved))


def test_a_plan_for_mnn_carries_q4_1_over_in_blocks_with_offsets() -> None:
    quant = plan({"w": (64, 64)}, {"w": "linear"}, "int4-b32", mnn.TRAITS, {"w": "Q4_1"})
    assert (quant.formats["w"].name, quant.carried) == ("int4-b32-o16", {"w"})


@pytest.mark.parametrize("scheme", LOOKED_UP)
@pytest.mark.parametrize("name", ["glm4v", "autoglm_phone"])
def test_the_directory_of_a_model_that_sees_answers_a_text_by_itself(
    name: str, scheme: str, zoo: Zoo, tmp_path: Path
) -> None:
    """MNN-LLM, told no more than config.json, looks the embeddings up in the other component's file."""
    import _mnncengine.llm as engine

    found = zoo.traced(name)
    parts(found, scheme, tmp_path)
    (tmp_path / "tokenizer.txt").write_text(NO_TOKENIZER)
    llm = engine.create(str(tmp_path / "config.json"), False)
    llm.set_config(json.dumps(EXACT))
    assert llm.load()
    llm.generate_init(None, None)
    value = llm.forward([int(token) for token in TOKENS[:9]])
    logits = np.array(value.read()).reshape(-1)
    del value
    np.testing.assert_allclose(logits, Decoder(found, stored_weights(found, scheme)).step(TOKENS[:9], 0), atol=1e-5)


@pytest.mark.parametrize("scheme", ["int8", "int4-b32"])
def test_as_it_ships_activations_are_rounded_to_int8(scheme: str, zoo: Zoo, tmp_path: Path) -> None:
    found = zoo.traced("llama")
    artifact = compiled([found.model], moved(found.plan(scheme)), tmp_path)
    expected = Decoder(found, stored_weights(found, scheme, moved)).step(TOKENS[:9], 0)
    noise = mnn_runner.open_decoder(tmp_path, artifact).step(TOKENS[:9], 0) - expected
    assert 1e-4 < np.sqrt((noise**2).mean() / (expected**2).mean()) < 0.05


def test_going_back_in_the_cache_forgets_what_came_after(llama: tuple[Artifact, Path]) -> None:
    artifact, folder = llama
    whole, back = (mnn_runner.open_decoder(folder, artifact, threads=1, exact=True) for _ in range(2))
    expected = whole.step(TOKENS[:10], 0)
    back.step(TOKENS[10:30], 0)
    back.step(TOKENS[:6], 0)
    back.step(TOKENS[20:27], 6)
    np.testing.assert_allclose(back.step(TOKENS[6:10], 6), expected, atol=1e-5)


def test_signatures_are_those_of_the_canonical_graph(zoo: Zoo, llama: tuple[Artifact, Path]) -> None:
    artifact, folder = llama
    model = zoo.traced("llama").model
    found = mnn_runner.read_signature(folder, artifact)
    assert found == {spec.name: spec for spec in (*model.inputs, *model.outputs)}
    with pytest.raises(errors.BundleError, match="bundle-no-variant"):
        mnn_runner.read_signature(folder, artifact, "44x20")


# files


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """A model whose weights outweigh its graph."""
    config = {**families.find("llama").tiny, **LARGER}
    return traced(write_checkpoint(tmp_path_factory.mktemp("larger") / "model", config, "bfloat16"))


@pytest.mark.parametrize("scheme", ["fp16", "int8", "int4-b32"])
def test_files_have_the_size_that_the_plan_says(scheme: str, larger: Traced, tmp_path: Path) -> None:
    plan = larger.plan(scheme)
    artifact = compiled([larger.model], plan, tmp_path)
    sizes = {name: (tmp_path / name).stat().st_size for name in artifact.files}
    assert sorted(sizes) == sorted(path.name for path in tmp_path.iterdir())
    ideal = plan.ideal_bytes({name: ref.shape for name, ref in larger.model.weights.items()})
    more = 0.03 + (2 / 32 if scheme == "int8" else 0)  # rotary tables and headers; a row's scale for each block
    assert ideal <= sizes["decoder.mnn.weight"] < (1 + more) * ideal
    assert sizes["decoder.mnn"] < 64_000  # a graph of four layers, with no weight in it


def test_two_builds_in_two_folders_have_the_same_bytes(zoo: Zoo, tmp_path: Path) -> None:
    found = zoo.traced("glm4")
    folders = (tmp_path / "one", tmp_path / "another" / "folder")
    one, two = (compiled([found.model], found.plan("int4-b32"), folder) for folder in folders)
    assert one == two
    for name in one.files:
        first, second = ((folder / name).read_bytes() for folder in folders)
        assert first == second
        assert str(tmp_path).encode() not in first


def test_the_engine_is_told_where_the_context_ends(llama: tuple[Artifact, Path]) -> None:
    config = json.loads((llama[1] / "config.json").read_text())
    assert config["max_all_tokens"] == 32
    assert config["thread_num"] == 4
    assert {config["llm_model"], config["llm_weight"]} <= set(llama[0].files)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("decoder.mnn.weight", "size"),
        ("decoder.mnn", "Load module failed"),
        ("llm_config.json", "Expecting|Unterminated|delimiter"),
        ("config.json", "Expecting|Unterminated|delimiter"),
    ],
)
def test_a_damaged_artifact_does_not_open(name: str, why: str, llama: tuple[Artifact, Path]) -> None:
    artifact, folder = llama
    os.truncate(folder / name, (folder / name).stat().st_size // 2)
    with pytest.raises(errors.BundleError, match="artifact-does-not-open") as caught:
        mnn_runner.open_decoder(folder, artifact)
    assert re.search(why, caught.value.findings[0].why)


@pytest.mark.parametrize("name", ["../decoder.mnn", "/etc/passwd", "", "."])
def test_a_configuration_names_only_files_beside_it(name: str, llama: tuple[Artifact, Path]) -> None:
    artifact, folder = llama
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "llm_model": name}))
    (folder.parent / "decoder.mnn").write_bytes((folder / "decoder.mnn").read_bytes())
    with pytest.raises(errors.BundleError, match="artifact-does-not-open"):
        mnn_runner.open_decoder(folder, artifact)


def test_nothing_is_printed_and_home_is_left_alone(
    llama: tuple[Artifact, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    artifact, folder = llama
    home = tmp_path / "home"
    home.mkdir()
    code = f"""
import msgspec, numpy as np
from pathlib import Path
from edgeexport.backends import mnn_runner
from edgeexport.core import Artifact
artifact = msgspec.json.decode({msgspec_of(artifact)!r}, type=Artifact)
decoder = mnn_runner.open_decoder(Path({str(folder)!r}), artifact)
for count in (1, 3, 1, 2):
    decoder.step(np.arange(count), 0)
"""
    environment = {**os.environ, "HOME": str(home)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")
    assert list(home.iterdir()) == []


def msgspec_of(artifact: Artifact) -> bytes:
    import msgspec

    return msgspec.json.encode(artifact)


# the converter


def graph_of(op: str) -> tuple[bytes, Graph]:
    graph = Graph()
    x = graph.input("x", ir.DataType.FLOAT, [1, 4])
    return graph.onnx([(TensorSpec("y", "float32", (1, 4)), graph.emit(op, [x]))]), graph


def test_an_op_that_mnn_does_not_have_is_named() -> None:
    onnx, graph = graph_of("Bernoulli")
    with pytest.raises(errors.LoweringError, match="mnn-conversion-failed") as caught:
        mnn_convert.convert(onnx, graph.placeholders, "vision")
    assert "Bernoulli" in caught.value.findings[0].why
    assert caught.value.findings[0].where == "vision"


def test_a_conversion_that_makes_no_file_says_what_mnn_said() -> None:
    with pytest.raises(errors.LoweringError, match="mnn-conversion-failed") as caught:
        mnn_convert.convert(b"no graph", Graph().placeholders, "decoder")
    assert "onnx" in caught.value.findings[0].why.lower()


def test_a_conversion_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mnn_convert, "CONVERT", "import time; time.sleep(60)")
    monkeypatch.setattr(mnn_convert, "SECONDS", 0.5)
    onnx, graph = graph_of("Sigmoid")
    with pytest.raises(errors.LoweringError, match="mnn-conversion-failed"):
        mnn_convert.convert(onnx, graph.placeholders, "decoder")


def test_the_converter_has_no_network_and_the_telemetry_is_not_loaded(tmp_path: Path) -> None:
    onnx, _ = graph_of("Sigmoid")
    (tmp_path / "a.onnx").write_bytes(onnx)
    check = (
        "; import socket; print('MNN.tools' in str(sorted(sys.modules)), socket.socket().connect_ex(('192.0.2.1', 9)))"
    )
    calls = json.dumps([["-f", "ONNX", "--modelFile", "a.onnx", "--MNNModel", "a.mnn"]])
    done = subprocess.run(
        [sys.executable, "-c", mnn_convert.CONVERT + check, calls],
        capture_output=True, text=True, cwd=tmp_path, check=True, timeout=60,
    )  # fmt: skip
    assert (tmp_path / "a.mnn").exists()
    loaded, connected = done.stdout.split()[-2:]
    assert loaded == "False"
    if os.geteuid() == 0:
        import errno

        assert int(connected) == errno.ENETUNREACH


WITHOUT_INTERNET = """
import ctypes, struct
def line(code, yes, no, value): return struct.pack("HBBI", code, yes, no, value)
program = b"".join([
    line(0x20, 0, 0, 0), line(0x15, 0, 4, 41),  # the number of the call: socket, or go on to the end
    line(0x20, 0, 0, 16), line(0x15, 1, 0, 2), line(0x15, 0, 1, 10),  # its family: AF_INET or AF_INET6
    line(0x06, 0, 0, 0x80000000), line(0x06, 0, 0, 0x7FFF0000),  # the process is killed; all else is allowed
])
held = ctypes.create_string_buffer(program)
filters = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(held)))
native = ctypes.CDLL(None)
assert native.prctl(38, 1, 0, 0, 0) == 0 and native.prctl(22, 2, filters) == 0
"""
"""Has Linux kill this process, or one that it starts, at its first socket of the internet: a seccomp filter."""


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="the filter is of Linux on x86-64"
)
def test_a_build_opens_no_connection(tmp_path: Path) -> None:
    model = with_tokenizer(write_checkpoint(tmp_path / "model", families.find("llama").tiny, "float16"))
    build = [
        "build", str(model), "--target", "android-mnn", "--quant", "fp16", "--context", "64", "--parity", "L1",
        "-o", str(tmp_path / "out"),
    ]  # fmt: skip

    def run(code: str) -> int:
        return subprocess.run([sys.executable, "-c", WITHOUT_INTERNET + code], check=False).returncode

    assert run(f"from edgeexport.cli_edge import execute; raise SystemExit(execute({build!r}))") == 0
    assert (tmp_path / "out" / "model-android-mnn" / "decoder.mnn").exists()
    assert run("import socket; socket.socket(socket.AF_INET)") == -signal.SIGSYS
    ask = [sys.executable, "-c", "import socket; socket.socket(socket.AF_INET6)"]
    assert run(f"import subprocess; raise SystemExit(-subprocess.run({ask!r}).returncode)") == signal.SIGSYS


# what is refused


def test_an_embedding_in_float32_is_refused(zoo: Zoo) -> None:
    found = zoo.traced("llama")
    (finding,) = mnn.check(found.model, target(), found.plan("fp32"))
    assert finding.code == "op-not-lowered"
    assert "float16" in finding.why
    assert "--quant" in finding.fix


def test_a_table_in_float32_is_refused_in_a_component_of_its_own(zoo: Zoo) -> None:
    found = zoo.traced("glm4v")
    (finding,) = mnn.check(found.parts["embed", ""], target(), found.plan("fp32", "embed"))
    assert finding.code == "op-not-lowered"
    assert "float16" in finding.why


@pytest.mark.parametrize(
    ("module", "name", "value", "why"),
    [("platform", "machine", lambda: "arm64", "arm64"), ("mnn_native", "FORWARD", "_Znothing", "no such call"),
     ("mnn_native", "FUNCTIONS", 24, "laid out")],
)  # fmt: skip
def test_embeddings_are_fed_only_to_an_engine_that_is_known(
    module: str, name: str, value: Any, why: str, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = zoo.traced("glm4v")
    artifact = compiled([found.model], found.plan("int8"), tmp_path)
    room: Any = mnn_native if module == "mnn_native" else mnn_native.platform
    monkeypatch.setattr(room, name, value)
    with pytest.raises(errors.ToolError, match="mnn-takes-no-embeddings") as caught:
        mnn_runner.open_decoder(tmp_path, artifact)
    assert why in caught.value.findings[0].why


# the tokenizer


GLM = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""How GLM-4's and Llama 3's tokenizers cut a text."""
PIECES = (
    "The quick brown fox", "你好", "世界", "打开微信", "🙂", "👩‍👩‍👧", "🇨🇳", "100%",
    "def f(x):\n\treturn x**2",
    "for(int i=0;i<10;++i){}", "12345", "3.14", "don't", "I'LL", "ÄÖÜ", "éé", "русский текст", "العربية", "ไทย",
    "\u00a0", "\u3000", "，。！", "½", "²", "Ⅳ", "<|im_start|>", "<|im_end|>", "http://a.b/c?d=1&e=2",
    "__init__", "日本語", "한국어", "…", "“q”", "\r\n", "\t\t",
)  # fmt: skip


def lines() -> list[str]:
    """1,000 lines of mixed pieces, with spaces of several widths between and around them."""
    rng = np.random.default_rng(11)
    made = []
    for _ in range(1000):
        gaps = rng.choice([" ", "", "  ", "\n"], 14)
        pieces = rng.choice(PIECES, int(rng.integers(1, 12)))
        made.append("".join(gap + piece for gap, piece in zip(gaps, pieces, strict=False)) + gaps[-1])
    return made


def trained(splitter: str) -> bytes:
    """A byte-level tokenizer.json, as `splitter` cuts, trained on our own documentation."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    steps = pre_tokenizers
    split = {
        "digits": [steps.Digits(individual_digits=True), steps.ByteLevel(add_prefix_space=False)],
        "plain": [steps.ByteLevel(add_prefix_space=False)],
        "glm": [steps.Split(Regex(GLM), "isolated"), steps.ByteLevel(add_prefix_space=False, use_regex=False)],
    }
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = steps.Sequence(split[splitter])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=steps.ByteLevel.alphabet(), show_progress=False)
    pages = (Path(__file__).parent.parent / "docs").glob("*.md")
    tokenizer.train_from_iterator([*(page.read_text() for page in pages), *PIECES], trainer)
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    return tokenizer.to_str().encode()


@pytest.mark.parametrize("splitter", ["digits", "plain", "glm"])
def test_mnn_tokenises_1000_mixed_lines_as_tokenizer_json_does(
    splitter: str, llama: tuple[Artifact, Path], tmp_path: Path
) -> None:
    import _mnncengine.llm as engine
    from tokenizers import Tokenizer

    artifact, folder = llama
    files = {"tokenizer.json": trained(splitter), "chat_template.jinja": b"[{{ messages[0].content }}]"}
    made = mnn.write_package(target(), artifact, folder, files, [7], 32, folder)
    assert made.name == json.loads((folder / "config.json").read_text())["tokenizer_file"]
    llm = engine.create(str(folder / "config.json"), False)
    assert llm.load()
    expected = Tokenizer.from_buffer(files["tokenizer.json"])
    for line in lines():
        assert list(llm.tokenizer_encode(line)) == expected.encode(line, add_special_tokens=False).ids, line
    assert llm.apply_chat_template("Hello") == "[Hello]"


METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
"""What transformers' LlamaTokenizer cuts by. After a special token MNN puts a mark that it does not put."""


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"normalizer": {"type": "Lowercase"}}, "Lowercase"), ({"pre_tokenizer": METASPACE}, "Metaspace that marks")],
)
def test_a_tokenizer_that_mnn_does_not_have_is_refused(
    changed: dict[str, Any], named: str, llama: tuple[Artifact, Path], tmp_path: Path
) -> None:
    files = {"tokenizer.json": json.dumps({**json.loads(trained("plain")), **changed}).encode()}
    with pytest.raises(errors.LoweringError, match="mnn-tokenizer-unsupported") as caught:
        mnn.write_package(target(), *llama, files, [7], 32, tmp_path)
    assert named in caught.value.findings[0].what
