"""The native loader under manifests and contracts that contradict their artifacts: a code, or the right answer.

Every case runs under AddressSanitizer and UBSan, through the C interface.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import with_tokenizer
from graphs import write_checkpoint
from native import libraries, programs
from safetensors.numpy import load_file, save_file

from edgeexport import build, families, open_bundle
from edgeexport.core import Array
from edgeexport.session.audio import Sound
from edgeexport.session.image_file import Image

ROOT = Path(__file__).parent.parent
CONTEXT, TOKENS = 160, list(range(5, 85))
"""A prompt of more tokens than the shortest piece that LiteRT's signatures take."""
SIZES = (0, -1, 1, 2**31 - 1, 2**31, 2**32, 2**63 - 1)
KNOWN_CODES = {"bundle-bad-manifest", "bundle-bad-preprocess", "artifact-does-not-open", "bundle-no-variant",
               "bundle-no-component", "bundle-file-changed", "bundle-file-missing", "backend-not-built",
               "modality-missing",
               "out-of-memory", "too-many-features", "context-full", "bad-token", "image-tokens-mismatch"}  # fmt: skip
"""What a case may end with: neither runtime-failed nor internal-error, which would say that it got too far."""

Manifest = dict[str, Any]


def built(model: str, target: str, folder: Path) -> Path:
    """A bundle of a tiny model, for pictures of 56 x 84 pixels where it sees."""
    text = (ROOT / "targets" / f"{target}.toml").read_text()
    for key, value in (("screens", [[56, 84], [84, 56]]), ("max_pixels", 56 * 84)):
        text = re.sub(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)
    (folder / "small.toml").write_text(text)
    checkpoint = with_tokenizer(write_checkpoint(folder / "model", families.find(model).tiny))
    return build(str(checkpoint), str(folder / "small.toml"), folder / "out", context=CONTEXT, parity="L1").bundle


BUNDLES = {
    "text, NNAPI": ("llama", "android-nnapi"),
    "all, ONNX Runtime": ("autoglm_phone", "android-ort"),
    "all, LiteRT": ("autoglm_phone", "android-tflite"),
    "pictures, LiteRT": ("glm4v", "android-tflite"),
}
ALWAYS = ("as it is", "embed decode deleted", "features axis 1 = 0", f"[{2**63 - 1}, 2]", "decoder decode deleted")
SHARE = 40
"""Of the other cases, one of so many is asked in every run: a different one for each bundle. `-m scale` asks all."""


