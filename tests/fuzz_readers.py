"""Every reader of files that nobody has vetted, with small good files to break: the table that tests/fuzz.py walks.

To add a reader, add a row to `READERS`: tests and `make fuzz` follow.
"""

from __future__ import annotations

import io
import json
import random
import sys
import wave
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from bundles import VALID, golden_tensors
from factories import tiny_model, with_tokenizer, write_gguf
from graphs import PROCESSOR, write_checkpoint
from mutation import mutated_bytes, mutated_json
from test_targets import GOOD

from edgeexport import families, strict_json, targets
from edgeexport.bundle import conformance, device_report, golden
from edgeexport.bundle import manifest as manifests
from edgeexport.checkpoint import gguf, open_checkpoint, safetensors
from edgeexport.checkpoint.files import parse_object
from edgeexport.checkpoint.gguf_architectures import read_model
from edgeexport.checkpoint.gguf_tokenizer import tokenizer_files
from edgeexport.core import Checkpoint
from edgeexport.families.settled import settle
from edgeexport.plan import plan
from edgeexport.quant import budget
from edgeexport.quant.smoothing import Fold, Smoothing
from edgeexport.session import preprocess
from edgeexport.session.actions import parse_action
from edgeexport.session.answers import split_answer
from edgeexport.session.audio import log_mel
from edgeexport.session.chat import ChatTemplate
from edgeexport.session.image_contract import contract_from_processor
from edgeexport.session.image_file import read_image
from edgeexport.session.tokenizer import Tokenizer
from edgeexport.session.wav import read_wav

Build = Callable[[Path], Sequence[Any]]
"""Good files, or JSON values that a mutation is to keep the shape of, of a reader; the folder is its own."""


@dataclass(frozen=True)
class Reader:
    """`read` takes the bytes of one bad file and a folder that `seeds` has filled. `share` is how many inputs it gets
    beside the others: few, where one takes long. `frame` puts a JSON value into its file."""

    name: str
    seeds: Build
    read: Callable[[bytes, Path], object]
    share: int = 10
    frame: Callable[[bytes], bytes] = bytes


def broken(reader: Reader, corpus: Sequence[Any], seed: int) -> bytes:
    """The input of a seed: a JSON value is broken as such, and now and then in its bytes."""
    dice = random.Random(seed)
    whole = corpus[dice.randrange(len(corpus))]
    if isinstance(whole, bytes):
        return mutated_bytes(whole, seed)
    text = dumped(mutated_json(whole, seed))
    return reader.frame(mutated_bytes(text, seed) if dice.random() < 0.1 else text)


def dumped(value: Any) -> bytes:
    """JSON of a value that is nested more deeply than Python likes."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        return json.dumps(value).encode()
    finally:
        sys.setrecursionlimit(limit)


# checkpoints


def tiny(folder: Path, name: str = "llama") -> Path:
    return with_tokenizer(write_checkpoint(folder / name, families.find(name).tiny))


@cache
def opened(folder: Path, name: str) -> Checkpoint:
    return open_checkpoint(folder / name)


def read_weights(data: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(data)
    safetensors.read_folder(folder)


def weights(folder: Path) -> list[Any]:
    made = (tiny(folder) / "model.safetensors").read_bytes()
    size = int.from_bytes(made[:8], "little")
    return [made, made[: 8 + size], json.loads(made[8 : 8 + size])]


def framed_weights(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(1 << 16)


def shards(folder: Path) -> list[Any]:
    made = tiny(folder)
    names = json.loads(framed_header(made / "model.safetensors"))
    for shard in ("a.safetensors", "b.safetensors"):
        (folder / shard).write_bytes((made / "model.safetensors").read_bytes())
    weight_map = {name: f"{'ab'[i % 2]}.safetensors" for i, name in enumerate(names) if name != "__metadata__"}
    return [{"metadata": {"total_size": 1}, "weight_map": weight_map}]


def framed_header(path: Path) -> bytes:
    data = path.read_bytes()
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def read_shards(data: bytes, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_bytes(data)
    safetensors.read_folder(folder)


def ggufs(folder: Path) -> list[Any]:
    write_gguf(folder / "a.gguf", tiny_model("llama"))
    data = (folder / "a.gguf").read_bytes()
    return [data, data[: len(data) - (1 << 14)]]


def read_gguf(data: bytes, folder: Path) -> None:
    (folder / "b.gguf").write_bytes(data)
    header = gguf.read_header(folder / "b.gguf")
    config, _, _ = read_model(header)
    tokenizer_files(header, config)


GGUF_MODELS = ["llama", "qwen3", "glm4"]


def gguf_values(folder: Path) -> list[Any]:
    found = []
    for name in GGUF_MODELS:
        write_gguf(folder / f"{name}.gguf", tiny_model(name))
        metadata = gguf.read_header(folder / f"{name}.gguf").metadata
        found.append({key: value for key, value in metadata.items() if isinstance(value, str | int | float)})
    return found


def read_gguf_values(data: bytes, folder: Path) -> None:
    """Typed values as a file of any kind may have them: lists are arrays of text, or of numbers."""
    try:
        values = strict_json.parse(data, unique=False)
    except ValueError:
        return
    if not isinstance(values, dict):
        return
    name = values.get("general.architecture")
    whole = gguf.read_header(folder / f"{name if name in GGUF_MODELS else 'llama'}.gguf")
    header = replace(whole, metadata={**whole.metadata, **{key: typed(value) for key, value in values.items()}})
    config, _, _ = read_model(header)
    tokenizer_files(header, config)


def typed(value: Any) -> Any:
    """What the reader of GGUF makes of such a value."""
    if isinstance(value, list):
        numbers = all(type(item) is int and abs(item) < 1 << 31 for item in value)
        return np.array(value, np.int32) if numbers else [str(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return max(-(1 << 63), min(value, (1 << 64) - 1))
    return None if isinstance(value, dict) else value


def configs(folder: Path) -> list[Any]:
    made = []
    for name in sorted(families.known()):
        tiny(folder, name)
        made.append(dict(families.find(name).tiny))
    return made


def config_of(data: bytes, folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The folder whose weights a broken config.json is of, and what is read of it."""
    config = parse_object(data, folder / "config.json")
    name = config.get("model_type")
    known = isinstance(name, str) and name in families.known()
    return (folder / str(name), config) if known else None


