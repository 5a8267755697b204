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
from edgeexport.checkpoint.resolved import TEMPLATE, TokenizerFiles, resolve
from edgeexport.core import Checkpoint

TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""What AutoTokenizer reads beside tokenizer.json, as far as it exists."""
TEMPLATE_FOLDER = "additional_chat_templates"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


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
        read_tokenizer=partial(read_tokenizer, folder, config),
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


def read_tokenizer(folder: Path, config: Mapping[str, Any]) -> TokenizerFiles:
    """The tokenizer's files by name, as AutoTokenizer has them, and generation_config.json as it is.

    Raises `missing-tokenizer`, `bad-json`, `file-too-large`, `path-escapes`, and what `resolved.resolve` raises.
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
            parse_object(files[name], path)
    template = _template(folder)
    if template is not None:
        files[TEMPLATE] = template
    made = resolve(folder, files, config)
    path = find(folder, "generation_config.json")
    if path is not None:
        made["generation_config.json"] = read_small(path, TOKENIZER_LIMIT)
    return made


def _template(folder: Path) -> bytes | None:
    """The chat template that goes before one in tokenizer_config.json, UTF-8. A model with a processor is asked through
    it, and it has two places more. Raises as `read_tokenizer` does."""
    extra = find(folder, TEMPLATE_FOLDER)
    paths = [find(extra, "default.jinja") if extra is not None and extra.is_dir() else None, find(folder, TEMPLATE)]
    given = next((path for path in paths if path is not None), None)
    if given is not None:
        data = read_small(given, TOKENIZER_LIMIT)
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as problem:
            raise errors.file_unreadable(given, f"it is not UTF-8: {problem}") from problem
        return data
    if any(find(folder, name) is not None for name in PROCESSOR_FILES):
        for name in ("processor_config.json", "chat_template.json"):
            path = find(folder, name)
            text = read_object(path, TOKENIZER_LIMIT).get("chat_template") if path is not None else None
            if isinstance(text, str):
                return text.encode("utf-8")
    return None
