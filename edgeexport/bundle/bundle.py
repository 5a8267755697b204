"""An opened bundle: its manifest, its session, its tokenizer, its chat template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeexport import errors
from edgeexport.bundle import manifest as manifests
from edgeexport.bundle.files import linked_part, unsafe_kind
from edgeexport.bundle.manifest import FILE, Manifest

if TYPE_CHECKING:
    from edgeexport.session.chat import ChatTemplate
    from edgeexport.session.session import Session
    from edgeexport.session.tokenizer import Tokenizer

DECODER = "decoder"
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

    def session(self, threads: int | None = None) -> Session:
        """Open the decoder; no other component's files are touched. `threads`: None lets the runtime choose.

        Raises bundle-no-component, and what the backend raises when its runtime is missing or refuses the artifact.
        """
        from edgeexport.backends import load_runner
        from edgeexport.session.session import Session

        component = self.manifest.component(DECODER)
        if component is None:
            raise errors.bundle_no_component(self.path, DECODER, [each.name for each in self.manifest.components])
        runner = load_runner(component.backend).open_decoder(self.path, component, threads=threads)
        return Session(runner)

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
    """Open the bundle in a folder. Checks the manifest and every file's size, but no hash: `verify` does that.

    Raises bundle-not-found, bundle-bad-manifest, bundle-too-new, bundle-file-missing, bundle-file-changed,
    bundle-unsafe-path.
    """
    folder = Path(path)
    manifest = manifests.from_json(read_manifest(folder), folder / FILE)
    for name, entry in manifest.files.items():
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