class Loader:
    """The tool over one bundle, and the answer that Python's session gives with it."""

    def __init__(self, bundle: Path, sees: bool, hears: bool) -> None:
        self.bundle = bundle
        self.manifest: Manifest = json.loads((bundle / "manifest.json").read_text())
        picture, seconds = (28, 42) if sees else (0, 0), 0.25 if hears else 0
        opened = open_bundle(bundle)
        with opened.session(threads=1) as session:
            shown = []
            if sees:
                pixels = (np.arange(picture[0] * picture[1] * 3) * 7 % 251).astype(np.uint8).reshape(*picture, 3)
                shown.append(session.encode_image(Image(pixels)))
            if hears:
                samples = (np.arange(int(16000 * seconds)) * 5 % 101).astype(np.float32) / np.float32(101) - 0.5
                shown.append(session.encode_audio(Sound(samples.astype(np.float32), 16000)))
            self.tokens = [*TOKENS[:40], *self._placeholder(bundle), *TOKENS[40:]]
            session.prefill(session.inputs.expand(self.tokens, shown) if shown else self.tokens, shown)
            session.decode(7)
            self.wanted: Array = session.decode(7).copy()
        places = [str(libraries()["onnxruntime"]), str(libraries()["litert"]), str(bundle.parent)]
        self.command = [str(programs("asan", ["hostile-tool"]) / "hostile-tool"), str(bundle), *places,
                        ",".join(map(str, self.tokens)), *map(str, picture), str(seconds)]  # fmt: skip

    @staticmethod
    def _placeholder(bundle: Path) -> list[int]:
        contract = bundle / "preprocess.json"
        found = json.loads(contract.read_text()) if contract.exists() else {}
        return [found["image_token_id"]] if found.get("joining", "splice") == "splice" and found.get("image") else []

    def ask(self, cases: list[dict[str, str]]) -> list[str]:
        """What the tool says of each case: files that are written into the bundle before it is opened."""
        lines = "".join(json.dumps(case) + "\n" for case in cases)
        # what asks for more memory than there is gets none, as without the sanitizer
        environment = {**os.environ, "ASAN_OPTIONS": "allocator_may_return_null=1"}
        done = subprocess.run(
            self.command, input=lines.encode(), env=environment, capture_output=True, timeout=600, check=False
        )
        answers = done.stdout.decode().splitlines()
        assert done.returncode == 0, f"case {len(answers)} of {len(cases)}: {done.stderr.decode()[-4000:]}"
        return answers

    def judge(self, names: list[str], cases: list[dict[str, str]], *, other_answers: bool = False) -> dict[str, int]:
        """How many cases ended with each code; "" are right answers, or `other_answers` where what is asked may be
        another question. Anything else fails."""
        ended: dict[str, int] = {}
        wrong = []
        for name, answer in zip(names, self.ask(cases), strict=True):
            code = answer.split(": ")[0] if re.match(r"[a-z-]+: ", answer) else ""
            ended[code] = ended.get(code, 0) + 1
            right = code in KNOWN_CODES or (not code and (other_answers or self.same(answer)))
            if not right:
                wrong.append(f"{name}: {answer[:300]}")
        assert not wrong, f"{len(wrong)} of {len(names)}:\n" + "\n".join(wrong)
        return ended

    def same(self, answer: str) -> bool:
        logits = np.array(answer.split(), np.float32)
        return logits.shape == self.wanted.shape and bool(np.allclose(logits, self.wanted, rtol=0, atol=2e-3))


@pytest.fixture(scope="module", params=BUNDLES)
def loader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loader:
    model, target = BUNDLES[request.param]
    bundle = built(model, target, tmp_path_factory.mktemp("hostile"))
    return Loader(bundle, sees=model != "llama", hears=model == "autoglm_phone")


def mutated(whole: Manifest) -> Iterator[tuple[str, Manifest]]:
    """The manifest with one thing in it changed, by the names of things: all that a reader could trip over."""

    def case(name: str, change: Callable[[Manifest], object]) -> tuple[str, Manifest]:
        made = copy.deepcopy(whole)
        change(made)
        return name, made

    def entries(place: str, at: Callable[[Manifest], list[Any]], index: int) -> Iterator[tuple[str, Manifest]]:
        yield case(f"{place} deleted", lambda m: at(m).pop(index))
        yield case(f"{place} twice", lambda m: at(m).append(copy.deepcopy(at(m)[index])))
        yield case(f"{place} first", lambda m: at(m).insert(0, at(m).pop(index)))

    yield case("as it is", lambda m: None)
    yield case("no components", lambda m: m.update(components=[]))
    yield case("no preprocess", lambda m: m.update(preprocess=None))
    for c, component in enumerate(whole["components"]):
        where = component["name"]
        yield from entries(where, lambda m: m["components"], c)

        def own(m: Manifest, c: int = c) -> Manifest:
            found: Manifest = m["components"][c]
            return found

        for key, value in (("backend", "onnxruntime"), ("backend", "litert"), ("backend", "mnn"), ("name", "decoder"),
                           ("name", "embed"), ("name", "x" * 100_000), ("files", []), ("signatures", []),
                           ("state", []), ("kv", None)):  # fmt: skip
            yield case(f"{where} {key} = {str(value)[:20]}", lambda m, k=key, v=value: own(m).update({k: v}))
        for key in component["kv"] or ():
            for size in SIZES:
                yield case(f"{where} kv.{key} = {size}", lambda m, k=key, s=size: own(m)["kv"].update({k: s}))
        if component["state"]:
            yield from entries(f"{where} state", lambda m: own(m)["state"], 0)
            yield case(f"{where} state reversed", lambda m: own(m)["state"][0].reverse())
            yield case(f"{where} states crossed", lambda m: own(m)["state"][0].__setitem__(1, own(m)["state"][1][1]))
        for s, signature in enumerate(component["signatures"]):
            place = f"{where} {signature['name']}"
            yield from entries(place, lambda m: own(m)["signatures"], s)

            def called(m: Manifest, s: int = s) -> Manifest:
                found: Manifest = own(m)["signatures"][s]
                return found

            for name in ("step", "decode", "prefill_1", "prefill_999999999", "window_8_prefill_64", "window_1_decode"):
                yield case(f"{place} named {name}", lambda m, n=name: called(m).update(name=n))
            yield case(f"{place} in no file", lambda m: called(m).update(file=""))
            yield case(f"{place} in another file", lambda m: called(m).update(file=own(m)["files"][-1]))
            for side in ("inputs", "outputs"):
                yield case(f"{place} no {side}", lambda m, side=side: called(m).update({side: []}))
                specs = signature[side]
                for t in sorted({*range(min(len(specs), 3)), len(specs) - 1}):
                    yield from tensors(case, f"{place} {specs[t]['name']}", specs[t], entries,
                                       lambda m, side=side, called=called: called(m)[side], t)  # fmt: skip


