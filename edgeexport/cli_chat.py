"""`edgeexport run`: one answer, or a chat at the terminal, about pictures and sounds where the model takes them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeexport import errors
from edgeexport.bundle import open_bundle
from edgeexport.console import Console
from edgeexport.session.generate import Sampling, generate
from edgeexport.units import format_number, format_seconds

if TYPE_CHECKING:
    from edgeexport.bundle import Bundle
    from edgeexport.core import Finding
    from edgeexport.session.inputs import Features
    from edgeexport.session.session import Session


@dataclass(frozen=True)
class Settings:
    """The options of the command. `threads` None means all cores."""

    system: str | None
    raw: bool
    max_tokens: int
    temperature: float
    seed: int
    threads: int | None
    frequency_penalty: float = 0.0


@dataclass(frozen=True)
class Shown:
    """What the first turn comes with, and what becomes of its answer. `action` reads it as an action on the first
    picture, which `draw` then marks."""

    images: tuple[Path, ...] = ()
    sounds: tuple[Path, ...] = ()
    action: bool = False
    draw: Path | None = None


@dataclass(frozen=True)
class Answer:
    """One answer. Token ids without the stop token; seconds to the first token (prefill included) and for the rest.

    `finish_reason` is "stop", "length", "context", or "interrupted" when the user ended it.
    """

    prompt_tokens: list[int]
    tokens: list[int]
    text: str
    finish_reason: str
    first_token_seconds: float
    decode_seconds: float
    remarks: tuple[Finding, ...] = ()
    """What the model did not see or hear of the pictures and sounds of this turn."""

    @property
    def tokens_per_second(self) -> float | None:
        """Speed after the first token; None for answers of one token."""
        return (len(self.tokens) - 1) / self.decode_seconds if len(self.tokens) > 1 and self.decode_seconds else None


def run(console: Console, path: Path, prompt: str | None, settings: Settings, shown: Shown = Shown()) -> None:
    """Answer the prompt once, or chat until the input ends; pictures and sounds go to the first turn.

    Raises: UsageError `json-needs-prompt`, `action-needs-picture`, and what opening a bundle, its session, a picture
    and a sound, and drawing raise.
    """
    if prompt is None and (console.as_json or shown.action):
        raise errors.json_needs_prompt()
    if (shown.action and not shown.images) or (shown.draw is not None and not shown.action):
        raise errors.action_needs_picture()
    if shown.draw is not None:
        from edgeexport.session.draw import check_out

        check_out(shown.draw)  # before the model runs for minutes
    bundle = open_bundle(path)
    if bundle.stand_in:
        console.say(f"Answers are {bundle.stand_in}.")
    if not settings.raw:
        bundle.chat_template().warm()
    with bundle.session(threads=settings.threads) as session:
        conversation = Conversation(bundle, session, settings)
        with console.step("Looking and listening") if shown.images or shown.sounds else nullcontext():
            features = [session.encode_image(image) for image in shown.images]
            features += [session.encode_audio(sound) for sound in shown.sounds]
        for remark in (remark for each in features for remark in each.remarks):
            console.finding(remark)
        if prompt is None:
            _chat(console, conversation, features)
            return
        answer = conversation.answer(prompt, console, features, interruptible=False, silent=shown.action)
        if shown.action:
            _act(console, bundle, answer, shown)
        else:
            console.result("")
            console.json(_document(bundle, answer))
        console.say(_speed(answer))


def _act(console: Console, bundle: Bundle, answer: Answer, shown: Shown) -> None:
    """Print the answer's action as JSON with the pixels of the first picture, and draw it where that was asked."""
    from edgeexport.session.actions import parse_action, split_answer, to_json
    from edgeexport.session.draw import draw
    from edgeexport.session.image_file import read_image

    picture = read_image(shown.images[0])
    thought = split_answer(answer.text)
    action = parse_action(thought.answer)
    if shown.draw is not None:
        draw(picture.array, action, shown.draw)
    document = {
        "think": thought.think,
        "complete": thought.complete,
        "action": to_json(action, (picture.width, picture.height)),
    }
    if console.as_json:
        console.json({**_document(bundle, answer), **document})
    else:
        console.result(json.dumps(document, indent=2, ensure_ascii=False))


