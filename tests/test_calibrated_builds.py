"""Calibration within a build: killed and resumed, on one thread and two, by a user's texts; and what a bundle says."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from edgeexport import build, calibrate, errors, families, open_bundle, quant
from edgeexport.bundle.cache import KEPT_SECONDS, Cache, owned
from edgeexport.canonical.dialect import linears
from edgeexport.checkpoint import WeightReader, open_checkpoint
from edgeexport.core import Array, CanonicalModel, QuantPlan, Traits
from edgeexport.pipeline import BuildResult, parity_text
from edgeexport.quant.calibration import METHODS, Method
from edgeexport.quant.codes import CodeStore
from edgeexport.quant.source import PlannedWeights

CONTEXT = 96


@pytest.fixture(scope="module")
def traced(checkpoint: Path) -> tuple[CanonicalModel, dict[str, tuple[int, ...]]]:
    from edgeexport.canonical.trace import trace

    opened = open_checkpoint(str(checkpoint))
    component = families.find("llama").components(opened, CONTEXT, {})[-1]
    model = trace(component, opened.tensors)
    return model, {name: ref.shape for name, ref in model.weights.items()}


def planned(traced: tuple[CanonicalModel, dict[str, tuple[int, ...]]], traits: Traits = Traits()) -> QuantPlan:  # noqa: B008
    from edgeexport.canonical.dialect import classes

    model, shapes = traced
    return quant.plan(shapes, classes(model.graph, model.weights, "decoder"), "int4-b32-t4", traits)


def calls(count: int = 5) -> list[dict[str, Array]]:
    rng = np.random.default_rng(4)
    return [
        {"input_ids": rng.integers(0, 250, (1, 20 + 7 * k)), "position": np.zeros(1, np.int64)} for k in range(count)
    ]


class Killed(BaseException):
    """What ends a run in the middle."""


def run(model: CanonicalModel, plan: QuantPlan, method: Method, folder: Path, kill_after: int = -1) -> CodeStore:
    def progress(done: int, total: int) -> None:
        if done == kill_after:
            raise Killed

    task = calibrate.Task(model, plan, method, calibrate.wanted(model, plan))
    with WeightReader() as reader, owned(folder):
        return calibrate.run(task, calls, calibrate.rows_of(model, reader.rows), folder, progress)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("method", ["search", "gptq"])
def test_a_run_that_is_killed_goes_on_where_it_was(method: Method, traced: Any, tmp_path: Path) -> None:
    model, plan = traced[0], planned(traced)
    run(model, plan, method, tmp_path / "whole")
    for stage in range(1, len(model.stages)):
        with pytest.raises(Killed):
            run(model, plan, method, tmp_path / "killed", kill_after=stage)
    run(model, plan, method, tmp_path / "killed")
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")


def test_the_number_of_threads_changes_nothing(traced: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    model, plan = traced[0], planned(traced)
    before, made = torch.get_num_threads(), onnxruntime.InferenceSession
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)

            def session(graph: bytes, options: Any, threads: int = threads, **settings: Any) -> Any:
                options.intra_op_num_threads = threads
                return made(graph, options, **settings)

            monkeypatch.setattr(onnxruntime, "InferenceSession", session)
            run(model, plan, "gptq", tmp_path / str(threads))
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.parametrize("traits", [Traits(), Traits(positive_scales=True), Traits(shifts=("zero",))], ids=str)
def test_what_is_chosen_loses_less_than_rounding(traits: Traits, traced: Any, tmp_path: Path) -> None:
    """The error of every product over what the calibration feeds it, by this test's own pass over the graph."""
    from edgeexport.canonical.streaming import StreamedGraph

    model, plan = traced[0], planned(traced, traits)
    fed: dict[str, list[Array]] = {}
    with WeightReader() as reader:
        rows = calibrate.rows_of(model, reader.rows)
        graph = StreamedGraph(model, tapped=True)
        values = graph.begin(calls())
        for stage in model.stages:
            graph.advance(
                stage, values, rows, lambda name, x: fed.setdefault(name, []).append(x.reshape(-1, x.shape[-1]))
            )
        lost: dict[str, dict[str, float]] = {}
        for method in METHODS:
            codes = run(model, plan, method, tmp_path / method) if method != "none" else None
            source = PlannedWeights(reader, model.weights, plan, codes=codes)
            for name in calibrate.wanted(model, plan):
                x, count = np.concatenate(fed[name]), model.weights[name].shape[0]
                whole, stored = rows(name, 0, count), source.stored_rows(name, 0, count)
                lost.setdefault(name, {})[method] = float(np.square(x @ (whole - stored).T).sum())
    # the head is calibrated on every token, and a call gives it its last one alone
    head = next(str(item.weight.name) for item in linears(model.graph.graph) if item.output.is_graph_output())
    assert head in lost and len(lost) > 5
    del lost[head]
    assert all(each["gptq"] < min(each["search"], each["none"]) for each in lost.values())
    # channels that go together are no concern of a search, so that one weight may come out worse
    assert sum(each["search"] / each["none"] for each in lost.values()) < 0.95 * len(lost)


