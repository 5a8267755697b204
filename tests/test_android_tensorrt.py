"""The C++ engine of android_runtime/tensorrt against Python's session, over a stand-in: no TensorRT, no GPU ran here.

What the stand-in opens as an engine names the ONNX graph that an engine would be built from; see
tests/tensorrt_stand_in/stand_in.cpp.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import rehash
from factories import with_tokenizer
from graphs import write_checkpoint
from native import CPP, SANITIZERS, libraries, programs, run
from sharing import alone, shared
from test_coreml_pipeline import small
from test_glm4v import CASES, checkpoint_of

from edgeexport import build, families, open_bundle
from edgeexport.core import Array
from edgeexport.session.image_file import Image
from edgeexport.session.inputs import Features
from edgeexport.session.session import Session

ENGINE, STAND_IN = CPP.parent / "tensorrt", Path(__file__).parent / "tensorrt_stand_in"
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror"]
CONTEXT, PREFILL, KEEP, TOKENS = 96, 32, 11, 8
ELEMENTS = {1: "float", 7: "int64", 10: "half"}
"""ONNX's element types as TensorRT calls them."""


def compiled(variant: str, main: Path, folder: Path, *flags: str) -> Path:
    """A program of the loader with this engine, over the stand-in; the rest of the loader is compiled already."""
    loader = programs(variant, ["edgeexport"]) / "libedgeexport.a"
    sources = [main, CPP / "src" / "engine.cpp", *ENGINE.glob("*.cpp")]
    folders = [f"-I{each}" for each in (CPP / "include", CPP / "src", ENGINE)] + ["-isystem", str(STAND_IN)]
    made, library = folder / main.stem, folder / "libstand_in.so"
    shared = ["-shared", "-fPIC", "-Wl,--exclude-libs,ALL", "-Wl,-Bsymbolic"]  # what it allocates is not the loader's
    for command in (
        ["g++", *FLAGS, *flags, *folders, *shared, STAND_IN / "stand_in.cpp", loader, "-o", library],
        ["g++", *FLAGS, *flags, "-DEDGEEXPORT_TENSORRT", *folders, *sources, loader, library,
         f"-Wl,-rpath,{folder}", "-pthread", "-ldl", "-o", made],
    ):  # fmt: skip
        run(command)
    return made


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The loader's command-line tool under AddressSanitizer and UBSan."""
    flags = [f"-fsanitize={SANITIZERS['asan']}", "-fno-sanitize-recover=all", "-g"]
    main, folder = CPP / "tools" / "edgeexport_run.cpp", shared(tmp_path_factory, "tensorrt")
    with alone(folder):
        made = folder / main.stem
        return made if made.exists() else compiled("asan", main, folder, *flags)


