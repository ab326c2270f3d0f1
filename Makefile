# `make demo` and `make test` are all a newcomer needs: each makes .venv from the lock files first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell grep '^torch==' requirements/cpu.txt)
# Bytecode is left to the first import, because most of these modules are never imported. Where nobody may write
# it, each of a run's processes compiles all that it imports: 24 s instead of 10 s for an engine's.
export PYTHONDONTWRITEBYTECODE :=
INSTALL := $(BIN)/pip install --no-deps --no-compile
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: demo test browser lint clean

demo: $(VENV)/.cpu
	$(BIN)/rlscale sweep experiments/demo.yaml --overwrite

test: $(VENV)/.dev browser lint
	$(BIN)/python -m pytest -n 2

# Tests of the report click through it in a browser.
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; } || \
		{ echo "the tests need Chromium: apt-get install chromium"; exit 1; }

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A stamp is written last, so an interrupted installation starts again and a finished one is re-used.
$(VENV)/.cpu: requirements/cpu.txt requirements/compiled.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11) and "rlscale needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --quiet $(TORCH) || $(INSTALL) --index-url $(TORCH_CPU_INDEX) $(TORCH)
	$(INSTALL) --quiet -r requirements/cpu.txt
	$(INSTALL) --quiet -r requirements/compiled.txt || echo "no C compiler: reasoning_gym/zebra_puzzles will not run"
	$(INSTALL) --quiet --no-build-isolation --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.cpu requirements/dev.txt
	$(INSTALL) --quiet -r requirements/dev.txt
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
