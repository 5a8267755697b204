"""The three-modality model, its config, its towers' readers, its data and how it learns."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeexport import errors
from edgeexport.core import no_progress
from edgeexport.families.autoglm_phone import assemble, data, learning, towers
from edgeexport.families.autoglm_phone.config import PRESETS, Config, from_dict, lite_stages, preset, to_dict
from edgeexport.families.autoglm_phone.model import AutoGLMPhone, ConvNorm, Vision, audio_encoder
from edgeexport.families.autoglm_phone.prompts import IGNORED, Prompts


@pytest.fixture(scope="module")
def tiny() -> AutoGLMPhone:
    torch.manual_seed(0)
    return AutoGLMPhone(preset("tiny")).eval()


def some_inputs(config: Config, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids [1, 6], a picture and a spectrogram."""
    generator = torch.Generator().manual_seed(seed)
    size, audio = config.vision_config.image_size, config.audio_config
    return (
        torch.randint(3, 300, (1, 6), generator=generator),
        torch.randn(1, 3, size, size, generator=generator),
        torch.randn(1, audio.n_mels, audio.frames, generator=generator),
    )


# config


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_own_json(name: str) -> None:
    values = json.loads(json.dumps(PRESETS[name]))
    assert to_dict(from_dict(values)) == PRESETS[name] == values


def test_the_student_has_half_the_layers_and_half_the_width() -> None:
    teacher, student = preset("9b").text_config, preset("3b").text_config
    for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"):
        assert 2 * student[key] == teacher[key]


def test_the_largest_preset_has_nine_billion_parameters() -> None:
    with torch.device("meta"):
        model = AutoGLMPhone(preset("9b"))
    assert 9.3e9 < sum(value.numel() for value in model.parameters()) < 9.9e9


def test_stages_scale_as_efficientnet_lite4_does() -> None:
    """Source: tensorflow/tpu, efficientnet/lite: lite4 is width 1.4, depth 1.8."""
    found = [(stage.repeats, stage.width) for stage in lite_stages(1.4, 1.8)]
    assert found == [(1, 24), (4, 32), (4, 56), (6, 112), (6, 160), (8, 272), (1, 448)]


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(values: dict[str, Any]) -> None:
        *outer, last = path.split(".")
        for key in outer:
            values = values[key]
        values[last] = value

    return apply


BAD = {
    "another model": change("model_type", "llama"),
    "an unknown key": change("vision_config.dropout", 0.1),
    "heads that do not divide": change("fusion_heads", 5),
    "audio heads that do not divide": change("audio_config.heads", 3),
    "a window of no whole hops": change("audio_config.seconds", 0.3001),
    "an odd number of frames": change("audio_config.seconds", 0.33),
    "a window of nothing": change("audio_config.seconds", 0.0),
    "no stages": change("vision_config.stages", []),
    "a huge picture": change("vision_config.image_size", 10**6),
    "a spread of nothing": change("vision_config.std", [0.0, 1.0, 1.0]),
    "text that is not one": change("text_config", []),
    "no hidden size": change("text_config.hidden_size", None),
    "a hidden size that is true": change("text_config.hidden_size", True),
    "itself as its text": change("text_config.model_type", "autoglm_phone"),
    "infinite": change("audio_config.seconds", float("inf")),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_config_is_refused(what: str) -> None:
    values = copy.deepcopy(dict(PRESETS["tiny"]))
    BAD[what](values)
    with pytest.raises(errors.CheckpointError, match="bad-config"):
        from_dict(values)


# the model


def test_text_alone_is_the_decoders_own_answer(tiny: AutoGLMPhone) -> None:
    ids, _, _ = some_inputs(tiny.config)
    with torch.no_grad():
        assert torch.equal(tiny(ids), tiny.decoder(input_ids=ids).logits)


def test_each_modality_changes_the_answer(tiny: AutoGLMPhone) -> None:
    ids, picture, sound = some_inputs(tiny.config)
    with torch.no_grad():
        answers = [tiny(ids), tiny(ids, picture), tiny(ids, None, sound), tiny(ids, picture, sound)]
    for i, one in enumerate(answers):
        assert not any(torch.allclose(one, other, atol=1e-4) for other in answers[:i])


def test_the_order_of_modalities_does_not_matter(tiny: AutoGLMPhone) -> None:
    ids, picture, sound = some_inputs(tiny.config)
    with torch.no_grad():
        image, audio, embeds = tiny.encode_image(picture), tiny.encode_audio(sound), tiny.embed(ids)
        one, other = (tiny.fuse(embeds, torch.cat(pair, 1)) for pair in ((image, audio), (audio, image)))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("bias", "closed"), [(-60.0, True), (60.0, False)])
