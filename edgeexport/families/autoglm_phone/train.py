"""Train mini's adaptor: `python -m edgeexport.families.autoglm_phone.train`, minutes on two cores.

The towers and the decoder are frozen and come from installed packages; what they make of the data is computed once and
kept in the cache folder. Writes adaptor.safetensors (float16), train.log and train.json (the held-out figures).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from edgeexport.console import Console
from edgeexport.core import Array
from edgeexport.families.autoglm_phone.assemble import decoder_weights, tokenizer_files, tower_weights
from edgeexport.families.autoglm_phone.config import preset
from edgeexport.families.autoglm_phone.data import TASKS, Split, held_out_items, held_out_split, split
from edgeexport.families.autoglm_phone.features import Features, compute
from edgeexport.families.autoglm_phone.judging import judge, probe, spoiled
from edgeexport.families.autoglm_phone.learning import Learner, draw
from edgeexport.families.autoglm_phone.model import AutoGLMPhone, decoder
from edgeexport.families.autoglm_phone.prompts import Prompts
from edgeexport.paths import cache_dir
from edgeexport.quant import plan_from_names
from edgeexport.quant.weights import dequantize_rows, quantize_rows

SCENES_EACH, VOICES_EACH = 40, 30
THREADS = 2
SAVED_EVERY = 20
"""Steps."""
WARMUP = 10
ROUNDED = "int4-b32"
"""The scheme whose rounding the adaptor must bear."""


@dataclass(frozen=True)
class Stage:
    """A stage of `learning`: its share of --steps, items of each task in a step, the largest learning rate, and what
    is trained."""

    name: str
    share: float
    each: int
    rate: float
    parts: tuple[str, ...]


STAGES = (
    Stage("meaning", 0.5, 2, 1e-3, ("fusion", "align", "codes")),
    Stage("aligning", 1.0, 24, 1e-3, ("align",)),
    Stage("together", 1.0, 3, 3e-4, ("fusion", "align")),
)


def main(
    out: Annotated[Path, typer.Option(help="Folder for adaptor.safetensors, train.log and train.json.")],
    steps: Annotated[int, typer.Option(min=2, help="Steps through the decoder.")] = 260,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    resume: Annotated[bool, typer.Option(help="Go on from the last saved step.")] = False,
) -> None:
    """Train the adaptor and measure it on what it has not seen."""
    torch.set_num_threads(THREADS)
    out.mkdir(parents=True, exist_ok=True)
    console, start = Console(), time.monotonic()
    log = _logger(out / "train.log", start, console, fresh=not resume)
    log(f"seed {seed}, {steps} steps through the decoder, torch {torch.__version__}, {THREADS} threads")
    test = _with_features(held_out_split(), console)
    train = _with_features(split(False, scenes_each=SCENES_EACH, voices_each=VOICES_EACH), console)
    log(f"to learn from: {_counts(train[0])}; held out: {_counts(test[0])}")
    torch.manual_seed(seed)
    learner = make_learner()
    for number, stage in enumerate(STAGES):
        _learn(learner, stage, round(stage.share * steps), seed + number, train, out, console, log, resume=resume)
    save_adaptor(learner, out / "adaptor.safetensors")
    items = held_out_items(test[0])
    figures = {"accuracy": judge(learner, items, test[1])}
    learner.coarse = True
    figures[f"decoder {ROUNDED}"] = judge(learner, items, test[1])
    learner.coarse = False
    figures |= {"linear probe": probe(train, test), **spoiled(learner, items, test[1])}
    (out / "train.json").write_text(json.dumps(figures, indent=2) + "\n")
    for line in table(figures):
        log(line)


def make_learner() -> Learner:
    """mini with its real decoder and an adaptor that has learned nothing; its towers are left out."""
    model, rounded = AutoGLMPhone(preset("mini")), decoder(preset("mini"))
    weights = decoder_weights()
    _load(model.decoder, weights)
    _load(rounded.eval(), {name: _rounded(name, value) for name, value in weights.items()})
    return Learner(model, rounded, Prompts(tokenizer_files()))


def _load(module: Any, weights: Mapping[str, Array]) -> None:
    module.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()}, strict=False)
    module.tie_weights()


def _rounded(name: str, weight: Array) -> Array:
    """A weight as `ROUNDED` stores it."""
    kept = plan_from_names({name: weight.shape}, ROUNDED, tied=True).formats[name]
    return dequantize_rows(*quantize_rows(weight, kept, name=name), kept) if kept.integer else weight


def save_adaptor(learner: Learner, path: Path) -> None:
    """Write align.* and fusion.* as float16, and round the learner's own to that: what is measured is what ships."""
    from safetensors.torch import save_file

    weights = {
        f"{part}.{name}": value.detach().to(torch.float16).contiguous()
        for part, module in (("align", learner.align), ("fusion", learner.fusion))
        for name, value in module.state_dict().items()
    }
    save_file(weights, path)
    for part, module in (("align", learner.align), ("fusion", learner.fusion)):
        module.load_state_dict({name: weights[f"{part}.{name}"].float() for name in module.state_dict()})


