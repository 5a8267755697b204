"""The loader as a phone's processor runs it: emulated aarch64 with the runtimes' own aarch64 libraries, and compilers'
view of Android's three processors. Python's session on this machine decides: it is fed the very same tokens, and where
its two best logits are not near a tie, the loader must have chosen as it does."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import with_tokenizer
from graphs import write_checkpoint
from native import CPP, ROOT, programs, run
from test_android_runtime import built, image_and_sound

from edgeexport import build, families, open_bundle
from edgeexport.bundle.golden import kl_divergence
from edgeexport.parity import gates
from edgeexport.parity.compare import margins
from edgeexport.parity.examples import TEXTS
from edgeexport.quant import schemes
from edgeexport.session.inputs import Features

TOOLS = ROOT / "build" / "android" / "tools"
CROSS = Path("/usr/aarch64-linux-gnu/lib")
LIBRARIES = {"onnxruntime": ("onnxruntime", "libonnxruntime.so."), "litert": ("ai-edge-litert", "libLiteRt.so")}
"""By the loader's option: where a runtime's library comes from."""
PARTS = {"cortex-a72": "0xd08", "cortex-a76": "0xd0b", "max": "0xd47"}
"""Of 2015, without int8 dot products; of 2018, with them; all that the emulator knows, int8 matrices among it."""
CORE = """processor\t: {number}
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x1
CPU part\t: {part}
CPU revision\t: 0

"""
CASES: list[Any] = [
    ("tiny", "android-ort", "fp32", "cortex-a72", 2, 16, ()),
    ("tiny", "android-tflite", "fp32", "max", 2, 16, ()),
    ("smollm2-135m", "android-ort", "int4-b32", "cortex-a76", 2, 12, pytest.mark.real),
    ("smollm2-135m", "android-tflite", "int4-b32", "cortex-a76", 2, 8, pytest.mark.real),
    ("smollm2-135m", "android-ort", "int4-b32", "cortex-a76", 10, 32, pytest.mark.scale),
    ("smollm2-135m", "android-ort", "int4-b32", "max", 4, 32, pytest.mark.scale),
    ("smollm2-135m", "android-ort", "int4-b32", "cortex-a72", 2, 8, pytest.mark.scale),
    ("smollm2-135m", "android-ort", "int8", "cortex-a76", 10, 8, pytest.mark.scale),
    ("smollm2-135m", "android-ort", "fp32", "cortex-a76", 20, 4, pytest.mark.scale),
    ("smollm2-135m", "android-tflite", "int4-b32", "max", 10, 32, pytest.mark.scale),
]
"""(model, target, scheme, processor, prompts, tokens of each answer)"""
ABIS = {
    "arm64-v8a": "aarch64-linux-musl",
    "armeabi-v7a": "arm-linux-musleabihf",
    "x86_64": "x86_64-linux-musl",
}


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """By processor: the emulator, the loader's program, and where its runtimes are."""
    if shutil.which("qemu-aarch64-static") is None:
        pytest.skip("no qemu-aarch64-static: apt-get install qemu-user-static")
    program = [str(programs("aarch64", ["edgeexport-run"]) / "edgeexport-run"), "--threads", "2"]
    libraries = tmp_path_factory.mktemp("libraries")
    for option, (package, library) in LIBRARIES.items():
        name = f"{package.replace('-', '_')}-{version(package)}-*aarch64.whl"
        wheel = next(iter(TOOLS.glob(name)), None)
        if wheel is None:
            pytest.skip(f"no {name}: make android-tools")
        with zipfile.ZipFile(wheel) as files:
            (member,) = (name for name in files.namelist() if f"/{library}" in name)
            program += [f"--{option}", files.extract(member, libraries)]
    return {
        name: ["qemu-aarch64-static", "-cpu", name, "-L", str(system(tmp_path_factory.mktemp(name), part)), *program]
        for name, part in PARTS.items()
    }


def system(folder: Path, part: str) -> Path:
    """What programs find of a machine with two cores of this processor. The runtimes read it, and crash on this
    machine's own."""
    (folder / "lib").symlink_to(CROSS)
    (folder / "proc").mkdir()
    (folder / "proc" / "cpuinfo").write_text("".join(CORE.format(number=number, part=part) for number in range(2)))
    cores = folder / "sys" / "devices" / "system" / "cpu"
    cores.mkdir(parents=True)
    for name in ("possible", "present"):
        (cores / name).write_text("0-1\n")
    return folder


