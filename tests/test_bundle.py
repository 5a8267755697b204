"""Bundles: writing all or nothing, verification down to the last bit, golden vectors."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import (
    CONTEXT,
    PROMPT,
    STEPS,
    TOKENS,
    VALID,
    VOCAB,
    WeightRunner,
    a_manifest,
    code_of,
    codes,
    golden_tensors,
    table,
    write_bundle,
)

from edgeexport import backends, core, errors
from edgeexport.bundle import manifest as manifests
from edgeexport.bundle import open_bundle, writer
from edgeexport.bundle.golden import kl_divergence
from edgeexport.bundle.inspect import describe
from edgeexport.bundle.manifest import Gates, Golden
from edgeexport.bundle.verify import verify
from edgeexport.bundle.writer import BundleWriter
from edgeexport.cli_edge import execute


@pytest.fixture(autouse=True)
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Puts WeightRunner in the backend's place; the names of the components that were opened."""
    names: list[str] = []

    def open_decoder(folder: Path, component: manifests.Component, *, threads: int | None, exact: bool) -> WeightRunner:
        names.append(component.name)
        return WeightRunner(folder, component)

    monkeypatch.setattr(backends, "load_runner", lambda name: types.SimpleNamespace(open_decoder=open_decoder))
    return names


# writer


