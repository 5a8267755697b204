"""Quantise SmolLM2-135M as llama.cpp does, for a comparison of quality.

    python benchmarks/quality_peer.py selftest [--venv .venv-quality] [--work build/bench-quality]

The weights go into a float GGUF (`write_source_gguf`), llama.cpp's quantisers make a smaller one of it (`quantise`),
and that comes back as float32 arrays under their own names (`dequantised`). The packaged model goes the same way as any
other source: by its dequantised weights, which llama-quantize would compute too with --allow-requantize.

The quantisers are those of libllama in the package xllamacpp, called by ctypes in a virtual environment of their own
that is made on the first run. That library leaves `llama_model_quantize` out, so the choice of a type for each tensor
is repeated here (`tensor_type`), and the loop around `ggml_quantize_chunk` with it. The `llama_model_quantize` of
llama.cpp v0.5.0 gave the same types and bytes for every tensor: both schemes, with an importance matrix and without,
from the float GGUF, and from the packaged one without.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib.util
import json
import shutil
import subprocess
import sys
import time
import venv as venvs
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

# The worker runs this file where neither edgeexport nor its packages are installed, so those are imported on use.

MODEL = "smollm2-135m"
VENV = Path(".venv-quality")
PACKAGES = ("xllamacpp==2026.10.11549", "gguf==0.19.0", "numpy==2.4.6")
SCHEMES: Mapping[str, tuple[str, str]] = {"q4_0": ("Q4_0", "MOSTLY_Q4_0"), "q4_k_m": ("Q4_K", "MOSTLY_Q4_K_M")}
"""Scheme to the ggml type that most tensors get, and gguf's name of the file type."""
FALLBACKS = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
"""What stands in for a type whose blocks are longer than a row."""
EXPECTED_BITS = {"q4_0": 5.34, "q4_k_m": 6.16}
"""Bits per weight of the model without an importance matrix."""

Arrays = Mapping[str, np.ndarray]


def ggml_name(name: str) -> str:
    """llama.cpp's name of a tensor of a Llama, given transformers' name."""
    found = _llama_names().get_name(name, try_suffixes=(".weight",))
    if found is None:
        raise ValueError(f"llama.cpp has no name for {name}")
    return str(found)


@functools.cache
def _llama_names() -> Any:
    """gguf's table of names, for as many layers as any Llama has."""
    import gguf

    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 128)


def write_source_gguf(weights: Arrays, out: Path) -> None:
    """A GGUF of float32 tensors with the packaged model's metadata, for `quantise`.

    `weights` has transformers' names, exactly those of the packaged model: the head is its table of tokens. Other
    dtypes than float32 become it; bfloat16 and float16 lose nothing. Raises ValueError for other names or shapes.
    """
    import gguf

    from edgeexport.checkpoint import open_checkpoint

    model = open_checkpoint(MODEL)
    if weights.keys() != model.tensors.keys():
        odd = sorted(weights.keys() ^ model.tensors.keys())
        raise ValueError(f"the weights' names are not those of {MODEL}: {', '.join(odd[:5])}")
    writer = _writer(gguf.GGUFReader(model.files[0]), out, "ALL_F32")
    for name, ref in model.tensors.items():
        values = np.asarray(weights[name], np.float32)
        if values.shape != ref.shape:
            raise ValueError(f"{name} is {values.shape}, not {ref.shape}")
        if ref.transform is not None:
            values = _interleave(values, ref.transform.heads)
        writer.add_tensor(ggml_name(name), np.ascontiguousarray(values))
    _write(writer)


def quantise(source: Path, scheme: str, imatrix: Arrays | Path | None, out: Path, venv: Path = VENV) -> float:
    """Quantise a GGUF of `write_source_gguf` by one of `SCHEMES`; the bits per weight of its matrices.

    `imatrix`: llama.cpp's importance matrix, by ggml tensor name the mean squared input of each column, for all linear
    layers; or the .npz file of it. `venv` is made where it is missing. Raises RuntimeError with the worker's words.
    """
    command = [str(peer_python(venv)), str(Path(__file__).resolve()), "worker", str(source), scheme, str(out)]
    saved = None
    if isinstance(imatrix, Path):
        command.append(str(imatrix))
    elif imatrix is not None:
        saved = out.with_name(out.name + ".imatrix.npz")
        np.savez(saved, **imatrix)  # type: ignore[arg-type]
        command.append(str(saved))
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    finally:
        if saved is not None:
            saved.unlink()
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return float(json.loads(done.stdout.strip().splitlines()[-1])["bits_per_weight"])


