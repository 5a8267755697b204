"""The loader's Kotlin and Java APIs, run on a JVM through JNI: Python's session decides."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from bundles import rehash
from factories import with_tokenizer
from graphs import strengthened, write_checkpoint
from native import CPP, ROOT, libraries, programs, run
from sharing import alone
from test_android_pictures import PICTURES, prompt_of, seeing
from test_android_runtime import TOKENS, built, image_and_sound

from edgeexport import build, families, open_bundle
from edgeexport.session.audio import Sound
from edgeexport.session.generate import Sampling, generate
from edgeexport.session.image_file import Image

COMPILER = ROOT / "build" / "android" / "tools" / "node_modules" / "kotlin-compiler"
STAND_INS = ROOT / "tests" / "android_kotlin"
LOADER = CPP.parent
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}<s>assistant\n"
)
EXAMPLES = {
    "kt": """package readme
import android.content.Context
import dev.edgeexport.*
import kotlinx.coroutines.CoroutineScope
suspend fun example(
    folder: String, context: Context, scope: CoroutineScope, rgb: ByteArray, height: Int, width: Int,
    show: (String) -> Unit,
) {
SHOWN
}
""",
    "java": """package readme;
import dev.edgeexport.*;
final class Readme {
    static void show(String text) {}
    static void example(String folder) {
SHOWN
    }
}
""",
}
"""What makes a program of the README's code, by its ending."""
CHECKS = ("cancel", "pieces", "misuse", "threads", "close", "leaks", "governed", "thermal")


class Machine:
    """A JVM with the compiled classes and the native library."""

    def __init__(self, classes: Path, library: Path, packed: Path) -> None:
        self.classes, self.library, self.packed = classes, library, packed

    def run(self, program: str, *arguments: Any, more: Sequence[Any] = ()) -> list[str]:
        """The lines that a program prints, which is given the runtimes and a cache behind these arguments."""
        places = [libraries()["onnxruntime"], libraries()["litert"], self.packed]
        path = os.pathsep.join(map(str, [self.classes, *jars()]))
        flags = ["-Xcheck:jni", "-Xmx512m", f"-Djava.library.path={self.library}", "-cp", path]
        text = run(["java", *flags, program, *arguments, *places, *more])
        assert "WARNING" not in text, text  # of -Xcheck:jni
        return text.splitlines()

    def check(self, name: str, bundle: Path, *more: Any) -> list[str]:
        return self.run("dev.edgeexport.ChecksKt", name, bundle, more=more)


def jars() -> list[Path]:
    return [COMPILER / "lib" / f"{name}.jar" for name in ("kotlin-stdlib", "kotlinx-coroutines-core-jvm")]