@pytest.fixture(scope="module")
def built(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, BuildResult]]:
    root = tmp_path_factory.mktemp("built")
    yield {
        method: build(
            str(checkpoint), "host-ort", root / method, quant="int4-b32-t4", context=CONTEXT, calibrate_method=method
        )
        for method in METHODS
    }


@pytest.mark.parametrize("method", METHODS)
def test_a_bundle_says_how_its_integers_were_chosen(method: Method, built: dict[str, BuildResult]) -> None:
    manifest = open_bundle(built[method].bundle).manifest
    assert manifest.calibration is not None
    assert manifest.calibration.method == method
    assert manifest.calibration.provenance == {"none": "rounded", "search": "searched", "gptq": "gptq"}[method]
    assert (len(manifest.calibration.codes) == 64) == (method != "none")
    report = json.loads((built[method].bundle / "parity.json").read_text())
    assert len(report["answers"]) == 8 and all(each["tokens"] for each in report["answers"])


def test_the_methods_make_different_files_and_keys(built: dict[str, BuildResult]) -> None:
    found = [(open_bundle(each.bundle).manifest.build_key, (each.bundle / "decoder.onnx.data").read_bytes())
             for each in built.values()]  # fmt: skip
    assert len({key for key, _ in found}) == len({data for _, data in found}) == len(METHODS)


def test_the_same_inputs_give_the_same_bytes(
    checkpoint: Path, built: dict[str, BuildResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEEXPORT_CACHE_DIR", str(tmp_path / "cache"))
    again = build(str(checkpoint), "host-ort", tmp_path, quant="int4-b32-t4", context=CONTEXT)
    wanted = built["gptq"].bundle
    assert (again.bundle / "manifest.json").read_bytes() == (wanted / "manifest.json").read_bytes()


def test_a_users_texts_are_what_it_is_calibrated_by(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("All work and no play makes Jack a dull boy. " * 40)
    given = {"quant": "int4-b32", "context": CONTEXT, "parity": "L3"}
    mine = build(str(checkpoint), "host-ort", tmp_path / "a", calibrate=tmp_path / "mine.txt", **given)
    ours = build(str(checkpoint), "host-ort", tmp_path / "b", **given)
    texts = [open_bundle(each.bundle).manifest.calibration for each in (mine, ours)]
    assert texts[0] is not None and texts[1] is not None
    assert texts[0].texts != texts[1].texts and texts[0].codes != texts[1].codes


@pytest.mark.parametrize(
    ("settings", "code"),
    [({"calibrate_method": "awq"}, "unknown-method"), ({"calibrate": Path("missing.txt")}, "calibration-unusable")],
)
def test_what_cannot_be_is_refused_before_any_work(
    settings: dict[str, Any], code: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(errors.UsageError, match=code):
        build(str(checkpoint), "host-ort", tmp_path, quant="int4-b32", context=CONTEXT, **settings)
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_not_there_is_an_error(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(errors.ToolError, match="no-gpu"):
        build(str(checkpoint), "host-ort", tmp_path, quant="int4-b32", context=CONTEXT, device="cuda")


def test_a_bundle_is_compared_along_a_text(checkpoint: Path, built: dict[str, BuildResult], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 5)
    found = {method: parity_text(each.bundle, str(checkpoint), text) for method, each in built.items()}
    assert all(each.tokens == len(text.read_bytes()) for each in found.values())
    assert 0 < found["gptq"].kl < found["none"].kl
    assert len({round(each.original_perplexity, 3) for each in found.values()}) == 1
    text.write_text("x")
    with pytest.raises(errors.UsageError, match="text-unreadable"):
        parity_text(built["none"].bundle, str(checkpoint), text)


def test_two_that_want_the_same_work_do_it_once(tmp_path: Path) -> None:
    """Many threads, each with a lock of its own file descriptor: as processes, as far as flock goes."""
    cache, made, at_once = Cache(tmp_path), [], []

    def build(number: int) -> Path:
        def fill(folder: Path) -> None:
            at_once.append(number)
            assert len(at_once) == 1, "two work at the same place"
            (folder / "codes").write_text("done")
            made.append(number)
            at_once.clear()

        with cache.workplace("calibrate", "k") as work:
            assert work.is_dir()
            return cache.folder("codes", "k", fill)[0]

    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(build, range(24)))
    assert len(made) == 1
    assert [(path / "codes").read_text() for path in found] == ["done"]
    assert list((tmp_path / "unfinished" / "calibrate").iterdir()) == []


def test_unfinished_work_is_kept_for_the_next_build_and_not_for_ever(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with pytest.raises(Killed), cache.workplace("calibrate", "k") as work:
        (work / "layer.npz").write_text("half")
        raise Killed
    cache.prune()
    assert (work / "layer.npz").read_text() == "half"
    old = time.time() - KEPT_SECONDS - 60
    for path in (work / "layer.npz", work):
        os.utime(path, (old, old))
    cache.prune()
    assert not work.exists()
