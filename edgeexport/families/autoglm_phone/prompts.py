"""The questions as token ids, rendered and cut exactly as a session does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from edgeexport.families.autoglm_phone.data import Item
from edgeexport.session.chat import ChatTemplate
from edgeexport.session.tokenizer import Tokenizer

END = "<|im_end|>"
IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Right-padded ids int64 [B, T]; `labels` [B, T] is what shall follow each id, or IGNORED."""

    ids: torch.Tensor
    labels: torch.Tensor


class Prompts:
    """Renders and tokenises items."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.tokenizer = Tokenizer(files["tokenizer.json"])
        self.template = ChatTemplate(files["chat_template.jinja"].decode(), {})

    def prompt(self, question: str) -> list[int]:
        """Ids up to where the answer begins."""
        text = self.template.render([{"role": "user", "content": question}])
        return self.tokenizer.encode(text, add_special_tokens=False)

    def batch(self, items: Sequence[Item]) -> Batch:
        """Question, answer and end of each item."""
        ids, labels = [], []
        for item in items:
            prompt = self.prompt(item.question)
            answer = self.tokenizer.encode(item.answer + END, add_special_tokens=False)
            ids.append(prompt + answer[:-1])
            labels.append([IGNORED] * (len(prompt) - 1) + answer)
        longest = max(map(len, ids))
        return Batch(
            torch.tensor([row + [0] * (longest - len(row)) for row in ids]),
            torch.tensor([row + [IGNORED] * (longest - len(row)) for row in labels]),
        )