def tensors(case: Any, place: str, spec: Manifest, entries: Any, at: Any, index: int) -> Iterator[tuple[str, Manifest]]:
    """The same of one input or output."""
    yield from entries(place, at, index)
    yield case(f"{place} renamed", lambda m: at(m)[index].update(name="other"))
    for dtype in ("float32", "float16", "int64", "int32", "bool", "int4", "complex64"):
        if dtype != spec["dtype"]:
            yield case(f"{place} {dtype}", lambda m, d=dtype: at(m)[index].update(dtype=d))
    for shape in ([], [2**62, 2], [2**63 - 1, 2], [1] * 9, spec["shape"][:-1], [*spec["shape"], 1]):
        yield case(f"{place} {shape}", lambda m, s=shape: at(m)[index].update(shape=s))
    for axis, size in enumerate(spec["shape"]):
        other = [] if isinstance(size, dict) else [size + 1, 2 * size, {"name": "T", "min": 1, "max": size}]
        for value in (*SIZES, *other, {"name": "T", "min": 0, "max": 0}, {"name": "T", "min": 1, "max": 2**63 - 1}):
            if value != size:
                yield case(f"{place} axis {axis} = {value}", lambda m, a=axis, v=value:
                           at(m)[index]["shape"].__setitem__(a, v))  # fmt: skip


def test_what_a_manifest_promises_is_checked_against_the_artifact(loader: Loader) -> None:
    """Deleted, doubled, renamed, retyped and resized entries of every kind."""
    cases = list(mutated(loader.manifest))
    chosen = [case for i, case in enumerate(cases) if i % SHARE == 7 or any(part in case[0] for part in ALWAYS)]
    asked_about(loader, chosen)


@pytest.mark.scale
def test_all_that_a_manifest_promises_is_checked_against_the_artifact(loader: Loader) -> None:
    asked_about(loader, list(mutated(loader.manifest)))


def asked_about(loader: Loader, cases: list[tuple[str, Manifest]]) -> None:
    names, manifests = zip(*cases, strict=True)
    ended = loader.judge(list(names), [{"manifest.json": json.dumps(each)} for each in manifests])
    print(f"{len(names)} cases: {ended}")
    assert ended.pop("") >= 1 and sum(ended.values()) > len(names) // 2  # the first is the manifest as it is