class Conversation:
    """Messages so far and the tokens that the session's cache holds. What a new turn shares with the cache is kept."""

    def __init__(self, bundle: Bundle, session: Session, settings: Settings) -> None:
        self.session = session
        self.settings = settings
        self._tokenizer = bundle.tokenizer()
        self._template = None if settings.raw else bundle.chat_template()
        self._stop_ids = bundle.stop_ids
        self._messages = [{"role": "system", "content": settings.system}] if settings.system else []
        self._cached: list[int] = []
        self._features: list[Features] = []

    def answer(
        self,
        text: str,
        console: Console,
        features: Sequence[Features] = (),
        *,
        interruptible: bool,
        silent: bool = False,
    ) -> Answer:
        """Answer one turn, streaming to the console unless `silent`. With `interruptible`, Ctrl-C ends the answer and
        keeps it. `features` are of the pictures and sounds that come with the turn."""
        self._features += features
        prompt = self._prompt(text, features)
        # at least one token is fed again: the logits of the last one are needed
        shared = max(min(_common(prompt, self._cached), len(prompt) - 1), 0)
        shared, waiting = self._unseen(prompt, shared, fresh=bool(features))
        self.session.truncate(shared)
        stream = self._tokenizer.stream()
        tokens: list[int] = []
        pieces: list[str] = []
        start = first = time.perf_counter()
        generation = generate(
            self.session,
            prompt[shared:],
            features=waiting,
            max_tokens=self.settings.max_tokens,
            stop_ids=self._stop_ids,
            sampling=Sampling(
                temperature=self.settings.temperature,
                frequency_penalty=self.settings.frequency_penalty,
                seed=self.settings.seed,
            ),
        )
        interrupted = False
        try:
            for token in generation:
                if not tokens:
                    first = time.perf_counter()
                tokens.append(token)
                pieces.append(stream.push(token))
                if not silent:
                    console.stream(pieces[-1])
        except KeyboardInterrupt:
            if not interruptible:
                raise
            console.stop = None
            interrupted = True
        end = time.perf_counter()
        pieces.append(stream.flush())
        if not silent:
            console.stream(pieces[-1])
        self._cached = [*prompt, *tokens][: self.session.position]
        self._messages.append({"role": "assistant", "content": "".join(pieces)})
        reason = "interrupted" if interrupted else str(generation.finish_reason)
        remarks = tuple(remark for each in features for remark in each.remarks)
        return Answer(prompt, tokens, "".join(pieces), reason, (first if tokens else end) - start, end - first, remarks)

    def _prompt(self, text: str, features: Sequence[Features]) -> list[int]:
        """The whole conversation's tokens, each picture's placeholder repeated once per feature."""
        inputs = self.session.inputs
        pictures = sum(each.component == "vision" for each in features)
        spliced = inputs is not None and inputs.contract.joining == "splice"
        if self._template is None:
            tokens = self._tokenizer.encode(text)
            if inputs is not None and spliced:
                tokens = [*inputs.contract.image_ids * pictures, *tokens]
        else:
            content: Any = text
            if spliced and pictures:
                content = [*[{"type": "image"}] * pictures, {"type": "text", "text": text}]
            self._messages.append({"role": "user", "content": content})
            rendered = self._template.render(self._messages, add_generation_prompt=True)
            tokens = self._tokenizer.encode(rendered, add_special_tokens=False)
        return inputs.expand(tokens, self._features) if inputs is not None else tokens

    def _unseen(self, prompt: list[int], shared: int, *, fresh: bool) -> tuple[int, list[Features]]:
        """(how many tokens of the cache can be kept, the features of pictures and sounds behind them): a picture is
        kept whole or not at all."""
        inputs = self.session.inputs
        if inputs is None or inputs.contract.joining != "splice":
            # every token attends to every feature: with new ones, the whole conversation is read anew
            return (0, self._features) if fresh or not shared else (shared, [])
        token = inputs.contract.image_token_id
        places = [i for i, each in enumerate(prompt) if each == token]
        seen, wanted = 0, sum(len(picture.values) for picture in self._features)
        if wanted > len(places):
            raise errors.image_tokens_mismatch(len(places), wanted)
        for k, picture in enumerate(self._features):
            first, last = places[seen], places[seen + len(picture.values) - 1]
            if last >= shared:
                return min(shared, first), self._features[k:]
            seen += len(picture.values)
        return shared, []


def _chat(console: Console, conversation: Conversation, features: Sequence[Features]) -> None:
    console.say("Ctrl-C ends an answer, Ctrl-D the chat.")
    while True:
        try:
            text = console.ask("> ")
        except KeyboardInterrupt:
            console.stop = None
            console.say("")
            continue
        if text is None:
            return
        if not text.strip():
            continue
        answer = conversation.answer(text, console, features, interruptible=True)
        features = ()
        console.result("")
        if answer.finish_reason == "context":
            console.say("The context is full: start anew, or build with a larger --context.")
        console.say(_speed(answer))


def _common(left: list[int], right: list[int]) -> int:
    """How many tokens both begin with."""
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))


def _speed(answer: Answer) -> str:
    speed = answer.tokens_per_second
    rate = f", then {format_number(speed)} tok/s" if speed else ""
    return (
        f"{len(answer.prompt_tokens)} + {len(answer.tokens)} tokens, first after "
        f"{format_seconds(answer.first_token_seconds)}{rate} ({answer.finish_reason})"
    )


def _document(bundle: Bundle, answer: Answer) -> dict[str, Any]:
    return {
        "bundle": bundle.path,
        "prompt_token_ids": answer.prompt_tokens,
        "token_ids": answer.tokens,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "remarks": answer.remarks,
        "timings": {
            "first_token_seconds": answer.first_token_seconds,
            "decode_seconds": answer.decode_seconds,
            "decode_tokens_per_second": answer.tokens_per_second,
        },
    }
