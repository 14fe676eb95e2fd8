# `make demo` and `make test` work on a fresh machine: first they build the virtual environment that they need.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Keeps Ultralytics from using the network and from writing its settings outside this folder.
export YOLO_OFFLINE := true
export YOLO_CONFIG_DIR := $(CURDIR)/runs/ultralytics
# One test worker per core, one thread per worker.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

.PHONY: help setup demo test test-interpreted test-compiled smoke gpu-check lint format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: $(VENV)/.installed  ## build the virtual environment

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	mkdir -p $(YOLO_CONFIG_DIR)
	touch $@

demo: setup  ## train YOLO26 with BRA on photographs, draw where it looks, compare with the reference: runs/demo
	$(BIN)/bra-bench demo

test: test-interpreted test-compiled  ## all tests; no GPU needed

test-interpreted: setup  ## the tests without the compiled ones; kernels run under Triton's interpreter
	TRITON_INTERPRET=1 $(PYTEST)

test-compiled: setup  ## the tests that compile the kernels, for several architectures; no GPU needed
	TRITON_INTERPRET=0 $(PYTEST) -m compiled

# The environment of PYTHON needs pytest, hypothesis and Ultralytics besides the package's own requirements.
# With Triton 3.5 and 3.6 it needs a NumPy before 2.4, which removed functions that Triton's interpreter uses.
# This target has passed with Python 3.10, PyTorch 2.8.0, Triton 3.4.0, einops 0.8.0; with 3.12, 2.10.0,
# 3.6.0, 0.8.2; and with 3.13, 2.14.1, 3.8.0, 0.8.2.
smoke:  ## a selection of the tests in another environment, PYTHON=...: every backend, the compiler, YOLO's rows
	TRITON_INTERPRET=1 $(PYTHON) bench/in_tree.py pytest -q $(addprefix tests/, bra_triton/test_seed.py \
		bra_triton/test_backends.py \
		yolo_integration/test_modules.py yolo_integration/test_counted_flops.py yolo_integration/test_yaml_rows.py \
		yolo_integration/test_wrong_rows.py)
	TRITON_INTERPRET=0 $(PYTHON) bench/in_tree.py pytest -q tests/kernels/test_plan_cache.py \
		tests/kernels/test_compile.py -k "plan_cache or yolo_p5 and (sm_80 or sm_90) or yolo_p3 and sm_80"

gpu-check:  ## on a GPU, in 14 minutes at most: every mode against float64, then all measurements; installs nothing
	$(PYTHON) bench/in_tree.py bra_triton.bench.command_line check $(GPU_CHECK)

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/typecheck.py

format: setup  ## let ruff fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what the targets built
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