def read_config(data: bytes, folder: Path) -> None:
    found = config_of(data, folder)
    if found is not None:
        (found[0] / "config.json").write_bytes(data)
        plan(str(found[0]), "android-ort")


def read_config_into_torch(data: bytes, folder: Path) -> None:
    found = config_of(data, folder)
    if found is None:
        return
    place, config = found
    family = families.find(place.name)
    checkpoint = settle(replace(opened(folder, place.name), config=config), family)
    for component in family.components(checkpoint, 8, targets.load("android-ort").shapes):
        component.stages()
        component.constants()
    family.oracle(checkpoint.config)


def read_processor(data: bytes, folder: Path) -> None:
    contract_from_processor(parse_object(data, folder / "preprocessor_config.json"))


# bundles


def read_report(data: bytes, folder: Path) -> None:
    (folder / "report.json").write_bytes(data)
    device_report.read(folder / "report.json")


def reports(_: Path) -> list[Any]:
    rows = [{"level": "L4", "units": "cpuOnly", "metrics": {"steps": 5, "max_abs": 2e-5}}]
    device = {"model": "Mac16,5", "system": "macOS Version 15.6"}
    common = {"schema": "edgeexport.device-parity/1", "bundle": "a" * 64, "component": "decoder"}
    return [{**common, "device": device, "date": "2026-11-20T09:30:00Z", "rows": rows}]


def vectors(_: Path) -> list[Any]:
    import safetensors.numpy

    return [safetensors.numpy.save(golden_tensors())]


def read_vectors(data: bytes, folder: Path) -> None:
    golden.read_vectors(data, folder / "golden.safetensors")


CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"


def turns(folder: Path) -> list[Any]:
    tokenizer = Tokenizer((tiny(folder) / "tokenizer.json").read_bytes())
    return [msgspec.to_builtins(conformance.chat_turns(ChatTemplate(CHAT, {}), tokenizer, pictures=False))]


def read_turns(data: bytes, folder: Path) -> None:
    tokenizer = Tokenizer((folder / "llama" / "tokenizer.json").read_bytes())
    conformance.check_chat(data, ChatTemplate(CHAT, {}), tokenizer)


def contracts(_: Path) -> list[Any]:
    audio = {
        "kind": "whisper-log-mel", "sample_rate": 16_000, "n_fft": 400, "hop_length": 160, "n_mels": 80, "seconds": 1.0,
    }  # fmt: skip
    patches = msgspec.to_builtins(contract_from_processor(PROCESSOR))
    return [
        {"schema": preprocess.SCHEMA, "image": patches, "audio": audio, "image_ids": [1, 2], "image_token_id": 2},
        {"schema": preprocess.SCHEMA, "audio": audio, "joining": "attend"},
    ]


def read_contract(data: bytes, _: Path) -> None:
    contract = preprocess.from_json(data)
    if contract.audio is not None:
        log_mel(np.zeros(100, np.float32), contract.audio)


def plans(_: Path) -> list[Any]:
    chosen = budget.Chosen("int4-b32")
    return [msgspec.to_builtins(budget.Choice(budget.SCHEMA, 1000, 0.1, None, {"a": chosen, "b": chosen}))]


