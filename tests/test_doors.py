"""One door to a bundle's files: whatever stands in a file's place, no reader waits, leaves the folder or is fooled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from bundles import code_of, codes, rehash, tree, write_bundle

from edgeexport import build, errors
from edgeexport.bundle import manifest as manifests
from edgeexport.bundle import open_bundle
from edgeexport.bundle.verify import verify
from edgeexport.plainfile import NotPlain, located, open_plain, read_plain

SECRET = b"not for anyone"


@pytest.fixture(scope="module")
def checkpoint(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, with a chat template."""
    folder = Path(shutil.copytree(checkpoint, tmp_path_factory.mktemp("chat") / "llama"))
    (folder / "chat_template.jinja").write_text("{% for each in messages %}{{ each.content }}{% endfor %}")
    return folder


@pytest.fixture(scope="module")
def built(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(str(checkpoint), "host-ort", tmp_path_factory.mktemp("out"), parity="L4").bundle


@pytest.fixture(scope="module")
def built_coreml(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(str(checkpoint), "ios-coreml", tmp_path_factory.mktemp("out"), parity="L4").bundle


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "in" / "bundle"))


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def socket(path: Path) -> None:
    import socket as sockets

    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket may have 107 bytes
    try:
        with sockets.socket(sockets.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def link_out(path: Path) -> None:
    secret = path.parents[2] / "secret.bin"
    secret.write_bytes(SECRET)
    path.symlink_to(secret)


def link_inside(path: Path) -> None:
    """A link to a file of the same bundle that has the right bytes."""
    (path.parent / "other").write_bytes(path.with_name(f"{path.name}.kept").read_bytes())
    path.symlink_to("other")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


KINDS = (fifo, device, socket, link_out, link_inside, loop, dangling)

READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "manifest": ("manifest.json", open_bundle),
    "tokenizer": ("tokenizer/tokenizer.json", lambda path: open_bundle(path).tokenizer()),
    "template": ("tokenizer/chat_template.jinja", lambda path: open_bundle(path).chat_template()),
    "graph": ("decoder.onnx", lambda path: open_bundle(path).session()),
    "weights": ("decoder.onnx.data", lambda path: open_bundle(path).session()),
    "golden": ("golden/text.safetensors", lambda path: verify(path).raise_if_bad()),
    "digest": ("manifest.json.sha256", lambda path: verify(path).raise_if_bad()),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_plain_file_is_not_read(bundle: Path, reader: str, kind: Callable[[Path], None]) -> None:
    name, read = READERS[reader]
    place = bundle / name
    kept = place.with_name(f"{place.name}.kept")
    place.rename(kept)
    kind(place)
    if kind is not link_inside:
        kept.unlink()
    with pytest.raises(errors.BundleError) as error:
        read(bundle)
    assert "bundle-unsafe-path" in [finding.code for finding in error.value.findings]


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "golden/text.safetensors"])
def test_a_file_of_another_size_is_not_read(bundle: Path, name: str) -> None:
    opened = open_bundle(bundle)
    with (bundle / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(errors.BundleError) as error:
        opened.read(name, 1 << 30)
    assert code_of(error) == "bundle-file-changed"


@pytest.mark.parametrize("name", ["notes.txt", "../secret.bin", "/etc/passwd", "tokenizer", ""])
def test_a_file_that_is_not_listed_is_not_read(bundle: Path, name: str) -> None:
    (bundle / "notes.txt").write_text("x")
    (bundle.parent / "secret.bin").write_bytes(SECRET)
    with pytest.raises(errors.BundleError) as error:
        open_bundle(bundle).open(name)
    assert code_of(error) == "bundle-bad-manifest"


def test_a_file_larger_than_its_reader_takes_is_not_read(bundle: Path) -> None:
    with pytest.raises(errors.BundleError) as error:
        open_bundle(bundle).read("decoder.onnx.data", 100)
    assert code_of(error) == "bundle-file-changed"


@pytest.mark.parametrize("name", ["x\0y", "x\ud800"])
def test_a_name_that_no_file_has_is_an_error_of_the_system(tmp_path: Path, name: str) -> None:
    with pytest.raises(OSError):
        read_plain(tmp_path / name, 10)


def test_a_file_that_grows_to_a_fifo_between_look_and_open_does_not_stop_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, other = tmp_path / "pipe", tmp_path / "file"
    os.mkfifo(place)
    other.write_bytes(b"x")
    looked = other.lstat()
    monkeypatch.setattr(Path, "lstat", lambda self: looked)
    with pytest.raises(NotPlain):
        open_plain(place)


# as downloads lie on disk


def in_hub_cache(bundle: Path, root: Path) -> Path:
    """The bundle as huggingface_hub keeps a download: real folders, and in them links to blobs by their hash."""
    from huggingface_hub.file_download import _create_symlink

    snapshot, blobs = root / "models--me--it" / "snapshots" / ("c" * 40), root / "models--me--it" / "blobs"
    blobs.mkdir(parents=True)
    for number, (name, data) in enumerate(tree(bundle).items()):
        blob, place = blobs / f"{number:040x}", snapshot / name
        blob.write_bytes(data)
        place.parent.mkdir(parents=True, exist_ok=True)
        _create_symlink(str(blob), str(place), new_blob=False)
    return snapshot


@pytest.mark.parametrize("target", ["built", "built_coreml"])
def test_a_download_in_the_hubs_cache_is_used_where_it_lies(
    request: pytest.FixtureRequest, tmp_path: Path, target: str
) -> None:
    bundle = Path(shutil.copytree(request.getfixturevalue(target), tmp_path / "bundle"))
    (bundle / "README.md").write_text("# A model card")
    (bundle / ".gitattributes").write_text("*.data filter=lfs")
    there = in_hub_cache(bundle, tmp_path / "hub")
    assert (there / "manifest.json").is_symlink(), "as the hub's own code links"
    report = verify(there)
    assert report.ok and report.golden.value == "PASS", report
    assert [each.code for each in report.remarks] == ["bundle-companion"] * 2
    with open_bundle(there).session() as session:
        session.prefill([1, 2])


def test_a_link_in_the_hubs_cache_leads_to_its_own_blobs_alone(bundle: Path, tmp_path: Path) -> None:
    there = in_hub_cache(bundle, tmp_path / "hub")
    for elsewhere in (tmp_path / "secret.bin", tmp_path / "hub" / "models--other--it" / "blobs" / "1"):
        elsewhere.parent.mkdir(parents=True, exist_ok=True)
        elsewhere.write_bytes((bundle / "decoder.onnx.data").read_bytes())
        (there / "decoder.onnx.data").unlink()
        (there / "decoder.onnx.data").symlink_to(elsewhere)
        assert codes(verify(there)) == ["bundle-unsafe-path"]
    (there / "tokenizer").rename(tmp_path / "t")
    (there / "tokenizer").symlink_to(tmp_path / "t")
    with pytest.raises(NotPlain):
        located(there, "tokenizer/tokenizer.json")


@pytest.mark.parametrize(
    "name", ["README.md", "README", "LICENSE.txt", "NOTICE", ".gitattributes", ".DS_Store", ".git/HEAD",
             ".cache/huggingface/download/x.metadata"],
)  # fmt: skip
def test_what_hubs_and_git_put_beside_a_bundle_is_a_remark(tmp_path: Path, name: str) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_text("x")
    report = verify(bundle, golden=False)
    assert report.ok and [each.code for each in report.remarks] == ["bundle-companion"]


@pytest.mark.parametrize("name", ["decoder.bin.md", "x/README.md", "tokenizer/.gitattributes", ".gitx", "readme/x.so"])
def test_any_other_file_beside_a_bundle_is_wrong(tmp_path: Path, name: str) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_text("x")
    assert codes(verify(bundle, golden=False)) == ["bundle-file-unlisted"]


@pytest.mark.parametrize("kind", [fifo, link_out, dangling])
def test_not_even_a_companion_may_be_something_else_than_a_file(tmp_path: Path, kind: Callable[[Path], None]) -> None:
    bundle = write_bundle(tmp_path / "in" / "bundle")
    kind(bundle / "README.md")
    assert codes(verify(bundle, golden=False)) == ["bundle-unsafe-path"]


# what a bundle says of itself


def change_weights(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    place = bundle / "decoder.weights.json"
    written = msgspec.json.decode(place.read_bytes())
    change(next(iter(written.values())))
    place.write_bytes(msgspec.json.encode(written))
    rehash(bundle)


@pytest.mark.parametrize("file", ["../secret.bin", "/etc/passwd", "manifest.json", "notes.txt", ""])
def test_weights_are_read_from_the_components_own_files(checkpoint: Path, bundle: Path, file: str) -> None:
    from edgeexport import pipeline

    (bundle.parent / "secret.bin").write_bytes(SECRET * 100_000)
    change_weights(bundle, lambda weight: weight.update(file=file))
    with pytest.raises(errors.BundleError) as error:
        pipeline.parity(bundle, str(checkpoint), level="L3")
    assert code_of(error) == "bundle-bad-weights"


def test_a_bundle_names_no_target_by_its_path(checkpoint: Path, bundle: Path) -> None:
    from edgeexport import pipeline

    evil = bundle.parent / "evil.toml"
    evil.write_text("title = 'never read'")
    data = manifests.from_json((bundle / "manifest.json").read_bytes())
    for name in (str(evil), "../evil.toml", "evil.toml", "targets/host-ort.toml", "host-ort.toml"):
        rehash(bundle, target=msgspec.structs.replace(data.target, name=name))
        with pytest.raises(errors.UsageError) as error:
            pipeline.parity(bundle, str(checkpoint), level="L3")
        assert code_of(error) == "unknown-target"


LOOKS: dict[str, list[str]] = {
    "parity --import": ["parity", "BUNDLE", "--import", "PIPE"],
    "inspect .engine": ["inspect", "PIPE.engine"],
    "inspect .onnx": ["inspect", "PIPE.onnx"],
    "eval": ["eval", "PACKAGE", "--inputs", "PIPE"],
}


@pytest.fixture
def pipes(tmp_path: Path) -> Iterator[Path]:
    for name in ("PIPE", "PIPE.engine", "PIPE.onnx"):
        os.mkfifo(tmp_path / name)
    yield tmp_path


@pytest.mark.parametrize("look", LOOKS)
def test_no_command_waits_for_a_pipe(pipes: Path, built_coreml: Path, bundle: Path, look: str) -> None:
    names = {"BUNDLE": bundle, "PACKAGE": built_coreml / "decoder.mlpackage"}
    line = [str(names.get(each, pipes / each if each.startswith("PIPE") else each)) for each in LOOKS[look]]
    done = subprocess.run(
        [sys.executable, "-m", "edgeexport", *line], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode in (2, 8) and "internal-error" not in done.stderr, done.stderr
