"""glm4v against transformers' unmodified model: pictures, positions, a live cache, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import rehash
from factories import with_tokenizer
from graphs import PROCESSOR, oracle, reference_logits, strengthened, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from edgeexport import build, errors, families, open_bundle, steps, targets
from edgeexport.bundle.verify import verify
from edgeexport.checkpoint import open_checkpoint
from edgeexport.core import Array, Checkpoint, EncoderInput, Verdict
from edgeexport.parity.examples import drawing
from edgeexport.session.image_file import Image
from edgeexport.session.inputs import rope_positions
from edgeexport.session.session import Session

GLM4V = families.find("glm4v")
STEPS = 16


@dataclass(frozen=True)
class Case:
    """A small model unlike the class defaults of transformers: what differs from the family's `tiny`, and pictures
    (height, width) that fall on two different grids."""

    family: str = "glm4v"
    top: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    rope: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=dict)
    screens: tuple[tuple[int, int], ...] = ((56, 84), (84, 56))
    pictures: tuple[tuple[int, int], ...] = ((60, 80), (90, 57))
    seed: int = 0

    @property
    def config(self) -> dict[str, Any]:
        made = {**deepcopy(dict(families.find(self.family).tiny)), **self.top}
        made["text_config"] |= self.text
        made["text_config"]["rope_parameters"] |= self.rope
        made["vision_config"] |= self.vision
        return made


CASES = {
    "plain": Case(),
    "tied, other grids": Case(
        top={"tie_word_embeddings": True, "image_token_id": 17, "image_start_token_id": 19, "image_end_token_id": 18},
        text={"num_hidden_layers": 3, "num_key_value_heads": 1, "tie_word_embeddings": True},
        rope={"rope_theta": 1234.5, "partial_rotary_factor": 1.0, "mrope_section": [1, 4, 3]},
        vision={"depth": 1, "hidden_size": 48, "num_heads": 3, "image_size": 84},
        screens=((112, 56), (56, 56)),
        pictures=((118, 50), (61, 66)),
        seed=1,
    ),
    "other patches, all key heads": Case(
        top={"image_token_id": 261, "image_start_token_id": 260, "image_end_token_id": 262},
        text={"num_key_value_heads": 4, "hidden_size": 96, "rms_norm_eps": 1e-3},
        rope={"rope_theta": 77.0, "mrope_section": [1, 2, 3]},
        vision={"depth": 3, "patch_size": 8, "image_size": 40, "out_hidden_size": 96, "rms_norm_eps": 1e-4},
        screens=((32, 96), (80, 48)),
        pictures=((33, 100), (77, 50)),
        seed=2,
    ),
    "glm46v": Case(family="glm46v", seed=3),
}


@dataclass(frozen=True)
class Work:
    """A case built: its checkpoint, its bundle, the original model, and the pictures with what transformers' own
    processor makes of them."""

    case: Case
    folder: Path
    bundle: Path
    model: Any
    pictures: list[Image]
    pixel_values: Any
    grids: Any

    @property
    def token(self) -> int:
        return int(self.case.config["image_token_id"])

    def prompt(self, session: Session) -> list[int]:
        """Text, a picture, text, the other picture, text: with the placeholder once per feature."""
        config = self.case.config
        one = [config["image_start_token_id"], self.token, config["image_end_token_id"]]
        short = [5, 6, 7, *one, 8, 9, *one, 10, 11, 12]
        assert session.inputs is not None
        return session.inputs.expand(short, [session.inputs.prepare_image(each) for each in self.pictures])


Works = Callable[[str], Work]


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> Works:
    """Cases by name, each built when it is first asked for."""

    def work(name: str) -> Work:
        return build_case(CASES[name], tmp_path_factory.mktemp("glm4v"), "L5" if name == "plain" else "L1")

    return cache(work)


def build_case(case: Case, folder: Path, level: str) -> Work:
    checkpoint = checkpoint_of(case, folder / "model")
    result = build(str(checkpoint), str(target_of(case, folder)), folder / "out", parity=level)
    assert not [row for row in result.results if row.verdict is Verdict.FAIL]
    pictures = [Image(drawing(*size)) for size in case.pictures]
    made = processor(checkpoint)(images=[each.array for each in pictures], return_tensors="pt")
    return Work(
        case, checkpoint, result.bundle, oracle(checkpoint), pictures, made["pixel_values"], made["image_grid_thw"]
    )


def checkpoint_of(case: Case, folder: Path) -> Path:
    """Random weights, a tokenizer, a processor."""
    with_tokenizer(strengthened(write_checkpoint(folder, case.config, seed=case.seed)))
    processor = {
        **PROCESSOR,
        "patch_size": case.config["vision_config"]["patch_size"],
        "size": {"shortest_edge": 784, "longest_edge": 2 * most_pixels(case)},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def target_of(case: Case, folder: Path) -> Path:
    path = folder / "tiny.toml"
    path.write_text(
        'title = "test"\nplatform = "host"\nbackend = "onnxruntime"\nartifact = ".onnx"\nprecision = "float32"\n'
        'quant = "fp32"\ncontext = 96\n'
        f"[shapes.vision]\nscreens = {[list(size) for size in case.screens]}\nmax_pixels = {most_pixels(case)}\n"
        "[options]\naccuracy_level = 4\nort_format = false\n"
    )
    return path


def most_pixels(case: Case) -> int:
    return max(height * width for height, width in case.screens)


def processor(checkpoint: Path) -> Any:
    """transformers' own, as the checkpoint configures it."""
    from transformers import Glm4vImageProcessorPil

    given = json.loads((checkpoint / "preprocessor_config.json").read_text())
    return Glm4vImageProcessorPil(**{key: value for key, value in given.items() if key != "image_processor_type"})


