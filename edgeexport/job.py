"""What is to be built, and the keys under which its parts are cached."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from edgeexport import backends, errors
from edgeexport.backends.tools import versions_of
from edgeexport.bundle.cache import key
from edgeexport.checkpoint import content_digest
from edgeexport.core import Checkpoint, Finding, Progress, Target
from edgeexport.families import Family
from edgeexport.quant.budget import Budget, Choice, written
from edgeexport.quant.calibration import Calibration
from edgeexport.samples import Samples
from edgeexport.session.chat import ChatTemplate
from edgeexport.session.preprocess import Preprocess
from edgeexport.session.tokenizer import SpecialTokens, Tokenizer, special_tokens
from edgeexport.text_tables.files import table_files

ROUNDED = Calibration("none")
UNLIMITED = Budget()

TOOLS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy", "tokenizers", "jinja2")
"""Packages whose version may change an artifact, or the tables of tokens and chat beside it."""


@dataclass(frozen=True)
class Job:
    """What is to be built, settled before anything is read."""

    checkpoint: Checkpoint
    target: Target
    scheme: str
    context: int
    parity: str
    family: Family
    samples: Samples | None = None
    """What the user gave to calibrate activations by."""
    calibration: Calibration = ROUNDED
    """How integers of 4 bits are chosen."""
    budget: Budget = UNLIMITED
    """What the formats are chosen within, where the scheme is `auto`."""
    choice: Choice | None = None
    """The formats that were chosen, or given by the user."""

    @cached_property
    def tokenizer_files(self) -> Mapping[str, bytes]:
        """The tokenizer's files; a second's work for a GGUF, so done once."""
        return self.checkpoint.read_tokenizer()

    @cached_property
    def special_tokens(self) -> SpecialTokens:
        """Special tokens and stop ids, from the tokenizer's files; config.json stands in for a generation config that
        is missing, as in transformers, or names no eos token. Raises: BundleError `tokenizer-unusable`."""
        return special_tokens(self.tokenizer_files, self.checkpoint.config)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer. Raises: BundleError `tokenizer-unusable`."""
        return Tokenizer(self.tokenizer_files["tokenizer.json"])

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """How the model is asked; None where the checkpoint has none. Raises: CheckpointError
        `chat-template-unusable`."""
        data = self.tokenizer_files.get("chat_template.jinja")
        if data is None:
            return None
        try:
            source = data.decode("utf-8")
        except UnicodeDecodeError as problem:
            raise errors.chat_template_unusable(f"it is not UTF-8 text: {problem}") from problem
        return ChatTemplate(source, self.special_tokens.names)

    @cached_property
    def text_tables(self) -> tuple[dict[str, bytes], list[Finding]]:
        """What the native loader reads in place of tokenizer.json and the template, and warnings about what is
        missing; nothing for targets of other loaders."""
        if self.target.platform != "android":
            return {}, []
        pictures = self.contract is not None and self.contract.joining == "splice"
        return table_files(self.tokenizer_files["tokenizer.json"], self.chat_template, pictures=pictures)

    @cached_property
    def contract(self) -> Preprocess | None:
        """What pictures, sound and prompts must go through; None for a model of text alone."""
        return self.family.preprocess(self.checkpoint, self.target.shapes)

    @cached_property
    def weights_digest(self) -> str:
        """sha256 over the checkpoint's bytes; remembered between builds by the files' identity."""
        return content_digest(self.checkpoint)

    def hash_weights(self, progress: Progress) -> None:
        """Make `weights_digest` now. What `progress` raises ends that early."""
        if "weights_digest" not in vars(self):
            vars(self)["weights_digest"] = content_digest(self.checkpoint, progress)

    @cached_property
    def trace_key(self) -> str:
        """Names the canonical graph: the config and tensor index, context and shapes, our code and torch's version."""
        return key(
            "trace", self.checkpoint.header_digest, self.context, self.target.shapes, code_digest(), tool_versions()
        )

    @cached_property
    def compile_key(self) -> str:
        """Names the artifact: the graph, the weights' bytes, the target, the scheme, the formats chosen, the samples
        and the backend's tools. Raises: ToolError `missing-package`."""
        aim, samples = self.target, self.samples.digest if self.samples is not None else ""
        tools = backends.load(aim.backend).versions()
        chosen = self.calibration.method, self.calibration.digest, self.calibration.device
        formats = written(self.choice).decode() if self.choice is not None else ""
        return key(
            "compile", self.trace_key, self.weights_digest, aim.source, aim.name, self.scheme, formats, samples, chosen,
            tools,
        )  # fmt: skip

    @cached_property
    def build_key(self) -> str:
        """Names the bundle: the artifact, the tokenizer and how far the ladder was climbed."""
        files = {name: hashlib.sha256(data).hexdigest() for name, data in self.tokenizer_files.items()}
        return key("bundle", self.compile_key, files, self.parity)


def tool_versions() -> dict[str, str]:
    """Versions of `TOOLS` from their metadata: importing them takes seconds."""
    return versions_of("build", *TOOLS)


def code_digest() -> str:
    """sha256 over this package's own sources: another compiler, another result."""
    state = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        state.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return state.hexdigest()
