"""Open a checkpoint folder as transformers writes it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from edgeexport import errors
from edgeexport.checkpoint import quantised, safetensors
from edgeexport.checkpoint.digest import header_digest
from edgeexport.checkpoint.files import CONFIG_LIMIT, TOKENIZER_LIMIT, find, parse_object, read_object, read_small
from edgeexport.core import Checkpoint

TOKENIZER_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
TEMPLATE = "chat_template.jinja"


def open_folder(folder: Path, name: str) -> Checkpoint:
    """The checkpoint in a folder; only config.json, generation_config.json and the weights' headers are read.

    Raises `adapter-not-merged`, `missing-config`, `bad-json`, `file-too-large`, `missing-model-type`, `remote-code`,
    `path-escapes`, and what `safetensors.read_folder` and `quantised.logical` raise. Of a checkpoint that comes
    quantised the tensors are its logical matrices, and `quantization_config` is not in the configuration any more.
    """
    adapter = find(folder, "adapter_config.json")
    if adapter is not None:
        raise errors.adapter_not_merged(adapter)
    config = _read_config(folder)
    generation_path = find(folder, "generation_config.json")
    generation = read_object(generation_path, CONFIG_LIMIT) if generation_path is not None else {}
    processor_path = find(folder, "preprocessor_config.json") or find(folder, "processor_config.json")
    processor = read_object(processor_path, CONFIG_LIMIT) if processor_path is not None else {}
    stored, files = safetensors.read_folder(folder)
    tensors = quantised.logical(stored, quantised.settings_of(config), folder / "config.json")
    config = quantised.without_settings(config)
    return Checkpoint(
        path=folder,
        name=name,
        format="safetensors",
        model_type=config["model_type"],
        config=config,
        generation=generation,
        tensors=tensors,
        files=files,
        processor=processor,
        read_tokenizer=partial(read_tokenizer, folder),
        header_digest=header_digest(config, {**generation, "processor": processor}, tensors, files),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = find(folder, "config.json")
    if path is None:
        raise errors.missing_config(folder)
    config = read_object(path, CONFIG_LIMIT)
    auto_map = config.get("auto_map")
    if auto_map:
        raise errors.remote_code(path, auto_map if isinstance(auto_map, dict) else [str(auto_map)[:80]])
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise errors.missing_model_type(path)
    return config


def read_tokenizer(folder: Path) -> Mapping[str, bytes]:
    """The tokenizer's files by name, as far as they exist. Raises `missing-tokenizer`, `bad-json`, `file-too-large`.

    A chat template inside tokenizer_config.json becomes chat_template.jinja, unless that file exists; of several
    templates it is the one named "default".
    """
    path = find(folder, "tokenizer.json")
    if path is None:
        raise errors.missing_tokenizer(folder)
    files = {"tokenizer.json": read_small(path, TOKENIZER_LIMIT)}
    parse_object(files["tokenizer.json"], path)
    for name in TOKENIZER_FILES:
        path = find(folder, name)
        if path is not None:
            files[name] = read_small(path, TOKENIZER_LIMIT)
            if name == "tokenizer_config.json":
                template = _inner_template(parse_object(files[name], path))
                if template is not None:
                    files[TEMPLATE] = template.encode("utf-8")
    path = find(folder, TEMPLATE)
    if path is not None:
        files[TEMPLATE] = read_small(path, TOKENIZER_LIMIT)
    return files


def _inner_template(config: Mapping[str, Any]) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None
