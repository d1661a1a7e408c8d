# Two commands do everything on a fresh machine with python3 and a C++ compiler:
#   make demo    set up, fetch a small real model, optimize it, show stock and optimized side by side
#   make test    set up, then lint, types, layers and tests
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
TORCH_VERSION := 2.13.0
MODEL_DIR ?= .cache/models/smollm2-135m-instruct
MODEL_FILE := SmolLM2-135M-Instruct.Q4_1.gguf
PYTEST_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
CPU_ENV := $(VENV)/cpu.env
STEP := $(PYTHON) scripts/step.py
# Settings that scripts/check_cpu.py found this machine to need, if any.
WITH_CPU_ENV = set -a; . $(abspath $(CPU_ENV)); set +a;

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_OFFLINE := 1

.PHONY: help setup demo test lint bench bench-kv bench-sparse bench-speculation bench-gpu format clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 16

setup: $(STAMP)  ## create .venv with the pinned dependencies

$(STAMP): pyproject.toml constraints.txt scripts/install_torch.sh scripts/check_cpu.py
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "graphwright needs Python 3.10 or newer; set PYTHON=")'
	@test -x $(BIN)/python || $(STEP) "creating $(VENV)" -- $(PYTHON) -m venv $(VENV)
	@$(STEP) "installing torch $(TORCH_VERSION) (CPU build)" -- sh scripts/install_torch.sh $(BIN)/python $(TORCH_VERSION)
	@$(STEP) "installing setuptools" -- $(BIN)/python -m pip install -q -c constraints.txt "setuptools>=77"
	@$(STEP) "installing graphwright and the pinned dependencies" -- \
		$(BIN)/python -m pip install -q --no-build-isolation -c constraints.txt -e ".[dev,triton]"
	@$(STEP) "checking torch on this CPU" -- $(BIN)/python scripts/check_cpu.py $(CPU_ENV)
	@touch $@

$(MODEL_DIR)/$(MODEL_FILE): | $(STAMP)
	@$(STEP) "fetching SmolLM2-135M-Instruct (93 MB)" -- sh scripts/fetch_demo_model.sh $(BIN)/python $(MODEL_DIR)

demo: $(STAMP) $(MODEL_DIR)/$(MODEL_FILE)  ## optimize SmolLM2-135M for this CPU and compare it with stock
	@$(WITH_CPU_ENV) $(BIN)/python examples/demo.py --model $(MODEL_DIR) --gguf $(MODEL_FILE)

lint: $(STAMP)  ## ruff, mypy and the layer contract
	@echo "ruff check"; $(BIN)/ruff check
	@echo "ruff format --check"; $(BIN)/ruff format --check
	@echo "mypy"; $(BIN)/mypy
	@echo "lint-imports"; $(BIN)/lint-imports

# One torch thread per worker: two workers on two cores must not fight over them.
test: lint $(MODEL_DIR)/$(MODEL_FILE)  ## lint, types, layers and tests
	@echo "pytest"; OMP_NUM_THREADS=1 GRAPHWRIGHT_DEMO_MODEL=$(abspath $(MODEL_DIR)) \
		$(BIN)/pytest -n 2 --dist loadfile $(PYTEST_ARGS)

bench: $(STAMP) $(MODEL_DIR)/$(MODEL_FILE)  ## decode speed and memory on this CPU, beside stock
	@$(WITH_CPU_ENV) $(BIN)/python benchmarks/decode_cpu.py --model $(MODEL_DIR) --gguf $(MODEL_FILE) \
		--processes --json benchmarks/results/decode_cpu.json

bench-kv: $(STAMP) $(MODEL_DIR)/$(MODEL_FILE)  ## what packed caches lose, save and cost
	@$(WITH_CPU_ENV) $(BIN)/python benchmarks/kv_quality.py --model $(MODEL_DIR) --gguf $(MODEL_FILE) \
		--out benchmarks/results/kv_quality.json
	@$(BIN)/python benchmarks/kv_report.py benchmarks/results/kv_quality.json

bench-speculation: $(STAMP) $(MODEL_DIR)/$(MODEL_FILE)  ## drafts on conversations: DATA="spec_bench.jsonl humaneval.jsonl"
	@$(WITH_CPU_ENV) $(BIN)/python benchmarks/speculation.py --model $(MODEL_DIR) --gguf $(MODEL_FILE) \
		--data $(DATA) --json benchmarks/results/speculation.json

bench-sparse: $(STAMP) $(MODEL_DIR)/$(MODEL_FILE)  ## what selected pages and evicted caches lose
	@$(WITH_CPU_ENV) $(BIN)/python benchmarks/sparse_quality.py --model $(MODEL_DIR) --gguf $(MODEL_FILE) \
		--out benchmarks/results/sparse_quality.json
	@$(BIN)/python benchmarks/sparse_report.py benchmarks/results/sparse_quality.json

# On a machine with a GPU, where `python3` is the interpreter that sees it: BIN is not used, so that its torch is.
bench-gpu:  ## bandwidth, attention, whole models and correctness on the GPU at hand (under 10 minutes)
	@PYTHONPATH=$(CURDIR) $(PYTHON) benchmarks/gpu.py --json benchmarks/results/gpu.json

format: $(STAMP)  ## rewrite the sources in ruff's format
	@$(BIN)/ruff check --fix; $(BIN)/ruff format

clean:  ## remove build outputs and caches; keeps .venv and the fetched model
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .cache/tests
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
