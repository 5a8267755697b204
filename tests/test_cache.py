"""One cache for many: processes of the same number, kills, what is in use, and a folder that may only be read."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edgeexport import errors
from edgeexport.bundle import cache as caches
from edgeexport.bundle.cache import Cache

STEP = """
import os, sys
from pathlib import Path
sys.path[:0] = {path!r}
from edgeexport.bundle.cache import Cache
{before}
def fill(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "half").write_text("half")
    print("filling", os.getpid(), flush=True)
    sys.stdin.readline()
    (folder / "whole").write_text(sys.argv[2])
cache = Cache(Path(sys.argv[1]))
place, known = cache.folder("step", sys.argv[2], fill)
print("known" if known else "made", place, flush=True)
for remark in cache.remarks:
    print("remark", remark.code, remark.where, flush=True)
sys.stdin.readline()
print((place / "whole").read_text(), flush=True)
"""
SAME_NUMBER = "os.getpid = lambda: 7"
NAMESPACES = ["unshare", "--pid", "--net", "--fork", "--kill-child"]
NOBODY = 65534


def namespaces() -> list[str] | None:
    """How a process gets numbers and a network of its own here; None where that is not permitted."""
    for command in (NAMESPACES, [*NAMESPACES, "--user", "--map-root-user"]):
        if shutil.which(command[0]) and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    return None


@contextmanager
def process(root: Path, key: str, before: str = "", prefix: list[str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """A process that fills an entry, or uses it, and waits for a line before each next thing."""
    script = STEP.format(path=sys.path, before=before)
    command = [*(prefix or []), sys.executable, "-c", script, str(root), key]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def said(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def tell(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()


def entries(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "steps" / "step").iterdir())


def fill(folder: Path) -> None:
    (folder / "whole").write_text("x")


@pytest.mark.parametrize("kind", ["the same number", "namespaces"])
def test_two_of_the_same_number_share_a_cache(tmp_path: Path, kind: str) -> None:
    prefix, before = (namespaces(), "") if kind == "namespaces" else ([], SAME_NUMBER)
    if prefix is None:
        pytest.skip("this user may not make namespaces; the same number is tested without")
    with process(tmp_path, "a", before, prefix) as one, process(tmp_path, "b", before, prefix) as other:
        first, second = said(one), said(other)
        assert first == second and first.startswith("filling")
        tell(other)
        assert said(other).startswith("made")
        Cache(tmp_path).prune(0)
        tell(one)
        assert said(one).startswith("made")
        tell(one)
        tell(other)
        assert (said(one), said(other)) == ("a", "b")
    assert entries(tmp_path) == ["a", "b"]


def test_two_may_make_the_same_entry_at_once(tmp_path: Path) -> None:
    with process(tmp_path, "a") as one, process(tmp_path, "a") as other:
        assert said(one).startswith("filling") and said(other).startswith("filling")
        tell(one)
        assert said(one).startswith("made")
        tell(other)
        said(other)
        tell(one)
        tell(other)
        assert (said(one), said(other)) == ("a", "a")
    assert entries(tmp_path) == ["a"]


def test_what_a_killed_process_began_is_removed_and_nothing_else(tmp_path: Path) -> None:
    with process(tmp_path, "a") as one, process(tmp_path, "b") as other:
        said(one), said(other)
        assert [name.split(".")[1] for name in entries(tmp_path)] == ["a", "b"]
        one.kill()
        one.wait()
        Cache(tmp_path).folder("step", "c", fill)
        assert sorted(name.strip(".").split(".")[0] for name in entries(tmp_path)) == ["b", "c"]
        other.kill()
        other.wait()
    (tmp_path / "steps" / "step" / ".d.0123").mkdir()  # killed before it had a lock
    Cache(tmp_path).prune()
    assert entries(tmp_path) == ["c"]


def test_what_is_in_use_is_not_pruned(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.folder("step", "mine", fill)
    Cache(tmp_path).folder("step", "a", lambda folder: (folder / "whole").write_text("a") and None)
    with process(tmp_path, "a") as user:
        assert said(user).startswith("known")
        cache.prune(0)
        assert entries(tmp_path) == ["a", "mine"]
        cache.release()
        cache.prune(0)
        assert entries(tmp_path) == ["a"]
        tell(user)
        assert said(user) == "a"
    cache.prune(0)
    assert entries(tmp_path) == []


def test_unfinished_work_in_use_is_not_pruned(tmp_path: Path) -> None:
    with Cache(tmp_path).workplace("step", "k") as work:
        os.utime(work, (1, 1))
        Cache(tmp_path).prune()
        assert work.is_dir()


def test_many_builders_users_and_pruners_at_once(tmp_path: Path) -> None:
    """Whoever was given an entry finds it whole, whatever the others do."""
    problems: list[str] = []

    def work(number: int) -> None:
        for turn in range(30):
            name = str((number + turn) % 3)
            cache = Cache(tmp_path)
            try:
                place, _ = cache.folder("step", name, lambda folder, name=name: fill_with(folder, name))
                if (place / "sub" / "whole").read_text() != name:
                    problems.append(f"{number} {turn}: {name} is another's")
                cache.release()
                cache.prune(0)
            except Exception as error:  # noqa: BLE001 - it is what the test is about
                problems.append(f"{number} {turn}: {error!r}")

    def fill_with(folder: Path, name: str) -> None:
        (folder / "sub").mkdir()
        (folder / "sub" / "whole").write_text(name)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert problems == []
    Cache(tmp_path).prune(0)
    assert entries(tmp_path) == []


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that other users may read, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp(prefix="edgeexport-test-"))
    folder.chmod(0o755)
    yield folder
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    shutil.rmtree(folder)


def test_a_cache_that_may_only_be_read_is_used_and_nothing_is_filed(public: Path) -> None:
    Cache(public).folder("step", "a", lambda folder: (folder / "whole").write_text("a") and None)
    for path in (public, *public.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted(public.rglob("*"))
    drop = f"if os.getuid() == 0: os.setuid({NOBODY})"
    with process(public, "a", drop) as user, process(public, "b", drop) as maker:
        assert said(user) == f"known {public}/steps/step/a"
        tell(user)
        assert said(user) == "a"
        assert said(maker).startswith("filling")
        tell(maker)
        place = Path(said(maker).removeprefix("made "))
        assert public not in place.parents and (place / "whole").read_text() == "b"
        assert said(maker) == f"remark cache-read-only {public}"
        tell(maker)
        assert said(maker) == "b"
        assert maker.wait() == 0 and not place.exists()
    assert sorted(public.rglob("*")) == before


def test_it_is_said_once_and_the_same_entry_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Cache, place: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Cache, "_begin", refuse)
    cache, made = Cache(tmp_path), []
    places = [cache.folder("step", "a", lambda folder: made.append(fill(folder)))[0] for _ in range(2)]
    assert places[0] == places[1] and (places[0] / "whole").read_text() == "x" and len(made) == 1
    assert [remark.code for remark in cache.remarks] == ["cache-read-only"]
    del cache
    assert not places[0].exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG])
def test_a_full_cache_is_said_as_itself_and_keeps_nothing_half(tmp_path: Path, number: int) -> None:
    def half(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(number, os.strerror(number))

    with pytest.raises(errors.ToolError) as error:
        Cache(tmp_path).folder("step", "a", half)
    (finding,) = error.value.findings
    assert (finding.code, finding.where) == ("cache-not-writable", str(tmp_path / "steps"))
    assert entries(tmp_path) == []


def test_what_another_folder_refuses_is_not_put_on_the_cache(tmp_path: Path) -> None:
    def elsewhere(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "tmp" / "x"))

    with pytest.raises(OSError, match="tmp/x"):
        Cache(tmp_path / "cache").folder("step", "a", elsewhere)


@pytest.mark.parametrize("depth", ["", "below"])
def test_a_file_in_place_of_the_cache_is_refused_at_once(tmp_path: Path, depth: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(errors.ToolError) as error:
        Cache(tmp_path / "file" / depth).folder("step", "a", lambda folder: pytest.fail("work was done"))
    assert error.value.findings[0].code == "cache-not-writable"


def test_without_locks_only_what_is_old_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(caches.fcntl, "flock", none)
    cache = Cache(tmp_path)
    place, _ = cache.folder("step", "a", fill)
    assert cache.folder("step", "a", fill) == (place, True)
    cache.release()
    cache.prune(0)
    assert entries(tmp_path) == ["a"]
    for path in (place, *place.rglob("*")):
        os.utime(path, (1, 1))
    cache.prune(0)
    assert entries(tmp_path) == []
    with cache.workplace("step", "k") as one, cache.workplace("step", "k") as other:
        assert one != other
