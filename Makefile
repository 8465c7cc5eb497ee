# Two commands matter: `make demo` and `make test`. Each sets up what it needs from a fresh clone. `make help` lists all.
#
# The set-up makes .venv with $(PYTHON), installs the versions of constraints.txt and then specdec itself (editable).
# Two cases install nothing: a .venv that is a symlink belongs to another checkout and is used as it is, and
# `make ... NO_SETUP=1 PYTHON=python3` uses the Python you name as it is.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
ARGS ?=

ifdef NO_SETUP
PY := $(PYTHON)
else
PY := $(VENV)/bin/python
ifeq ($(shell test -L $(VENV) && echo linked),)
RUN_READY := $(VENV)/.ready-run
DEV_READY := $(VENV)/.ready-dev
endif
endif

PYTEST := $(PY) -m pytest

.PHONY: help demo test test-slow test-gpu gpu check format docs bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(RUN_READY)  ## set up, then edit real code with the bundled model, plain and speculative
	$(PY) -m specdec demo $(ARGS)

# The tests' models are tiny: one thread per worker is fastest, and more would fight over the cores.
test test-slow: export OMP_NUM_THREADS := 1

test: $(DEV_READY)  ## set up, then run the CPU tests (ARGS="-k word" picks some)
	$(PYTEST) -n $(JOBS) --dist worksteal $(ARGS)

test-slow: $(DEV_READY)  ## the tests that take longer than a minute each
	$(PYTEST) -m 'slow and not gpu' -n $(JOBS) --dist worksteal $(ARGS)

test-gpu: $(DEV_READY)  ## the tests that need a CUDA device
	$(PYTEST) -m gpu $(ARGS)

# Below nine minutes: the kernels' tests first, but at most 100 seconds of them; the benchmark then repeats the longest.
gpu: $(DEV_READY)  ## everything that only a CUDA device can show: tests, then the benchmark into bench/results/gpu.json
	timeout 100 $(PYTEST) -m gpu -k "not differs_nowhere" $(ARGS) || echo "tests failed or had no time: see above"
	$(PY) -m specdec bench --gpu --out bench/results/gpu.json --seconds 400

check: $(DEV_READY)  ## format, lint, types, spelling, import rules
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m codespell_lib
	$(PYTEST) -q tests/test_architecture.py

format: $(DEV_READY)  ## let ruff format and fix what it can
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

docs: $(DEV_READY)  ## write docs/help.md from the commands' --help
	$(PY) -m tests.test_help

bench: $(RUN_READY)  ## run one benchmark: make bench NAME=engine_overhead ARGS="..."
	@test -n "$(NAME)" || { echo 'make bench needs a NAME: one of' $(BENCHES); exit 2; }
	$(PY) -m specdec.bench.$(NAME) $(ARGS)

clean:  ## remove .venv, builds and caches
	@if test -L $(VENV); then echo '$(VENV) is a symlink: left alone'; else rm -rf $(VENV); fi
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Every benchmark is a module of bench/ with a main; they are found, not listed.
BENCHES = $(shell grep -l '__name__ == "__main__"' bench/*.py 2>/dev/null | sed 's|bench/||; s|\.py$$||')

# torch goes first and by itself: where a build of that version for this machine is at hand (a CPU build, say), pip
# takes it, and what follows finds it in place. Nothing is installed twice: pip keeps what satisfies the constraints.
$(VENV)/.ready-run: EXTRAS :=
$(VENV)/.ready-dev: EXTRAS := [server,otel,train,redis,bench,dev]
$(VENV)/.ready-run $(VENV)/.ready-dev: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'specdec needs Python 3.11 or newer: make PYTHON=python3.11 ...'; exit 2; }
	@echo 'Setting up $(VENV) (once; the first time takes a few minutes)'
	$(VENV)/bin/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install "$$(grep '^torch==' constraints.txt)"
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.$(EXTRAS)'
	@touch $@
