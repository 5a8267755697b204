"""What the ladder asks: ten short texts of different kinds, the same for every model."""

from __future__ import annotations

import numpy as np

from edgeexport.core import Array

TEXTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
    "List three primary colors:\n1.",
    "Question: What is 12 times 12?\nAnswer:",
    "北京是中国的首都，也是",
    "The quick brown fox jumps over the lazy dog. The dog then",
    "import numpy as np\n\nx = np.zeros((3, 4))\nprint(x.shape)  #",
    "Photosynthesis is the process by which plants use sunlight, water and carbon dioxide to",
)


def encode(tokenizer_json: bytes, vocab: int, context: int) -> list[Array]:
    """The texts as int64 token ids of this tokenizer, each at most a quarter of the context and never empty.

    Ids beyond the model's vocabulary (a tokenizer may be larger than its model) are left out.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json.decode("utf-8"))
    encoded = []
    for text in TEXTS:
        ids = [i for i in tokenizer.encode(text).ids if i < vocab][: max(1, context // 4)]
        encoded.append(np.array(ids or [0], np.int64))
    return encoded