def codes(call: Callable[[], object], kind: type[errors.EdgeExportError]) -> list[str]:
    with pytest.raises(kind) as caught:
        call()
    return [finding.code for finding in caught.value.findings]


@pytest.mark.parametrize("name", CASES)
def test_pictures_text_and_a_live_cache_equal_transformers(name: str, works: Works) -> None:
    work = works(name)
    wanted = original_features(work)
    assert 0.3 < np.abs(wanted).mean() < 30, "features of a magnitude that 1e-4 says something about"
    with open_bundle(work.bundle).session() as session:
        features = [session.encode_image(each) for each in work.pictures]
        tokens = work.prompt(session)
        logits = [session.prefill(tokens, features).copy()]
        for _ in range(STEPS):
            logits.append(session.decode(int(logits[-1].argmax())).copy())
        assert session.position == len(tokens) + STEPS
    assert [each.grid for each in features] == [(rows // 2, columns // 2) for _, rows, columns in work.grids]
    assert len({each.grid for each in features}) == 2
    np.testing.assert_allclose(np.concatenate([each.values for each in features]), wanted, rtol=0, atol=1e-4)
    answer, expected = generated(work, tokens)
    assert [int(each.argmax()) for each in logits] == answer
    np.testing.assert_allclose(np.stack(logits), expected, rtol=0, atol=1e-3)


def original_features(work: Work) -> Array:
    """What transformers' vision tower makes of all pictures: float32 [features, hidden]."""
    import torch

    with torch.no_grad():
        features: Array = work.model.model.visual(work.pixel_values, grid_thw=work.grids).pooler_output.numpy()
    return features


def generated(work: Work, tokens: list[int]) -> tuple[list[int], Array]:
    """transformers' own greedy answer of STEPS + 1 tokens, and the logits that each was chosen from."""
    import torch

    ids = torch.tensor([tokens])
    with torch.no_grad():
        made = work.model.generate(
            ids,
            pixel_values=work.pixel_values,
            image_grid_thw=work.grids,
            mm_token_type_ids=(ids == work.token).int(),
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=STEPS + 1,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
    logits = torch.cat(made.logits).numpy()
    assert len(logits) == STEPS + 1
    return made.sequences[0, len(tokens) :].tolist(), logits


def test_a_prompt_with_pictures_is_judged_along_the_artifacts_own_answer(works: Works, tmp_path: Path) -> None:
    """The last row of the ladder, from a session's answer and transformers' logits for it."""
    import torch

    work = works("plain")
    pictures = [Image(drawing(*size)) for size in work.case.screens]
    golden = load_file(work.bundle / open_bundle(work.bundle).manifest.golden.shown[0].file)
    prompt = golden["tokens"][: int(golden["prefill"][0])].tolist()
    answer, _ = answered(work.bundle, prompt, pictures, 3, frozenset())
    checkpoint = shutil.copytree(work.folder, tmp_path / "model")
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": answer[-1]}))

    made = build(str(checkpoint), str(target_of(work.case, tmp_path)), tmp_path / "out", quant="int8", parity="L5")

    (row,) = [
        each for each in made.results if each.level == "L5" and each.output.startswith("logits of answers to pictures")
    ]
    answer, logits = answered(made.bundle, prompt, pictures, steps.ANSWER_TOKENS, frozenset(answer[-1:]))
    assert row.metrics["steps"] == len(answer) < steps.ANSWER_TOKENS
    given = processor(checkpoint)(images=[each.array for each in pictures], return_tensors="pt")
    ids = torch.tensor([prompt + answer[:-1]])
    with torch.no_grad():
        wanted = work.model(ids, **given, mm_token_type_ids=(ids == work.token).int()).logits[0, len(prompt) - 1 :]
    log_p, log_q = torch.log_softmax(wanted, -1), torch.log_softmax(torch.from_numpy(logits), -1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert row.metrics["kl"] == pytest.approx(float(divergence), rel=1e-3)


def answered(
    bundle: Path, prompt: list[int], pictures: list[Image], most: int, stops: frozenset[int]
) -> tuple[list[int], Array]:
    """A session's greedy answer, to its end, and the logits [tokens, V] that it was chosen from."""
    with open_bundle(bundle).session() as session:
        logits = [session.prefill(prompt, [session.encode_image(each) for each in pictures]).copy()]
        answer = [int(logits[0].argmax())]
        while len(answer) < most and answer[-1] not in stops:
            logits.append(session.decode(answer[-1]).copy())
            answer.append(int(logits[-1].argmax()))
    return answer, np.stack(logits)


def test_a_picture_in_front_can_be_kept_and_the_rest_said_again(works: Works) -> None:
    work = works("plain")
    with open_bundle(work.bundle).session() as session, open_bundle(work.bundle).session() as fresh:
        tokens = work.prompt(session)
        features = [session.encode_image(each) for each in work.pictures]
        session.prefill(tokens, features)
        for token in (20, 21, 22):
            session.decode(token)
        session.truncate(len(tokens) - 2)  # behind the second picture
        again = session.prefill([30, 31, 32]).copy()
        wanted = fresh.prefill([*tokens[:-2], 30, 31, 32], features)
        np.testing.assert_allclose(again, wanted, rtol=0, atol=1e-4)
        # behind the first picture: the second one's end, and where text goes on, move
        first = len(tokens) - 1 - tokens[::-1].index(work.token) - len(features[1].values)
        session.truncate(first)
        fresh.reset()
        again = session.prefill([30, 31, 32]).copy()
        np.testing.assert_allclose(again, fresh.prefill([*tokens[:first], 30, 31, 32], features[:1]), rtol=0, atol=1e-4)


def test_pieces_of_a_prompt_equal_the_whole(works: Works) -> None:
    work = works("plain")
    with open_bundle(work.bundle).session() as session:
        tokens = work.prompt(session)
        features = [session.encode_image(each) for each in work.pictures]
        whole = session.prefill(tokens, features).copy()
        session.reset()
        cut = tokens.index(work.token) + len(features[0].values) + 1
        session.prefill(tokens[:3])
        session.prefill(tokens[3:cut], features[:1])
        np.testing.assert_allclose(session.prefill(tokens[cut:], features[1:]), whole, rtol=0, atol=1e-4)


def test_text_alone_needs_no_vision_file(works: Works, tmp_path: Path) -> None:
    work = works("plain")
    copy = shutil.copytree(work.bundle, tmp_path / "bundle")
    vision = [path for path in copy.iterdir() if path.name.startswith("vision.")]
    assert {path.name for path in vision} >= {"vision.4x6.onnx", "vision.6x4.onnx"}
    with open_bundle(work.bundle).session() as session:
        wanted = session.prefill([5, 6, 7]).copy()
    for path in vision:
        path.unlink()
    with open_bundle(copy).session() as session:
        np.testing.assert_array_equal(session.prefill([5, 6, 7]), wanted)
        assert codes(lambda: session.encode_image(work.pictures[0]), errors.BundleError) == ["bundle-file-missing"]
        session.decode(8)
    found = {finding.code for finding in verify(copy).findings}
    assert found == {"bundle-file-missing"}


def test_grids_share_one_file_of_weights(works: Works) -> None:
    work = works("plain")
    component = open_bundle(work.bundle).component("vision")
    weights = [name for name in component.files if name.endswith(".data")]
    assert len(weights) == 1
    assert sorted({signature.name for signature in component.signatures}) == ["4x6", "6x4"]
    stored = sum(ref.elements for name, ref in open_checkpoint(work.folder).tensors.items() if ".visual." in name)
    size = (work.bundle / weights[0]).stat().st_size
    assert 4 * stored <= size < 4 * stored * 1.2, "each weight once, as float32"


def test_placeholders_and_features_must_agree(works: Works) -> None:
    work = works("plain")
    with open_bundle(work.bundle).session() as session:
        tokens = work.prompt(session)
        features = [session.encode_image(each) for each in work.pictures]
        wrong: list[tuple[list[int], Any]] = [
            (tokens, features[:1]),
            (tokens, ()),
            (tokens[: tokens.index(work.token) + 1], features[:1]),
            ([5, 6, 7], features),
        ]
        for given_tokens, given_features in wrong:
            refused = codes(lambda t=given_tokens, f=given_features: session.prefill(t, f), errors.UsageError)  # type: ignore[misc]
            assert refused == ["image-tokens-mismatch"]
        assert session.position == 0
        assert session.inputs is not None
        prepared = [session.inputs.prepare_image(each) for each in work.pictures]
        for places in (0, 1, 3):
            short = [5, *[work.token] * places, 6]
            refused = codes(lambda t=short: session.inputs.expand(t, prepared), errors.UsageError)  # type: ignore[misc]
            assert refused == ["image-tokens-mismatch"]


def test_an_image_token_in_an_answer_is_a_word(works: Works) -> None:
    """A model may write any token; transformers then goes on, and so does a session."""
    work = works("plain")
    with open_bundle(work.bundle).session() as session:
        session.prefill([5, 6, 7])
        session.decode(work.token)
        logits = session.decode(8)
        wanted = reference_logits(work.model, np.array([5, 6, 7, work.token, 8]))[-1]
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-3)


def test_a_picture_beyond_the_context_is_refused_and_the_position_stays(works: Works) -> None:
    work = works("plain")
    with open_bundle(work.bundle).session() as session, open_bundle(work.bundle).session() as fresh:
        tokens = work.prompt(session)
        features = [session.encode_image(each) for each in work.pictures]
        filler = [5] * (session.context - len(tokens) + 1)
        session.prefill(filler)
        assert codes(lambda: session.prefill(tokens, features), errors.UsageError) == ["context-full"]
        assert session.position == len(filler)
        np.testing.assert_allclose(session.decode(9), fresh.prefill([*filler, 9]), rtol=0, atol=1e-4)


def test_another_models_eyes_are_refused_by_the_golden_picture(works: Works, tmp_path: Path) -> None:
    work = works("plain")
    copy = shutil.copytree(work.bundle, tmp_path / "bundle")
    assert verify(copy).ok
    file = copy / "vision.onnx.data"
    mixed = np.fromfile(file, np.float32)
    np.random.default_rng(0).shuffle(mixed)
    mixed.tofile(file)
    rehash(copy)
    report = verify(copy)
    assert [finding.code for finding in report.findings] == ["golden-mismatch"]
    assert "picture" in report.findings[0].what + report.findings[0].where + report.findings[0].why


def test_every_component_has_parity_rows(works: Works) -> None:
    summary = json.loads((works("plain").bundle / "parity.json").read_text())
    rows = {(row["component"], row["level"]) for row in summary["results"]}
    assert rows >= {(component, level) for component in ("vision", "embed", "decoder") for level in ("L1", "L2", "L3")}


# positions


@given(
    layout=st.lists(
        st.one_of(
            st.integers(1, 5).map(lambda count: ("text", (count, 0))),
            st.tuples(st.integers(1, 4), st.integers(1, 4)).map(lambda grid: ("picture", grid)),
        ),
        min_size=1,
        max_size=7,
    )
)
@settings(max_examples=60, deadline=None)
def test_rotary_positions_equal_transformers_own(layout: list[tuple[str, tuple[int, int]]]) -> None:
    """A picture always has its start token in front, as the prompt gives it."""
    import torch

    config = Case().config
    token = int(config["image_token_id"])
    ids: list[int] = []
    for kind, (a, b) in layout:
        ids += [5] * a if kind == "text" else [config["image_start_token_id"], *[token] * (a * b)]
    grids = [grid for kind, grid in layout if kind == "picture"]
    pictures = [EncoderInput("vision", "", {}, grid) for grid in grids]
    given_ids = torch.tensor([ids])
    wanted, delta = original_positions()(
        given_ids,
        mm_token_type_ids=(given_ids == token).int(),
        image_grid_thw=torch.tensor([(1, 2 * rows, 2 * columns) for rows, columns in grids]) if grids else None,
    )
    found, after = rope_positions(np.array(ids), token, pictures, 0)
    np.testing.assert_array_equal(found, wanted[:, 0].numpy())
    assert after == len(ids) + int(delta[0])
    moved, moved_after = rope_positions(np.array(ids), token, pictures, 100)
    np.testing.assert_array_equal(moved, found + 100)
    assert moved_after == after + 100


@cache
def original_positions() -> Any:
    """transformers' `Glm4vModel.get_rope_index`, which reads nothing but the config."""
    import torch
    from transformers import AutoConfig, Glm4vModel

    config = Case().config
    with torch.device("meta"):
        return Glm4vModel(AutoConfig.for_model(**config)).get_rope_index


# what is refused


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    yield open_checkpoint(checkpoint_of(CASES["plain"], tmp_path_factory.mktemp("refused") / "model"))


SHAPES = {"vision": {"screens": [[56, 84]], "max_pixels": 4704}}


def changed(config: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with one value changed, or taken out where it is None."""
    made = deepcopy(dict(config))
    *tables, key = path.split(".")
    inner = made
    for table in tables:
        inner = inner[table]
    if value is None:
        del inner[key]
    else:
        inner[key] = value
    return made


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("text_config", None),
        ("text_config", [1]),
        ("text_config.hidden_size", None),
        ("text_config.rope_parameters", None),
        ("text_config.rope_parameters.mrope_section", None),
        ("text_config.rope_parameters.mrope_section", "2, 1, 1"),
        ("text_config.rope_parameters.mrope_section", [2, 2, 0]),
        ("text_config.rope_parameters.mrope_section", [2, 1, 2]),
        ("vision_config", None),
        ("vision_config.hidden_size", "64"),
        ("vision_config.patch_size", 16),
        ("vision_config.temporal_patch_size", 1),
        ("vision_config.spatial_merge_size", 4),
        ("vision_config.spatial_merge_size", None),
        ("image_token_id", None),
        ("image_token_id", 320),
        ("image_token_id", True),
        ("image_start_token_id", -1),
        ("image_end_token_id", None),
    ],
)
def test_a_config_that_does_not_say_is_refused_by_the_key(path: str, value: Any, checkpoint: Checkpoint) -> None:
    assert len(GLM4V.components(checkpoint, 96, SHAPES)) == 3
    wrong = replace(checkpoint, config=changed(checkpoint.config, path, value))
    with pytest.raises(errors.CheckpointError) as caught:
        GLM4V.components(wrong, 96, SHAPES)
    (finding,) = caught.value.findings
    assert finding.code == "bad-config"
    key = "mrope_section" if path.endswith("rope_parameters") else path.rpartition(".")[2]
    assert key in finding.what


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        ("patch_size", 16, "bad-config"),
        ("merge_size", 1, "bad-config"),
        ("temporal_patch_size", 1, "bad-config"),
        ("do_resize", False, "bad-preprocessor"),
        ("image_processor_type", "CLIPImageProcessor", "bad-preprocessor"),
        ("size", {"height": 56, "width": 56}, "bad-preprocessor"),
    ],
)
def test_a_processor_that_the_model_contradicts_is_refused(
    key: str, value: Any, code: str, checkpoint: Checkpoint
) -> None:
    assert checkpoint.processor is not None
    wrong = replace(checkpoint, processor={**checkpoint.processor, key: value})
    assert codes(lambda: GLM4V.components(wrong, 96, SHAPES), errors.CheckpointError) == [code]


def test_a_target_without_screens_is_told_what_to_add(checkpoint: Checkpoint) -> None:
    assert codes(lambda: GLM4V.components(checkpoint, 96, {}), errors.UsageError) == ["shapes-missing"]


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("screens = [[56, 84]]", ["bad-target"]),
        ("max_pixels = 4704", ["bad-target"]),
        ("screens = [[56, 84]]\nmax_pixels = 4704\ngrids = [[4, 6]]", ["unknown-key"]),
        ("screens = []\nmax_pixels = 4704", ["bad-target"]),
        ("screens = [56, 84]\nmax_pixels = 4704", ["bad-target"]),
        ("screens = [[56]]\nmax_pixels = 4704", ["bad-target"]),
        ("screens = [[56, 0]]\nmax_pixels = 4704", ["bad-target"]),
        ("screens = [[56, 84.5]]\nmax_pixels = 4704", ["bad-target"]),
        ("screens = [[true, 84]]\nmax_pixels = 4704", ["bad-target"]),
        ('screens = [["56", "84"]]\nmax_pixels = 4704', ["bad-target"]),
        ("screens = [[56, 84]]\nmax_pixels = 100", ["bad-target"]),
        ("screens = [[56, 84]]\nmax_pixels = 4704.0", ["bad-target"]),
        ('screens = "56x84"\nmax_pixels = "many"', ["bad-target", "bad-target"]),
    ],
)
def test_a_table_of_screens_is_read_strictly(table: str, expected: list[str]) -> None:
    top = targets.load("host-ort").source.partition("[shapes.vision]")[0]
    assert targets.parse("test", f"{top}[shapes.vision]\nscreens = [[56, 84]]\nmax_pixels = 4704", "test.toml")
    found = codes(lambda: targets.parse("test", f"{top}[shapes.vision]\n{table}", "test.toml"), errors.UsageError)
    assert sorted(found) == expected


@pytest.mark.parametrize("source", ["[shapes]\nvision = 3", "[shapes]\nvison = {}", "[shapes.vision]"])
def test_shapes_are_a_table_of_known_names(source: str) -> None:
    top = targets.load("host-ort").source.partition("[shapes.vision]")[0]
    assert codes(lambda: targets.parse("test", f"{top}{source}", "test.toml"), errors.UsageError)
