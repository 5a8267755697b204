"""The manifest is written as one text and read strictly, whoever wrote it."""

from __future__ import annotations

import copy
import json
import time
from typing import Any

import pytest
from bundles import VALID, a_manifest, code_of
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeexport import core, errors
from edgeexport.bundle import manifest as manifests
from edgeexport.bundle.manifest import Gates, Golden

PLAIN: dict[str, Any] = json.loads(manifests.to_json(VALID))


def refusal(document: Any) -> str:
    with pytest.raises(errors.BundleError) as error:
        manifests.from_json(json.dumps(document).encode())
    return code_of(error)


def test_a_manifest_survives_the_round_trip_as_the_same_bytes() -> None:
    data = manifests.to_json(VALID)
    assert manifests.from_json(data) == VALID and manifests.to_json(manifests.from_json(data)) == data
    assert data.endswith(b"}\n") and data.isascii()
    reordered = json.dumps(dict(reversed(PLAIN.items()))).encode()
    assert manifests.to_json(manifests.from_json(reordered)) == data


@pytest.mark.parametrize("version", ["edgeexport.bundle/2", "edgeexport.bundle/10", "edgeexport.bundle/1.1"])
def test_a_newer_schema_is_named_even_when_nothing_else_fits(version: str) -> None:
    assert refusal({"schema": version, "whatever": []}) == "bundle-too-new"


BAD_PATHS = [
    "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/.", "", "a\\b", "C:x", "a\0b", "a\nb", "\ud800",
    "manifest.json", "Manifest.JSON", "manifest.json.sha256", "DECODER.bin", "e\u0301/x", "decoder.bin/x", "x" * 300,
]  # fmt: skip


@pytest.mark.parametrize("path", BAD_PATHS)
def test_bad_paths_are_refused(path: str) -> None:
    document = copy.deepcopy(PLAIN)
    document["files"][path] = {"size": 1, "sha256": "a" * 64}
    assert refusal(document) == "bundle-bad-manifest"


CHANGES: list[tuple[str, Any]] = [
    ("files/decoder.bin/size", -1), ("files/decoder.bin/size", 1.5), ("files/decoder.bin/size", "1"),
    ("files/decoder.bin/size", True), ("files/decoder.bin/size", 2**64), ("files/decoder.bin/size", 10**400),
    ("files/decoder.bin/sha256", "A" * 64), ("files/decoder.bin/sha256", "a" * 63),
    ("files/decoder.bin/mode", 7), ("extra", 1), ("schema", None), ("schema", "other/1"), ("schema", 1),
    ("components/0/name", ""), ("components/0/files", ["nowhere"]), ("components/0/kv/layers", 0),
    ("components/0/kv/dtype", "float13"), ("components/0/signatures/0/inputs/0/shape", [-1]),
    ("components/0/signatures/0/inputs/0/shape", [{"name": "T", "min": 3, "max": 2}]),
    ("components/0/signatures/0/inputs/0/dtype", "string"), ("components/0/state", [["a", "b"]]),
    ("components/0/signatures/0/inputs/0/name", "past_key.0"), ("components/0/weights/0/tensor_class", "norm"),
    ("components", [PLAIN["components"][0], PLAIN["components"][0]]), ("golden/file", "nowhere"),
    ("golden/file", None), ("golden/gates", {}), ("golden/gates/kl", -0.1), ("golden/not_run", "why"),
    ("parity/L6", "PASS"), ("parity/L1", "GREEN"), ("text/stop_ids", [-1]), ("model", None), ("files", []),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value"), CHANGES)
def test_bad_values_are_refused(place: str, value: Any) -> None:
    document = copy.deepcopy(PLAIN)
    *parents, last = place.split("/")
    inner = document
    for key in parents:
        inner = inner[int(key)] if isinstance(inner, list) else inner[key]
    inner[last] = value
    assert refusal(document) == "bundle-bad-manifest"


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff", b"[" * 100_000, b'{"schema": NaN}', b"null", b'{"a": 1e999}', b"9" * 5000,
     manifests.to_json(VALID).replace(b'"kl": 0.01', b'"kl": 1e999'),
     manifests.to_json(VALID).replace(b'"kl": 0.01', b'"kl": 0.01, "kl": 0.5'),
     manifests.to_json(VALID) + b"x", b" " * (manifests.MAX_BYTES + 1)],
)  # fmt: skip
def test_what_is_no_strict_json_is_refused(data: bytes) -> None:
    with pytest.raises(errors.BundleError) as error:
        manifests.from_json(data)
    assert code_of(error) == "bundle-bad-manifest"