def example(ending: str, language: str) -> Path:
    """What the README shows, as a program that compiles where it is right."""
    (shown,) = re.findall(rf"^```{language}\n(.*?)^```$", (LOADER / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    file = ROOT / "build" / "android" / "readme" / f"Readme.{ending}"
    with alone(file.parent):
        file.write_text(EXAMPLES[ending].replace("SHOWN", shown))
    return file


def compiled() -> Path:
    """The folder of the classes of the API, the checks and the stand-ins for Android's classes."""
    java = sorted([*LOADER.glob("java/**/*.java"), *STAND_INS.glob("**/*.java"), example("java", "java")])
    kotlin = [*LOADER.glob("kotlin/**/*.kt"), *LOADER.glob("android/**/*.kt"), *STAND_INS.glob("*.kt")]
    kotlin = sorted([*kotlin, example("kt", "kotlin")])
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
    model = with_tokenizer(strengthened(write_checkpoint(root / "llama", config)))
    (model / "chat_template.jinja").write_text(TEMPLATE)
    return build(str(model), "android-ort", root, quant="fp32", context=1200, parity="L4").bundle


def listed(tokens: Sequence[int]) -> str:
    return ",".join(map(str, tokens))


def answered(bundle: Path, prompt: list[int], sampling: Sampling) -> tuple[list[int], str | None]:
    opened = open_bundle(bundle)
    with opened.session(threads=2) as session:
        answer = generate(session, prompt, max_tokens=TOKENS, stop_ids=opened.stop_ids, sampling=sampling)
        return list(answer), answer.finish_reason


def same_answers(machine: Machine, bundle: Path, prompt: list[int]) -> None:
    ids, text, reason, drawn = machine.check("answer", bundle, listed(prompt))
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


def changed(bundle: Path, folder: Path, change: Callable[[Any], Any]) -> Path:
    """A copy whose contract of text is another one."""
    copy = shutil.copytree(bundle, folder)
    rehash(copy, text=change(open_bundle(bundle).manifest.text))
    return copy


@pytest.fixture(scope="module")
def ending(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy whose answers end: a seventh of all tokens are stop ids."""
    stops = tuple(range(0, 320, 7))
    folder = tmp_path_factory.mktemp("ending") / "bundle"
    return changed(bundle, folder, lambda text: msgspec.structs.replace(text, stop_ids=stops))


def test_an_answer_is_kept(machine: Machine, ending: Path, tmp_path: Path) -> None:
    more = changed(
        ending, tmp_path / "more", lambda text: msgspec.structs.replace(text, stop_ids=(*text.stop_ids, 319))
    )
    other = changed(ending, tmp_path / "other", lambda text: text)
    chat = other / "tokenizer" / "chat.json"
    chat.write_text(chat.read_text().replace("assistant", "assistant "))
    rehash(other)
    (found,) = machine.check("cached", ending, "5", more, other)
    opened = open_bundle(ending)
    prompt = opened.tokenizer().encode(
        opened.chat_template().render([{"role": "user", "content": "Tap  it"}]), add_special_tokens=False
    )
    with opened.session(threads=2) as session:
        wanted = generate(session, prompt, max_tokens=200, stop_ids=opened.stop_ids)
        assert found == listed(list(wanted)) and wanted.finish_reason == "stop"


def shows_as_python_does(machine: Machine, bundle: Path, prompt: list[int], folder: Path, *media: Image | Sound) -> str:
    """The same greedy tokens from Kotlin; gives what tells a program of the first picture or sound."""
    told = []
    opened = open_bundle(bundle)
    with opened.session(threads=2) as session:
        features = []
        for i, each in enumerate(media):
            file = folder / str(i)
            if isinstance(each, Image):
                features.append(session.encode_image(each))
                file.write_bytes(each.array.tobytes())
                told.append(f"picture:{file}:{each.height}:{each.width}")
            else:
                features.append(session.encode_audio(each))
                file.write_bytes(each.samples.astype(np.float32).tobytes())
                told.append(f"sound:{file}:{each.rate}")
        assert session.inputs is not None
        tokens = session.inputs.expand(prompt, features)
        wanted = generate(session, tokens, features=features, max_tokens=TOKENS, stop_ids=opened.stop_ids)
        assert machine.check("shown", bundle, listed(prompt), *told) == [listed(list(wanted))]
    return told[0]


def test_a_picture_is_seen_as_in_python(
    machine: Machine, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    found = seeing(tmp_path_factory)
    shows_as_python_does(machine, found, prompt_of(2), tmp_path, *PICTURES)
    told = shows_as_python_does(machine, found, prompt_of(1), tmp_path, PICTURES[0])
    kotlin = machine.check("shown", found, listed(prompt_of(1)), told)
    assert machine.run("JavaChecks", found, more=[listed(prompt_of(1)), told])[1:] == kotlin


@pytest.mark.real
def test_a_picture_and_a_sound_are_one_prompt(
    machine: Machine, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    found = built(tmp_path_factory, "autoglm-phone-mini", "android-ort", "int8")
    (image, _), (clip, _) = image_and_sound(tmp_path)
    question = [{"role": "user", "content": "Which digit do you see and which do you hear?"}]
    opened = open_bundle(found)
    prompt = opened.tokenizer().encode(opened.chat_template().render(question))
    shows_as_python_does(machine, found, prompt, tmp_path, image, clip)


def test_java_needs_no_kotlin(machine: Machine, ending: Path) -> None:
    answer, started = machine.run("JavaChecks", ending)
    wanted, _ = answered(ending, [5, 6, 7, 8], Sampling())
    assert [int(token) for token in answer.split(",")] == wanted
    assert [int(token) for token in started.split(",")] == wanted[:2]
