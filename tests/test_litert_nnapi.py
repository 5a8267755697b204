"""The NNAPI target: a decoder whose cache the loader writes, and what the linter says of every file, in LiteRT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases.ops import OPS, OpCase
from graphs import (
    FAMILIES,
    TOKENS,
    Decoder,
    Traced,
    Zoo,
    assert_built,
    positive,
    stored_weights,
    written,
)
from test_backend_ops import build, oracle
from test_litert import shifted

from edgeexport import targets
from edgeexport.backends import litert_nnapi, litert_nnapi_runner
from edgeexport.backends.litert_nnapi_lint import lint, read
from edgeexport.core import Artifact, CanonicalModel, Dim, QuantPlan, Target


def target(**options: Any) -> Target:
    """android-nnapi with short pieces of prompts."""
    found = targets.load("android-nnapi")
    return replace(found, options={"prefill": 4, **options})


def compiled(models: list[CanonicalModel], plan: QuantPlan, folder: Path, **options: Any) -> Artifact:
    """What the backend writes of one component into `folder`, which is made."""
    return written(litert_nnapi, models, target(**options), plan, folder)


def planned(found: Traced, scheme: str, component: str = "decoder") -> QuantPlan:
    """A component's plan as this backend gets it."""
    return positive(found.plan(scheme, component))


# what is computed


BUILT = [
    *((name, scheme) for name in FAMILIES for scheme in ("fp16", "int8")),
    ("llama", "fp32"),
    ("llama", "int4-b32"),
]
"""Every scheme goes through LiteRT's own tests."""


@pytest.mark.parametrize(("name", "scheme"), BUILT)
def test_every_family_and_scheme_computes_what_the_canonical_graph_computes(
    name: str, scheme: str, zoo: Zoo, tmp_path: Path
) -> None:
    found = zoo.traced(name)
    weights = stored_weights(found, scheme, positive)
    artifacts = {
        component: compiled(found.variants(component), planned(found, scheme, component), tmp_path)
        for component in found.components()
    }
    assert_built(tmp_path, artifacts, found, weights)


def test_blocks_with_offsets_stay_on_the_processor_and_compute_the_same(zoo: Zoo, tmp_path: Path) -> None:
    found = zoo.traced("llama")
    artifact = compiled([found.model], shifted(found.plan("int4-b32")), tmp_path)
    assert_built(tmp_path, {"decoder": artifact}, found, stored_weights(found, "int4-b32", shifted))
    share = lint(tmp_path / "decoder.tflite", 6)[0]
    refused = {op for op, _ in share.refused}
    assert "FULLY_CONNECTED" in refused
    assert "SUM" not in refused


OWN = {row.op for row in litert_nnapi.OPS if row is not litert_nnapi.litert.OPS.get(row.op)}


def is_refused(case: OpCase) -> bool:
    """What is added to the cache is an input, so that there is nothing to compute; and blocks of int8."""
    return case.op == "TensorScatter" or any(weight.format.startswith("int8-b") for weight in case.weights.values())


@pytest.mark.parametrize("case", [case for case in OPS if case.op in OWN and is_refused(case)], ids=str)
def test_what_the_table_does_not_take_is_refused_before_a_weight_is_read(case: OpCase, tmp_path: Path) -> None:
    model, plan = build(case, tmp_path)
    (finding,) = litert_nnapi.check(model, target(), positive(plan))
    assert finding.code == "op-not-lowered"
    assert ("is an input of the graph" if case.op == "TensorScatter" else "blocks of int4") in finding.why


