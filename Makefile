# `make demo` and `make test` work on a fresh machine: they build the virtual environment they need first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Ultralytics must not look for a network, nor write its settings outside this folder.
export YOLO_OFFLINE := true
export YOLO_CONFIG_DIR := $(CURDIR)/runs/ultralytics
# One test worker a core, one thread a worker.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

.PHONY: help setup demo test test-interpreted test-compiled gpu-check lint format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: $(VENV)/.installed  ## build the virtual environment

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	mkdir -p $(YOLO_CONFIG_DIR)
	touch $@

demo: setup  ## train YOLO26 with BRA on the photographs, predict, compare with the reference: runs/demo
	$(BIN)/bra-bench demo

test: test-interpreted test-compiled  ## all tests; no GPU needed

test-interpreted: setup  ## the kernels under Triton's interpreter, everything else as it is
	TRITON_INTERPRET=1 $(PYTEST)

test-compiled: setup  ## the kernels compiled for GPUs that need not be there
	TRITON_INTERPRET=0 $(PYTEST) -m compiled

gpu-check:  ## where there is a GPU: every mode, then times beside peers, in 9 minutes; installs nothing
	$(PYTHON) bench/in_tree.py bra_triton.bench.command_line check $(GPU_CHECK)

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/typecheck.py

format: setup  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what the targets built
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