def same_tokens(
    command: Sequence[Any], bundle: Path, scheme: str, prompts: Sequence[Sequence[int]], count: int, tmp_path: Path,
    features: Sequence[Features] = (),
) -> None:  # fmt: skip
    """The ladder's rule and its gates: tokens near a tie are set aside, all others are the same, and the logits are as
    near as an artifact's must be to those of its own weights."""
    written = tmp_path / "logits"
    tokens = [part for prompt in prompts for part in ("--tokens", ",".join(map(str, prompt)))]
    found = json.loads(run([*command, bundle, *tokens, "--max-tokens", count, "--logits", written]))
    rows = []
    with open_bundle(bundle).session(threads=2) as session:
        for prompt, answer in zip(prompts, found["answers"], strict=True):
            session.reset()
            rows.append(session.prefill(prompt, features).copy())
            rows += [session.decode(token).copy() for token in answer["tokens"][: count - 1]]
    here = np.stack(rows)
    there = np.fromfile(written, np.float32).reshape(here.shape)
    kind = gates.kind(schemes.find(scheme).linear.bits)
    decided = margins(here) >= gates.NEAR_TIE[kind]
    same = here.argmax(-1) == there.argmax(-1)
    far = float(kl_divergence(here, there).mean())
    print(
        f"{bundle.name} {scheme}: {same.sum()} of {same.size} tokens are the same, {(same & decided).sum()} of "
        f"{decided.sum()} that are not near a tie; KL {far:.1e}, max_abs {np.abs(here - there).max():.2g}"
    )
    assert decided.any() and same[decided].all()
    assert far <= gates.SHIPPED_KL[kind]


@pytest.mark.parametrize(
    ("model", "target", "scheme", "processor", "prompts", "tokens"),
    [pytest.param(*case[:-1], marks=case[-1], id="-".join(map(str, case[:-1]))) for case in CASES],
)
def test_it_answers_as_on_x86(
    model: str, target: str, scheme: str, processor: str, prompts: int, tokens: int, arm: dict[str, list[str]],
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    if model == "tiny":
        checkpoint = with_tokenizer(write_checkpoint(tmp_path / "llama", families.find("llama").tiny))
        bundle = build(str(checkpoint), target, tmp_path, quant=scheme, context=96, parity="L4").bundle
        asked = [[5, 6, 7, 8], [9, 3, 11]]
    else:
        bundle = built(tmp_path_factory, model, target, scheme, "L4" if scheme == "int4-b32" else "L1")
        asked = [open_bundle(bundle).tokenizer().encode(text) for text in TEXTS]
        asked += [ids[: (len(ids) + 1) // 2] for ids in asked]
    check = ["--verify", "--check"] if open_bundle(bundle).manifest.golden.file is not None else []
    same_tokens([*arm[processor], *check], bundle, scheme, asked[:prompts], tokens, tmp_path)


@pytest.mark.scale
@pytest.mark.parametrize("target", ["android-ort", "android-tflite"])
def test_it_reads_sees_and_hears_as_on_x86(
    target: str, arm: dict[str, list[str]], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bundle = built(tmp_path_factory, "autoglm-phone-mini", target, "int8")
    (image, picture), (clip, sound) = image_and_sound(tmp_path)
    opened = open_bundle(bundle)
    tokenizer, template = opened.tokenizer(), opened.chat_template()
    with opened.session(threads=2) as session:
        seen, heard = session.encode_image(image), session.encode_audio(clip)
    for question, features, medium in (
        ("What is the capital of France?", [], []),
        ("Which digit is in the picture?", [seen], picture),
        ("Which word do you hear?", [heard], sound),
    ):
        prompt = tokenizer.encode(template.render([{"role": "user", "content": question}]))
        same_tokens([*arm["cortex-a76"], *medium], bundle, "int8", [prompt], 8, tmp_path, features)


@pytest.mark.parametrize("abi", ABIS)
def test_it_compiles_for(abi: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With clang and libc++, as the NDK does, but against musl's headers: Android's own are in the NDK alone."""
    zig = TOOLS / "ziglang" / "zig"
    if not zig.exists():
        pytest.skip("no zig: make android-tools")
    javac = shutil.which("javac")
    if javac is None:
        pytest.skip("no jni.h: apt-get install openjdk-17-jdk-headless")
    headers = Path(javac).resolve().parents[1] / "include"
    strict = ["-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror", "-c"]
    strict += ["-O0", "-g0", "-fno-sanitize=all"]  # zig's own choice is slower, and no warning depends on it
    places = [f"-I{CPP / 'include'}", f"-I{CPP / 'src'}", "-isystem", headers, "-isystem", headers / "linux"]
    sources = sorted([*CPP.glob("src/*.cpp"), *(CPP.parent / "jni").glob("*.cpp")])
    monkeypatch.chdir(tmp_path)  # where the objects go
    run([zig, "c++", "-target", ABIS[abi], *strict, *places, *sources])
