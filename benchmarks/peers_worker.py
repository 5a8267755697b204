"""One measurement in a process of its own: decode greedily with one engine, print JSON.

    python peers_worker.py llama-cpp|genai|edgeexport MODEL --threads 2 --prompt 64 --tokens 128
    python peers_worker.py folder FILE.gguf OUT      (a transformers folder of the GGUF, for genai's builder)

Runs in the engine's own virtual environment, so it imports numpy and that engine only. All engines get the same prompt
ids, keep one conversation, and are timed around what a caller must do per token: the step and the argmax. Each runs a
short warm-up first.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Result = dict[str, Any]


def prompt_ids(count: int, vocab: int) -> list[int]:
    """Ids spread over the vocabulary, always the same."""
    return [int(i) for i in (np.arange(count) * 7919 + 11) % vocab]


def timed(prefill: Callable[[], int], decode: Callable[[int], int], prompt: int, tokens: int) -> Result:
    """`prefill` starts a conversation and returns the first token; `decode` takes a token and returns the next."""
    token = prefill()
    for _ in range(8):
        token = decode(token)
    start = time.perf_counter()
    token = prefill()
    filled = time.perf_counter()
    for _ in range(tokens):
        token = decode(token)
    end = time.perf_counter()
    return {"prefill": prompt / (filled - start), "decode": tokens / (end - filled)}


def llama_cpp(options: argparse.Namespace) -> Result:
    """llama.cpp by its C functions (the wrapper's own `generate` adds work in Python)."""
    import llama_cpp as lib

    context = options.prompt + options.tokens + 16
    llm = lib.Llama(
        str(options.model), n_ctx=context, n_threads=options.threads, n_threads_batch=options.threads, verbose=False
    )
    ids, vocab = prompt_ids(options.prompt, llm.n_vocab()), llm.n_vocab()

    def step(tokens: list[int]) -> int:
        buffer = (lib.llama_token * len(tokens))(*tokens)
        if lib.llama_decode(llm.ctx, lib.llama_batch_get_one(buffer, len(tokens))):
            raise RuntimeError("llama_decode failed")
        logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(llm.ctx, -1), (vocab,))
        return int(np.argmax(logits))

    def prefill() -> int:
        lib.llama_memory_clear(lib.llama_get_memory(llm.ctx), True)
        return step(ids)

    return timed(prefill, lambda token: step([token]), options.prompt, options.tokens)


def genai(options: argparse.Namespace) -> Result:
    """onnxruntime-genai; its generator keeps the last token itself."""
    import onnxruntime_genai as og

    config = options.model / "genai_config.json"
    document = json.loads(config.read_text())
    document["model"]["decoder"]["session_options"]["intra_op_num_threads"] = options.threads
    config.write_text(json.dumps(document, indent=2))
    model = og.Model(str(options.model))
    length = options.prompt + options.tokens + 16
    ids = prompt_ids(options.prompt, document["model"]["vocab_size"])
    generator: Any = None

    def prefill() -> int:
        nonlocal generator
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=1)
        generator = og.Generator(model, parameters)
        generator.append_tokens(np.array(ids, np.int32))
        generator.generate_next_token()
        return 0

    def decode(_: int) -> int:
        generator.generate_next_token()
        return 0

    return timed(prefill, decode, options.prompt, options.tokens)


def edgeexport(options: argparse.Namespace) -> Result:
    """Our own bundle."""
    from edgeexport import open_bundle

    with open_bundle(options.model).session(threads=options.threads) as session:
        ids = prompt_ids(options.prompt, session.vocab)

        def prefill() -> int:
            session.reset()
            return int(np.argmax(session.prefill(ids)))

        return timed(prefill, lambda token: int(np.argmax(session.decode(token))), options.prompt, options.tokens)


def folder(options: argparse.Namespace) -> Result:
    """Write the GGUF as a transformers folder, fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where, name = options.model.parent, options.model.name
    loaded = AutoModelForCausalLM.from_pretrained(
        where, gguf_file=name, quantization_config=GgufConfig(dequantize=True)
    ).float()
    # A model that came from a GGUF refuses to be saved, so its weights move to one that did not.
    config = type(loaded.config).from_dict(
        {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    )
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(options.out)
    AutoTokenizer.from_pretrained(where, gguf_file=name).save_pretrained(options.out)
    return {}


WORK = {"llama-cpp": llama_cpp, "genai": genai, "edgeexport": edgeexport, "folder": folder}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("engine", choices=sorted(WORK))
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    print(json.dumps(WORK[options.engine](options)))


if __name__ == "__main__":
    main()
