"""An opened bundle: its manifest, its session, its tokenizer, its chat template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeexport import errors
from edgeexport.bundle import manifest as manifests
from edgeexport.bundle.files import linked_part, unsafe_kind
from edgeexport.bundle.manifest import FILE, Component, Manifest

if TYPE_CHECKING:
    from edgeexport.session.chat import ChatTemplate
    from edgeexport.session.preprocess import Preprocess
    from edgeexport.session.session import Session
    from edgeexport.session.tokenizer import Tokenizer

DECODER, EMBED = "decoder", "embed"
TOKENIZER = "tokenizer/tokenizer.json"
CHAT_TEMPLATE = "tokenizer/chat_template.jinja"


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
        place = self.path / self.manifest.preprocess
        return preprocess.from_json(place.read_bytes(), place)

    def component(self, name: str) -> Component:
        """A component whose files are there. Raises bundle-no-component, bundle-file-missing, bundle-file-changed."""
        component = self.manifest.component(name)
        if component is None:
            raise errors.bundle_no_component(self.path, name, [each.name for each in self.manifest.components])
        for file in component.files:
            self.check(file)
        return component

    def check(self, file: str) -> None:
        """Raises bundle-file-missing, bundle-unsafe-path, bundle-file-changed."""
        check_size(self.path, file, self.manifest.files[file])

    def tokenizer(self) -> Tokenizer:
        """Raises tokenizer-unusable."""
        from edgeexport.session.tokenizer import Tokenizer

        if TOKENIZER not in self.manifest.files:
            raise errors.tokenizer_unusable(self.path / TOKENIZER, "the manifest does not list it")
        return Tokenizer.from_file(self.path / TOKENIZER)

    def chat_template(self) -> ChatTemplate:
        """Raises chat-template-missing, chat-template-failed."""
        from edgeexport.session.chat import ChatTemplate

        if CHAT_TEMPLATE not in self.manifest.files:
            raise errors.chat_template_missing(self.path)
        try:
            source = (self.path / CHAT_TEMPLATE).read_text(encoding="utf-8")
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
            check_size(folder, name, entry)
    return Bundle(folder, manifest)


def read_manifest(folder: Path) -> bytes:
    """The bytes of manifest.json. Raises bundle-not-found, bundle-bad-manifest, bundle-unsafe-path."""
    place = folder / FILE
    if not place.is_file():
        raise errors.bundle_not_found(folder)
    if place.is_symlink():
        raise errors.bundle_unsafe_path(folder, FILE, "it is a symbolic link")
    with place.open("rb") as file:
        return file.read(manifests.MAX_BYTES + 1)


def check_size(folder: Path, name: str, entry: manifests.FileEntry) -> None:
    """Raises bundle-file-missing, bundle-unsafe-path, bundle-file-changed."""
    linked = linked_part(folder, name)
    if linked is not None:
        raise errors.bundle_unsafe_path(folder, linked, "it is a symbolic link")
    try:
        found = (folder / name).lstat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise errors.bundle_file_missing(folder, name) from error
    kind = unsafe_kind(found.st_mode)
    if kind is not None:
        raise errors.bundle_unsafe_path(folder, name, kind)
    if found.st_size != entry.size:
        raise errors.bundle_file_changed(
            folder, name, f"its size is {found.st_size} bytes, the manifest says {entry.size}"
        )
