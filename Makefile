# Two commands: `make demo` and `make test`. Both set everything up in .venv by themselves.
.DEFAULT_GOAL := help
SHELL := /bin/sh

PYTHON ?= python3
VENV := .venv
WHEELS := wheels
BIN := $(VENV)/bin
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

.PHONY: help demo test test-slow bench lint types imports check-python vectors reference wheels clean

help: ## what there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

demo: $(VENV)/.installed ## five hospitals train one private, encrypted, pruned model (under a minute)
	$(BIN)/securefl demo

test: lint types imports ## lint, types, import directions and the test suite (minutes)
	$(PYTEST) tests/protocols protocols
	$(PYTEST) tests/securefl securefl
	$(PYTEST) tests/attacks attacks
	$(PYTEST) tests/project
	$(PYTEST) --dist loadfile tests/deployment

test-slow: $(VENV)/.tests ## the tests marked slow
	$(PYTEST) -m slow

bench: $(VENV)/.tests ## measure, and write benchmarks/results.json, results.md and plots
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/run.py

lint: $(VENV)/.tests ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.tests ## mypy --strict
	$(BIN)/mypy

imports: $(VENV)/.tests ## the directions of imports
	$(BIN)/lint-imports

vectors: $(VENV)/.tests ## write the known-answer vectors again
	$(BIN)/python tests/vectors/regenerate.py

reference: $(VENV)/.installed ## write docs/reference/ again, from the code that reads the files
	mkdir -p docs/reference
	$(BIN)/securefl reference experiment > docs/reference/experiment.md
	$(BIN)/securefl reference site > docs/reference/site.md
	$(BIN)/securefl reference schema > docs/reference/schema.md

wheels: | $(VENV)/bin/python ## a folder from which securefl[flare] is installed without a network
	rm -rf $(WHEELS)
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --wheel-dir $(WHEELS) '.[flare]'

check-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "securefl needs Python 3.11 or newer; '$(PYTHON)' is not: make PYTHON=python3.12 ..." >&2; exit 2; }

$(VENV)/bin/python: | check-python
	$(PYTHON) -m venv $(VENV) || { \
	  echo "cannot make a virtual environment: install your system's python3-venv" >&2; exit 2; }

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	@echo "installing into $(VENV) (once, about a minute)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.tests: pyproject.toml $(VENV)/.installed
	@echo "installing the tools for tests into $(VENV) (once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

clean: ## remove the virtual environment and caches (runs stay)
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .import_linter_cache build dist