def table(figures: dict[str, dict[str, float]]) -> list[str]:
    """The figures in percent, a line each."""
    lines = [f"{'held out, %':<18}" + "".join(f"{task:>8}" for task in TASKS)]
    for name, row in figures.items():
        cells = (f"{100 * row[task]:8.1f}" if task in row else f"{'':>8}" for task in TASKS)
        lines.append(f"{name:<18}" + "".join(cells))
    return lines


def _with_features(data: Split, console: Console) -> tuple[Split, Features]:
    with console.progress("Running the towers") as watch:
        return data, compute(data, preset("mini"), tower_weights(), cache_dir() / "autoglm-phone-training", watch)


def _counts(data: Split) -> str:
    return f"{len(data.digits)} digits, {len(data.scenes)} crops, {len(data.clips)} clips"


def _learn(
    learner: Learner, stage: Stage, steps: int, seed: int, data: tuple[Split, Features],
    out: Path, console: Console, log: Callable[[str], None], *, resume: bool,
) -> None:  # fmt: skip
    """Run a stage, or the rest of it. What is random in a step follows from the seed and the step alone."""
    trained = [value for name, value in learner.named_parameters() if name.startswith(stage.parts)]
    optimizer = torch.optim.AdamW(trained, stage.rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    saved = out / f"{stage.name}.state"
    first = _restore(saved, learner, optimizer, schedule) if resume and saved.is_file() else 0
    learner.train()
    recent: list[float] = []
    with console.progress(f"Stage {stage.name}") as watch:
        for step in range(first, steps):
            torch.manual_seed(seed * 1_000_003 + step)
            generator = np.random.default_rng([seed, step])
            learner.coarse = stage.name == "together" and step % 2 == 1
            items = draw(data[0], stage.each, generator, joint=stage.name != "aligning")
            loss = learner.meaning(items) if stage.name == "meaning" else getattr(learner, stage.name)(items, data[1])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            recent = [*recent[-SAVED_EVERY + 1 :], loss.item()]
            watch(step + 1, steps)
            if (step + 1) % SAVED_EVERY == 0 or step + 1 == steps:
                _save(saved, step + 1, learner, optimizer, schedule)
                log(f"{stage.name} {step + 1}/{steps} loss {np.mean(recent):.4f}")
    learner.coarse = False


def _rate(step: int, steps: int) -> float:
    """Up in a line, down in half a cosine."""
    return min(1.0, (step + 1) / WARMUP) * (0.02 + 0.98 * 0.5 * (1 + float(np.cos(np.pi * min(1.0, step / steps)))))


def _save(path: Path, step: int, learner: Learner, optimizer: Any, schedule: Any) -> None:
    state = {"step": step, "learner": learner.state_dict(), "optimizer": optimizer.state_dict(),
             "schedule": schedule.state_dict()}  # fmt: skip
    torch.save(state, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)


def _restore(path: Path, learner: Learner, optimizer: Any, schedule: Any) -> int:
    state = torch.load(path, weights_only=True)
    learner.load_state_dict(state["learner"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return int(state["step"])


def _logger(path: Path, start: float, console: Console, *, fresh: bool) -> Callable[[str], None]:
    if fresh:
        path.write_text("")

    def log(line: str) -> None:
        console.say(line)
        with path.open("a") as file:
            file.write(f"{time.monotonic() - start:7.1f}s  {line}\n")

    return log


if __name__ == "__main__":
    typer.run(main)
