"""How the adaptor (alignment and fusion) learns between frozen towers and a frozen decoder, in three stages.

1. `meaning`: the fusion learns to tell the decoder a word, through the decoder, from a code of that word in the shared
   space (one vector a word, the same for what is seen and for what is heard) instead of features. There are few words,
   so this needs few of the expensive steps.
2. `aligning`: the alignments learn to give what the fusion's tokens find in a tower's features the direction of the
   word's code. No decoder takes part.
3. `together`: both learn on, through the decoder, from real features. Every other step goes through the decoder as
   4-bit weights make it: an adaptor that knows only the precise one speaks too softly for the rounded one (it had 56
   instead of 97 of 100 digits right).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeexport.families.autoglm_phone.data import SCENES, TASKS, WORDS, Item, Split, draw_items
from edgeexport.families.autoglm_phone.features import Features
from edgeexport.families.autoglm_phone.model import AutoGLMPhone
from edgeexport.families.autoglm_phone.prompts import IGNORED, Prompts

LABELS = (*WORDS, *SCENES.values())
SHARPNESS = 1 / 24
"""Turns a product of two vectors of length sqrt(512) into a logit: 21 where they agree."""
NOISE = 0.5
"""Standard deviation of what is added to a word's code in the first stage, where each coordinate is about 1."""
DROPPED = 0.1
"""Part of a tower's features that is left out in training."""
CLOSED = -2.0
"""The gates' bias at the start: a tenth of what is found is let in."""


@dataclass(frozen=True)
class Group:
    """Items of one task, with the features float32 [B, M, align_dim] that their tokens attend to."""

    items: Sequence[Item]
    features: torch.Tensor


