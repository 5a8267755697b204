"""Choosing integers: the search, GPTQ and its factor, the codes on disk, what is read, and a run that is killed."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeexport import errors
from edgeexport.core import Array, Codes, Format
from edgeexport.quant import FORMATS, calibration, codes
from edgeexport.quant import gptq as gptq_module
from edgeexport.quant.codes import CodeStore
from edgeexport.quant.gptq import DAMPING, PANEL, Factor, gptq, inverse_factor
from edgeexport.quant.search import meaning, nearest, search, takes, to_codes
from edgeexport.quant.weights import dequantize_codes, encode_rows

SEARCHED = [replace(fmt, positive=positive) for fmt in FORMATS.values() if takes(fmt) for positive in (False, True)]


def correlated(width: int, rows: int = 600, seed: int = 1) -> torch.Tensor:
    """What a multiplication is fed: channels of different strength, neighbours alike, float32 [rows, width]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator) * (0.1 + 3 * torch.rand(width, generator=generator) ** 4)
    return x + 0.7 * x.roll(1, 1)


def matrix(rows: int, width: int, seed: int = 2) -> torch.Tensor:
    return 0.02 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def lost(weight: torch.Tensor, stored: torch.Tensor, x: torch.Tensor) -> float:
    """The error of the product over the product."""
    return float((x @ (weight - stored).T).square().sum() / (x @ weight.T).square().sum())


@pytest.mark.parametrize("fmt", SEARCHED, ids=lambda fmt: f"{fmt.name}{' positive' * fmt.positive}")
def test_a_search_loses_less_than_rounding_and_gptq_less_than_a_search(fmt: Format) -> None:
    x, weight = correlated(256), matrix(96, 256)
    products = x.T @ x / len(x)
    grid = search(weight, products.diagonal().clone(), fmt)
    rounded = torch.from_numpy(dequantize_codes(encode_rows(weight.numpy(), fmt), fmt))
    searched = meaning(nearest(weight, grid), grid)
    integers, error = gptq(weight, Factor(products.clone()), grid)
    chosen = meaning(integers, grid)
    damping = DAMPING * float(products.diagonal().mean() * (weight - chosen).square().sum())
    assert error == pytest.approx(float((x @ (weight - chosen).T).square().sum(1).mean()) + damping, rel=1e-3)
    assert lost(weight, chosen, x) < 0.8 * lost(weight, searched, x) < 0.8 * lost(weight, rounded, x)
    if fmt.positive:
        assert float(grid.scales.min()) > 0


@pytest.mark.parametrize("fmt", SEARCHED, ids=lambda fmt: f"{fmt.name}{' positive' * fmt.positive}")
def test_codes_mean_what_the_grid_says(fmt: Format) -> None:
    weight = matrix(7, 256)
    grid = search(weight, torch.ones(256), fmt)
    integers = nearest(weight, grid)
    found = to_codes(integers, grid)
    np.testing.assert_array_equal(dequantize_codes(found, fmt), meaning(integers, grid).numpy())


def test_rows_do_not_depend_on_each_other() -> None:
    x, weight, fmt = correlated(128), matrix(50, 128), FORMATS["int4-b32"]
    products = x.T @ x / len(x)
    factor, strength = Factor(products.clone()), products.diagonal()
    whole, _ = gptq(weight, factor, search(weight, strength, fmt))
    part = weight[20:30]
    torch.testing.assert_close(gptq(part, factor, search(part, strength, fmt))[0], whole[20:30], rtol=0, atol=0)


