"""Measure a bundle on this machine: speed, memory, and how near the memory-bandwidth roofline it decodes."""

from __future__ import annotations

import os
import sys
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgeexport import errors

if TYPE_CHECKING:
    from edgeexport.bundle.manifest import Component
    from edgeexport.console import Console
    from edgeexport.session.session import Session

Tokens = npt.NDArray[np.int64]

PREFILL_ROUNDS = 3
ALLOCATION_TOKENS = 32
BANDWIDTH_ROUNDS = 8
LARGEST_BUFFER = 512 << 20


def bench(
    bundle: Path,
    *,
    prompt_tokens: int = 64,
    decode_tokens: int = 128,
    threads: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure the bundle's decoder with `threads` (by default as many as the runtime takes).

    Returns plain data in four sections: `run`, `speed`, `memory`, `roofline`; a name ends in its unit. Raises
    context-full where prompt and answer do not fit into the bundle's context, and what opening a bundle raises.
    """
    from edgeexport.bundle import open_bundle

    rss_before = current_rss()
    start = time.perf_counter()
    opened = open_bundle(bundle)
    with opened.session(threads=threads) as session:
        load_seconds = time.perf_counter() - start
        with _step(console, f"Decoding {decode_tokens} tokens after a prompt of {prompt_tokens}"):
            speed = measure_speed(session, prompt_tokens, decode_tokens)
        with _step(console, "Looking for allocations that grow"):
            growth = measure_growth(session, prompt_tokens, decode_tokens)
        memory = {
            "rss_before_loading_bytes": rss_before,
            "rss_bytes": current_rss(),
            "peak_rss_bytes": peak_rss(),
            **growth,
        }
    with _step(console, "Reading memory as fast as it goes"):
        bandwidth = read_bandwidth(threads or usable_cores())
    manifest = opened.manifest
    decoder = manifest.component("decoder")
    assert decoder is not None, "a session was opened on it"
    needed = bytes_per_token(decoder, prompt_tokens + decode_tokens // 2)
    rate = speed["decode_tokens_per_second"]
    return {
        "run": {
            "model": manifest.model.name,
            "target": manifest.target.name,
            "quantisation": manifest.quantisation,
            **({"runtime": opened.stand_in} if opened.stand_in else {}),
            "threads": threads or "the runtime's default",
            "prompt_tokens": prompt_tokens,
            "decode_tokens": decode_tokens,
        },
        "speed": {"load_seconds": load_seconds, **speed},
        "memory": memory,
        "roofline": {
            "bytes_read_per_token": needed,
            "memory_bandwidth_bytes_per_second": bandwidth,
            "bandwidth_measured_by": f"numpy max over a buffer of {_buffer_bytes() >> 20} MiB, best of "
            f"{BANDWIDTH_ROUNDS}, {threads or usable_cores()} threads",
            "roofline_tokens_per_second": bandwidth / needed if needed else 0.0,
            "achieved_share": rate * needed / bandwidth,
        },
    }


def measure_speed(session: Session, prompt_tokens: int, decode_tokens: int) -> dict[str, float]:
    """Greedy decoding after a prompt of pseudo-random tokens. A token's time covers `decode` and the argmax.

    `overhead_share` is the part of a token's time spent outside the runtime's call. `recomputed_over_cached` says how
    many times longer a token would take if the whole text were computed again for it. Raises context-full.
    """
    total = prompt_tokens + decode_tokens
    if total > session.context:
        raise errors.context_full(0, total, session.context)
    prompt = _tokens(prompt_tokens, session.vocab)
    _decode(session, prompt, min(8, decode_tokens))  # warm: caches, lazily made kernels
    prefill = min(_prefill_seconds(session, prompt) for _ in range(PREFILL_ROUNDS))
    seconds, inside = _decode(session, prompt, decode_tokens)
    recomputed = min(_prefill_seconds(session, _tokens(total, session.vocab)) for _ in range(PREFILL_ROUNDS))
    token = float(np.median(seconds))
    return {
        "first_token_seconds": prefill,
        "prefill_tokens_per_second": prompt_tokens / prefill,
        "decode_tokens_per_second": 1 / token,
        "token_ms_median": 1e3 * token,
        "token_ms_p95": 1e3 * float(np.percentile(seconds, 95)),
        "overhead_share": 1 - float(np.median(inside / seconds)),
        "recomputed_over_cached": recomputed / token,
    }


def measure_growth(session: Session, prompt_tokens: int, decode_tokens: int) -> dict[str, float]:
    """Bytes that each decoded token leaves behind: Python's and numpy's by tracemalloc, the process's by its RSS."""
    prompt = _tokens(prompt_tokens, session.vocab)
    count = max(1, min(ALLOCATION_TOKENS, decode_tokens // 2))
    _decode(session, prompt, count)
    rss = current_rss()
    _decode(session, prompt, count)
    rss_growth = (current_rss() - rss) / count
    tracing = tracemalloc.is_tracing()
    if not tracing:
        tracemalloc.start()
    try:
        _decode(session, prompt, count)
        before = tracemalloc.get_traced_memory()[0]
        _decode(session, prompt, count)
        traced_growth = (tracemalloc.get_traced_memory()[0] - before) / count
    finally:
        if not tracing:
            tracemalloc.stop()
    return {"python_growth_bytes_per_token": traced_growth, "rss_growth_bytes_per_token": rss_growth}


def bytes_per_token(decoder: Component, position: int) -> int:
    """Bytes of memory that decoding one token at this position must read: weights once, and the cache so far.

    An embedding is looked up, one row a token, and does not count; where it is tied, it is read as the lm_head.
    """
    tied = not any(entry.tensor_class == "lm_head" for entry in decoder.weights)
    weights = sum(entry.bytes for entry in decoder.weights if tied or entry.tensor_class != "embedding")
    return weights + (decoder.kv.bytes_per_token * position if decoder.kv else 0)


def read_bandwidth(threads: int) -> float:
    """Bytes per second that this many threads read from memory together.

    Each thread takes numpy's max over its part of a buffer several times the size of the last-level cache; that
    reduction runs at over 50 GB/s a core from cache, so that the memory is what limits it. The best of several rounds.
    """
    words = np.ones(_buffer_bytes() // 4, np.uint32)
    parts = np.array_split(words, threads)
    with ThreadPoolExecutor(threads) as pool:
        best = 0.0
        for _ in range(BANDWIDTH_ROUNDS):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, words.nbytes / (time.perf_counter() - start))
    return best


def usable_cores() -> int:
    """Number of processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def current_rss() -> int:
    """Resident bytes of this process now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_rss() -> int:
    """Most resident bytes this process ever had."""
    status = Path("/proc/self/status")
    if status.exists():  # not ru_maxrss: Linux lets a child start with its parent's
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    import psutil

    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return int(info.peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_rss_of_all() -> int:
    """Most resident bytes of the largest process: this one, or one that it started and that has ended, such as a
    backend's compiler. The largest ever, in this process's life."""
    if sys.platform == "win32":  # it keeps no such count of processes that ended
        return peak_rss()
    import resource

    unit = 1 if sys.platform == "darwin" else 1 << 10
    return max(peak_rss(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit)


def _buffer_bytes() -> int:
    """Four times the last-level cache, within 128 MB and LARGEST_BUFFER; 256 MB where its size is not known."""
    cache = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    text = cache.read_text().strip() if cache.exists() else ""
    size = int(text[:-1]) << 10 if text.endswith("K") and text[:-1].isdigit() else 64 << 20
    return min(max(4 * size, 128 << 20), LARGEST_BUFFER)


def _tokens(count: int, vocab: int) -> Tokens:
    """Ids spread over the vocabulary, always the same."""
    return (np.arange(count, dtype=np.int64) * 7919 + 11) % vocab


def _prefill_seconds(session: Session, tokens: Tokens) -> float:
    session.reset()
    start = time.perf_counter()
    session.prefill(tokens)
    return time.perf_counter() - start


def _decode(session: Session, prompt: Tokens, count: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Seconds per token, and seconds of it inside the runtime."""
    seconds, inside = np.empty(count), np.empty(count)
    session.reset()
    token = int(np.argmax(session.prefill(prompt)))
    for step in range(count):
        runtime, start = session.runner.runtime_seconds, time.perf_counter()
        token = int(np.argmax(session.decode(token)))
        seconds[step] = time.perf_counter() - start
        inside[step] = session.runner.runtime_seconds - runtime
    session.reset()
    return seconds, inside


@contextmanager
def _silent() -> Iterator[None]:
    yield


def _step(console: Console | None, title: str) -> AbstractContextManager[None]:
    return console.step(title) if console else _silent()