class Learner(nn.Module):
    """The model, of which alignment and fusion are trained, and the words' codes.

    `rounded` is the decoder with its weights as a scheme stores them; it takes the decoder's place while `coarse` is
    set.
    """

    def __init__(self, model: AutoGLMPhone, rounded: Any, prompts: Prompts) -> None:
        super().__init__()
        self.align, self.fusion = model.align, model.fusion
        self.prompts, self.config = prompts, model.config
        # in a tuple, so that they are not saved with the learner
        self._frozen = (model.decoder.requires_grad_(False), rounded.requires_grad_(False))
        self.coarse = False
        self.codes = nn.Parameter(self._begin())

    def _begin(self) -> torch.Tensor:
        """Set the fusion so that what it finds comes back out as an embedding, and give each word its own as its code.

        The shared space is a random projection of the decoder's embeddings, and `output` its transpose: at the start, a
        token that finds a word's code mixes that word's embedding into itself.
        """
        with torch.no_grad():
            table = self._frozen[0].get_input_embeddings().weight
            into = nn.init.orthogonal_(torch.empty_like(self.fusion.query.weight))
            self.fusion.query.weight.copy_(into)
            self.fusion.query.bias.zero_()
            words = [self.prompts.tokenizer.encode(f" {label}", add_special_tokens=False) for label in LABELS]
            inner = torch.stack([table[torch.tensor(ids)].mean(0) for ids in words]) @ into.T
            self.fusion.output.weight.copy_(into.T * inner.square().mean().sqrt())
            self.fusion.output.bias.zero_()
            self.fusion.gate.weight.mul_(0.2)
            self.fusion.gate.bias.fill_(CLOSED)
            return nn.functional.layer_norm(inner, inner.shape[-1:])

    def meaning(self, items: Sequence[Item]) -> torch.Tensor:
        """The first stage's loss: codes in place of features."""
        config = self.config
        groups = []
        for same in by_task(items):
            parts = []
            if same[0].picture is not None:
                labels = [item.picture.label for item in same if item.picture is not None]
                parts.append(self._as_features(labels, "image", config.vision_config.positions))
            if same[0].clip is not None:
                labels = [item.clip.label for item in same if item.clip is not None]
                parts.append(self._as_features(labels, "audio", config.audio_config.positions))
            groups.append(Group(same, torch.cat(parts, 1)))
        return nn.functional.cross_entropy(*self.answers(groups))

    def aligning(self, items: Sequence[Item], features: Features) -> torch.Tensor:
        """The second stage's loss."""
        losses = [self._aligning(same, features) for same in by_task(items)]
        return torch.stack(losses).mean()

    def together(self, items: Sequence[Item], features: Features) -> torch.Tensor:
        """The third stage's loss: cross-entropy of the answers' tokens."""
        groups = [Group(same, torch.cat(self.aligned(same, features), 1)) for same in by_task(items)]
        return nn.functional.cross_entropy(*self.answers(groups))

    def aligned(self, items: Sequence[Item], features: Features) -> list[torch.Tensor]:
        """Features of one task's items in the shared space: of their pictures, of their clips."""
        towers = zip(("image", "audio"), features.of(items), strict=True)
        return [self.align[name](self._thinned(given)) for name, given in towers if given is not None]

    def answers(self, groups: Sequence[Group]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [N, vocab] of all answers' tokens, in the items' order, and which those should be, [N]."""
        decoder = self._frozen[self.coarse]
        batches = [self.prompts.batch(group.items) for group in groups]
        longest = max(batch.ids.shape[1] for batch in batches)
        fused = [
            _padded(self.fusion(decoder.get_input_embeddings()(batch.ids), group.features), longest, 0.0)
            for batch, group in zip(batches, groups, strict=True)
        ]
        labels = torch.cat([_padded(batch.labels[..., None], longest, IGNORED)[..., 0] for batch in batches])
        hidden = decoder.model(inputs_embeds=torch.cat(fused), use_cache=False).last_hidden_state
        answered = labels != IGNORED
        return decoder.lm_head(hidden[answered]), labels[answered]

    def _aligning(self, items: Sequence[Item], features: Features) -> torch.Tensor:
        (aligned,) = self.aligned(items, features)
        ids = self.prompts.batch(items).ids
        found = self.fusion.find(self._frozen[0].get_input_embeddings()(ids), aligned)[1][:, 1:]
        wanted = torch.tensor([LABELS.index(item.answer) for item in items])
        codes = nn.functional.layer_norm(self.codes, self.codes.shape[-1:]).detach()
        logits = found @ codes.T * SHARPNESS
        distance = (found - codes[wanted][:, None]).square().mean()
        return nn.functional.cross_entropy(logits.flatten(0, 1), wanted.repeat_interleave(logits.shape[1])) + distance

    def _as_features(self, labels: Sequence[str], name: str, positions: int) -> torch.Tensor:
        """Words' codes in place of features: noise on each feature, and on all of an item together."""
        codes = self.codes[torch.tensor([LABELS.index(label) for label in labels])][:, None]
        codes = nn.functional.layer_norm(codes, codes.shape[-1:]).expand(-1, positions, -1)
        noise = NOISE * (torch.randn_like(codes) + torch.randn_like(codes[:, :1]))
        features: torch.Tensor = codes + noise + self.align[name].position
        return features

    def _thinned(self, features: torch.Tensor) -> torch.Tensor:
        """Whole features set to zero at random while training."""
        if not self.training:
            return features
        kept = torch.rand(features.shape[:2]) >= DROPPED
        return features * kept[..., None]


def _padded(rows: torch.Tensor, length: int, value: float) -> torch.Tensor:
    """[B, T, N] -> [B, length, N], filled at the end: what comes later changes no causal logits."""
    return nn.functional.pad(rows, (0, 0, 0, length - rows.shape[1]), value=value)


def by_task(items: Sequence[Item]) -> list[list[Item]]:
    """The items in groups of one task, in the order of TASKS."""
    groups = ([item for item in items if item.task == task] for task in TASKS)
    return [group for group in groups if group]


def draw(data: Split, each: int, generator: np.random.Generator, *, joint: bool) -> list[Item]:
    """The items of a step: so many of each task, the joint one among them with `joint`."""
    tasks = TASKS if joint else TASKS[:-1]
    return [item for task in tasks for item in draw_items(data, task, each, generator)]
