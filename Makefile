# Two commands set a fresh machine up: `make lab` and `make test`. Both need Python 3.11 or newer, and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin

.PHONY: env lab test check clean

env: $(VENV)/installed

# The constraints are the versions that the tests run with.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

lab: env
	cd examples/lab && PATH="$(BIN):$$PATH" sh lab.sh

test: env check
	$(BIN)/pytest

check: env
	$(BIN)/ruff check src tests examples benchmarks docs
	$(BIN)/ruff format --check src tests examples benchmarks docs
	$(BIN)/mypy

clean:
	rm -rf $(VENV) examples/lab/models