def left_over(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_two_builds_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = write_bundle(tmp_path / "a" / "b"), write_bundle(tmp_path / "c")
    names = sorted(path.relative_to(one).as_posix() for path in one.rglob("*") if path.is_file())
    assert names == ["decoder.bin", "golden/text.safetensors", "manifest.json", "manifest.json.sha256",
                     "tokenizer/chat_template.jinja"]  # fmt: skip
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    assert left_over(tmp_path) == ["a", "c"]


@pytest.mark.parametrize("size", [0, 1, writer.PIECE, 2 * writer.PIECE + 12345])
def test_a_large_file_is_taken_over_and_hashed(tmp_path: Path, size: int) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(data := np.random.default_rng(0).bytes(size))
    (tmp_path / "alias").symlink_to(source)
    with BundleWriter(tmp_path / "bundle") as out:
        out.add_file("deep/file.bin", tmp_path / "alias")
        entry = out.files["deep/file.bin"]
        place = out.folder / "deep" / "file.bin"
        assert not place.samefile(source) and not place.is_symlink()
        source.write_bytes(b"changed")
        assert place.read_bytes() == data
    assert entry == manifests.FileEntry(size, hashlib.sha256(data).hexdigest())


def test_where_blocks_are_shared_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Btrfs and XFS: the system is asked to share them, and what is there then is hashed."""

    def clone(place: int, request: int, source: int) -> int:
        assert request == 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)
        return os.write(place, os.pread(source, 1 << 20, 0)) and 0

    monkeypatch.setattr("fcntl.ioctl", clone)
    (tmp_path / "source").write_bytes(b"abc")
    with BundleWriter(tmp_path / "bundle") as out:
        out.add_file("x", tmp_path / "source")
        assert (out.folder / "x").read_bytes() == b"abc"
        assert out.files["x"] == manifests.FileEntry(3, hashlib.sha256(b"abc").hexdigest())


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failed_build_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure), BundleWriter(tmp_path / "bundle") as out:
        out.add_bytes("a/b", b"x")
        raise failure
    assert left_over(tmp_path) == []


def test_leaving_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle") as out:
        out.add_bytes("a/b", b"x")
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("kind", ["bundle", "folder", "file", "link"])
def test_what_exists_is_replaced_only_when_asked(tmp_path: Path, kind: str) -> None:
    place, elsewhere = tmp_path / "out" / "bundle", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    place.parent.mkdir()
    if kind == "bundle":
        write_bundle(place, build_key="old")
    elif kind == "folder":
        place.mkdir()
    elif kind == "file":
        place.write_text("x")
    else:
        place.symlink_to(elsewhere)
    with pytest.raises(errors.UsageError) as error:
        write_bundle(place)
    assert code_of(error) == "output-exists"
    write_bundle(place, force=True, build_key="new")
    assert verify(place).ok and open_bundle(place).manifest.build_key == "new"
    assert left_over(place.parent) == ["bundle"] and left_over(elsewhere) == ["precious"]


def test_a_failed_forced_build_keeps_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = write_bundle(tmp_path / "bundle", build_key="old")
    with pytest.raises(RuntimeError), BundleWriter(place, force=True) as out:
        out.add_bytes("x", b"x")
        raise RuntimeError
    rename = Path.rename

    def refuse_the_second(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_the_second)
    with pytest.raises(errors.UsageError) as error:
        write_bundle(place, force=True, build_key="new")
    assert code_of(error) == "output-not-writable"
    assert left_over(tmp_path) == ["bundle"] and open_bundle(place).manifest.build_key == "old" and verify(place).ok


KILLED = """
import os, signal, sys
from pathlib import Path
from edgeexport.bundle.writer import BundleWriter
with BundleWriter(Path(sys.argv[1])) as out:
    out.add_bytes("a/b", b"x")
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_a_second_build_is_refused_and_a_killed_one_cleaned_up(tmp_path: Path) -> None:
    place = tmp_path / "bundle"
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"ready\n"
        with pytest.raises(errors.UsageError) as error:
            write_bundle(place)
        assert code_of(error) == "build-running"
        assert any(".partial-" in name for name in left_over(tmp_path))
        other.send_signal(signal.SIGKILL)
    assert left_over(tmp_path) != []
    write_bundle(place)
    assert left_over(tmp_path) == ["bundle"] and verify(place).ok


def test_a_bundle_moved_aside_by_a_killed_build_comes_back(tmp_path: Path) -> None:
    place = write_bundle(tmp_path / "bundle", build_key="old")
    place.rename(tmp_path / ".bundle.old")
    with BundleWriter(place, force=True):
        pass
    assert open_bundle(place).manifest.build_key == "old"
    shutil.copytree(place, tmp_path / ".bundle.old")
    write_bundle(place, force=True)
    assert left_over(tmp_path) == ["bundle"]


FULL = """
import resource, sys
from pathlib import Path
from edgeexport import errors
from edgeexport.bundle.writer import BundleWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with BundleWriter(Path(sys.argv[1])) as out:
        out.add_bytes("x", bytes(2000))
except errors.EdgeExportError as error:
    print(error.findings[0].code, error.findings[0].why)
"""


def test_a_write_that_the_system_refuses_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path / "b")], capture_output=True, check=True)
    assert done.stdout.startswith(b"output-not-writable File too large")
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_full_or_read_only_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(writer.os, "fsync", refuse)
    with pytest.raises(errors.UsageError) as error:
        write_bundle(tmp_path / "bundle")
    assert code_of(error) == "output-not-writable" and left_over(tmp_path) == []


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(errors.UsageError) as error:
        write_bundle(tmp_path / "file" / "bundle")
    assert code_of(error) == "output-not-writable"


