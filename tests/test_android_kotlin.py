"""The loader's Kotlin and Java APIs, run on a JVM through JNI: Python's session decides."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from factories import with_tokenizer
from graphs import write_checkpoint
from native import CPP, ROOT, alone, libraries, programs, run
from test_android_runtime import TOKENS, built

from edgeexport import build, families, open_bundle
from edgeexport.session.generate import Sampling, generate

COMPILER = ROOT / "build" / "android" / "tools" / "node_modules" / "kotlin-compiler"
STAND_INS = ROOT / "tests" / "android_kotlin"
LOADER = CPP.parent
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}<s>assistant\n"
)
CHECKS = ("cancel", "pieces", "misuse", "threads", "close", "leaks", "governed", "thermal")


class Machine:
    """A JVM with the compiled classes and the native library."""

    def __init__(self, classes: Path, library: Path, packed: Path) -> None:
        self.classes, self.library, self.packed = classes, library, packed

    def run(self, program: str, *arguments: Any, more: str = "") -> list[str]:
        """The lines that a program prints, which is given the runtimes and a cache behind these arguments."""
        places = [libraries()["onnxruntime"], libraries()["litert"], self.packed]
        path = os.pathsep.join(map(str, [self.classes, *jars()]))
        flags = ["-Xcheck:jni", "-Xmx512m", f"-Djava.library.path={self.library}", "-cp", path]
        text = run(["java", *flags, program, *arguments, *places, *([more] if more else [])])
        assert "WARNING" not in text, text  # of -Xcheck:jni
        return text.splitlines()

    def check(self, name: str, bundle: Path, more: str = "") -> list[str]:
        return self.run("dev.edgeexport.ChecksKt", name, bundle, more=more)


def jars() -> list[Path]:
    return [COMPILER / "lib" / f"{name}.jar" for name in ("kotlin-stdlib", "kotlinx-coroutines-core-jvm")]


def compiled() -> Path:
    """The folder of the classes of the API, the checks and the stand-ins for Android's classes."""
    java = sorted([*LOADER.glob("java/**/*.java"), *STAND_INS.glob("**/*.java")])
    kotlin = sorted([*LOADER.glob("kotlin/**/*.kt"), *LOADER.glob("android/**/*.kt"), *STAND_INS.glob("*.kt")])
    key = hashlib.sha256(b"".join(path.read_bytes() for path in [*java, *kotlin])).hexdigest()[:16]
    folder = ROOT / "build" / "android" / f"classes-{key}"
    compiler = ["java", "-Xmx700m", "-cp", COMPILER / "lib" / "kotlin-compiler.jar"]
    with alone(ROOT / "build" / "android" / "classes"):
        if not folder.exists():
            partial = folder.with_name("classes-partial")
            shutil.rmtree(partial, ignore_errors=True)
            run(["javac", "-Xlint:all,-options", "-Werror", "--release", "8", "-d", partial, *java])
            run(
                [*compiler, "org.jetbrains.kotlin.cli.jvm.K2JVMCompiler", "-kotlin-home", COMPILER, "-no-reflect"]
                + ["-Werror", "-jvm-target", "1.8", "-cp", f"{partial}{os.pathsep}{jars()[1]}", "-d", partial, *kotlin]
            )
            partial.rename(folder)
    return folder


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    if shutil.which("javac") is None:
        pytest.skip("no javac: apt-get install openjdk-17-jdk-headless")
    if not COMPILER.exists():
        pytest.skip("no Kotlin compiler: make android-tools")
    library = programs("plain", ["edgeexport_jni"]) / "jni"
    return Machine(compiled(), library, tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer of bytes and a chat template; its context is longer than two pieces."""
    root = tmp_path_factory.mktemp("tiny")
    config = families.find("llama").tiny | {"max_position_embeddings": 2048}
    model = with_tokenizer(write_checkpoint(root / "llama", config))
    (model / "chat_template.jinja").write_text(TEMPLATE)
    return build(str(model), "android-ort", root, quant="fp32", context=1200, parity="L4").bundle


def answered(bundle: Path, prompt: list[int], sampling: Sampling) -> tuple[list[int], str | None]:
    opened = open_bundle(bundle)
    with opened.session(threads=2) as session:
        answer = generate(session, prompt, max_tokens=TOKENS, stop_ids=opened.stop_ids, sampling=sampling)
        return list(answer), answer.finish_reason


def same_answers(machine: Machine, bundle: Path, prompt: list[int]) -> None:
    ids, text, reason, drawn = machine.check("answer", bundle, ",".join(map(str, prompt)))
    wanted, finished = answered(bundle, prompt, Sampling())
    assert [int(token) for token in ids.split(",")] == wanted
    assert bytes.fromhex(text).decode() == open_bundle(bundle).tokenizer().decode(wanted)
    assert reason.lower() == finished
    sampling = Sampling(temperature=0.8, top_p=0.9, top_k=40, seed=7)
    assert [int(token) for token in drawn.split(",")] == answered(bundle, prompt, sampling)[0]


def test_a_flow_gives_what_python_gives(machine: Machine, bundle: Path) -> None:
    same_answers(machine, bundle, [5, 6, 7, 8])


@pytest.mark.real
@pytest.mark.parametrize("target", ["android-ort", "android-tflite"])
def test_a_real_model_answers_as_in_python(
    target: str, machine: Machine, tmp_path_factory: pytest.TempPathFactory
) -> None:
    found = built(tmp_path_factory, "smollm2-135m", target, "int4-b32")
    same_answers(machine, found, open_bundle(found).tokenizer().encode("The capital of France is"))


def test_text_is_pythons(machine: Machine, bundle: Path) -> None:
    opened = open_bundle(bundle)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße 👋🏽"}]
    wanted = opened.tokenizer().encode(opened.chat_template().render(messages))
    (found,) = machine.check("text", bundle)
    assert [int(token) for token in found.split(",")] == list(wanted)


@pytest.mark.parametrize("name", CHECKS)
def test_it_holds(name: str, machine: Machine, bundle: Path) -> None:
    print(*machine.check(name, bundle))


def test_java_needs_no_kotlin(machine: Machine, bundle: Path) -> None:
    answer, started = machine.run("JavaChecks", bundle)
    wanted, _ = answered(bundle, [5, 6, 7, 8], Sampling())
    assert [int(token) for token in answer.split(",")] == wanted
    assert [int(token) for token in started.split(",")] == wanted[:2]
