"""preprocess.json: what must happen to pictures, sound and prompts before the model sees them."""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

from edgeexport import errors
from edgeexport.session.audio import AudioContract
from edgeexport.session.image_contract import PatchContract, PixelContract

SCHEMA: Final = "edgeexport.preprocess/1"
FILE = "preprocess.json"
MAX_BYTES = 1 << 20

TokenId = Annotated[int, Meta(ge=0, le=2**31)]


class Preprocess(Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file.

    `joining` says how features meet the text: spliced into the embeddings where the prompt has `image_token_id`, one
    for each feature, or attended to by every token through the component `fusion`. `image_ids` are the tokens
    that stand for one picture, its placeholder once among them. `position_rows` is 3 for M-RoPE.
    """

    image: PatchContract | PixelContract | None = None
    audio: AudioContract | None = None
    joining: Literal["splice", "attend"] = "splice"
    image_token_id: TokenId | None = None
    image_ids: tuple[TokenId, ...] = ()
    position_rows: Literal[1, 3] = 1
    schema: Literal["edgeexport.preprocess/1"] = SCHEMA

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of patches that pictures may have: one variant of `vision` each."""
        return self.image.grids if isinstance(self.image, PatchContract) else ()


def to_json(contract: Preprocess) -> bytes:
    """The one text of this contract."""
    return msgspec.json.format(msgspec.json.encode(contract, order="deterministic"), indent=1) + b"\n"


def from_json(data: bytes, where: object = FILE) -> Preprocess:
    """Read a contract that anyone may have written. Raises: BundleError `bundle-bad-preprocess`."""
    if len(data) > MAX_BYTES:
        raise errors.bundle_bad_preprocess(where, f"it has {len(data)} bytes, more than {MAX_BYTES}")
    try:
        return msgspec.json.decode(data, type=Preprocess)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise errors.bundle_bad_preprocess(where, str(error)[:400]) from error