def test_a_manifest_must_list_what_was_added(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle") as out:
        out.add_bytes("decoder.bin", b"x")
        with pytest.raises(ValueError, match="other files"):
            out.commit(VALID)
        for path in ("decoder.bin", "../x", "/x", "manifest.json"):
            with pytest.raises(ValueError, match="the path"):
                out.add_bytes(path, b"y")
    assert left_over(tmp_path) == []


# opening and verifying


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def test_a_good_bundle_verifies(bundle: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = verify(bundle, progress=lambda done, total: seen.append((done, total)))
    assert report.ok and report.golden is core.Verdict.PASS and seen[-1] == (report.bytes, report.bytes)
    assert report.comparison is not None
    assert (report.comparison.metric, report.comparison.steps) == ("max_abs", STEPS + 1)
    assert verify(bundle, golden=False).golden is core.Verdict.NOT_RUN


def test_a_flipped_bit_anywhere_is_found(bundle: Path) -> None:
    # every byte of the small files, a spread of the others
    for path in sorted(path for path in bundle.rglob("*") if path.is_file()):
        original = path.read_bytes()
        step = max(1, len(original) // 150)
        for index in range(0, len(original), step):
            changed = bytearray(original)
            changed[index] ^= 1 << (index % 8)
            path.write_bytes(changed)
            try:
                found = not verify(bundle).ok
            except errors.BundleError:
                found = True
            assert found, (path.name, index)
        path.write_bytes(original)
    assert verify(bundle).ok


@pytest.mark.parametrize("name", ["decoder.bin", "manifest.json.sha256", "golden/text.safetensors"])
@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda path: path.unlink(), "bundle-file-missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bundle-file-changed"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "bundle-file-changed"),
        (lambda path: (path.unlink(), path.mkdir()), "bundle-unsafe-path"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "bundle-unsafe-path"),
        (lambda path: path.rename(path.with_name("moved")), "bundle-file-missing"),
    ],
)
def test_damage_is_found(bundle: Path, opened: list[str], name: str, damage: Any, code: str) -> None:
    damage(bundle / name)
    report = verify(bundle)
    assert code in codes(report) and not report.ok and report.golden is core.Verdict.NOT_RUN and opened == []
    with pytest.raises(errors.BundleError) as error:
        report.raise_if_bad()
    assert error.value.findings == report.findings
    if name == "decoder.bin":  # the others are read when they are needed
        with pytest.raises(errors.BundleError) as error:
            open_bundle(bundle)
        assert code_of(error) == code


@pytest.mark.parametrize("name", ["notes.txt", "tokenizer/x", "new/deep/x"])
def test_an_unlisted_file_is_found(bundle: Path, name: str) -> None:
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_text("")
    assert codes(verify(bundle)) == ["bundle-file-unlisted"]


@pytest.mark.parametrize("name", ["decoder.bin", "tokenizer", "manifest.json.sha256"])
def test_a_link_is_refused_even_when_its_target_is_right(bundle: Path, tmp_path: Path, name: str) -> None:
    (bundle / name).rename(tmp_path / "elsewhere")
    (bundle / name).symlink_to(tmp_path / "elsewhere")
    assert set(codes(verify(bundle))) == {"bundle-unsafe-path"}
    if name != "manifest.json.sha256":
        with pytest.raises(errors.BundleError) as error:
            open_bundle(bundle)
        assert code_of(error) == "bundle-unsafe-path"


def test_an_unlisted_link_and_a_linked_manifest_are_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / "extra").symlink_to("/etc")
    assert codes(verify(bundle)) == ["bundle-unsafe-path"]
    (bundle / "manifest.json").rename(tmp_path / "m")
    (bundle / "manifest.json").symlink_to(tmp_path / "m")
    with pytest.raises(errors.BundleError) as error:
        open_bundle(bundle)
    assert code_of(error) == "bundle-unsafe-path"


@pytest.mark.parametrize("missing", ["nowhere", "."])
def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path, missing: str) -> None:
    for call in (open_bundle, verify):
        with pytest.raises(errors.BundleError) as error:
            call(tmp_path / missing)
        assert code_of(error) == "bundle-not-found"


def test_swapped_weights_of_the_same_shape_are_found(bundle: Path, tmp_path: Path) -> None:
    swapped = write_bundle(tmp_path / "swapped", weights=table(seed=5))
    report = verify(swapped)
    assert codes(report) == ["golden-mismatch"] and report.golden is core.Verdict.FAIL
    without = golden_tensors(artifact_logits=None)
    kl = write_bundle(tmp_path / "kl", weights=table(seed=5), tensors=without)
    assert codes(verify(kl)) == ["golden-mismatch"]