@pytest.mark.parametrize("case", [case for case in OPS if case.op in OWN and not is_refused(case)], ids=str)
def test_every_op_of_our_own_rows_computes_what_it_means(case: OpCase, tmp_path: Path) -> None:
    model, plan = build(case, tmp_path)
    plan = positive(plan)
    artifact = compiled([model], plan, tmp_path / "out")
    expected = oracle(case, model, plan)
    graph = litert_nnapi_runner.open_graph(tmp_path / "out", artifact, threads=1, exact=True)
    got = graph.run(case.inputs)
    graph.close()
    written = dict(model.state)
    for name, want in expected.items():
        if name in written.values():  # what the loader writes at the position
            past = case.inputs[next(past for past, present in model.state if present == name)]
            count, start = got[name].shape[2], int(case.inputs["position"].reshape(-1)[0])
            assert start + count <= past.shape[2]
            made = past.copy()
            made[:, :, start : start + count] = got[name]
        else:
            made = got[name]
        np.testing.assert_allclose(made, want, atol=case.tolerance, rtol=1e-5)


# the decoder


@pytest.mark.parametrize("scheme", ["fp16", "int8"])
def test_no_operator_writes_a_cache_and_the_loader_gets_every_slice(scheme: str, zoo: Zoo, tmp_path: Path) -> None:
    found = zoo.traced("llama")
    artifact = compiled([found.model], planned(found, scheme), tmp_path)
    layers = found.checkpoint.config["num_hidden_layers"]
    graphs = dict(read(tmp_path / "decoder.tflite"))
    assert list(graphs) == ["decode", "prefill_4"] == [signature.name for signature in artifact.signatures]
    for operations in graphs.values():
        assert not {op.op for op in operations} & {"DYNAMIC_UPDATE_SLICE", "SELECT_V2", "LESS"}
    assert artifact.state == tuple(
        (f"kv_cache_{kind}_{k}", f"kv_slice_{kind}_{k}") for k in range(layers) for kind in "kv"
    )
    for signature, length in zip(artifact.signatures, (1, 4), strict=True):
        shapes = {spec.name: spec.shape for spec in signature.outputs}
        assert {shapes[added][2] for _, added in artifact.state} == {length}
        assert ("logits" in shapes) == (length == 1)


def test_what_pads_a_piece_is_never_written(zoo: Zoo, tmp_path: Path) -> None:
    # 9 tokens: two pieces of 4, the last of them decoded; then a piece that begins before the cache's end.
    found = zoo.traced("llama")
    artifact = compiled([found.model], planned(found, "fp32"), tmp_path)
    decoder = litert_nnapi_runner.open_decoder(tmp_path, artifact, threads=1)
    expected = Decoder(found, stored_weights(found, "fp32", positive))
    for start, stop in ((0, 9), (9, 12), (12, 29), (29, 32)):
        got = decoder.step(TOKENS[start:stop], start)
        np.testing.assert_allclose(got, expected.step(TOKENS[start:stop], start), atol=1e-5)
        assert all((held[:, :, stop:] == 0).all() and held[:, :, :stop].any() for held in decoder._held.values())
    decoder.close()


@pytest.mark.parametrize("name", ["llama", "glm4v"])
def test_the_runtime_sees_the_signatures_that_the_canonical_graphs_promise(name: str, zoo: Zoo, tmp_path: Path) -> None:
    found = zoo.traced(name)
    for (component, variant), model in found.parts.items():
        artifact = compiled(found.variants(component), planned(found, "fp32", component), tmp_path)
        seen = litert_nnapi_runner.read_signature(tmp_path, artifact, variant)
        assert seen.keys() == {spec.name for spec in (*model.inputs, *model.outputs)}
        for spec in (*model.inputs, *model.outputs):
            assert seen[spec.name].dtype == spec.dtype
            pairs = zip(seen[spec.name].shape, spec.shape, strict=True)
            assert all(isinstance(a, Dim) or isinstance(b, Dim) or a == b for a, b in pairs)


def test_the_fast_kernels_round_each_token_by_itself(zoo: Zoo, tmp_path: Path) -> None:
    found = zoo.traced("qwen3")
    artifact = compiled([found.model], planned(found, "int8"), tmp_path)
    shipped, exact = (
        litert_nnapi_runner.open_decoder(tmp_path, artifact, threads=1, exact=exact) for exact in (False, True)
    )
    for position in range(0, 24, 6):
        want = exact.step(TOKENS[position : position + 6], position)
        noise = shipped.step(TOKENS[position : position + 6], position) - want
        assert 0 < np.sqrt(np.mean(noise**2)) < 0.05 * np.sqrt(np.mean(want**2))
    shipped.close()
    exact.close()


