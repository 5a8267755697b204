"""Formats within a budget: the choice against all others, what is measured against transformers, whole builds."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeexport import build, calibrate, errors, families, open_bundle, pipeline, sensitivity
from edgeexport import plan as plans
from edgeexport.bundle.cache import owned
from edgeexport.canonical.dialect import classes
from edgeexport.canonical.trace import trace
from edgeexport.checkpoint import WeightReader, open_checkpoint
from edgeexport.core import Array, CanonicalModel, Traits, no_progress
from edgeexport.quant import budget
from edgeexport.quant.budget import FILE, Budget, Choice, Chosen, Option, Unit, choose
from edgeexport.quant.plan import is_value

CONTEXT = 96
EVERY = Traits(shifts=("int8", "zero"), int8_blocks=True)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> CanonicalModel:
    opened = open_checkpoint(str(checkpoint))
    return trace(families.find("llama").components(opened, CONTEXT, {})[-1], opened.tensors)


def task_of(model: CanonicalModel, traits: Traits = EVERY) -> sensitivity.Task:
    return sensitivity.Task(model, classes(model.graph, model.weights, "decoder"), traits)


def calls(count: int = 3) -> list[dict[str, Array]]:
    rng = np.random.default_rng(4)
    return [
        {"input_ids": rng.integers(0, 250, (1, 12 + 5 * k)), "position": np.zeros(1, np.int64)} for k in range(count)
    ]


# the choice

OPTIONS = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 1000)), min_size=1, max_size=4)


def units_of(drawn: list[list[tuple[int, int]]]) -> list[Unit]:
    return [
        Unit(tuple(Option({f"w{k}": f"f{j}"}, size, kl / 1000) for j, (size, kl) in enumerate(options)))
        for k, options in enumerate(drawn)
    ]


def every_choice(units: list[Unit]) -> Iterator[tuple[int, float]]:
    for options in itertools.product(*(unit.options for unit in units)):
        yield sum(each.bytes for each in options), sum(each.kl for each in options)


def kl_of(units: list[Unit], choice: Choice) -> float:
    of = {(name, fmt): each.kl for unit in units for each in unit.options for name, fmt in each.formats.items()}
    return sum(of[name, each.format] for name, each in choice.tensors.items())


@given(st.lists(OPTIONS, min_size=1, max_size=5), st.integers(0, 300))
@settings(max_examples=200, deadline=None)
def test_no_other_choice_of_its_size_loses_less(drawn: list[list[tuple[int, int]]], limit: int) -> None:
    units = units_of(drawn)
    least = sum(min(each.bytes for each in unit.options) for unit in units)
    if limit < least:
        with pytest.raises(errors.UsageError, match="no choice of formats"):
            choose(units, 0, Budget(size=limit))
        return
    found = choose(units, 0, Budget(size=limit))
    assert found.bytes <= limit
    every = list(every_choice(units))
    assert any(size == found.bytes and kl == pytest.approx(kl_of(units, found)) for size, kl in every)
    # a step that did not fit may leave room: what is chosen is as good as any choice of the room that it fills, up to
    # the gain of one step
    step = max((a.kl - b.kl for unit in units for a in unit.options for b in unit.options), default=0.0)
    assert kl_of(units, found) <= min(kl for size, kl in every if size <= limit) + step + 1e-9


@given(st.lists(OPTIONS, min_size=1, max_size=5), st.integers(0, 2000))
@settings(max_examples=200, deadline=None)
def test_a_kl_is_kept_to_or_out_of_reach(drawn: list[list[tuple[int, int]]], asked: int) -> None:
    units = units_of(drawn)
    within = [size for size, kl in every_choice(units) if kl <= asked / 1000 + 1e-12]
    try:
        found = choose(units, 7, Budget(kl=asked / 1000))
    except errors.UsageError:
        reachable = sum(min(each.kl for each in unit.options) for unit in units)
        assert reachable > asked / 1000 - 1e-9
    else:
        assert within
        assert kl_of(units, found) <= asked / 1000 + 1e-9
        assert found.asked_kl == asked / 1000


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_what_is_no_plan_is_said_to_be_none(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "plan.json"
    path.write_bytes(data)
    with pytest.raises(errors.UsageError, match="plan of formats"):
        budget.read(path)


@pytest.mark.parametrize(
    "damage", [{"schema": "another/1"}, {"tensors": {"w": {"format": ""}}}, {"more": 1}, {"bytes": "many"}], ids=str
)
def test_a_damaged_plan_is_refused(tmp_path: Path, damage: dict[str, Any]) -> None:
    plan = json.loads(budget.written(Choice(budget.SCHEMA, 1, 0.1, None, {"w": Chosen("int4-b32")})))
    (tmp_path / "plan.json").write_text(json.dumps({**plan, **damage}))
    with pytest.raises(errors.UsageError, match="plan of formats"):
        budget.read(tmp_path / "plan.json")


# the measurement


def test_every_matrix_is_in_one_unit_and_v_proj_in_its_own(model: CanonicalModel) -> None:
    task = task_of(model)
    found = sensitivity.units(task)
    names = [name for unit in found for name in unit]
    matrices = [name for name, kind in task.classes.items() if kind in ("linear", "embedding", "lm_head")]
    assert sorted(names) == sorted(matrices)
    assert all(len({is_value(name) for name in unit}) == 1 for unit in found)


def measured(model: CanonicalModel, folder: Path, kill_after: int = -1) -> list[Unit]:
    def progress(done: int, total: int) -> None:
        if done == kill_after:
            raise KeyboardInterrupt

    task = task_of(model)
    with WeightReader() as reader, owned(folder):
        return sensitivity.measure(task, calls(), calibrate.rows_of(model, reader.rows), folder, progress)


def test_what_a_matrix_loses_is_what_transformers_says(checkpoint: Path, model: CanonicalModel, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    task = task_of(model)
    found = measured(model, tmp_path / "run")
    runs = sensitivity._Run(task, calls(), lambda name, start, stop: original[name][start:stop], tmp_path, no_progress)
    with WeightReader() as reader:
        original = {name: reader.read(ref) for name, ref in model.weights.items()}
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    state = theirs.state_dict()

    def answers() -> list[torch.Tensor]:
        with torch.no_grad():
            logits = [theirs(torch.from_numpy(call["input_ids"])).logits[0] for call in calls()]
        return [torch.log_softmax(each.double(), -1) for each in logits]

    wanted = answers()
    fed = captured(theirs, model)
    compared = 0
    for index, names in enumerate(sensitivity.units(task)):
        if not all(name in fed for name in names):
            continue
        strength = torch.from_numpy(fed[names[0]])
        rounded = runs._rounded(index, strength)
        for name in names:
            rows = rounded(name, 0, len(original[name]))
            assert np.abs(rows - original[name]).max() > 0
            state[model.weights[name].name].copy_(torch.from_numpy(rows))
        kl = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(wanted, answers(), strict=True))
        kl /= sum(len(each) for each in wanted)
        for name in names:
            state[model.weights[name].name].copy_(torch.from_numpy(original[name]))
        probe = next(each for each in found[index].options if next(iter(each.formats.values())) == "int4-b32-zp")
        plain = runs_error(found[index], task, names, strength, original)
        assert probe.kl == pytest.approx(kl * plain, rel=0.05, abs=1e-7), names
        compared += 1
    assert compared > 4


def test_what_gptq_makes_up_for_costs_less() -> None:
    def option(fmt: str, kl: float, carried: bool = False) -> Option:
        return Option({"q": fmt, "k": fmt}, 10, kl, carried)

    unit = Unit((option("int4-b32", 0.2), option("int4-b64-zp", 0.4), option("int8-channel", 0.01)))
    other = Unit((option("int4-b32", 0.0, carried=True), option("int4-b32", 0.1)))
    found = sensitivity.by_gptq([unit, other], {"q": 0.5, "k": 0.7})
    assert [each.kl for each in found[0].options] == pytest.approx([0.12, 0.24, 0.01])
    assert [each.kl for each in found[1].options] == pytest.approx([0.0, 0.06])
    assert sensitivity.by_gptq([unit, other], {}) == [unit, other], "looked up, and never multiplied"


def runs_error(unit: Unit, task: sensitivity.Task, names: Any, strength: Any, original: Any) -> float:
    """The error of the format with zero points over that of the format which is measured."""
    import torch

    from edgeexport.quant import FORMATS, resolve, search

    total = {"int4-b32-zp": 0.0, "int4-b32": 0.0}
    for name in names:
        weight = torch.from_numpy(original[name])
        for fmt in total:
            real = FORMATS[resolve(FORMATS["int4-b32"], weight.shape[1]).name + fmt.removeprefix("int4-b32")]
            grid = search.search(weight, strength, real)
            lost = (search.meaning(search.nearest(weight, grid), grid) - weight).square().sum(0)
            total[fmt] += float((lost * strength).sum())
    return total["int4-b32-zp"] / total["int4-b32"]


def captured(theirs: Any, model: CanonicalModel) -> dict[str, Array]:
    """The mean square of what transformers' linears are fed, by the canonical graph's names."""
    import torch

    sums: dict[str, list[Any]] = {}
    hooks = []
    named = {ref.name: name for name, ref in model.weights.items()}
    for path, module in theirs.named_modules():
        name = named.get(f"{path}.weight")
        if isinstance(module, torch.nn.Linear) and name is not None and "layers" in path:

            def hook(_: Any, inputs: Any, name: str = name) -> None:
                x = inputs[0].reshape(-1, inputs[0].shape[-1])
                sums.setdefault(name, []).append(x)

            hooks.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        for call in calls():
            theirs(torch.from_numpy(call["input_ids"]))
    for each in hooks:
        each.remove()
    return {name: torch.cat(xs).square().mean(0).numpy() for name, xs in sums.items()}


def test_a_measurement_that_is_killed_goes_on_where_it_was(model: CanonicalModel, tmp_path: Path) -> None:
    whole = measured(model, tmp_path / "whole")
    for stage in range(1, len(model.stages)):
        with pytest.raises(KeyboardInterrupt):
            measured(model, tmp_path / "killed", kill_after=stage)
    assert measured(model, tmp_path / "killed") == whole
    assert list((tmp_path / "killed").iterdir()) == []


# builds


@pytest.fixture(scope="module")
def built(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> pipeline.BuildResult:
    out = tmp_path_factory.mktemp("auto")
    return build(str(checkpoint), "host-ort", out, quant="auto", context=CONTEXT, calibrate_method="search")


def test_without_a_budget_it_is_as_large_as_the_targets_own_scheme(
    built: pipeline.BuildResult, checkpoint: Path, tmp_path: Path
) -> None:
    own = build(str(checkpoint), "host-ort", tmp_path, context=CONTEXT, parity="L1", calibrate_method="none")
    assert built.ideal_bytes <= own.ideal_bytes


def test_a_plan_that_is_given_back_makes_the_same_bundle(
    built: pipeline.BuildResult, checkpoint: Path, tmp_path: Path
) -> None:
    plan = built.bundle / FILE
    again = build(str(checkpoint), "host-ort", tmp_path, quant=str(plan), context=CONTEXT, calibrate_method="search")
    names = sorted(path.relative_to(built.bundle) for path in built.bundle.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(again.bundle) for path in again.bundle.rglob("*") if path.is_file())
    assert [name for name in names if (built.bundle / name).read_bytes() != (again.bundle / name).read_bytes()] == []


def test_the_same_build_again_is_up_to_date(built: pipeline.BuildResult, checkpoint: Path) -> None:
    again = build(
        str(checkpoint), "host-ort", built.bundle.parent, quant="auto", context=CONTEXT, calibrate_method="search"
    )
    assert again.up_to_date


def test_the_ladder_is_climbed_again_over_a_chosen_bundle(built: pipeline.BuildResult, checkpoint: Path) -> None:
    assert pipeline.parity(built.bundle, str(checkpoint), level="L4")
    assert open_bundle(built.bundle).manifest.quantisation == "auto"


def test_a_size_is_kept_to(built: pipeline.BuildResult, checkpoint: Path, tmp_path: Path) -> None:
    smaller = int(0.97 * built.ideal_bytes)
    found = build(
        str(checkpoint), "host-ort", tmp_path, quant="auto", max_size=smaller, context=CONTEXT, parity="L1",
        calibrate_method="search",
    )  # fmt: skip
    assert found.ideal_bytes <= smaller < built.ideal_bytes
    assert found.plan["bytes"]["artifact"] <= smaller


def test_a_kl_that_is_asked_for_is_the_ladders_gate(checkpoint: Path, tmp_path: Path) -> None:
    found = build(
        str(checkpoint), "host-ort", tmp_path, quant="auto", max_kl=0.05, context=CONTEXT, calibrate_method="search"
    )
    [gate] = {row.gate["kl"] for row in found.results if row.level == "L5" and "kl" in row.gate}
    assert gate == 0.05


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({"nobody.weight": {"format": "int8-channel"}}, "no nobody.weight"),
        ({"model.embed_tokens.weight": {"format": "int4-b128"}}, "cannot be int4-b128"),
        ({"model.embed_tokens.weight": {"format": "int8-channel", "carried": True}}, "the checkpoint's own"),
    ],
)
def test_a_plan_of_another_model_is_refused(checkpoint: Path, tmp_path: Path, tensors: Any, why: str) -> None:
    path = tmp_path / "plan.json"
    document = {"schema": budget.SCHEMA, "bytes": 1, "expected_kl": 0.0, "asked_kl": None, "tensors": tensors}
    path.write_text(json.dumps(document))
    with pytest.raises(errors.UsageError) as caught:
        build(str(checkpoint), "host-ort", tmp_path, quant=str(path), context=CONTEXT, parity="L1")
    assert caught.value.findings[0].code == "plan-unusable"
    assert why in caught.value.findings[0].why


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        (plans.Asked("auto", max_size=1000), "budget-too-small"),
        (plans.Asked("int8", max_size=1 << 30), "budget-without-auto"),
        (plans.Asked(None, max_kl=0.1), "budget-without-auto"),
        (plans.Asked("auto", for_device="galaxy-s99"), "unknown-device"),
        (plans.Asked("nothing.json"), "plan-unusable"),
    ],
)
def test_a_budget_that_cannot_be_is_found_from_headers_alone(checkpoint: Path, asked: plans.Asked, code: str) -> None:
    try:
        codes = {each["code"] for each in plans.plan(str(checkpoint), "android-ort", asked)["findings"]}
    except errors.UsageError as error:
        codes = {finding.code for finding in error.findings}
    assert code in codes


def test_a_device_leaves_room_for_its_cache(checkpoint: Path) -> None:
    found = plans.plan(str(checkpoint), "android-ort", plans.Asked("auto", for_device="galaxy-s23"))
    device = next(each for each in found["devices"] if each["name"] == "galaxy-s23")
    assert found["budget"]["size"] <= device["usable"] - found["bytes"]["kv_cache"]
    assert device["fits"]
