"""The native loader against Python's session: the same tokens from the same bundles, and the same refusals."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import rehash, write_bundle
from factories import with_tokenizer
from graphs import write_checkpoint
from native import CPP, SANITIZERS, answers, device_rows, edgeexport_run, libraries, programs, run
from sharing import alone, shared

from edgeexport import build, errors, families, open_bundle
from edgeexport.bundle import device_report, golden
from edgeexport.core import Verdict
from edgeexport.families.autoglm_phone.data import held_out_split
from edgeexport.parity.examples import TEXTS
from edgeexport.session.audio import Sound
from edgeexport.session.generate import generate
from edgeexport.session.image_file import Image, read_image

TARGETS = ("android-ort", "android-tflite")
TOKENS = 16
CODES_OF_DEVICES = {
    *("answer-interrupted", "backend-not-built", "bad-argument", "bad-policy", "bad-text"),
    "cache-closed",
    *("out-of-memory", "runtime-failed", "runtime-missing", "runtime-too-old", "session-busy"),
}


def built(factory: pytest.TempPathFactory, model: str, target: str, scheme: str, parity: str = "L4") -> Path:
    """A bundle, made by the first worker of this run that needs it."""
    folder = shared(factory, "android", f"{model}-{target}-{scheme}")
    found = folder / f"{model}-{target}"
    with alone(folder):
        if not found.exists():
            build(model, target, folder, quant=scheme, context=512, parity=parity)
    return found


@pytest.fixture(scope="session")
def plain() -> Path:
    return programs("plain", ["all"])


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where LiteRT's packed weights are kept."""
    return tmp_path_factory.mktemp("packed")


@pytest.fixture(scope="session", params=TARGETS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory, "smollm2-135m", request.param, "int4-b32")


