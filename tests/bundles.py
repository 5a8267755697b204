"""Small bundles for tests: a decoder whose only weight is a table, its manifest and its golden vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from edgeexport import core, errors
from edgeexport.bundle import manifest as manifests
from edgeexport.bundle.files import sha256_of
from edgeexport.bundle.manifest import Gates, Golden, Manifest
from edgeexport.bundle.verify import VerifyReport
from edgeexport.bundle.writer import BundleWriter

VOCAB, CONTEXT, PROMPT, STEPS = 11, 16, 3, 4
TOKENS = np.array([1, 5, 2, 7, 7, 0, 10], np.int64)


class WeightRunner:
    """A decoder whose only weight is the file decoder.bin, a table [VOCAB, VOCAB] float32."""

    context, vocab, runtime_seconds = CONTEXT, VOCAB, 0.0

    def __init__(self, folder: Path, component: manifests.Component) -> None:
        self.table = np.frombuffer((folder / component.files[0]).read_bytes(), np.float32).reshape(VOCAB, VOCAB)
        self.cache = np.zeros(CONTEXT, np.int64)

    def step(self, tokens: NDArray[np.int64], position: int, rope: Any = None) -> NDArray[np.float32]:
        self.cache[position : position + len(tokens)] = tokens
        return self.table[self.cache[: position + len(tokens)]].sum(axis=0)

    def close(self) -> None:
        pass


def table(seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(VOCAB, VOCAB)).astype(np.float32)


def golden_tensors(**changed: NDArray[Any] | None) -> dict[str, NDArray[Any]]:
    """The artifact's logits worked out here, and a reference that differs a little."""
    rows = np.cumsum(table()[TOKENS], axis=0)[PROMPT - 1 :]
    noise = np.random.default_rng(1).normal(size=rows.shape).astype(np.float32) * np.float32(0.01)
    found = {
        "tokens": TOKENS,
        "prefill": np.array([PROMPT], np.int64),
        "reference_logits": rows + noise,
        "artifact_logits": rows,
        **changed,
    }
    return {name: np.ascontiguousarray(tensor) for name, tensor in found.items() if tensor is not None}


def a_manifest(files: dict[str, manifests.FileEntry], **changed: Any) -> Manifest:
    tensor = manifests.Tensor("input_ids", "int64", (1, manifests.Dim("T", 1, CONTEXT)))
    past = manifests.Tensor("past_key.0", "float32", (1, 2, CONTEXT, 4))
    present = manifests.Tensor("present_key.0", "float32", (1, 2, CONTEXT, 4))
    decoder = manifests.Component(
        name="decoder",
        backend="onnxruntime",
        files=("decoder.bin",),
        signatures=(manifests.Signature("decode", (tensor, past), (present,)),),
        state=(("past_key.0", "present_key.0"),),
        kv=manifests.KVLayout(layers=3, kv_heads=2, head_dim=4, context=CONTEXT, dtype="float16"),
        weights=(manifests.WeightClass("linear", "int4-b32", 7, 484),),
    )
    fields: dict[str, Any] = {
        "edgeexport": "0.1.0",
        "build_key": "k",
        "model": manifests.Model("tiny", "llama", 121, "d" * 64),
        "target": manifests.Target("host-ort", "linux", "This machine", {"accuracy_level": 4}, {}),
        "quantisation": "int4-b32",
        "components": (decoder,),
        "files": files,
        "golden": Golden("golden/text.safetensors", gates=Gates(max_abs=1e-4, kl=1e-2)),
        "text": manifests.TextContract((2,), {"eos_token": "</s>"}),
        "tools": {"onnxruntime": "1.31"},
        "parity": {"L1": core.Verdict.PASS, "L5": core.Verdict.AMBIGUOUS},
    }
    return Manifest(**(fields | changed))


def write_bundle(
    folder: Path, *, force: bool = False, weights: NDArray[np.float32] | None = None,
    tensors: dict[str, NDArray[Any]] | None = None, **changed: Any,
) -> Path:  # fmt: skip
    with BundleWriter(folder, force=force) as out:
        out.add_bytes("decoder.bin", (table() if weights is None else weights).tobytes())
        out.add_bytes("tokenizer/chat_template.jinja", b"{{ messages[0].content }}{{ eos_token }}")
        out.add_bytes("golden/text.safetensors", safetensors.numpy.save(tensors or golden_tensors()))
        return out.commit(a_manifest(out.files, **changed))


def codes(report: VerifyReport) -> list[str]:
    return [finding.code for finding in report.findings]


def code_of(error: pytest.ExceptionInfo[errors.EdgeExportError]) -> str:
    return error.value.findings[0].code


def rehash(folder: Path, **changes: Any) -> None:
    """Give the bundle a manifest that agrees with its files, as someone who knows the format could."""
    old = manifests.from_json((folder / "manifest.json").read_bytes())
    files = {name: manifests.FileEntry((folder / name).stat().st_size, sha256_of(folder / name)) for name in old.files}
    (folder / "manifest.json").write_bytes(manifests.to_json(msgspec.structs.replace(old, files=files, **changes)))
    (folder / "manifest.json.sha256").write_text(sha256_of(folder / "manifest.json") + "\n")


VALID = a_manifest(
    {name: manifests.FileEntry(484, "a" * 64) for name in ("decoder.bin", "golden/text.safetensors", "é/x")}
)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