@pytest.mark.parametrize("width", [1, 16, 17, PANEL, PANEL + 32, 2 * PANEL + 1, 3 * PANEL])
def test_the_factor_is_that_of_the_inverse(width: int) -> None:
    x = correlated(width, rows=4 * width).double()
    products = x.T @ x / len(x)
    products.diagonal().add_(DAMPING * products.diagonal().mean())
    wanted = torch.linalg.cholesky(torch.linalg.inv(products), upper=True)
    torch.testing.assert_close(inverse_factor(products.flip(0, 1)), wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("width", [17, 2 * PANEL + 1])
@pytest.mark.parametrize("exact", [0, 1 << 20], ids=["float32", "float64"])
def test_a_factor_has_strong_channels_first(width: int, exact: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq_module, "EXACT", exact)
    x = correlated(width, rows=4 * width)
    products = x.T @ x / len(x)
    found = Factor(products.clone())
    strengths = products.diagonal()[found.order]
    assert bool((strengths[:-1] >= strengths[1:]).all())
    damped = products.double()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    wanted = torch.linalg.cholesky(torch.linalg.inv(damped[found.order][:, found.order]), upper=True)
    torch.testing.assert_close(found.u.double(), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_channels_that_are_fed_nothing_and_few_samples_are_no_problem() -> None:
    x = correlated(256, rows=20)  # far fewer than channels
    x[:, 10:30] = 0
    weight, fmt = matrix(32, 256), FORMATS["int4-b32"]
    products = x.T @ x / len(x)
    grid = search(weight, products.diagonal().clone(), fmt)
    chosen = meaning(gptq(weight, Factor(products), grid)[0], grid)
    assert bool(torch.isfinite(chosen).all())
    assert lost(weight, chosen, x) < lost(weight, meaning(nearest(weight, grid), grid), x)
    zeros = search(torch.zeros(4, 64), torch.zeros(64), fmt)
    assert float(meaning(nearest(torch.zeros(4, 64), zeros), zeros).abs().max()) == 0


def test_one_thread_and_two_choose_the_same() -> None:
    x, weight, fmt = correlated(576), matrix(64, 576), FORMATS["int4-b32"]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            products = x.T @ x / len(x)
            found.append(gptq(weight, Factor(products.clone()), search(weight, products.diagonal(), fmt))[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def _cut(codes: Codes, start: int, stop: int) -> Codes:
    offsets = None if codes.offsets is None else codes.offsets[start:stop]
    return Codes(codes.integers[start:stop], codes.scales[start:stop], offsets)


@pytest.mark.parametrize("name", ["int4-b32", "int4-b32-zp", "int4-b32-o8", "int8-b32"])
def test_codes_come_back_from_disk(name: str, tmp_path: Path) -> None:
    fmt, rng = FORMATS[name], np.random.default_rng(3)
    top = 2 ** (fmt.bits - 1)
    integers = rng.integers(-top, top, (9, 96)).astype(np.int8)
    offsets: Array | None = None
    if fmt.shift:
        offsets = rng.integers(-8, 8, (9, 3)).astype(np.int8 if fmt.shift == "zero" else np.float32)
    whole = Codes(integers, rng.standard_normal((9, 3)).astype(np.float16), offsets)
    entry = codes.save(tmp_path, "w.codes", fmt, [_cut(whole, 0, 4), _cut(whole, 4, 9)], "gptq", 0.25)
    codes.save_index(tmp_path, {"w": entry})
    store = CodeStore(tmp_path, codes.load_index(tmp_path))
    assert store.entries == {"w": entry} and "w" in store and list(store) == ["w"]
    for start, stop in ((0, 9), (2, 5), (8, 9)):
        got = store.rows("w", start, stop)
        np.testing.assert_array_equal(got.integers, integers[start:stop])
        np.testing.assert_array_equal(got.scales, whole.scales[start:stop])
        if offsets is not None:
            np.testing.assert_array_equal(got.offsets, offsets[start:stop])
    (tmp_path / "w.codes").write_bytes((tmp_path / "w.codes").read_bytes()[:-1])
    with pytest.raises(errors.BundleError, match="artifact-truncated"):
        store.rows("w", 0, 9)


def by_bytes(document: calibration.Document) -> list[int]:
    return list((document.text or "".join(each["content"] for each in document.messages)).encode())


@pytest.mark.parametrize("context", [8, 64, 2048])
def test_the_packages_texts_give_the_same_sequences_each_time(context: int) -> None:
    found = calibration.sequences(calibration.packaged(), by_bytes, context)
    again = calibration.sequences(calibration.packaged(), by_bytes, context)
    assert calibration.digest(found) == calibration.digest(again)
    total = sum(len(each) for each in found)
    assert (0.9 if context > 8 else 0.5) * calibration.TOKENS < total < 1.3 * calibration.TOKENS
    assert all(0 < len(each) <= min(context, calibration.LENGTH) and each.dtype == np.int64 for each in found)


def test_the_packages_texts_hold_none_of_the_prompts_that_are_judged() -> None:
    for source in calibration.packaged():
        assert source.documents
        for document in source.documents:
            text = json.dumps([document.text, document.messages])
            assert "Name three planets" not in text and "one sentence about the sea" not in text


def test_a_user_gives_texts_and_conversations(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n---\ntwo")
    (tmp_path / "b.jsonl").write_text('{"messages": [{"role": "user", "content": "three"}]}\n\n')
    (tmp_path / "c.bin").write_bytes(b"\xff")
    texts, chats = calibration.given(tmp_path)
    assert [each.text for each in texts.documents] == ["one", "two"]
    assert chats.documents[0].messages == ({"role": "user", "content": "three"},)
    assert len(calibration.given(tmp_path / "a.txt")) == 1
    digest = calibration.Calibration.of("gptq", tmp_path).digest
    assert digest != calibration.Calibration.of("gptq", tmp_path / "a.txt").digest
    assert calibration.Calibration.of("none", None).digest == ""


def conversation(*parts: dict[str, Any]) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": list(parts)}]}).encode()


TEXT = {"type": "text", "text": "What is this?"}
PIXELS = base64.b64encode(b"BM-picture").decode()


def test_pictures_and_sounds_of_a_conversation_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "shot.png").write_bytes(b"PNG-picture")
    parts = [
        {"type": "image_url", "image_url": {"url": "shot.png"}},
        {"type": "input_audio", "input_audio": {"data": base64.b64encode(b"RIFF").decode(), "format": "wav"}},
        {"type": "image_url", "image_url": {"url": f"data:image/bmp;base64,{PIXELS}"}},
        TEXT,
    ]
    (tmp_path / "a.jsonl").write_bytes(conversation(*parts))
    [source] = calibration.given(tmp_path / "a.jsonl")
    [document] = source.documents
    assert [(each.kind, each.data) for each in document.media] == [
        ("image", b"PNG-picture"), ("audio", b"RIFF"), ("image", b"BM-picture"),
    ]  # fmt: skip
    assert document.messages[0]["content"] == [{"type": "image"}, {"type": "image"}, TEXT]
    assert calibration.sequences([source], by_bytes, 64) == []  # it goes whole, and not among the texts
    before = calibration.Calibration.of("search", tmp_path / "a.jsonl").digest
    (tmp_path / "shot.png").write_bytes(b"PNG-picturf")
    assert calibration.Calibration.of("search", tmp_path / "a.jsonl").digest != before


def test_a_content_of_text_parts_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(conversation(TEXT, TEXT))
    [source] = calibration.given(tmp_path / "a.jsonl")
    assert source.documents[0].messages[0]["content"] == 2 * str(TEXT["text"])


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "../secret.png"}},
        {"type": "image_url", "image_url": {"url": "/etc/hostname"}},
        {"type": "image_url", "image_url": {"url": "link.png"}},
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
        {"type": "image_url", "image_url": {"url": "missing.png"}},
        {"type": "image_url", "image_url": {"url": "a\0.png"}},
        {"type": "image_url", "image_url": {"url": "data:image/png,plain"}},
        {"type": "image_url", "image_url": {"url": 3}},
        {"type": "image_url"},
        {"type": "input_audio", "input_audio": {"data": "!"}},
        {"type": "video_url", "video_url": {"url": "a.mp4"}},
        {"text": "of no type"},
        "a string",
    ],
    ids=str,
)
def test_parts_that_cannot_be_used_are_refused(part: Any, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"outside")
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "chats" / "a.jsonl").write_bytes(conversation(part))
    with pytest.raises(errors.UsageError, match="calibration-unusable"):
        calibration.given(tmp_path / "chats" / "a.jsonl")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.txt", b"\xff\xfe"), ("a.txt", b" \n"), ("a.jsonl", b"{}"), ("a.jsonl", b"[1]"), ("a.jsonl", b"{"),
        ("a.jsonl", b'{"messages": []}'), ("a.jsonl", b'{"messages": [{}]}'), ("a.csv", b"1,2"), ("missing.txt", None),
    ],
)  # fmt: skip
def test_files_that_are_no_texts_are_refused(name: str, data: bytes | None, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(errors.UsageError, match="calibration-unusable"):
        calibration.given(tmp_path / name)
    with pytest.raises(errors.UsageError, match="calibration-unusable"):
        calibration.given(tmp_path / "nothing")
