"""Our end of the process in which chat templates render: started when it is needed, and anew after one that it did not
survive."""

from __future__ import annotations

import atexit
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgeexport.limits import UNTRUSTED

LENGTH = 8
"""As in rendering.py, which is not imported here: it is the other process's."""
MAX_ANSWER = 64 << 20
"""Bytes of an answer: a text of the greatest length, each character written as 12 bytes."""
START = "import sys; sys.path[:] = sys.argv[1:]; from edgeexport.session.rendering import main; main()"


class RenderingFailed(Exception):
    """What the template did wrong, or the process with it."""


class Renderer:
    """One process. Several threads may use it; they wait for each other."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the process, if it does not run, without waiting for it. Raises: RenderingFailed."""
        with self._lock:
            self._started()

    def render(self, source: str, variables: Mapping[str, Any] | None, now: str) -> str:
        """The text that the template makes of `variables`, which are JSON's own types; "" where they are None and it is
        only compiled. `now` is the time that it may ask for, in ISO 8601.

        Raises: RenderingFailed.
        """
        request: dict[str, Any] = {"source": source}
        if variables is not None:
            request |= {"variables": variables, "now": now}
        try:
            data = json.dumps(request).encode("ascii")
        except (ValueError, RecursionError) as problem:
            raise RenderingFailed(str(problem)) from problem
        with self._lock:
            answer = json.loads(self._exchange(len(data).to_bytes(LENGTH, "little") + data))
            if "last" in answer:
                self._end()
        if "failed" in answer:
            raise RenderingFailed(answer["failed"])
        return str(answer["text"])

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def forget(self) -> None:
        """In a fork: the process is the parent's."""
        self._process, self._lock = None, threading.Lock()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            root = str(Path(__file__).parents[2])
            paths = [path for path in dict.fromkeys((*sys.path, root)) if path]
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", START, *paths],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,  # a Ctrl-C that ends an answer is none of its business
                )
            except OSError as problem:
                raise RenderingFailed(f"the process for templates did not start: {problem}") from problem
        return self._process

    def _exchange(self, data: bytes) -> bytes:
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        deadline = time.monotonic() + UNTRUSTED.wall_seconds
        try:
            process.stdin.write(data)
            process.stdin.flush()
            size = int.from_bytes(self._read(LENGTH, deadline), "little")
            if size > MAX_ANSWER:
                raise RenderingFailed("the template writes too much")
            return self._read(size, deadline)
        except OSError:
            raise self._ended() from None
        except BaseException:  # a Ctrl-C in between: what is on its way belongs to no request any more
            self._end()
            raise

    def _read(self, size: int, deadline: float) -> bytes:
        process = self._process
        assert process is not None and process.stdout is not None
        parts: list[bytes] = []
        with selectors.DefaultSelector() as ready:
            ready.register(process.stdout, selectors.EVENT_READ)
            while size:
                left = deadline - time.monotonic()
                if left <= 0 or not ready.select(left):
                    raise RenderingFailed(f"the template takes more than {UNTRUSTED.wall_seconds:g} s")
                part = os.read(process.stdout.fileno(), min(size, 1 << 20))
                if not part:
                    raise self._ended()
                parts.append(part)
                size -= len(part)
        return b"".join(parts)

    def _ended(self) -> RenderingFailed:
        """Why the process is no more."""
        process = self._process
        assert process is not None
        try:
            code = process.wait(5)
        except subprocess.TimeoutExpired:
            code = 0
        self._end()
        if code == -signal.SIGPROF:
            return RenderingFailed(f"the template needs more than {UNTRUSTED.cpu_seconds:g} s of processor time")
        return RenderingFailed(f"the template ended its process (exit status {code})")

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was not written yet has no reader
                    pipe.close()


SHARED = Renderer()
"""The process that everyone here uses."""
atexit.register(SHARED.close)
os.register_at_fork(after_in_child=SHARED.forget)
