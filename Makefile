# Each target sets up all that it needs: `make test` works on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp

.PHONY: setup demo test lint types matrix corpus

setup: $(STAMP)

# Absent until every install step went through, so a broken setup is tried again.
$(STAMP): setup.cfg constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

matrix: $(STAMP)
	$(BIN)/python benchmarks/matrix.py

# Takes long; `make test` runs a sample.
corpus: $(STAMP)
	$(BIN)/python -m tests.corpus --record $(ARGS)
