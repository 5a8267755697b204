"""An opened bundle: its manifest, its session, its tokenizer, its chat template."""

from __future__ import annotations

import os
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from edgeexport import errors
from edgeexport.bundle import manifest as manifests
from edgeexport.bundle.manifest import FILE, Component, Manifest
from edgeexport.plainfile import NotPlain, located, open_plain, read_all

if TYPE_CHECKING:
    from edgeexport.session.chat import ChatTemplate
    from edgeexport.session.preprocess import Preprocess
    from edgeexport.session.session import Session
    from edgeexport.session.tokenizer import Tokenizer

DECODER, EMBED = "decoder", "embed"
TOKENIZER = "tokenizer/tokenizer.json"
CHAT_TEMPLATE = "tokenizer/chat_template.jinja"
MAX_TEMPLATE_BYTES = 16 << 20


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk. Nothing but the manifest has been read."""

    path: Path
    manifest: Manifest

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer, ascending."""
        return self.manifest.text.stop_ids if self.manifest.text is not None else ()

    @property
    def stand_in(self) -> str:
        """What runs the decoder on this computer, in words, where it is not the runtime that it is deployed to."""
        from edgeexport.backends import load_runner

        return str(getattr(load_runner(self.component("decoder").backend), "RUNTIME", ""))

    def session(self, threads: int | None = None) -> Session:
        """Open the decoder, and the embedding where it is apart. An encoder is opened when the first picture or sound
        is given to it: a session of text alone never touches the files of the others. `threads`: None lets the runtime
        choose.

        Raises bundle-no-component, and what the backend raises when its runtime is missing or refuses the artifact.
        """
        from edgeexport.bundle.artifacts import OpenArtifacts
        from edgeexport.session.inputs import Inputs
        from edgeexport.session.session import Session

        opened = OpenArtifacts(lambda name: (self.path, self.component(name)), threads)
        contract = self.preprocess()
        return Session(opened.decoder, Inputs(contract, opened.run, opened.close) if contract is not None else None)

    def preprocess(self) -> Preprocess | None:
        """The contract of pictures and sound; None for a model of text alone. Raises bundle-bad-preprocess."""
        from edgeexport.session import preprocess

        if self.manifest.preprocess is None:
            return None
        name = self.manifest.preprocess
        return preprocess.from_json(self.read(name, preprocess.MAX_BYTES), self.path / name)

    def component(self, name: str) -> Component:
        """A component whose files are there. Raises bundle-no-component, bundle-file-missing, bundle-file-changed."""
        component = self.manifest.component(name)
        if component is None:
            raise errors.bundle_no_component(self.path, name, [each.name for each in self.manifest.components])
        for file in component.files:
            self.check(file)
        return component

    def open(self, name: str) -> FileIO:
        """A file of the bundle: listed in the manifest, of the size that is listed, a plain file, and no link out of
        the folder. Every reader of ours opens files here; runtimes, which open by path, get those of `component`.

        Raises bundle-bad-manifest, bundle-file-missing, bundle-unsafe-path, bundle-file-changed.
        """
        entry = self.manifest.files.get(name)
        if entry is None:
            raise errors.bundle_bad_manifest(self.path / FILE, f"it does not list {name}")
        return open_listed(self.path, name, entry)

    def read(self, name: str, limit: int) -> bytes:
        """All of a file, which may have `limit` bytes. Raises as `open` does."""
        with self.open(name) as file:
            size = self.manifest.files[name].size
            if size > limit:
                problem = f"it has {size} bytes, and none that is built has more than {limit}"
                raise errors.bundle_file_changed(self.path, name, problem)
            try:
                return read_all(file)
            except OSError as error:
                problem = f"it cannot be read: {error.strerror}"
                raise errors.bundle_file_changed(self.path, name, problem) from error

    def check(self, name: str) -> None:
        """Raises as `open` does."""
        self.open(name).close()

    def tokenizer(self) -> Tokenizer:
        """Raises tokenizer-unusable."""
        from edgeexport.session.library import MAX_TOKENIZER_BYTES
        from edgeexport.session.tokenizer import Tokenizer

        if TOKENIZER not in self.manifest.files:
            raise errors.tokenizer_unusable(self.path / TOKENIZER, "the manifest does not list it")
        return Tokenizer(self.read(TOKENIZER, MAX_TOKENIZER_BYTES), self.path / TOKENIZER)

    def chat_template(self) -> ChatTemplate:
        """Raises chat-template-missing, chat-template-failed."""
        from edgeexport.session.chat import ChatTemplate

        if CHAT_TEMPLATE not in self.manifest.files:
            raise errors.chat_template_missing(self.path)
        try:
            source = self.read(CHAT_TEMPLATE, MAX_TEMPLATE_BYTES).decode("utf-8")
        except UnicodeDecodeError as error:
            raise errors.chat_template_failed(f"it is not UTF-8 text: {error}") from error
        return ChatTemplate(source, self.manifest.text.special_tokens if self.manifest.text is not None else {})


def open_bundle(path: Path | str) -> Bundle:
    """Open the bundle in a folder. Checks the manifest and the sizes of the files that every use needs, but no hash:
    `verify` does that. An encoder's files are looked at when it is opened.

    Raises bundle-not-found, bundle-bad-manifest, bundle-too-new, bundle-file-missing, bundle-file-changed,
    bundle-unsafe-path.
    """
    folder = Path(path)
    manifest = manifests.from_json(read_manifest(folder), folder / FILE)
    apart = {each.name for each in manifest.components} - {DECODER, EMBED}
    for name, entry in manifest.files.items():
        if not (name.startswith("golden/") or name.split(".")[0] in apart):
            open_listed(folder, name, entry).close()
    return Bundle(folder, manifest)


def read_manifest(folder: Path) -> bytes:
    """The bytes of manifest.json. Raises bundle-not-found, bundle-bad-manifest, bundle-unsafe-path."""
    try:
        with open_plain(located(folder, FILE)) as file:
            return file.read(manifests.MAX_BYTES + 1)
    except NotPlain as error:
        raise errors.bundle_unsafe_path(folder, FILE, error.problem) from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise errors.bundle_not_found(folder) from error
    except OSError as error:
        raise errors.bundle_bad_manifest(folder / FILE, f"it cannot be read: {error.strerror}") from error


def open_listed(folder: Path, name: str, entry: manifests.FileEntry) -> FileIO:
    """The door to a bundle's files: the file `name`, open, that is what its entry promises, hash apart. Links are
    followed into the cache of the Hugging Face hub alone (plainfile.py).

    Raises bundle-file-missing, bundle-unsafe-path, bundle-file-changed.
    """
    try:
        file = open_plain(located(folder, name))
    except NotPlain as error:
        refused = Path(error.filename)
        part = refused.relative_to(folder).as_posix() if refused.is_relative_to(folder) else name
        raise errors.bundle_unsafe_path(folder, part, error.problem) from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise errors.bundle_file_missing(folder, name) from error
    except OSError as error:
        raise errors.bundle_file_changed(folder, name, f"it cannot be read: {error.strerror}") from error
    size = os.fstat(file.fileno()).st_size
    if size != entry.size:
        file.close()
        raise errors.bundle_file_changed(folder, name, f"its size is {size} bytes, the manifest says {entry.size}")
    return file