def test_the_gate_shuts_a_modality_out(tiny: AutoGLMPhone, bias: float, closed: bool) -> None:
    ids, picture, _ = some_inputs(tiny.config)
    fusion = copy.deepcopy(tiny.fusion)
    with torch.no_grad():
        fusion.gate.bias.fill_(bias)
        embeds, features = tiny.embed(ids), tiny.encode_image(picture)
        expected = embeds if closed else fusion.output(fusion.find(embeds, features)[1])
        torch.testing.assert_close(fusion(embeds, features), expected)


def test_each_encoder_runs_without_the_others(tiny: AutoGLMPhone) -> None:
    _, picture, sound = some_inputs(tiny.config)
    vision, audio = Vision(tiny.config.vision_config).eval(), audio_encoder(tiny.config.audio_config).eval()
    vision.load_state_dict(tiny.vision.state_dict())
    audio.load_state_dict(tiny.audio.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(tiny.align["image"](vision(picture)), tiny.encode_image(picture))
        torch.testing.assert_close(tiny.align["audio"](audio(sound).last_hidden_state), tiny.encode_audio(sound))


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_padding_is_tensorflows_same(size: int, kernel: int, stride: int) -> None:
    """out[i] sees the inputs from i * stride - total // 2 on, where total makes ceil(size / stride) of them fit."""
    block = ConvNorm(1, 1, kernel, stride, size, activation=False).eval()
    torch.nn.init.ones_(block.conv.weight)
    picture = torch.arange(float(size * size)).reshape(1, 1, size, size)
    out_size = -(-size // stride)
    first = -(max((out_size - 1) * stride + kernel - size, 0) // 2)
    spans = [slice(max(first + i * stride, 0), first + i * stride + kernel) for i in range(out_size)]
    expected = torch.tensor([[picture[0, 0, rows, columns].sum() for columns in spans] for rows in spans])
    with torch.no_grad():
        found = block(picture)[0, 0] * (1 + block.norm.eps) ** 0.5
    torch.testing.assert_close(found, expected)


# the towers' files


def ct2_file(tensors: dict[str, np.ndarray], version: int = 6) -> bytes:
    """A CTranslate2 model.bin."""

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    kinds = {np.dtype(name): kind for kind, name in towers.CT2_DTYPES.items()}
    parts = [struct.pack("<I", version), text("WhisperSpec"), struct.pack("<II", 3, len(tensors))]
    for name, value in tensors.items():
        parts += [text(name), struct.pack("<B", value.ndim), struct.pack(f"<{value.ndim}I", *value.shape)]
        parts += [struct.pack("<BI", kinds[value.dtype], value.nbytes), value.tobytes()]
    return b"".join([*parts, struct.pack("<I", 0)])


def as_ct2(encoder: Any) -> dict[str, np.ndarray]:
    """An encoder of transformers under CTranslate2's names, q, k and v in one; its table is 1500 long."""
    state = {name: value.numpy().astype(np.float16) for name, value in encoder.state_dict().items()}
    width = state["layer_norm.weight"].shape[0]
    table = np.zeros((1500, width), np.float16)
    table[: len(state["embed_positions.weight"])] = state["embed_positions.weight"]
    found = {"encoder/position_encodings/encodings": table, "encoder/num_heads": np.array(2, np.int16)}
    for conv in ("conv1", "conv2"):
        found |= {f"encoder/{conv}/{part}": state[f"{conv}.{part}"] for part in ("weight", "bias")}

    def norm(theirs: str, ours: str) -> dict[str, np.ndarray]:
        return {
            f"{theirs}/layer_norm/gamma": state[f"{ours}.weight"],
            f"{theirs}/layer_norm/beta": state[f"{ours}.bias"],
        }

    found |= norm("encoder", "layer_norm")
    for i in range(len(encoder.layers)):
        attention, ours = f"encoder/layer_{i}/self_attention", f"layers.{i}.self_attn"
        joint = np.concatenate([state[f"{ours}.{letter}_proj.weight"] for letter in "qkv"])
        bias = np.concatenate(
            [state.get(f"{ours}.{letter}_proj.bias", np.zeros(width, np.float16)) for letter in "qkv"]
        )
        found |= norm(attention, f"{ours}_layer_norm")
        found |= {f"{attention}/linear_0/weight": joint, f"{attention}/linear_0/bias": bias}
        found |= norm(f"encoder/layer_{i}/ffn", f"layers.{i}.final_layer_norm")
        for part in ("weight", "bias"):
            found[f"{attention}/linear_1/{part}"] = state[f"{ours}.out_proj.{part}"]
            found[f"encoder/layer_{i}/ffn/linear_0/{part}"] = state[f"layers.{i}.fc1.{part}"]
            found[f"encoder/layer_{i}/ffn/linear_1/{part}"] = state[f"layers.{i}.fc2.{part}"]
    return found


@pytest.fixture(scope="module")
def whisper() -> tuple[Any, bytes]:
    """A small encoder whose every weight is its own, and its model.bin."""
    torch.manual_seed(1)
    encoder = audio_encoder(preset("tiny").audio_config).eval()
    with torch.no_grad():
        for value in encoder.parameters():
            value.copy_((0.3 * torch.randn_like(value)).half())
    return encoder, ct2_file(as_ct2(encoder))


def test_whispers_encoder_is_read_from_a_ctranslate2_file(whisper: tuple[Any, bytes], tmp_path: Path) -> None:
    encoder, file = whisper
    (tmp_path / "model.bin").write_bytes(file)
    found = towers.read_audio(tmp_path / "model.bin", preset("tiny").audio_config)
    again = audio_encoder(preset("tiny").audio_config).eval()
    again.load_state_dict({name: torch.from_numpy(np.array(value)).float() for name, value in found.items()})
    _, _, sound = some_inputs(preset("tiny"))
    with torch.no_grad():
        torch.testing.assert_close(again(sound).last_hidden_state, encoder(sound).last_hidden_state)


@given(st.data())
def test_a_damaged_ctranslate2_file_is_an_error_or_other_numbers(whisper: tuple[Any, bytes], tmp_path_factory: Any, data: Any) -> None:  # fmt: skip  # noqa: E501
    damaged = bytearray(whisper[1][: data.draw(st.integers(0, len(whisper[1])))])
    for _ in range(data.draw(st.integers(0, 3)) if damaged else 0):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "model.bin"
    path.write_bytes(damaged)
    try:
        towers.read_audio(path, preset("tiny").audio_config)
    except errors.CheckpointError as problem:
        assert problem.findings[0].code == "bad-tower"


def test_an_unknown_tensor_of_the_cnn_is_refused() -> None:
    with pytest.raises(errors.CheckpointError, match="bad-tower"):
        towers.vision_name("_blocks.0._se_reduce.weight", Path("x.pth"))


# data and prompts


def test_no_voice_is_in_both_sides() -> None:
    """Not even a variant with another accent."""
    variants = [{voice.split("+")[1] for voice in voices} for voices in (data.TRAIN_VOICES, data.TEST_VOICES)]
    assert not variants[0] & variants[1]


def test_no_pixel_of_a_scene_is_in_both_sides() -> None:
    picture = np.arange(60 * 80 * 3).reshape(60, 80, 3)
    sides = []
    for held_out in (False, True):
        generator = np.random.default_rng(0)
        crops = [data._crop(picture, generator, held_out) for _ in range(200)]
        sides.append(set(np.concatenate([crop.ravel() for crop in crops]).tolist()))
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_digits_are_split_evenly_and_none_is_in_both_sides() -> None:
    pytest.importorskip("sklearn")
    train, test = data._digits(False), data._digits(True)
    assert (len(train), len(test)) == (1437, 360)
    assert {[each.label for each in test].count(label) for label in data.DIGITS} == {36}


def item(task: str, answer: str) -> data.Item:
    return data.Item(task, data.QUESTIONS[task][0], answer)


def test_accuracy_forgives_capitals_and_a_full_stop_but_no_other_word() -> None:
    items = [item("digit", "two"), item("digit", "two"), item("digit", "two"), item("word", "up")]
    answers = iter([" Two.", "two two", "three", "up"])
    assert data.accuracy(items, lambda _: next(answers)) == {"digit": 1 / 3, "word": 1.0}


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts(assemble.tokenizer_files())


@pytest.mark.real
def test_labels_are_the_answer_and_its_end_where_they_follow(prompts: Prompts) -> None:
    items = [item("joint", "three and five"), item("scene", "astronaut")]
    batch = prompts.batch(items)
    for each, ids, labels in zip(items, batch.ids, batch.labels, strict=True):
        answered = labels != IGNORED
        assert (
            prompts.tokenizer.decode(labels[answered].tolist(), skip_special_tokens=False) == each.answer + "<|im_end|>"
        )
        first = int(answered.nonzero()[0])
        assert ids[: first + 1].tolist() == prompts.prompt(each.question)
        assert ids[first + 1 : first + int(answered.sum())].tolist() == labels[answered][:-1].tolist()


# learning


class Letters:
    """A tokenizer of letters, and a template of the question alone: small enough for a random decoder."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [3 + ord(letter) % 128 for letter in text.replace("<|im_end|>", "\x7f")]


class LetterPrompts(Prompts):
    def __init__(self) -> None:
        self.tokenizer = Letters()  # type: ignore[assignment]

    def prompt(self, question: str) -> list[int]:
        return self.tokenizer.encode(question[:5], add_special_tokens=False)


@pytest.fixture
def lesson() -> tuple[AutoGLMPhone, learning.Learner, data.Split, Any]:
    """A tiny model, its learner, and random pictures and clips with their features."""
    from edgeexport.families.autoglm_phone.features import compute

    torch.manual_seed(0)
    model = AutoGLMPhone(preset("tiny")).eval()
    with torch.no_grad():  # fresh weights are so small that a decoder says the same to everything
        for value in model.decoder.parameters():
            value.copy_(0.3 * torch.randn_like(value) if value.ndim > 1 else value)
    learner = learning.Learner(model, copy.deepcopy(model.decoder), LetterPrompts())
    generator = np.random.default_rng(0)

    def picture(label: str) -> data.Picture:
        return data.Picture(generator.integers(0, 256, (20, 20, 3)).astype(np.uint8), label)

    split = data.Split(
        tuple(picture(label) for label in data.DIGITS),
        tuple(picture(label) for label in ("cat", "moon")),
        tuple(data.Clip(generator.normal(0, 0.1, 4000).astype(np.float32), label) for label in data.DIGITS),
    )
    weights = {
        name: value.numpy() for name, value in model.state_dict().items() if name.startswith(("vision", "audio"))
    }
    return model, learner, split, weights, compute  # type: ignore[return-value]


def test_what_is_trained_is_what_the_model_computes(lesson: Any, tmp_path: Path) -> None:
    from edgeexport.families.autoglm_phone.preparation import audio_contract, image_contract
    from edgeexport.session.audio import log_mel
    from edgeexport.session.images import Image, pixels

    model, learner, split, weights, compute = lesson
    features = compute(split, model.config, weights, tmp_path, no_progress)
    learner.eval()
    items = learning.draw(split, 1, np.random.default_rng(0), joint=True)
    with torch.no_grad():
        groups = [
            learning.Group(same, torch.cat(learner.aligned(same, features), 1)) for same in learning.by_task(items)
        ]
        logits, wanted = learner.answers(groups)
        for each in items:
            batch = learner.prompts.batch([each])
            image = (
                torch.from_numpy(pixels(Image(each.picture.array), image_contract(model.config)))
                if each.picture
                else None
            )
            sound = torch.from_numpy(log_mel(each.clip.samples, audio_contract(model.config))) if each.clip else None
            answered = batch.labels != IGNORED
            expected, count = model(batch.ids, image, sound)[answered], int(answered.sum())
            torch.testing.assert_close(logits[:count], expected, atol=5e-3, rtol=0)  # features are kept as float16
            assert wanted[:count].tolist() == batch.labels[answered].tolist()
            logits, wanted = logits[count:], wanted[count:]
    assert len(logits) == 0


@pytest.mark.parametrize("stage", ["meaning", "aligning", "together"])
def test_every_stage_lowers_its_loss(lesson: Any, tmp_path: Path, stage: str) -> None:
    model, learner, split, weights, compute = lesson
    features = compute(split, model.config, weights, tmp_path, no_progress)
    learner.train()
    items = learning.draw(split, 3, np.random.default_rng(0), joint=stage != "aligning")
    optimizer = torch.optim.Adam(learner.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        loss = learner.meaning(items) if stage == "meaning" else getattr(learner, stage)(items, features)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_training_goes_on_where_it_was_stopped(lesson: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeexport.console import Console
    from edgeexport.families.autoglm_phone import train

    model, learner, split, weights, compute = lesson
    features = compute(split, model.config, weights, tmp_path, no_progress)
    monkeypatch.setattr(train, "SAVED_EVERY", 2)
    stage, begun = train.STAGES[0], copy.deepcopy(learner.state_dict())

    def learn(folder: str, resume: bool, stop: int | None = None) -> dict[str, torch.Tensor]:
        (tmp_path / folder).mkdir(exist_ok=True)
        learner.load_state_dict(begun)
        lines: list[str] = []

        def log(line: str) -> None:
            lines.append(line)
            if stop is not None and len(lines) == stop:
                raise KeyboardInterrupt

        train._learn(
            learner, stage, 6, 0, (split, features), tmp_path / folder, Console(quiet=True), log, resume=resume
        )
        return {name: value.clone() for name, value in learner.state_dict().items()}

    whole = learn("whole", resume=False)
    with pytest.raises(KeyboardInterrupt):
        learn("parts", resume=False, stop=2)
    parts = learn("parts", resume=True)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert any(not torch.equal(whole[name], begun[name]) for name in whole)


# mini itself


@pytest.mark.real
def test_the_cnn_knows_what_is_in_a_picture() -> None:
    """With the classifier of its package, which mini leaves out: ImageNet's 285 is an Egyptian cat, 967 an espresso."""
    from edgeexport.checkpoint.models import find_installed
    from edgeexport.families.autoglm_phone.features import tower
    from edgeexport.families.autoglm_phone.preparation import image_contract
    from edgeexport.session.images import Image, pixels

    config, path = preset("mini"), find_installed("efficientnet-lite0", towers.VISION)
    vision = tower(Vision(config.vision_config), towers.read_vision(path), "")
    head = torch.load(path, weights_only=True)
    for file, label in (("chelsea.png", 285), ("coffee.png", 967)):
        prepared = torch.from_numpy(pixels(Image(data._scene(file)), image_contract(config)))
        with torch.no_grad():
            scores = vision(prepared).mean(1) @ head["_fc.weight"].T + head["_fc.bias"]
        assert int(scores.argmax()) == label


@pytest.mark.real
def test_mini_is_assembled_whole_and_the_same_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEEXPORT_CACHE_DIR", str(tmp_path))
    checkpoint = assemble.open_model()
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in AutoGLMPhone(preset("mini")).state_dict().items()}
    found = {name: ref.shape for name, ref in checkpoint.tensors.items()}
    left_out = {name for name in wanted if name.endswith("num_batches_tracked")} | {"decoder.lm_head.weight"}
    assert found == {name: shape for name, shape in wanted.items() if name not in left_out}
    first = checkpoint.files[0].read_bytes()
    checkpoint.files[0].unlink()
    again = assemble.open_model()
    assert again.files[0].read_bytes() == first and again.header_digest == checkpoint.header_digest


@pytest.mark.real
def test_the_adaptor_is_a_few_megabytes() -> None:
    assert assemble.ADAPTOR.stat().st_size < 4 * 2**20


@pytest.mark.real
def test_the_adaptor_answers_what_it_has_not_seen(own_cache: Path) -> None:
    """Eight questions of each task; docs/autoglm-phone-mini.md has the figures for all."""
    from edgeexport.families.autoglm_phone.features import compute
    from edgeexport.families.autoglm_phone.judging import judge
    from edgeexport.families.autoglm_phone.train import make_learner

    items = data.part_of(data.held_out_items(data.held_out_split()), 8)
    some = data.Split(
        tuple(dict.fromkeys(each.picture for each in items if each.picture)),
        (),
        tuple(dict.fromkeys(each.clip for each in items if each.clip)),
    )
    features = compute(some, preset("mini"), assemble.tower_weights(), own_cache, no_progress)
    learner = make_learner()
    trained = {name: torch.from_numpy(value).float() for name, value in assemble.adaptor_weights().items()}
    missing = learner.load_state_dict(trained, strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == (["codes"], [])
    assert all(right >= 0.75 for right in judge(learner, items, features).values())


@pytest.mark.real
def test_the_int4_bundle_answers_as_well_as_the_model_it_was_made_from(tmp_path: Path) -> None:
    """Twelve questions of each task; `make bench-mini` asks all, docs/autoglm-phone-mini.md has the figures."""
    from edgeexport import build, open_bundle
    from edgeexport.families.autoglm_phone.evaluate import answerer

    items = data.part_of(data.held_out_items(data.held_out_split()), 12)
    made = build("autoglm-phone-mini", "host-ort", tmp_path, quant="int4-b32", context=512, parity="L1")
    bundle = open_bundle(made.bundle)
    with bundle.session() as session:
        right = data.accuracy(items, answerer(bundle, session))
    assert right.keys() == set(data.TASKS)
    assert all(share >= 0.75 for share in right.values()), right
