# Each target sets up all that it needs: `make test` works on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp
# The optimizers that graphfold is compared with stay out of the environment that tests run in.
PEERS_VENV := .venv-peers
PEERS_STAMP := $(PEERS_VENV)/.setup-stamp

.PHONY: setup demo test lint types matrix corpus benchmark-peers

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

$(PEERS_STAMP): setup.cfg constraints.txt
	test -x $(PEERS_VENV)/bin/python || $(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_VENV)/bin/python -m pip install -c constraints.txt -e '.[peers]'
	touch $@

benchmark-peers: $(PEERS_STAMP)
	$(PEERS_VENV)/bin/python benchmarks/optimizers.py $(ARGS)

# Takes long; `make test` runs a sample.
corpus: $(STAMP)
	$(BIN)/python -m tests.corpus --record $(ARGS)