def folds(_: Path) -> list[Any]:
    fold = Fold("a", ("b", "c"), np.array([1, -2, 0, 3], np.int8))
    return [json.loads(Smoothing([fold]).to_json())]


def read_folds(data: bytes, _: Path) -> None:
    """Its caller turns ValueError into `bundle-bad-smoothing`."""
    with suppress(ValueError):
        Smoothing.from_json(data).fit({"a": (4, 4), "b": (4, 4), "c": (4, 4)})


def read_plan(data: bytes, folder: Path) -> None:
    (folder / "plan.json").write_bytes(data)
    budget.read(folder / "plan.json")


def read_target(data: bytes, folder: Path) -> None:
    (folder / "mine.toml").write_bytes(data)
    targets.load(str(folder / "mine.toml"))


TEMPLATES = (
    b"{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}{% endfor %}"
    b"{% if add_generation_prompt %}A{% endif %}",
    b"{%- set ns = namespace(a=1) %}{% macro f(x) %}{{ x ~ ns.a }}{% endmacro %}{{ f(messages | length * 3) }}"
    b"{% for a in range(9) %}{{ '%5d' % a }}{{ 'x'.center(a) }}{{ [a, a] | tojson(indent=2) }}{% endfor %}",
    b"{% for k, v in messages[0].items() | sort %}{{ loop.index }}{{ k | replace('o', k) }}{{ 'ab' * 3 }}{{ 2 ** 5 }}"
    b"{% if loop.last %}{{ '{:>4}'.format(2) }}{{ strftime_now('%Y') }}{% endif %}{% endfor %}",
)


def read_template(data: bytes, _: Path) -> None:
    template = ChatTemplate(data.decode("utf-8", "replace"), {"bos_token": "<s>"})
    template.render([{"role": "user", "content": "a\tb\nc" * 20}, {"role": "assistant", "content": "ok"}])


# pictures, sounds, answers


def pictures(_: Path) -> list[Any]:
    from PIL import Image

    drawn = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 31, 3)).astype(np.uint8))
    made = []
    for kind in ("PNG", "JPEG", "BMP", "WEBP", "GIF"):
        buffer = io.BytesIO()
        drawn.save(buffer, kind)
        made.append(buffer.getvalue())
    return made


def sounds(_: Path) -> list[Any]:
    made = []
    for rate, width, channels in ((16_000, 2, 1), (44_100, 3, 2), (8000, 1, 1)):
        buffer = io.BytesIO()
        with wave.open(buffer, "wb") as file:
            file.setnchannels(channels)
            file.setsampwidth(width)
            file.setframerate(rate)
            file.writeframes(random.Random(rate).randbytes(600 * width * channels))
        made.append(buffer.getvalue())
    return made


ANSWERS = (
    b'<think>There it is.</think><answer>do(action="Tap", element=[499,500])</answer>',
    'do(action="Type", text="尺寸 \\"x\\"")'.encode(),
    b'finish(message="done")',
    b'do(action="Swipe", start=[1,2], end=[3,4])',
)


def read_answer(data: bytes, _: Path) -> None:
    text = data.decode("utf-8", "replace")
    split_answer(text)
    parse_action(split_answer(text).answer)


def manifest(_: Path) -> list[Any]:
    return [json.loads(manifests.to_json(VALID))]


READERS: tuple[Reader, ...] = (
    Reader("safetensors", weights, read_weights, 20, framed_weights),
    Reader("shard index", shards, read_shards, 20),
    Reader("gguf", ggufs, read_gguf, 10),
    Reader("gguf values", gguf_values, read_gguf_values, 10),
    Reader("config to plan", configs, read_config, 3),
    Reader("config to torch", configs, read_config_into_torch, 1),
    Reader("preprocessor config", lambda _: [dict(PROCESSOR)], read_processor, 40),
    Reader("manifest", manifest, lambda data, _: manifests.from_json(data), 40),
    Reader("preprocess", contracts, read_contract, 20),
    Reader("device report", reports, read_report, 40),
    Reader("golden vectors", vectors, read_vectors, 40),
    Reader("golden chat", turns, read_turns, 20),
    Reader("plan of formats", plans, read_plan, 40),
    Reader("smoothing", folds, read_folds, 40),
    Reader("target", lambda _: [GOOD.encode()], read_target, 40),
    Reader("chat template", lambda _: TEMPLATES, read_template, 20),
    Reader("picture", pictures, lambda data, _: read_image(data), 40),
    Reader("sound", sounds, lambda data, _: read_wav(data), 40),
    Reader("action", lambda _: ANSWERS, read_answer, 40),
)
