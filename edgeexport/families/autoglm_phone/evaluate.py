"""Ask a bundle of mini the held-out questions: `python -m edgeexport.families.autoglm_phone.evaluate BUNDLE`.

Needs no torch: the bundle's own session prepares pictures and sound, and decodes greedily.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeexport.console import Console
from edgeexport.families.autoglm_phone.data import Item, accuracy, held_out_items, held_out_split, part_of
from edgeexport.session.generate import generate
from edgeexport.session.image_file import Image
from edgeexport.session.wav import Sound

if TYPE_CHECKING:
    from edgeexport.bundle import Bundle
    from edgeexport.session.inputs import Features
    from edgeexport.session.session import Session

MAX_TOKENS = 8
"""The longest answer, two words of one token and what joins them, has four."""


def main(
    bundle: Annotated[Path, typer.Argument(help="The folder of a bundle of autoglm-phone-mini.")],
    each: Annotated[int, typer.Option(min=0, help="Questions of each task; 0: all.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
) -> None:
    """Print the part of each task's held-out questions that the bundle answers right."""
    from edgeexport.bundle import open_bundle

    console = Console()
    items = part_of(held_out_items(held_out_split()), each)
    opened = open_bundle(bundle)
    with opened.session(threads=threads) as session, console.progress("Asking", len(items), "steps") as watch:
        ask = answerer(opened, session)
        asked = 0

        def answer(item: Item) -> str:
            nonlocal asked
            asked += 1
            watch(asked, len(items))
            return ask(item)

        figures = accuracy(items, answer)
    rows = [(task, str(sum(item.task == task for item in items)), f"{100 * figures[task]:.1f}") for task in figures]
    console.table(("task", "questions", "right, %"), rows, right=("questions", "right, %"))


def answerer(bundle: Bundle, session: Session) -> Callable[[Item], str]:
    """The bundle's answer to an item, as a conversation of its own. A picture or clip is encoded once."""
    tokenizer, template = bundle.tokenizer(), bundle.chat_template()
    seen: dict[object, Features] = {}

    def answer(item: Item) -> str:
        features = []
        if item.picture is not None:
            if item.picture not in seen:
                seen[item.picture] = session.encode_image(Image(item.picture.array))
            features.append(seen[item.picture])
        if item.clip is not None:
            if item.clip not in seen:
                seen[item.clip] = session.encode_audio(Sound(item.clip.samples, item.clip.rate))
            features.append(seen[item.clip])
        prompt = template.render([{"role": "user", "content": item.question}])
        tokens = tokenizer.encode(prompt, add_special_tokens=False)
        session.reset()
        ids = generate(session, tokens, features=features, max_tokens=MAX_TOKENS, stop_ids=bundle.stop_ids)
        return tokenizer.decode(list(ids))

    return answer


if __name__ == "__main__":
    typer.run(main)
