# make serve | test | lint | bench: everything runs in .venv, which the first of them makes. make bench-gpu: on a GPU.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= smollm2-135m
ARGS ?=
STAMP := $(VENV)/.installed
SOURCES := $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)

# Without an NVIDIA GPU the constraints pin the CPU build of torch; with one, take torch as it comes.
ifeq ($(shell command -v nvidia-smi >/dev/null 2>&1 && echo yes),yes)
CONSTRAINTS :=
else
CONSTRAINTS := -c constraints.txt
endif

.PHONY: serve test lint format bench bench-gpu clean

serve: $(STAMP) ## serve the default model on http://localhost:8000
	$(BIN)/octavo serve $(MODEL) $(ARGS)

test: $(STAMP) ## all tests, in two workers
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder $(ARGS)

lint: $(STAMP) ## ruff (lint, format) and mypy (engine/core, cluster)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/types && ln -sfn ../.. build/types/octavo
	cd build/types && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml -p octavo.engine.core -p octavo.cluster

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## offline throughput, KV waste, comparison with peers: see benchmarks/README.md
	$(BIN)/python benchmarks/run.py $(ARGS)

# Installs nothing: with .venv's Python if there is one, else with PYTHON, whose CUDA build of torch stays as it is.
bench-gpu: ## every goal on this machine's GPU, in 8 minutes: see benchmarks/README.md
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py $(ARGS)

$(STAMP): pyproject.toml constraints.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[test]'
	touch $(STAMP)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
