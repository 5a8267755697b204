"""A `.litertlm` file: a decoder's `.tflite` with its tokenizer and what LiteRT-LM's engine must know, in one file.

    0    "LITERTLM", version 3 x uint32, padding, uint64 end of the header
    32   a flatbuffer that names the sections
    ...  the sections, each at a multiple of 16 KiB

Written here and not by LiteRT-LM's own builder, which puts the time and a random number into every file.
Source: litert-lm-builder 0.18, litertlm_builder.py and litertlm_core.py.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from edgeexport import errors

MAGIC = b"LITERTLM"
VERSION = (1, 7, 0)
HEADER_END_AT = 24
HEADER_AT = 32
BLOCK = 16 << 10


@dataclass(frozen=True)
class Speech:
    """What the engine must know of a model's text: tokenizer.json, chat template, ids that end an answer, and cache
    slots."""

    tokenizer: bytes
    template: str
    stop_ids: tuple[int, ...]
    context: int


@dataclass(frozen=True)
class _Section:
    """One section: its kind and labels in the header, and what writes it."""

    kind: int
    labels: tuple[tuple[str, str], ...]
    write: Callable[[BinaryIO], None]


def write_litertlm(model: Path, speech: Speech, out: Path) -> None:
    """Write the file `out` from the decoder's `.tflite`, which is copied block by block. The same bytes every time.

    The engine picks the likeliest token unless its caller asks for another way. No start token is named: a chat
    template writes its own, and text without one is to be taken as it is.

    Raises: ToolError `missing-package`; UsageError `output-not-writable`.
    """
    try:
        from litert_lm_builder import litertlm_header_schema_py_generated as schema
    except ImportError as problem:
        raise errors.missing_package("litert-lm-builder", "tflite") from problem

    kinds = schema.AnySectionDataType
    sections = (
        _Section(kinds.LlmMetadataProto, (), lambda file: _put(file, _metadata(speech))),
        _Section(kinds.HF_Tokenizer_Zlib, (), lambda file: _put(file, _tokenizer(speech.tokenizer))),
        _Section(kinds.TFLiteModel, (("model_type", "tf_lite_prefill_decode"),), lambda file: _copy(file, model)),
    )
    try:
        with out.open("wb") as file:
            places = [(1, 1)] * len(sections)  # numbers of a fixed width, unknown so far
            at = HEADER_AT + len(_header(schema, sections, places))
            for k, section in enumerate(sections):
                file.seek(-(-at // BLOCK) * BLOCK)
                start = file.tell()
                section.write(file)
                at = file.tell()
                places[k] = start, at
            header = _header(schema, sections, places)
            file.seek(0)
            file.write(MAGIC + b"".join(number.to_bytes(4, "little") for number in VERSION))
            file.seek(HEADER_END_AT)
            file.write((HEADER_AT + len(header)).to_bytes(8, "little") + header)
    except OSError as problem:
        raise errors.output_not_writable(out, str(problem)) from problem


def _header(schema: Any, sections: Iterable[_Section], places: Iterable[tuple[int, int]]) -> bytes:
    import flatbuffers

    def label(key: str, value: str) -> Any:
        text = schema.StringValueT(value)
        return schema.KeyValuePairT(key=key, value=text, valueType=schema.VData.StringValue)

    listed = [
        schema.SectionObjectT(
            items=[label(*each) for each in section.labels], dataType=section.kind, beginOffset=start, endOffset=end
        )
        for section, (start, end) in zip(sections, places, strict=True)
    ]
    document = schema.LiteRTLMMetaDataT(
        systemMetadata=schema.SystemMetadataT(entries=[label("Authors", "edgeexport")]),
        sectionMetadata=schema.SectionMetadataT(objects=listed),
    )
    builder = flatbuffers.Builder(BLOCK)
    builder.Finish(document.Pack(builder))
    return bytes(builder.Output())


def _metadata(speech: Speech) -> bytes:
    from litert_lm_builder.runtime.proto import llm_metadata_pb2, sampler_params_pb2

    found = llm_metadata_pb2.LlmMetadata()
    found.max_num_tokens = speech.context
    found.jinja_prompt_template = speech.template
    found.llm_model_type.generic_model.SetInParent()
    for token in speech.stop_ids:
        found.stop_tokens.add().token_ids.ids.append(token)
    sampler = found.sampler_params  # of one token, the likeliest; the engine has no sampler of the type GREEDY
    sampler.type = sampler_params_pb2.SamplerParameters.TOP_P
    sampler.k, sampler.p, sampler.temperature = 1, 1.0, 1.0
    data: bytes = found.SerializeToString(deterministic=True)
    return data


def _tokenizer(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + zlib.compress(data, 9)


def _put(file: BinaryIO, data: bytes) -> None:
    file.write(data)


def _copy(file: BinaryIO, source: Path) -> None:
    with source.open("rb") as model:
        shutil.copyfileobj(model, file, 1 << 22)