# what is reported


def test_the_build_says_that_nnapi_is_deprecated_and_what_it_would_take(zoo: Zoo, tmp_path: Path) -> None:
    found = zoo.traced("llama")
    deprecated, share = compiled([found.model], planned(found, "fp16"), tmp_path).findings
    assert (deprecated.severity, deprecated.code) == ("warning", "nnapi-deprecated")
    assert "android-tflite" in deprecated.fix
    assert (share.severity, share.code) == ("note", "nnapi-share")
    assert "decode, feature level 6" in share.where
    (decode, _) = lint(tmp_path / "decoder.tflite", 6)
    assert f"{decode.taken} of {decode.operators} operators and {100 * decode.of_macs:.1f}%" in share.what


def test_a_decoder_in_float16_or_int8_multiplies_in_nnapi_alone_at_feature_level_6(zoo: Zoo, tmp_path: Path) -> None:
    found = zoo.traced("llama")
    compiled([found.model], planned(found, "fp16"), tmp_path / "half")
    compiled([found.model], planned(found, "int8"), tmp_path / "int8")
    compiled([found.model], planned(found, "int4-b32"), tmp_path / "int4")
    half = {level: lint(tmp_path / "half" / "decoder.tflite", level)[0] for level in range(1, 9)}
    assert [share.taken for share in half.values()] == sorted(share.taken for share in half.values())
    assert half[6].of_macs == 1
    assert {op for op, _ in half[6].refused} == set()
    assert {op for op, _ in half[5].refused} == {"BATCH_MATMUL", "RESHAPE"}
    (int8, _) = lint(tmp_path / "int8" / "decoder.tflite", 6)
    assert {op for op, _ in int8.refused} == {"EMBEDDING_LOOKUP"}
    assert (int8.of_macs, int8.macs) == (1, half[6].macs)
    (blocks, _) = lint(tmp_path / "int4" / "decoder.tflite", 6)
    assert {op for op, _ in blocks.refused} == {"EMBEDDING_LOOKUP", "FULLY_CONNECTED"}
    assert blocks.of_macs < 0.5
    config = found.checkpoint.config
    hidden, wide, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    width, keys = found.model.inputs[2].shape[3], config["num_key_value_heads"]
    assert isinstance(width, int)
    layer = hidden * width * (2 * heads + 2 * keys) + 3 * hidden * wide + 2 * heads * width * (32 + 1)
    assert half[6].macs == config["num_hidden_layers"] * layer + hidden * config["vocab_size"]


@pytest.mark.parametrize("scheme", ["fp16", "int8"])
def test_a_tied_table_is_stored_once_and_every_tensor_has_a_name_of_its_own(
    scheme: str, zoo: Zoo, tmp_path: Path
) -> None:
    from ai_edge_litert import schema_py_generated as schema

    found = zoo.traced("llama")
    assert found.checkpoint.config["tie_word_embeddings"]
    compiled([found.model], planned(found, scheme), tmp_path)
    model = schema.ModelT.InitFromPackedBuf((tmp_path / "decoder.tflite").read_bytes())
    names = [tensor.name for graph in model.subgraphs for tensor in graph.tensors]
    assert len(set(names)) == len(names)
    stored = sum(buffer.size for buffer in model.buffers)
    ideal = planned(found, scheme).ideal_bytes({name: ref.shape for name, ref in found.model.weights.items()})
    assert stored < 1.05 * ideal + 20_000  # tables of angles and masks, no second copy


@pytest.mark.parametrize("options", [{"prefill": 1}, {"features": 0}, {"feature_level": 9}])
def test_an_option_out_of_its_range_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="to"):
        litert_nnapi.Options(**options)
