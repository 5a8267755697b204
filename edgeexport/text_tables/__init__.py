"""What a loader without a regex engine and without Jinja reads in a bundle's tokenizer/, beside its other files."""

from __future__ import annotations


class Unsupported(Exception):
    """A tokenizer or a chat template that these tables cannot hold: `part` of it is `kind`."""

    def __init__(self, part: str, kind: str) -> None:
        super().__init__(f"{part} {kind}")
        self.part, self.kind = part, kind