@pytest.mark.parametrize("kl", [False, True])
def test_a_manifests_gates_are_no_looser_than_the_ladders(tmp_path: Path, kl: bool) -> None:
    """Someone who swaps the weights and may write any gate."""
    gates = Gates(kl=9e3) if kl else Gates(max_abs=9e3)
    swapped = write_bundle(tmp_path / "b", weights=5 * table(1), golden=Golden("golden/text.safetensors", gates=gates))
    report = verify(swapped)
    assert codes(report) == ["golden-mismatch"]
    honest = write_bundle(tmp_path / "c", golden=Golden("golden/text.safetensors", gates=gates))
    assert verify(honest).ok


@pytest.mark.parametrize("gate", ["1e300", "10001", "-1", "1e999", "null"])
def test_a_gate_beyond_all_logits_is_no_gate(bundle: Path, gate: str) -> None:
    text = (bundle / "manifest.json").read_text()
    for name in ("max_abs", "kl"):
        text = re.sub(rf'"{name}": [^,\n]*', f'"{name}": {gate}', text)
    (bundle / "manifest.json").write_text(text)
    with pytest.raises(errors.BundleError) as error:
        verify(bundle)
    assert code_of(error) == "bundle-bad-manifest"


def test_verify_says_what_it_does_not_prove(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights and golden vectors that were forged together pass, and are not called proven."""
    rows = np.cumsum(table(1)[TOKENS], axis=0)[PROMPT - 1 :]
    forged = write_bundle(
        tmp_path / "forged", weights=table(1), tensors=golden_tensors(artifact_logits=rows, reference_logits=rows)
    )
    for folder in (bundle, forged):
        assert execute(["verify", str(folder)]) == 0
        assert "no signature" in capsys.readouterr().err.splitlines()[-1]
        assert execute(["verify", str(folder), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["signature"] is None


def test_golden_vectors_that_do_not_run_are_neither_passed_nor_failed(tmp_path: Path) -> None:
    bare = write_bundle(tmp_path / "b", golden=Golden(not_run="the ladder stopped at L1"))
    assert execute(["verify", str(bare)]) == 9
    assert execute(["verify", str(bare), "--no-golden"]) == 0
    with (bare / "decoder.bin").open("ab") as file:
        file.write(b"x")
    assert execute(["verify", str(bare)]) == 8


def test_without_the_artifacts_logits_the_reference_is_the_measure(tmp_path: Path) -> None:
    report = verify(write_bundle(tmp_path / "b", tensors=golden_tensors(artifact_logits=None)))
    assert report.comparison is not None and report.comparison.metric == "kl" and 0 < report.comparison.value < 1e-2


ROWS = np.zeros((STEPS + 1, VOCAB), np.float32)


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"artifact_logits": ROWS * np.float32("nan")}, "golden-mismatch"),
        ({"artifact_logits": None, "reference_logits": ROWS + np.float32("nan")}, "golden-mismatch"),
        ({"artifact_logits": None, "reference_logits": ROWS + np.float32("inf")}, "golden-mismatch"),
        ({"artifact_logits": ROWS[:2]}, "golden-unusable"),
        ({"reference_logits": None}, "golden-unusable"),
        ({"reference_logits": ROWS.astype(np.float64)}, "golden-unusable"),
        ({"artifact_logits": None, "reference_logits": ROWS[:0]}, "golden-unusable"),
        ({"artifact_logits": None, "reference_logits": ROWS[:2]}, "golden-unusable"),
        ({"artifact_logits": None, "reference_logits": np.zeros((STEPS + 1, 5), np.float32)}, "golden-mismatch"),
        ({"tokens": None}, "golden-unusable"),
        ({"tokens": TOKENS * 100}, "bad-token"),
        ({"prefill": np.array([0], np.int64)}, "golden-unusable"),
        ({"prefill": np.array([99], np.int64)}, "golden-unusable"),
        ({"prefill": np.array([1, 2], np.int64)}, "golden-unusable"),
    ],
)
def test_golden_vectors_that_prove_nothing_fail(tmp_path: Path, changed: dict[str, Any], code: str) -> None:
    report = verify(write_bundle(tmp_path / "b", tensors=golden_tensors(**changed)))
    assert codes(report) == [code] and report.golden is core.Verdict.FAIL


def test_a_gate_that_fits_nothing_fails(tmp_path: Path) -> None:
    golden = Golden("golden/text.safetensors", gates=Gates(max_abs=1.0))
    report = verify(write_bundle(tmp_path / "b", tensors=golden_tensors(artifact_logits=None), golden=golden))
    assert codes(report) == ["golden-unusable"]


def test_a_golden_file_that_is_none_fails(tmp_path: Path) -> None:
    golden = Golden("decoder.bin", gates=Gates(kl=1.0))
    assert codes(verify(write_bundle(tmp_path / "b", golden=golden))) == ["golden-unusable"]


def test_no_golden_vectors_is_said_not_hidden(tmp_path: Path) -> None:
    report = verify(write_bundle(tmp_path / "b", golden=Golden(not_run="the ladder stopped at L3")))
    assert report.ok and report.golden is core.Verdict.NOT_RUN and report.note == "the ladder stopped at L3"


def test_kl_divergence_equals_torchs() -> None:
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(3)
    one, other = (random.normal(size=(4, 100)).astype(np.float32) * 5 for _ in range(2))
    logs = [torch.tensor(logits, dtype=torch.float64).log_softmax(-1) for logits in (one, other)]
    expected = torch.nn.functional.kl_div(logs[1], logs[0], log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(kl_divergence(one, other), expected.numpy(), rtol=1e-9)


def test_an_opened_bundle_talks(bundle: Path, opened: list[str]) -> None:
    found = open_bundle(str(bundle))
    with found.session(threads=1) as session:
        np.testing.assert_allclose(session.prefill([1, 5]), table()[[1, 5]].sum(axis=0), rtol=1e-6)
    assert opened == ["decoder"] and found.stop_ids == (2,)
    assert found.chat_template().render([{"role": "user", "content": "hi"}]) == "hi</s>"
    with pytest.raises(errors.BundleError) as error:
        found.tokenizer()
    assert code_of(error) == "tokenizer-unusable"


def test_a_text_session_needs_no_other_components_files(tmp_path: Path, opened: list[str]) -> None:
    with BundleWriter(tmp_path / "b") as out:
        out.add_bytes("decoder.bin", table().tobytes())
        out.add_bytes("vision.bin", b"not a model")
        vision = manifests.Component("vision", "nowhere", ("vision.bin",), ())
        golden = Golden(not_run="a test")
        out.commit(a_manifest(out.files, components=(VALID.components[0], vision), golden=golden))
    with open_bundle(tmp_path / "b").session() as session:
        session.prefill([1])
    assert opened == ["decoder"]


def test_a_bundle_without_a_decoder_or_a_template_says_so(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "b") as out:
        out.commit(a_manifest(out.files, components=(), golden=Golden(not_run="no decoder")))
    found = open_bundle(tmp_path / "b")
    for call, code in ((found.session, "bundle-no-component"), (found.chat_template, "chat-template-missing")):
        with pytest.raises(errors.BundleError) as error:
            call()
        assert code_of(error) == code


def test_a_description_is_plain_json(bundle: Path) -> None:
    found = describe(open_bundle(bundle))
    assert json.loads(json.dumps(found)) == found
    (decoder,) = found["components"]
    assert decoder["kv_cache"]["bytes_per_token"] == 2 * 3 * 2 * 4 * 2
    assert decoder["kv_cache"]["bytes_full"] == 96 * CONTEXT
    assert decoder["signatures"]["decode"]["inputs"][0] == f"input_ids: int64 [1, T=1..{CONTEXT}]"
    assert found["bytes"] == sum(found["files"].values()) and found["parity"] == {"L1": "PASS", "L5": "AMBIGUOUS"}


def test_nothing_here_needs_torch() -> None:
    script = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "gguf"}:
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import edgeexport.bundle, edgeexport.bundle.inspect, edgeexport.bundle.verify, edgeexport.bundle.writer
import edgeexport.session.chat, edgeexport.session.generate, edgeexport.session.tokenizer
"""
    subprocess.run([sys.executable, "-c", script], check=True)
