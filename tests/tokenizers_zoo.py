"""Small tokenizers of each kind that the families have, trained here, and 2,000 lines of every sort of text."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CORPUS = (
    "def encode(text: str) -> list[int]:\n    return [ord(char) for char in text]  # one each",
    "The quick brown fox doesn't jump over 1234567890 lazy dogs; it's sleeping, they've said.",
    "Größe, Straße und Fußgängerübergänge im Überblick: äöüß ÄÖÜ",
    "你好，世界。今天天气很好，我们去公园散步吧！ 日本語のテキスト と 한국어 문장",
    "😀😃 👩‍👩‍👧‍👦 🇫🇷 naïve café résumé e\u0301 n\u0303 — “quotes” … ¿Qué?",
    '{\'a\': [1, 2.5, null], "b": {"c": true}}\t\tif (x <= y && z != 0) { return; }',
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "[gMASK]", "<sop>", "<s>", "</s>", "<unk>", "<think>")
FRAGMENTS = (
    *CORPUS, *SPECIAL,
    *("Hello", " ", "  ", "   \t", "\n", "\n\n\n", "\r\n", "world", "don't", "I'LL", "123", "3.14159", "1,000,000"),
    *("中文", "字符", "東京", "ÄÖ", "ß", "\ufb01", "\u0130", "e\u0301\u0323", "\u0323\u0301", "\u1100\u1161", "각"),
    *("\u0663\u0664", "\u2167", "\u212b", "\ufeff", "\u00a0", "\u200d", "\u200b", "\u0000", "\ufffd"),
    *("😀", "👍\U0001f3fd", "🏴\U000e0067\U000e007f", "▁", "▁▁a", "Ġ", "<0x41>", "the", " the", "ing", "$", "^"),
    *("user", "assistant", "system", "<|im_start", "|>", "<", ">", "im_end", "[", "]", "def ", "return", "_", "__x__"),
)  # fmt: skip
TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def lines(count: int = 2_000, seed: int = 17) -> list[str]:
    """Code, Chinese, German, emoji, runs of white space, special tokens within text, digits, combining marks."""
    dice = random.Random(seed)
    return ["".join(dice.choice(FRAGMENTS) for _ in range(dice.randint(1, 9))) for _ in range(count)]


def conversations(count: int = 30) -> list[list[dict[str, str]]]:
    """Messages whose contents are of the lines."""
    texts = lines(3 * count, 4)
    roles = ("system", "user", "assistant")
    return [
        [{"role": role, "content": text} for role, text in zip(roles[turn % 2 :], texts[3 * turn :], strict=False)]
        for turn in range(count)
    ]


def _byte_level(split: str | None, special: Sequence[str], *, nfc: bool = False, whole: bool = False) -> dict[str, Any]:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(ignore_merges=whole))
    if nfc:
        made.normalizer = normalizers.NFC()
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    made.pre_tokenizer = (
        level if split is None else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), level])
    )
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    found: dict[str, Any] = json.loads(made.to_str())
    return found


CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def gpt2() -> dict[str, Any]:
    return _byte_level(None, ["<|endoftext|>"])


def llama3() -> dict[str, Any]:
    made = _byte_level(
        rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}", ["<s>", "</s>"], whole=True
    )
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    number = next(token["id"] for token in made["added_tokens"] if token["content"] == "<s>")
    made["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [number], "tokens": ["<s>"]}},
    }
    return made


def qwen2() -> dict[str, Any]:
    split = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{REST}"
    return _byte_level(split, ["<|endoftext|>"], nfc=True)


def glm4() -> dict[str, Any]:
    split = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}"
    return _byte_level(split, ["<|endoftext|>", "[gMASK]", "<sop>"])


def llama2() -> dict[str, Any]:
    """A BPE of SentencePiece: words with a leading mark, unknown characters as runs of `<0xXX>` tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learner.train_from_iterator(
        [word for text in CORPUS[:3] for word in text.split()],
        trainers.BpeTrainer(vocab_size=160, show_progress=False),
    )
    learnt = json.loads(learner.to_str())["model"]
    pieces = [*("<unk>", "<s>", "</s>"), *(f"<0x{byte:02X}>" for byte in range(256)), *learnt["vocab"]]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    made = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[tuple(pair) for pair in learnt["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    made.normalizer = learner.normalizer
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    found: dict[str, Any] = json.loads(made.to_str())
    return found


KINDS = {"gpt2": gpt2, "llama3": llama3, "qwen2": qwen2, "glm4": glm4, "llama2": llama2}
"""Each kind of tokenizer by the name of the model that has it."""

CUT_AND_PADDED: dict[str, Any] = {
    "truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        "strategy": {"Fixed": 10**9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "a",
    },
}
"""Sections of a tokenizer.json that leave a text a token, and a billion of padding."""

SERVER = """
import os, runpy, sys
sys.modules["torch"] = None
from transformers import AutoConfig, AutoTokenizer, GPT2Tokenizer, LlamaTokenizer, Qwen2Tokenizer
from pathlib import Path
main = runpy.run_path(sys.argv[1])["main"]
for line in sys.stdin:
    child = os.fork()
    if not child:
        try:
            os.dup2(2, 1)  # the library prints remarks there
            main(Path(line.rstrip()))
        finally:
            os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@contextmanager
def asking() -> Iterator[Callable[[Path], int]]:
    """A stand-in for `resolved.ask`: the same program, forked from one that has imported what it needs."""
    from edgeexport.checkpoint import auto_tokenizer

    command = [sys.executable, "-P", "-c", SERVER, auto_tokenizer.__file__]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        asks, answers = process.stdin, process.stdout
        assert asks is not None and answers is not None

        def ask(place: Path) -> int:
            print(place, file=asks, flush=True)
            return int(answers.readline())

        yield ask
        asks.close()