def refitted(manifest: Manifest, **files: str) -> dict[str, str]:
    """The manifest with the sizes and hashes of these texts, and the texts."""
    made = copy.deepcopy(manifest)
    for name, text in files.items():
        made["files"][name] = {"size": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return {"manifest.json": json.dumps(made), **files}


def test_a_contract_that_no_component_takes_is_refused(loader: Loader) -> None:
    """preprocess.json's numbers, each of them another one; no picture or sound is prepared for what takes none."""
    if loader.manifest["preprocess"] is None:
        turns = json.dumps({"schema": "edgeexport.preprocess/1", "position_rows": 3})
        manifest = {**loader.manifest, "preprocess": "preprocess.json"}
        loader.judge(["positions for a model without"], [refitted(manifest, **{"preprocess.json": turns})])
        return
    intact = (loader.bundle / "preprocess.json").read_text()
    contract = json.loads(intact)
    cases = [("as it is", contract), ("other rows", {**contract, "position_rows": 4 - contract["position_rows"]})]
    for part in ("image", "audio"):
        for key, value in (contract.get(part) or {}).items():
            for other in (1, 2**31, [[4, 4]]):
                if other != value:
                    cases.append((f"{part}.{key} = {other}", {**contract, part: {**contract[part], key: other}}))
    names = [name for name, _ in cases]
    try:
        files = [refitted(loader.manifest, **{"preprocess.json": json.dumps(each)}) for _, each in cases]
        print(loader.judge(names, files, other_answers=True))
    finally:
        (loader.bundle / "preprocess.json").write_text(intact)


def litert_answer(loader: Loader, bundle: Path, *more: str) -> Array:
    """The last logits that the loader gives with a bundle, its packed weights kept in the folder that all share."""
    command = [loader.command[0], str(bundle), *loader.command[2:], *more]
    done = subprocess.run(command, input=b"{}\n", capture_output=True, timeout=300, check=True)
    return np.array(done.stdout.split(), np.float32)


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Loader, Path]:
    """A model of text for LiteRT, and a bundle of another model of the same shapes."""
    folder = tmp_path_factory.mktemp("twins")
    good = Loader(built("llama", "android-tflite", folder), sees=False, hears=False)
    model = folder / "model" / "model.safetensors"
    weights = load_file(model)
    save_file({name: np.roll(weight, 1, axis=-1) for name, weight in weights.items()}, model, {"format": "pt"})
    other = build(str(folder / "model"), str(folder / "small.toml"), folder / "other", context=CONTEXT, parity="L1")
    return good, other.bundle


def test_another_models_packed_weights_never_answer(twins: tuple[Loader, Path]) -> None:
    """A bundle that claims another one's digest and time; and flipped bits in what is kept."""
    good, other = twins
    kept = good.bundle.parent
    claims = json.loads((other / "manifest.json").read_text())
    claims["files"]["decoder.tflite"]["sha256"] = good.manifest["files"]["decoder.tflite"]["sha256"]
    (other / "manifest.json").write_text(json.dumps(claims))
    time = (good.bundle / "decoder.tflite").stat().st_mtime_ns
    os.utime(other / "decoder.tflite", ns=(time, time))
    refused = subprocess.run(
        [good.command[0], str(other), *good.command[2:]], input=b"{}\n", capture_output=True, timeout=300, check=True
    )
    assert refused.stdout.startswith(b"bundle-file-changed: ")
    assert not good.same(" ".join(map(str, litert_answer(good, other, "verified"))))  # it is another model
    for more in ((), ("verified",)):  # packed anew, and as it was kept
        for _ in range(2):
            np.testing.assert_allclose(litert_answer(good, good.bundle, *more), good.wanted, rtol=0, atol=2e-3)
    packed = sorted(kept.glob("*.xnnpack"))
    assert len(packed) == 3 and {f"{path.name}.sha256" for path in packed} == {
        path.name for path in kept.glob("*.xnnpack.sha256")
    }
    rng, sizes = np.random.default_rng(0), {path: path.stat().st_size for path in packed}
    for _ in range(6):
        for path, size in sizes.items():
            data = bytearray(path.read_bytes())
            data[rng.integers(size)] ^= 1 << rng.integers(8)
            path.write_bytes(data)
        np.testing.assert_allclose(litert_answer(good, good.bundle), good.wanted, rtol=0, atol=2e-3)
    assert sorted(kept.glob("*.xnnpack*")) == sorted([*packed, *kept.glob("*.sha256")])  # no left-over partial


def test_files_are_compared_with_their_hashes_before_a_runtime_opens_them(loader: Loader) -> None:
    """One flipped bit in each file that a session of text or an encoder opens."""
    for component in loader.manifest["components"]:
        for name in component["files"]:
            path = loader.bundle / name
            data = path.read_bytes()
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            (answer,) = loader.ask([{"manifest.json": json.dumps(loader.manifest)}])
            path.write_bytes(data)
            assert answer.startswith("bundle-file-changed: "), name
