# make demo    install, fetch the default model, train the agent, edit, write a report with pictures
# make test    install and run the tests, on every core
# make help    what else there is

PYTHON     ?= python3
VENV       ?= .venv
# torch comes first and pinned: on a machine without a GPU, other ways to ask for it may bring gigabytes of CUDA.
TORCH      ?= torch==2.13.0
DEMO_FLAGS ?=
# Processes that share the tests, one thread of torch each; 0 runs them in one process.
WORKERS    ?= auto
TEST_FLAGS ?=

BIN   := $(VENV)/bin
STAMP := $(VENV)/.rledit-installed
PYTEST = $(BIN)/python -m pytest -n $(WORKERS)

.PHONY: help venv install demo test test-real test-slow lint types check wheel notebooks clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       train the agent on the default model, edit, write runs/demo/report.html (DEMO_FLAGS=--help)"
	@echo "make test       run the tests (TEST_FLAGS='-k stream')"
	@echo "make test-real  run the tests that need the default model"
	@echo "make test-slow  run the tests that take minutes each on an old processor"
	@echo "make check      lint, types and tests"
	@echo "make wheel      build the sdist and the wheel, and use the wheel away from the sources"
	@echo "make notebooks  run the notebooks in examples/ on the default model and keep their outputs (minutes)"
	@echo "make install    create $(VENV) and install the package (PYTHON=python3.12, TORCH='torch==2.13.0 ...')"
	@echo "make clean      remove what make and the tools wrote, but not runs/"

venv: $(BIN)/python

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "$(PYTHON) is not there, or older than 3.10; name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo "$(PYTHON) cannot make virtual environments: on Debian and Ubuntu, 'apt install python3-venv' mends that" >&2; \
	    exit 1; }
	$(PYTHON) -m venv $(VENV)

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -e ".[dev]"
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py $(DEMO_FLAGS)

test: $(STAMP)
	$(PYTEST) $(TEST_FLAGS)

test-real: $(STAMP)
	$(PYTEST) -m "real and not slow" $(TEST_FLAGS)

test-slow: $(STAMP)
	$(PYTEST) -m slow $(TEST_FLAGS)

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/lint-imports --no-cache --no-logo

types: $(STAMP)
	$(BIN)/python -m mypy

check: lint types test

wheel: $(STAMP)
	$(BIN)/python tests/wheel.py

notebooks: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/notebooks.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
