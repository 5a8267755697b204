"""The loader as a phone's processor runs it: emulated aarch64 with ONNX Runtime's own aarch64 library, and compilers'
view of Android's three processors. Python's session on this machine decides."""

from __future__ import annotations

import json
import shutil
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from factories import with_tokenizer
from graphs import write_checkpoint
from native import CPP, ROOT, programs, run
from test_android_runtime import built

from edgeexport import build, families, open_bundle
from edgeexport.session.generate import generate

TOOLS = ROOT / "build" / "android" / "tools"
CROSS = Path("/usr/aarch64-linux-gnu/lib")
CPUINFO = """processor\t: 0
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3

"""
"""Of a Cortex-A72. ONNX Runtime reads it, and crashes on this machine's own."""
PROCESSORS = {
    "arm64-v8a": "aarch64-linux-musl",
    "armeabi-v7a": "arm-linux-musleabihf",
    "x86_64": "x86_64-linux-musl",
}


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The emulator, the loader's program, and where its runtime is."""
    if shutil.which("qemu-aarch64-static") is None:
        pytest.skip("no qemu-aarch64-static: apt-get install qemu-user-static")
    name = f"onnxruntime-{version('onnxruntime')}-*aarch64.whl"
    wheel = next(iter(TOOLS.glob(name)), None)
    if wheel is None:
        pytest.skip(f"no {name}: make android-tools")
    program = programs("aarch64", ["edgeexport-run"]) / "edgeexport-run"
    system = tmp_path_factory.mktemp("arm")
    (system / "lib").symlink_to(CROSS)
    (system / "proc").mkdir()
    (system / "proc" / "cpuinfo").write_text(CPUINFO)
    with zipfile.ZipFile(wheel) as files:
        (library,) = (name for name in files.namelist() if "/libonnxruntime.so." in name)
        files.extract(library, system)
    emulator = ["qemu-aarch64-static", "-cpu", "cortex-a72", "-L", str(system)]
    return [*emulator, str(program), "--onnxruntime", str(system / library), "--threads", "2"]


def same_tokens(arm: list[str], bundle: Path, prompt: list[int], count: int, *more: str) -> None:
    tokens = ["--tokens", ",".join(map(str, prompt)), "--max-tokens", str(count)]
    found = json.loads(run([*arm, bundle, *tokens, *more]))
    opened = open_bundle(bundle)
    with opened.session(threads=2) as session:
        wanted = list(generate(session, prompt, max_tokens=count, stop_ids=opened.stop_ids))
    assert found["answers"][0]["tokens"] == wanted
    print(f"{bundle.name}: {found}")


def test_it_answers_as_on_x86(arm: list[str], tmp_path: Path) -> None:
    model = with_tokenizer(write_checkpoint(tmp_path / "llama", families.find("llama").tiny))
    bundle = build(str(model), "android-ort", tmp_path, quant="fp32", context=96, parity="L4").bundle
    same_tokens(arm, bundle, [5, 6, 7, 8], 16, "--verify", "--check")


@pytest.mark.real
def test_a_real_model_answers_as_on_x86(arm: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Few tokens: a Cortex-A72 multiplies int4 weights with floats, and this machine with rounded activations, so that
    a near tie may fall to the other side."""
    bundle = built(tmp_path_factory, "smollm2-135m", "android-ort", "int4-b32")
    same_tokens(arm, bundle, open_bundle(bundle).tokenizer().encode("The capital of France is"), 4)


@pytest.mark.parametrize("abi", PROCESSORS)
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
    places = [f"-I{CPP / 'include'}", f"-I{CPP / 'src'}", "-isystem", headers, "-isystem", headers / "linux"]
    sources = sorted([*CPP.glob("src/*.cpp"), *(CPP.parent / "jni").glob("*.cpp")])
    monkeypatch.chdir(tmp_path)  # where the objects go
    run([zig, "c++", "-target", PROCESSORS[abi], *strict, *places, *sources])
