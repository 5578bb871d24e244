# Everything runs in $(VENV), made on first use with the exact versions of constraints.txt. Second calls install nothing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=

help:            ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 8

demo: $(VENV)/.ready-data    ## the first command: a real posterior, a table, a figure
	$(BIN)/boltzsample demo

test: $(VENV)/.ready-test    ## the whole test suite, on two cores
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations 10 $(PYTEST_ARGS)

lint: $(VENV)/.ready-test    ## ruff everywhere, mypy --strict on boltzsample/
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

docs: $(VENV)/.ready-docs    ## HTML pages in docs/_build; warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -q -E docs docs/_build

clean:           ## remove what the other commands made, the environment included
	rm -rf $(VENV) docs/_build docs/api docs/_generated dist .pytest_cache .mypy_cache .ruff_cache

# one stamp per extra: remade when the dependencies change
$(VENV)/.ready-%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "boltzsample needs Python 3.11 or newer; try: make $(MAKECMDGOALS) PYTHON=python3.12")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@

.NOTPARALLEL:
.PHONY: help demo test lint docs clean
