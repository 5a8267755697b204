"""Run a bundle through the C++ adapter and through the runner, and print how far apart they are.

    python compare.py LIBRARY BUNDLE

A process of its own: MNN's library must be loaded so that the adapter finds its symbols there.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.setdlopenflags(os.RTLD_GLOBAL | os.RTLD_LAZY)
import _mnncengine  # noqa: E402, F401

from edgeexport.backends import mnn_runner  # noqa: E402
from edgeexport.bundle.bundle import open_bundle  # noqa: E402

PIECES = (5, 1, 1, 3)


def main(library_file: str, folder: Path) -> dict[str, float]:
    """The largest difference of each component's outputs."""
    library, bundle = ctypes.CDLL(library_file), open_bundle(folder)
    library.failure.restype = ctypes.c_char_p
    rng, found = np.random.default_rng(0), {}

    def call(function: Any, *arguments: Any) -> int:
        code = int(function(*[each.ctypes.data_as(ctypes.c_void_p) if hasattr(each, "ctypes") else each
                              for each in arguments]))  # fmt: skip
        assert code >= 0, library.failure().decode()
        return code

    vocab = call(library.open_decoder, str(folder).encode())
    component = bundle.component("decoder")
    runner = mnn_runner.open_decoder(folder, component, threads=1)
    names = [spec.name for spec in component.signatures[0].inputs]
    embeds = "inputs_embeds" in names
    width = int(component.signatures[0].inputs[0].shape[-1]) if embeds else 0
    for start, count in ((0, PIECES[0]), (5, 1), (6, 1), (4, PIECES[3])):  # the last goes back in the cache
        ids = rng.integers(0, vocab, count)
        fed = rng.standard_normal((count, width), np.float32) if embeds else ids
        rope = rng.integers(0, 20, (3, count)) if "rope_positions" in names else None
        logits = np.zeros(vocab, np.float32)
        call(library.step, ids.astype(np.int32), fed if embeds else None, rope, count, start, logits)
        apart = float(np.abs(logits - runner.step(fed, start, rope)).max())
        found["decoder"] = max(found.get("decoder", 0), apart)
    for each in bundle.manifest.components:
        for signature in each.signatures if each.name != "decoder" else ():
            (given,), (made,) = signature.inputs, signature.outputs
            whole = given.dtype == "int64"
            shape = [size if isinstance(size, int) else 6 for size in given.shape]
            data = rng.integers(0, vocab, shape) if whole else rng.standard_normal(shape, np.float32)
            variant = "" if signature.name == "step" else signature.name
            graph = mnn_runner.open_graph(folder, each, variant)
            want = graph.run({given.name: data})[made.name]
            graph.close()
            out = np.zeros(want.shape, np.float32)
            text = (each.name.encode(), variant.encode(), given.name.encode(), int(whole))
            call(library.run_graph, *text, np.array(shape), len(shape), data, out, out.size)
            found[f"{each.name} {variant}".strip()] = float(np.abs(out - want).max())
            assert np.abs(want).max() > 0
    library.close_decoder()
    runner.close()
    return found


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