def stand_in(bundle: Path, graph: str, plan: dict[str, Any]) -> bytes:
    """What the stand-in opens in an engine's place: the graph with its interface, as TensorRT's parser gives it."""
    import onnx

    found = onnx.load(str(bundle / graph), load_external_data=False).graph
    tensors = []
    for value in (*found.input, *found.output):
        sizes = [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        network = [-1 if isinstance(size, str) else size for size in sizes]
        tensors.append({
            "name": value.name,
            "input": value in found.input,
            "dtype": ELEMENTS[value.type.tensor_type.elem_type],
            "graph": sizes,
            "network": [1, -1, *network[2:]] if value.name == "logits" else network,
            "most": plan["profile"].get(value.name, [[], [], network])[2],
        })  # fmt: skip
    described = {
        "graph": str(bundle / graph), "onnxruntime": str(libraries()["onnxruntime"]), "in_place": plan["in_place"],
        "tensors": tensors, "state": plan["state"],
    }  # fmt: skip
    text = json.dumps(described).encode()
    return struct.pack("<4s12xQ", b"vtrt", 24 + len(text)) + text


def with_engines(bundle: Path, folder: Path | None = None) -> Path:
    """The bundle, with what stands in for its engines: in the engines' place in it, or in a folder outside of it."""
    rtx = any(bundle.glob("*.engine"))
    folder = bundle if rtx else folder or bundle.parent / "engines"
    folder.mkdir(exist_ok=True)
    for file in bundle.glob("*.build_plan.json"):
        for plan in json.loads(file.read_bytes())["graphs"]:
            for engine in plan["engines"]:
                (folder / engine["file"]).write_bytes(stand_in(bundle, plan["graph"], plan))
    if rtx:
        rehash(bundle)
    return bundle


def llama(target: str, root: Path) -> Path:
    checkpoint = with_tokenizer(write_checkpoint(root / "model", families.find("llama").tiny))
    made = build(
        str(checkpoint), small(target, PREFILL, root), root / "out", quant="fp16", context=CONTEXT, parity="L1"
    )
    return with_engines(made.bundle)


@pytest.fixture(scope="module")
def jetson(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Graphs of primitives: a cache goes from one buffer to another."""
    return llama("jetson-trt", tmp_path_factory.mktemp("jetson"))


@pytest.fixture(scope="module")
def rtx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fused graphs: a cache is updated in place."""
    return llama("rtx-trt", tmp_path_factory.mktemp("rtx"))


@pytest.fixture(params=["jetson", "rtx"])
def bundle(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


def in_pieces(session: Session, prompt: Sequence[int], shown: Sequence[Features] = ()) -> Array:
    """Logits of the last token, with the prompt in the pieces that the engine takes; the first shows everything."""
    for start in range(0, len(prompt), PREFILL):
        logits = session.prefill(prompt[start : start + PREFILL], () if start else shown)
    return logits.copy()


def greedy(session: Session, first: Array) -> list[Array]:
    rows = [first]
    while len(rows) < TOKENS:
        rows.append(session.decode(int(rows[-1].argmax())).copy())
    return rows


def spoken(program: Path, bundle: Path, logits: Path, prompts: Sequence[Sequence[int]], *more: object) -> Array:
    """The logits of each token that the loader chose; the tokens are the largest ones'."""
    given = [part for prompt in prompts for part in ("--tokens", ",".join(map(str, prompt)))]
    answers = json.loads(run([program, bundle, *given, "--max-tokens", TOKENS, "--logits", logits, *more]))["answers"]
    rows = np.fromfile(logits, np.float32).reshape(len(prompts) * TOKENS, -1)
    assert [token for each in answers for token in each["tokens"]] == rows.argmax(1).tolist()
    return rows


def test_its_tokens_are_pythons(program: Path, bundle: Path, tmp_path: Path) -> None:
    """Prompts shorter and longer than a piece, single tokens, and one that starts anew amid what is cached."""
    prompts = [list(range(5, 5 + length)) for length in (20, 70, 3)]
    rows = []
    with open_bundle(bundle).session(threads=2) as session:
        for i, prompt in enumerate(prompts):
            session.truncate(KEEP if i else 0)
            rows += greedy(session, in_pieces(session, prompt))
    found = spoken(program, bundle, tmp_path / "logits", prompts, "--keep", KEEP)
    np.testing.assert_allclose(found, np.stack(rows), rtol=0, atol=1e-6)


def test_a_model_that_sees(program: Path, tmp_path: Path) -> None:
    """Embeddings in pieces, M-RoPE positions, and an encoder for each grid of patches."""
    model = checkpoint_of(CASES["plain"], tmp_path / "model")
    made = build(
        str(model), small("jetson-trt", PREFILL, tmp_path), tmp_path / "out", quant="fp16", context=CONTEXT, parity="L1"
    )
    bundle = open_bundle(with_engines(made.bundle, tmp_path / "named"))
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    (tmp_path / "picture").write_bytes(pixels.tobytes())
    picture = CASES["plain"].config["image_token_id"]
    prompt = [*range(5, 15), picture, *range(20, 60)]
    with bundle.session(threads=2) as session:
        seen = session.encode_image(Image(pixels))
        wanted = greedy(session, in_pieces(session, session.inputs.expand(prompt, [seen]), [seen]))
    shown = ["--picture", tmp_path / "picture", *pixels.shape[:2], "--engines", tmp_path / "named"]
    found = spoken(program, bundle.path, tmp_path / "logits", [prompt], *shown)
    np.testing.assert_allclose(found, np.stack(wanted), rtol=0, atol=1e-6)


def refusal(program: Path, bundle: Path, *more: object, **environment: str) -> str:
    """The code with which it ends. Sanitizers end a program with another one."""
    command = [str(part) for part in (program, bundle, "--tokens", "5,6,7", *more)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert done.returncode == 8, done.stdout + done.stderr
    return done.stderr.partition("error[")[2].partition("]")[0]


FAULTS = {
    "no-device": "no-gpu",
    "runtime": "runtime-too-old",
    "context": "out-of-memory",
    "memory": "out-of-memory",
    "memory:9": "out-of-memory",  # of a cache
    "pinned": "out-of-memory",
    "enqueue": "runtime-failed",
    "enqueue:3": "runtime-failed",
    "enqueue-memory:2": "out-of-memory",
    "kernel:2": "runtime-failed",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_of_the_gpu_is_an_error_with_its_code(fault: str, program: Path, jetson: Path) -> None:
    assert refusal(program, jetson, STAND_IN_FAULT=fault) == FAULTS[fault]


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """What the engine says of its network, changed."""

    def damage(engine: bytes) -> bytes:
        described = json.loads(engine[24:])
        change({each["name"]: each for each in described["tensors"]} | {"": described})
        text = json.dumps(described).encode()
        return struct.pack("<4s12xQ", b"vtrt", 24 + len(text)) + text

    return damage


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda engine: b"",
    "cut": lambda engine: engine[:-1],
    "cut in its header": lambda engine: engine[:20],
    "another name": changed(lambda found: found["logits"].update(name="scores")),
    "an output in an input's place": changed(lambda found: found["position"].update(input=False)),
    "one more": changed(lambda found: found[""]["tensors"].append({**found["position"], "name": "more"})),
    "one fewer": changed(lambda found: found[""]["tensors"].remove(found["logits"])),
    "logits in float16": changed(lambda found: found["logits"].update(dtype="half")),
    "another vocabulary": changed(lambda found: found["logits"].update(network=[1, -1, 77], graph=[1, 1, 77])),
    "all tokens' logits": changed(lambda found: found["logits"].update(graph=[1, "T", 320])),
    "a cache of whole numbers": changed(lambda found: found["past_key.0"].update(dtype="int64")),
    "a shorter cache": changed(lambda found: found["past_value.1"].update(network=[1, 2, 64, 16])),
    "another precision of what replaces it": changed(lambda found: found["present_key.1"].update(dtype="float")),
    "a size that nothing tells": changed(lambda found: found["logits"].update(graph=[1, "U", 320])),
    "no tokens at all": changed(lambda found: found["input_ids"].update(most=[1, 0])),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_another_engine_is_refused(damage: str, program: Path, jetson: Path, tmp_path: Path) -> None:
    held = (jetson.parent / "engines" / "decoder.engine").read_bytes()
    (tmp_path / "decoder.engine").write_bytes(DAMAGES[damage](held))
    assert refusal(program, jetson, "--engines", tmp_path) == "artifact-does-not-open"


@pytest.mark.parametrize("damage", ["empty", "cut", "cut in its header", "another kind"])
def test_a_cut_engine_is_refused_though_its_hash_fits(damage: str, program: Path, rtx: Path, tmp_path: Path) -> None:
    """By the loader: TensorRT-RTX is not asked to."""
    copy = shutil.copytree(rtx, tmp_path / "bundle")
    engine = copy / "decoder.engine"
    engine.write_bytes({**DAMAGES, "another kind": lambda held: b"ftrt" + held[4:]}[damage](engine.read_bytes()))
    rehash(copy)
    assert refusal(program, copy) == "artifact-does-not-open"


def test_an_engine_that_was_not_built_yet_is_asked_for(program: Path, jetson: Path, tmp_path: Path) -> None:
    assert refusal(program, jetson, "--engines", tmp_path) == "engine-to-build"


def test_a_gpu_of_compute_capability_7_5_takes_the_file_of_its_own(program: Path, rtx: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(rtx, tmp_path / "bundle")
    (copy / "decoder.engine").rename(copy / "decoder.sm75.engine")
    (copy / "decoder.engine").write_bytes(b"of other GPUs")
    manifest = json.loads((copy / "manifest.json").read_bytes())
    manifest["files"]["decoder.sm75.engine"] = manifest["files"]["decoder.engine"]
    manifest["components"][0]["files"].append("decoder.sm75.engine")
    (copy / "manifest.json").write_text(json.dumps(manifest))
    rehash(copy)
    run(["env", "STAND_IN_CAPABILITY=75", program, copy, "--tokens", "5,6,7"])
    assert refusal(program, copy, STAND_IN_CAPABILITY="89") == "artifact-does-not-open"


def test_without_it_the_loader_says_so(jetson: Path) -> None:
    assert refusal(programs("plain", ["edgeexport-run"]) / "edgeexport-run", jetson) == "backend-not-built"


@pytest.mark.scale
def test_a_token_allocates_nothing(bundle: Path, tmp_path: Path) -> None:
    counter = compiled("plain", CPP / "tests" / "test_allocations.cpp", tmp_path, "-static-libstdc++")
    print(run([counter, bundle, *libraries().values(), tmp_path]))