def dequantised(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a GGUF as float32, by transformers' names and with its order of rows."""
    from edgeexport.checkpoint import WeightReader, open_checkpoint

    with WeightReader() as reader:
        return {name: reader.read(ref) for name, ref in open_checkpoint(path).tensors.items()}


def peer_python(folder: Path) -> Path:
    """The interpreter of llama.cpp's environment, which is made where it is missing."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"making {folder}", file=sys.stderr)
        venvs.create(folder, with_pip=True)
        try:
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        except BaseException:
            shutil.rmtree(folder)  # half an environment would be taken for a whole one next time
            raise
    return python.absolute()


def tensor_type(name: str, columns: int, scheme: str, layers: int, tied: bool, with_imatrix: bool) -> str:
    """The ggml type that llama-quantize picks for a matrix of a dense Llama below 70B.

    Source: `llama_tensor_get_type_impl` and `tensor_type_fallback` in llama.cpp's src/llama-quant.cpp.
    """
    kind, _ = SCHEMES[scheme]
    layer, part = _split(name)
    more_bits = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    is_head = name == "output.weight" or (name == "token_embd.weight" and tied)
    if is_head or (scheme == "q4_k_m" and part in {"attn_v", "ffn_down"} and more_bits):
        kind = "Q6_K"
    elif scheme == "q4_0" and part == "ffn_down" and with_imatrix and layer < layers // 8:
        kind = "Q4_1"
    return FALLBACKS[kind] if kind.endswith("_K") and columns % 256 else kind


def work(source: Path, scheme: str, out: Path, imatrix: Path | None) -> float:
    """What `quantise` says, in the environment that has llama.cpp."""
    import gguf

    reader = gguf.GGUFReader(source)
    layers = int(reader.fields["llama.block_count"].contents())
    matrices = {tensor.name: tensor for tensor in reader.tensors if len(tensor.shape) > 1}
    importance = None if imatrix is None else _importance(imatrix, {n: int(t.shape[0]) for n, t in matrices.items()})
    quantize = _quantiser()
    writer = _writer(reader, out, SCHEMES[scheme][1])
    bits = weights = 0
    for tensor in reader.tensors:
        values = np.ascontiguousarray(tensor.data, np.float32)
        if tensor.name not in matrices:  # llama-quantize leaves vectors as they are
            writer.add_tensor(tensor.name, values)
            continue
        name = tensor_type(
            tensor.name, values.shape[1], scheme, layers, "output.weight" not in matrices, importance is not None
        )
        kind = gguf.GGMLQuantizationType[name]
        stored = quantize(values, kind, None if importance is None else importance.get(tensor.name))
        writer.add_tensor(tensor.name, stored, raw_dtype=kind)
        bits += 8 * stored.size
        weights += values.size
    _write(writer)
    return bits / weights


def _split(name: str) -> tuple[int, str]:
    """(3, "attn_q") of "blk.3.attn_q.weight"; what belongs to no layer is in layer 0."""
    parts = name.split(".")
    return (int(parts[1]), parts[2]) if parts[0] == "blk" else (0, parts[0])


def _interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """The rows of q or k in llama.cpp's order: what `edgeexport.core.RopeUnpermute` undoes."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(values.shape)


def _importance(path: Path, columns: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The importance matrix in a .npz file, for matrices of so many columns.

    llama-quantize passes over matrices that it finds no figures for. Here that would compare something else than was
    meant, so it is an error, but for the table and the head, which llama-imatrix leaves out too.
    """
    with np.load(path) as file:
        found = {name: np.ascontiguousarray(file[name], np.float32) for name in file.files}
    for name in found.keys() | {name for name in columns if name.startswith("blk.")}:
        if name not in columns or name not in found:
            raise ValueError(f"{name} is in only one of the importance matrix and the model")
        if found[name].shape != (columns[name],) or not np.isfinite(found[name]).all():
            raise ValueError(f"the importance of {name} is not {columns[name]} finite numbers")
    return found


def _quantiser() -> Callable[[np.ndarray, int, np.ndarray | None], np.ndarray]:
    """`ggml_quantize_chunk` over a whole matrix: float32 [rows, columns], type, importance to uint8 [rows, bytes]."""
    import gguf

    spec = importlib.util.find_spec("xllamacpp")  # not imported: only its library is wanted
    if spec is None or spec.origin is None:
        raise RuntimeError("xllamacpp is missing")
    library = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
    chunk = library.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    # type, source, destination, first element, rows, columns, importance
    chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def quantize(values: np.ndarray, kind: int, importance: np.ndarray | None) -> np.ndarray:
        rows, columns = values.shape
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        if columns % block:  # ggml would end the process
            raise ValueError(f"rows of {columns} are not in blocks of {block}")
        stored = np.empty((rows, columns // block * block_bytes), np.uint8)
        given = None if importance is None else importance.ctypes.data
        written = chunk(int(kind), values.ctypes.data, stored.ctypes.data, 0, rows, columns, given)
        if written != stored.size:
            raise RuntimeError(f"{written} bytes written, {stored.size} expected")
        return stored

    return quantize


def _writer(model: Any, out: Path, file_type: str) -> Any:
    """A gguf writer with the metadata of the GGUF that `model` reads."""
    import gguf

    writer = gguf.GGUFWriter(out, model.fields["general.architecture"].contents())
    for key, field in model.fields.items():
        # The first are counts of the file itself; the architecture is there already.
        if key.startswith("GGUF.") or key in {"general.architecture", "general.file_type"}:
            continue
        inner = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), field.types[0], inner)
    writer.add_file_type(gguf.LlamaFileType[file_type])
    return writer


def _write(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def selftest(venv: Path, folder: Path) -> bool:
    """Quantise the packaged model by each scheme; True where the figures are the expected ones."""
    from edgeexport.checkpoint import open_checkpoint

    folder.mkdir(parents=True, exist_ok=True)
    peer_python(venv)
    weights = dequantised(open_checkpoint(MODEL).files[0])
    source = folder / "source-f32.gguf"
    start = time.perf_counter()
    write_source_gguf(weights, source)
    print(f"source: {source.stat().st_size / 1e6:.0f} MB, {time.perf_counter() - start:.1f} s")
    back = dequantised(source)
    good = all(np.array_equal(back[name], weights[name]) for name in weights)
    print(f"source reads back as it was: {good}")
    for scheme, expected in EXPECTED_BITS.items():
        out = folder / f"{scheme}.gguf"
        start = time.perf_counter()
        bits = quantise(source, scheme, None, out, venv)
        seconds = time.perf_counter() - start
        errors = {name: _relative_error(weights[name], values) for name, values in dequantised(out).items()}
        worst = max(errors, key=errors.__getitem__)
        print(f"{scheme}: {bits:.3f} bits per weight, {expected} expected; {seconds:.1f} s; "
              f"largest relative error {errors[worst]:.3f}, in {worst}")  # fmt: skip
        good &= abs(bits - expected) < 0.01 and errors[worst] < 0.2
    return good


def _relative_error(weight: np.ndarray, quantised: np.ndarray) -> float:
    return float(np.linalg.norm(quantised - weight) / np.linalg.norm(weight))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    test = commands.add_parser("selftest", help="quantise the packaged model by each scheme")
    test.add_argument("--venv", type=Path, default=VENV)
    test.add_argument("--work", type=Path, default=Path("build/bench-quality"))
    worker = commands.add_parser("worker", help="quantise one GGUF, in the environment that has llama.cpp")
    worker.add_argument("source", type=Path)
    worker.add_argument("scheme", choices=sorted(SCHEMES))
    worker.add_argument("out", type=Path)
    worker.add_argument("imatrix", type=Path, nargs="?")
    options = parser.parse_args()
    if options.command == "worker":
        bits = work(options.source, options.scheme, options.out, options.imatrix)
        print(json.dumps({"bits_per_weight": bits}))
        return 0
    return 0 if selftest(options.venv, options.work) else 1


if __name__ == "__main__":
    sys.exit(main())
