# Everything runs in an environment of its own; `make help` lists what there is.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin

# The package set that is tested together, where it has wheels: Python 3.11 on Linux.
PINNED := $(shell $(PYTHON) -c "import platform as p; \
	print('-c constraints/jax-0.10.2-py311-linux.txt' if p.system() == 'Linux' and \
	p.machine() == 'x86_64' and p.python_version().startswith('3.11.') else '')")

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint types check format clean

help:  ## This list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | column -t -s '|'

$(VENV)/.runtime: pyproject.toml constraints/jax-0.10.2-py311-linux.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PINNED) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(BIN)/pip install --quiet --disable-pip-version-check $(PINNED) -e ".[dev]"
	touch $@

demo: $(VENV)/.runtime  ## Train on procedural shapes and probe the result (minutes on a laptop)
	$(BIN)/python -m hjepa_jax.main --config=configs/shapes_tiny.py

test: $(VENV)/.dev  ## Quick tests
	$(BIN)/python -m pytest -n $(WORKERS)

test-slow: $(VENV)/.dev  ## Tests that take minutes
	$(BIN)/python -m pytest -n $(WORKERS) -m slow

lint: $(VENV)/.dev  ## Style and common mistakes
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.dev  ## Static types
	$(BIN)/basedpyright

check: lint types test test-slow  ## Everything that CI runs

format: $(VENV)/.dev  ## Rewrite the code in the project's style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove the environment and the caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
