"""`edgeexport run`: one answer, or a chat at the terminal."""

from __future__ import annotations

import time
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

    @property
    def tokens_per_second(self) -> float | None:
        """Speed after the first token; None for answers of one token."""
        return (len(self.tokens) - 1) / self.decode_seconds if len(self.tokens) > 1 and self.decode_seconds else None


def run(console: Console, path: Path, prompt: str | None, settings: Settings) -> None:
    """Answer the prompt once, or chat until the input ends.

    Raises: UsageError `json-needs-prompt`, and what opening a bundle and its session raise.
    """
    if prompt is None and console.as_json:
        raise errors.json_needs_prompt()
    bundle = open_bundle(path)
    with bundle.session(threads=settings.threads) as session:
        conversation = Conversation(bundle, session, settings)
        if prompt is None:
            _chat(console, conversation)
            return
        answer = conversation.answer(prompt, console, interruptible=False)
        console.result("")
        console.json(_document(bundle, answer))
        console.say(_speed(answer))


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

    def answer(self, text: str, console: Console, *, interruptible: bool) -> Answer:
        """Answer one turn, streaming to the console. With `interruptible`, Ctrl-C ends the answer and keeps it."""
        prompt = self._prompt(text)
        # at least one token is fed again: the logits of the last one are needed
        shared = max(min(_common(prompt, self._cached), len(prompt) - 1), 0)
        self.session.truncate(shared)
        stream = self._tokenizer.stream()
        tokens: list[int] = []
        pieces: list[str] = []
        start = first = time.perf_counter()
        generation = generate(
            self.session,
            prompt[shared:],
            max_tokens=self.settings.max_tokens,
            stop_ids=self._stop_ids,
            sampling=Sampling(temperature=self.settings.temperature, seed=self.settings.seed),
        )
        interrupted = False
        try:
            for token in generation:
                if not tokens:
                    first = time.perf_counter()
                tokens.append(token)
                pieces.append(stream.push(token))
                console.stream(pieces[-1])
        except KeyboardInterrupt:
            if not interruptible:
                raise
            interrupted = True
        end = time.perf_counter()
        pieces.append(stream.flush())
        console.stream(pieces[-1])
        self._cached = [*prompt, *tokens][: self.session.position]
        self._messages.append({"role": "assistant", "content": "".join(pieces)})
        reason = "interrupted" if interrupted else str(generation.finish_reason)
        return Answer(prompt, tokens, "".join(pieces), reason, (first if tokens else end) - start, end - first)

    def _prompt(self, text: str) -> list[int]:
        if self._template is None:
            return self._tokenizer.encode(text)
        self._messages.append({"role": "user", "content": text})
        rendered = self._template.render(self._messages, add_generation_prompt=True)
        return self._tokenizer.encode(rendered, add_special_tokens=False)


def _chat(console: Console, conversation: Conversation) -> None:
    console.say("Ctrl-C ends an answer, Ctrl-D the chat.")
    while True:
        try:
            text = console.ask("> ")
        except KeyboardInterrupt:
            console.say("")
            continue
        if text is None:
            return
        if not text.strip():
            continue
        answer = conversation.answer(text, console, interruptible=True)
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
        "timings": {
            "first_token_seconds": answer.first_token_seconds,
            "decode_seconds": answer.decode_seconds,
            "decode_tokens_per_second": answer.tokens_per_second,
        },
    }