def readable_or_refused(data: bytes) -> None:
    try:
        manifest = manifests.from_json(data)
    except errors.BundleError:
        return
    # whatever is accepted must be writable again
    assert manifests.from_json(manifests.to_json(manifest)) == manifest


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


def places(document: Any, found: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    below = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [found, *[place for key, inner in below for place in places(inner, (*found, key))]]


@given(ANY_JSON, st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_json_is_read_or_refused(document: Any, named: bool) -> None:
    if named and isinstance(document, dict):
        document["schema"] = manifests.SCHEMA
    readable_or_refused(json.dumps(document).encode())


@given(st.data(), ANY_JSON | st.sampled_from([-1, 2**63, "../x", "", None, [], {}, 1e308]))
@settings(max_examples=400, deadline=None)
def test_a_changed_manifest_is_read_or_refused(data: st.DataObject, value: Any) -> None:
    document = {"root": copy.deepcopy(PLAIN)}
    *parents, last = data.draw(st.sampled_from(places(document)[1:]))
    inner: Any = document
    for key in parents:
        inner = inner[key]
    action = data.draw(st.sampled_from(["set", "delete", "add"]))
    if action == "delete":
        del inner[last]
    elif action == "add" and isinstance(inner, dict):
        inner[data.draw(st.text(max_size=8))] = value
    else:
        inner[last] = value
    readable_or_refused(json.dumps(document.get("root")).encode())


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_flipped_or_cut_manifest_is_read_or_refused(data: st.DataObject) -> None:
    text = bytearray(manifests.to_json(VALID))
    text[data.draw(st.integers(0, len(text) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    readable_or_refused(bytes(text[: data.draw(st.integers(0, len(text)))]))
    readable_or_refused(bytes(text))


def test_names_are_compared_as_often_as_there_are_names() -> None:
    """A manifest of 16 MB may have 200,000 signatures over 3,000 files."""
    compared = 0

    class Counted(str):
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    names = [Counted(f"f{i}") for i in range(1_000)]
    entry = next(iter(VALID.files.values()))
    signatures = tuple(manifests.Signature("s", (), (), name) for name in names)
    component = manifests.Component("many", "onnxruntime", tuple(names), signatures)
    assert list(manifests._component_contradictions(component, dict.fromkeys(names, entry))) == []
    assert compared < 20 * len(names)


def test_a_path_through_hundreds_of_folders_is_refused() -> None:
    document = copy.deepcopy(PLAIN)
    document["files"] |= {"a/" * 500 + str(i): next(iter(document["files"].values())) for i in range(9_000)}
    began = time.process_time()
    assert refusal(document) == "bundle-bad-manifest"
    assert time.process_time() - began < 20


def test_a_manifest_that_could_not_be_read_is_not_written() -> None:
    for changed in (
        {"golden": Golden("nowhere", gates=Gates(kl=1.0))},
        {"target": manifests.Target("t", "p", "", {"x": float("nan")})},
    ):
        with pytest.raises(errors.BundleError) as error:
            manifests.to_json(a_manifest(VALID.files, **changed))
        assert code_of(error) == "bundle-bad-manifest"


def test_the_schema_document_says_what_is_allowed() -> None:
    document = manifests.schema()
    root = document["$defs"]["Manifest"]
    assert set(root["properties"]) == set(PLAIN) and root["additionalProperties"] is False
    assert document["$defs"]["FileEntry"]["properties"]["size"]["minimum"] == 0
    json.dumps(document)


def test_signatures_and_weight_classes_of_the_core_types() -> None:
    spec = core.TensorSpec("x", "int64", (1, core.Dim("T", 1, 9)))
    artifact = core.Artifact("decoder", "b", (), (core.Signature("decode", (spec,), ()),), (), {}, {})
    expected = manifests.Tensor("x", "int64", (1, manifests.Dim("T", 1, 9)))
    assert manifests.signatures_of(artifact) == (manifests.Signature("decode", (expected,), ()),)
    int4, fp32 = core.Format("int4-b32", 4, True, 32), core.Format("fp32", 32, False)
    plan = core.QuantPlan("s", {"a": "linear", "b": "linear", "n": "other"}, {"a": int4, "b": int4, "n": fp32})
    assert manifests.weight_classes(plan, {"a": (2, 64), "b": (4, 64), "n": (10,)}) == (
        manifests.WeightClass("linear", "int4-b32", 2, 6 * 32 + 6 * 2 * 2),
        manifests.WeightClass("other", "fp32", 1, 40),
    )