@pytest.fixture(scope="session", params=TARGETS)
def mini(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that sees and hears."""
    return built(tmp_path_factory, "autoglm-phone-mini", request.param, "int8")


@pytest.mark.real
def test_it_gives_the_same_tokens_as_python(plain: Path, bundle: Path, packed: Path) -> None:
    assert speaks_as_python_does(plain, bundle, packed) == 0  # the same runtime on the same machine


@pytest.mark.real
def test_it_gives_the_same_tokens_with_an_embedding_apart(plain: Path, mini: Path, packed: Path) -> None:
    # the golden logits came of other pieces, which int8 kernels round otherwise, in Python as here
    gates = open_bundle(mini).manifest.golden.gates
    assert gates is not None and speaks_as_python_does(plain, mini, packed) <= gates.max_abs


def speaks_as_python_does(plain: Path, bundle: Path, packed: Path) -> float:
    """The very same tokens for 20 prompts; gives how far the golden logits are off."""
    opened = open_bundle(bundle)
    tokenizer = opened.tokenizer()
    texts = [*TEXTS, *(" ".join([text] * (1 + 2 * i)) for i, text in enumerate(TEXTS))]
    prompts = [tokenizer.encode(text) for text in texts]
    assert len(prompts) == 20 and max(map(len, prompts)) > 256  # longer than the longest signature
    found = answers(plain, bundle, packed, prompts, "--max-tokens", TOKENS, "--check", "--verify")
    with opened.session(threads=2) as session:
        for prompt, answer in zip(prompts, found["answers"], strict=True):
            session.reset()
            wanted = generate(session, prompt, max_tokens=TOKENS, stop_ids=opened.stop_ids)
            assert answer["tokens"] == list(wanted)
    whole, runtime = (sum(each[f"{name}_seconds"] for each in found["answers"]) for name in ("decode", "runtime"))
    print(f"{bundle.name}: {100 * (whole - runtime) / whole:.2f}% of a token's time outside the runtime; 1% is asked")
    return float(found["check"]["max_abs"])


@pytest.mark.real
@pytest.mark.parametrize("scheme", ["fp32", "int8"])
def test_other_weights_give_the_same_tokens(
    scheme: str, plain: Path, packed: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    opened = open_bundle(built(tmp_path_factory, "smollm2-135m", "android-ort", scheme, "L1"))
    prompts = [opened.tokenizer().encode(text) for text in TEXTS[:4]]
    found = answers(plain, opened.path, packed, prompts, "--max-tokens", TOKENS)
    with opened.session(threads=2) as session:
        for prompt, answer in zip(prompts, found["answers"], strict=True):
            session.reset()
            assert answer["tokens"] == list(generate(session, prompt, max_tokens=TOKENS, stop_ids=opened.stop_ids))


def test_it_writes_the_cache_where_the_graph_does_not(plain: Path, packed: Path, tmp_path: Path) -> None:
    """A bundle for NNAPI: prompts of a padded piece, of whole pieces and single tokens, and one that starts anew amid
    what is cached."""
    checkpoint = with_tokenizer(write_checkpoint(tmp_path / "model", families.find("llama").tiny))
    bundle = build(str(checkpoint), "android-nnapi", tmp_path / "out", context=160, parity="L1").bundle
    prompts = [list(range(5, 5 + length)) for length in (20, 140, 3)]
    logits = tmp_path / "logits"
    found = answers(plain, bundle, packed, prompts, "--max-tokens", 8, "--logits", logits, "--keep", 11)
    wanted = []
    with open_bundle(bundle).session(threads=2) as session:
        for i, prompt in enumerate(prompts):
            session.truncate(11 if i else 0)
            wanted.append(session.prefill(prompt).copy())
            wanted += [session.decode(int(wanted[-1].argmax())).copy() for _ in range(7)]
    np.testing.assert_allclose(np.fromfile(logits, np.float32).reshape(24, -1), np.stack(wanted), rtol=0, atol=1e-5)
    assert [token for each in found["answers"] for token in each["tokens"]] == np.stack(wanted).argmax(1).tolist()


def image_and_sound(folder: Path) -> tuple[tuple[Image, list[Any]], tuple[Sound, list[Any]]]:
    """A picture and a clip, for Python and as arguments of edgeexport-run, which reads them in `folder`."""
    data = held_out_split()
    pixels, clip = data.digits[0].array, data.clips[0]
    (folder / "picture").write_bytes(pixels.tobytes())
    (folder / "sound").write_bytes(clip.samples.astype(np.float32).tobytes())
    picture, sound = ["--picture", folder / "picture", *pixels.shape[:2]], ["--sound", folder / "sound", clip.rate]
    return (Image(pixels), picture), (Sound(clip.samples, clip.rate), sound)


@pytest.mark.real
def test_it_sees_and_hears_as_python_does(plain: Path, mini: Path, packed: Path, tmp_path: Path) -> None:
    (image, picture), (clip, sound) = image_and_sound(tmp_path)
    opened = open_bundle(mini)
    tokenizer, template = opened.tokenizer(), opened.chat_template()
    with opened.session(threads=2) as session:
        seen, heard = session.encode_image(image), session.encode_audio(clip)
        for question, shown, media in (
            ("Name three colours.", [], []),
            ("Which digit is in the picture?", [seen], picture),
            ("Which word do you hear?", [heard], sound),
            ("Which digit do you see and which do you hear?", [seen, heard], [*picture, *sound]),
        ):
            prompt = tokenizer.encode(template.render([{"role": "user", "content": question}]))
            session.reset()
            wanted = list(generate(session, prompt, features=shown, max_tokens=TOKENS, stop_ids=opened.stop_ids))
            found = answers(plain, mini, packed, [prompt], "--max-tokens", TOKENS, *media)
            assert found["answers"][0]["tokens"] == wanted, question


@pytest.mark.real
def test_a_token_allocates_nothing(plain: Path, bundle: Path, packed: Path) -> None:
    print(run([plain / "test-allocations", bundle, *libraries().values(), packed]))


@pytest.mark.real
def test_a_token_with_an_embedding_apart_allocates_nothing(plain: Path, mini: Path, packed: Path) -> None:
    print(run([plain / "test-allocations", mini, *libraries().values(), packed]))


@pytest.mark.real
def test_threads_and_misuse_with_the_real_runtime(plain: Path, bundle: Path, packed: Path) -> None:
    for more in ([], ["memory"]):
        run([plain / "test-real_session", bundle, *libraries().values(), packed, *more])


@pytest.mark.real
def test_it_answers_through_its_c_interface(plain: Path, bundle: Path, packed: Path) -> None:
    prompt = [504, 3575, 282, 4649, 314]
    found = run([plain / "test-c", bundle, *libraries().values(), packed, *prompt])
    with open_bundle(bundle).session(threads=2) as session:
        wanted = list(generate(session, prompt, max_tokens=8))
    assert [int(token) for token in found.split()] == wanted


@pytest.mark.real
def test_its_report_is_one_that_python_reads(plain: Path, bundle: Path, packed: Path, tmp_path: Path) -> None:
    rows = device_rows(plain, bundle, packed, tmp_path / "report.json")
    assert [(row.level, row.output) for row in rows] == [
        *((level, f"{what} on {rows[0].output.split(' on ')[1]}") for level, what in (
            ("L1", "golden chat"), ("L1", "opens"), ("L4", "golden text"), ("L5", "golden text")
        )),
    ]  # fmt: skip
    assert {row.verdict for row in rows} == {Verdict.PASS}
    assert rows[2].metrics["max_abs"] == 0


@pytest.mark.real
def test_pictures_sounds_and_conversations_are_replayed(plain: Path, mini: Path, packed: Path, tmp_path: Path) -> None:
    rows = device_rows(plain, mini, packed, tmp_path / "report.json")
    replayed = ["text", "picture", "sound", "picture and sound"]
    assert [row.output.split(" on ")[0] for row in rows] == [
        "golden chat", "opens", *(f"golden {name}" for name in replayed for _ in ("L4", "L5"))
    ]  # fmt: skip
    # how far the artifact is from the original model, L5, this build did not ask
    assert {row.verdict for row in rows if row.level != "L5"} == {Verdict.PASS}
    found = {row.output.split(" on ")[0]: row.metrics["max_abs"] for row in rows if row.level == "L4"}
    vectors = golden.read_vectors((mini / "golden/picture.safetensors").read_bytes(), mini)
    assert vectors.artifact is not None
    with open_bundle(mini).session(threads=2) as session:
        picture = session.encode_image(read_image(mini / "golden" / "picture-224x224.bmp"))
        logits = golden.answered_logits(session, vectors, "picture", [picture])
    wanted = float(golden.max_abs_difference(logits, vectors.artifact).max())
    assert found["golden text"] == 0 and found["golden picture"] == pytest.approx(wanted, rel=1e-3)
    run(edgeexport_run(plain, mini, packed, "--check"))
    copy = shutil.copytree(mini, tmp_path / "bundle")
    chat, sound = copy / "golden" / "chat.json", copy / "golden" / "sound.wav"
    chat.write_text(chat.read_text().replace("Hello", "Hallo", 1))
    samples = np.frombuffer(sound.read_bytes()[44:], "<i2")
    sound.write_bytes(sound.read_bytes()[:44] + (samples // 2).tobytes())
    rehash(copy)
    rows = device_rows(plain, copy, packed, tmp_path / "report.json")
    failed = [row for row in rows if "[golden-mismatch]" in row.note]
    assert [row.output.split(" on ")[0] for row in failed] == [
        "golden chat", "golden sound", "golden picture and sound"
    ]  # fmt: skip
    assert {row.verdict for row in failed} == {Verdict.FAIL}
    refused = subprocess.run(edgeexport_run(plain, copy, packed, "--check"), capture_output=True, text=True)
    assert refused.returncode == 8 and "error[golden-mismatch]: " in refused.stderr


@pytest.mark.real
def test_a_failure_is_in_the_report(plain: Path, bundle: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    missing = ["--onnxruntime", "nowhere.so", "--litert", "nowhere.so"]
    report.write_text(run([plain / "edgeexport-run", bundle, *missing, "--report"]))
    chat, opened = device_report.judge(device_report.read(report), open_bundle(bundle), report)
    assert chat.verdict is Verdict.PASS
    assert opened.verdict is Verdict.FAIL and "[runtime-missing]" in opened.note


@pytest.mark.real
@pytest.mark.parametrize("variant", SANITIZERS)
def test_sanitizers_find_nothing(variant: str) -> None:
    folder = programs(variant, ["test-readers", "test-session", "test-c"])
    for program in ("test-readers", "test-session", "test-c"):
        print(run([folder / program]))


@pytest.mark.scale
@pytest.mark.parametrize("variant", SANITIZERS)
def test_sanitizers_find_nothing_with_the_real_runtime(variant: str, bundle: Path, packed: Path) -> None:
    folder = programs(variant, ["test-real_session"])
    suppressions = f"TSAN_OPTIONS=suppressions={CPP / 'tests' / 'tsan.supp'}"
    run(["env", suppressions, folder / "test-real_session", bundle, *libraries().values(), packed])


def changed_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return damage


def moved(manifest: dict[str, Any], path: str) -> None:
    manifest["files"][path] = manifest["files"].pop("golden/text.safetensors")


def linked(folder: Path) -> None:
    (folder / "decoder.bin").rename(folder / "elsewhere")
    (folder / "decoder.bin").symlink_to("elsewhere")


def one_bit(folder: Path) -> None:
    data = bytearray((folder / "decoder.bin").read_bytes())
    data[7] ^= 1
    (folder / "decoder.bin").write_bytes(data)


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "nothing": ("bundle-no-variant", lambda folder: None),
    "no manifest": ("bundle-not-found", lambda folder: (folder / "manifest.json").unlink()),
    "newer": ("bundle-too-new", changed_manifest(lambda found: found.update(schema="edgeexport.bundle/2"))),
    "cut manifest": ("bundle-bad-manifest", lambda folder: os.truncate(folder / "manifest.json", 300)),
    "no JSON": ("bundle-bad-manifest", lambda folder: (folder / "manifest.json").write_text("{'a': 1}")),
    "outside": ("bundle-bad-manifest", changed_manifest(lambda found: moved(found, "../../etc/passwd"))),
    "absolute": ("bundle-bad-manifest", changed_manifest(lambda found: moved(found, "/etc/passwd"))),
    "digest": ("bundle-file-changed", lambda folder: (folder / "manifest.json.sha256").write_text("0" * 64 + "\n")),
    "cut file": ("bundle-file-changed", lambda folder: os.truncate(folder / "decoder.bin", 20)),
    "one bit": ("bundle-file-changed", one_bit),
    "gone": ("bundle-file-missing", lambda folder: (folder / "decoder.bin").unlink()),
    "link": ("bundle-unsafe-path", linked),
}


@pytest.mark.real
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_bundle_is_refused_with_its_code(damage: str, plain: Path, tmp_path: Path) -> None:
    code, change = DAMAGES[damage]
    folder = write_bundle(tmp_path / "bundle")
    change(folder)
    done = subprocess.run([plain / "edgeexport-run", folder, "--verify"], capture_output=True, text=True)
    assert done.returncode == 8
    assert done.stderr.startswith(f"error[{code}]: ")


@pytest.mark.real
@pytest.mark.parametrize("keep", [0.001, 0.5, 0.999])
def test_a_cut_artifact_is_refused_though_its_hash_fits(keep: float, plain: Path, bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    artifact = next(path for path in folder.iterdir() if path.suffix in {".tflite", ".onnx"})
    os.truncate(artifact, int(keep * artifact.stat().st_size))
    rehash(folder)
    done = subprocess.run(edgeexport_run(plain, folder, tmp_path, "--verify"), capture_output=True, text=True)
    assert done.returncode == 8
    assert "error[artifact-does-not-open]: " in done.stderr


def test_its_codes_are_pythons() -> None:
    texts = [path.read_text() for path in CPP.parent.glob("*/**/*errors.h")]
    codes = {code for text in texts for code in re.findall(r'return \{\s*"([a-z0-9-]+)"', text)}
    known = set(re.findall(r'(?:_error\(|"\w+",)\s*"([a-z0-9-]+)",', Path(errors.__file__).read_text()))
    assert len(codes) > 20
    assert codes - known == CODES_OF_DEVICES
    readme = (CPP.parent / "README.md").read_text()
    assert [code for code in sorted(CODES_OF_DEVICES) if f"`{code}`" not in readme] == []
