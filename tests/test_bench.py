"""The measurements of `bench`, on a runner whose costs are known."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edgeexport import bench
from edgeexport.bundle import manifest
from edgeexport.errors import UsageError
from edgeexport.session.session import Session


class SlowRunner:
    """Takes 2 ms per token inside the runtime and 1 ms outside it; can leak 10,000 bytes per call."""

    context, vocab = 64, 100

    def __init__(self, leak: bool = False) -> None:
        self.runtime_seconds = 0.0
        self.leak = leak
        self.kept: list[bytearray] = []
        self.calls: list[tuple[int, int]] = []
        self.logits = np.zeros(self.vocab, np.float32)

    def step(self, tokens: np.ndarray, position: int, rope: object = None) -> np.ndarray:
        self.calls.append((len(tokens), position))
        if self.leak:
            self.kept.append(bytearray(10_000))
        start = time.perf_counter()
        time.sleep(0.002 * len(tokens))
        self.runtime_seconds += time.perf_counter() - start
        time.sleep(0.001)
        return self.logits

    def close(self) -> None:
        self.logits = np.zeros(0, np.float32)


def test_speed_is_what_the_runner_takes() -> None:
    runner = SlowRunner()
    speed = bench.measure_speed(Session(runner), prompt_tokens=16, decode_tokens=12)
    # sleeps last a little longer than asked, more so on a busy machine
    assert 20 < speed["decode_tokens_per_second"] < 334
    assert 0.033 <= speed["first_token_seconds"] == 16 / speed["prefill_tokens_per_second"]
    assert 3 <= speed["token_ms_median"] <= speed["token_ms_p95"]
    assert 0.15 < speed["overhead_share"] < 0.6
    assert 4 < speed["recomputed_over_cached"] < 25  # 28 tokens x 2 ms + 1 ms against 3 ms
    lengths = [length for length, _ in runner.calls]
    assert lengths.count(28) == bench.PREFILL_ROUNDS and max(position for _, position in runner.calls) == 27


def test_prompt_and_answer_must_fit_the_context() -> None:
    runner = SlowRunner()
    with pytest.raises(UsageError, match="context-full"):
        bench.measure_speed(Session(runner), prompt_tokens=60, decode_tokens=5)
    assert not runner.calls


@pytest.mark.parametrize("leak", [False, True])
def test_growing_allocations_are_seen(leak: bool) -> None:
    growth = bench.measure_growth(Session(SlowRunner(leak)), prompt_tokens=2, decode_tokens=20)
    # a prefill and ten tokens in each pass
    assert (growth["python_growth_bytes_per_token"] > 9_000) is leak


def component(*weights: tuple[str, int], kv: bool = False) -> manifest.Component:
    layout = manifest.KVLayout(layers=2, kv_heads=3, head_dim=4, context=64, dtype="float16")
    return manifest.Component(
        "decoder",
        "onnxruntime",
        ("decoder.onnx",),
        (),
        kv=layout if kv else None,
        weights=tuple(manifest.WeightClass(kind, "int8-b32", 1, size) for kind, size in weights),  # type: ignore[arg-type]
    )


def test_bytes_per_token() -> None:
    assert bench.bytes_per_token(component(("linear", 100), ("embedding", 50), ("lm_head", 60), ("other", 1)), 9) == 161
    assert bench.bytes_per_token(component(("linear", 100), ("embedding", 50), ("other", 1)), 9) == 151
    assert bench.bytes_per_token(component(("linear", 100), kv=True), 9) == 100 + 9 * (2 * 2 * 3 * 4) * 2


def test_machine_figures_are_plausible() -> None:
    assert 1e9 < bench.read_bandwidth(1) < 1e12
    assert 1 << 20 < bench.current_rss() <= bench.peak_rss() + (1 << 20)


def test_the_whole_document(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened = SimpleNamespace(
        session=lambda threads: Session(SlowRunner()),
        stand_in="",
        manifest=SimpleNamespace(
            model=SimpleNamespace(name="toy"),
            target=SimpleNamespace(name="host-ort"),
            quantisation="int8",
            component=lambda name: component(("linear", 1000)),
        ),
    )
    monkeypatch.setattr("edgeexport.bundle.open_bundle", lambda path: opened, raising=False)
    monkeypatch.setattr(bench, "read_bandwidth", lambda threads: 1e6)
    document = bench.bench(tmp_path, prompt_tokens=4, decode_tokens=6, threads=2)
    assert list(document) == ["run", "speed", "memory", "roofline"]
    roofline, speed = document["roofline"], document["speed"]
    assert roofline["bytes_read_per_token"] == 1000 and roofline["roofline_tokens_per_second"] == 1000
    assert roofline["achieved_share"] == pytest.approx(speed["decode_tokens_per_second"] / 1000)
    assert all(isinstance(value, int | float) for value in (*speed.values(), *document["memory"].values()))


def test_random_checkpoint_is_one_that_transformers_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import random_checkpoint

    numbers = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    assert np.array_equal(random_checkpoint.bfloat16(numbers), torch.from_numpy(numbers).bfloat16().view(torch.uint16))
    billion = random_checkpoint.PRESETS["llama-1.1b"].tensors()
    assert sum(int(np.prod(shape)) for _, shape in billion) == 1_100_048_384  # TinyLlama's number of parameters
    preset = random_checkpoint.PRESETS["llama-tiny"]
    total = random_checkpoint.write_checkpoint(preset, tmp_path / "shards", shard_bytes=60_000)
    random_checkpoint.write_checkpoint(preset, tmp_path / "one")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) == 4
    shards, one = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("shards", "one"))
    assert sum(weight.numel() for weight in one.parameters()) * 2 == total
    assert all(torch.equal(a, b) for a, b in zip(shards.parameters(), one.parameters(), strict=True))
    assert 0.019 < one.lm_head.weight.float().std() < 0.021
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert tokenizer.decode(tokenizer("Paris, 你好 é\n")["input_ids"]) == "Paris, 你好 é\n"


def test_the_peak_of_a_build_is_that_of_its_compiler_where_that_is_larger() -> None:
    script = """
import subprocess, sys
from edgeexport.bench import peak_rss, peak_rss_of_all
subprocess.run([sys.executable, "-c", "held = b'x' * 300_000_000"], check=True)
print(peak_rss(), peak_rss_of_all())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    own, largest = map(int, done.stdout.split())
    assert own < 200_000_000 < 300_000_000 < largest < 400_000_000


def test_peak_rss_sees_the_memory_of_a_grandchild() -> None:
    inner = "import time; held = b'x' * 150_000_000; time.sleep(0.3)"
    outer = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {inner!r}]) + 3)"
    script = Path(__file__).parents[1] / "benchmarks" / "peak_rss.py"
    done = subprocess.run([sys.executable, str(script), sys.executable, "-c", outer], capture_output=True, text=True)
    found = re.fullmatch(
        r"([\d.]+) s wall, peak RSS: largest process (\d+) MB, process tree (\d+) MB, exit code 3\n", done.stderr
    )
    assert found is not None and done.returncode == 3, done.stderr
    assert float(found[1]) > 0.3 and 150 < int(found[2]) < 200 and int(found[2]) < int(found[3]) < 230
