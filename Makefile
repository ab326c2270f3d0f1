# `make demo` and `make test` are all a newcomer needs: each makes .venv from the lock files first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell grep '^torch==' requirements/cpu.txt)
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: demo test lint clean

demo: $(VENV)/.cpu
	$(BIN)/rlscale sweep experiments/demo.yaml --overwrite

test: $(VENV)/.dev lint
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A stamp is written last, so an interrupted installation starts again and a finished one is re-used.
$(VENV)/.cpu: requirements/cpu.txt requirements/compiled.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11) and "rlscale needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-deps $(TORCH) || $(BIN)/pip install --no-deps --index-url $(TORCH_CPU_INDEX) $(TORCH)
	$(BIN)/pip install --quiet --no-deps -r requirements/cpu.txt
	$(BIN)/pip install --quiet --no-deps -r requirements/compiled.txt || echo "no C compiler: reasoning_gym/zebra_puzzles will not run"
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.cpu requirements/dev.txt
	$(BIN)/pip install --quiet --no-deps -r requirements/dev.txt
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
