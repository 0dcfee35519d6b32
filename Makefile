# Everything runs in an environment of its own; `make help` lists what there is.
PYTHON ?= python3
VENV ?= .venv
VENV_JAX050 ?= .venv-jax050
VENV_DOCS ?= .venv-docs
WORKERS ?= 2
# The tests of a file stay on one worker, and share what they train and compile. The workers take
# the files in the order of tests/suite.py.
PYTEST := -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
BIN := $(VENV)/bin

# The package set that is tested together, where it has wheels: Python 3.11 on Linux.
PINNED := $(shell $(PYTHON) -c "import platform as p; \
	print('-c constraints/jax-0.10.2-py311-linux.txt' if p.system() == 'Linux' and \
	p.machine() == 'x86_64' and p.python_version().startswith('3.11.') else '')")

# Where there is an environment with jax 0.5.0, checkpoints are taken from one to the other.
OTHER_PYTHON = HJEPA_OTHER_PYTHON="$$(ls $(CURDIR)/$(VENV_JAX050)/bin/python 2>/dev/null)"

.DEFAULT_GOAL := help
.PHONY: help demo install install-jax050 install-docs test test-slow test-exchange test-jax050 lint \
	types check docs format clean

help:  ## This list
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | column -t -s '|'

$(VENV)/.runtime: pyproject.toml constraints/jax-0.10.2-py311-linux.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PINNED) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(BIN)/pip install --quiet --disable-pip-version-check $(PINNED) -e ".[dev]"
	touch $@

demo: $(VENV)/.runtime  ## Train on procedural shapes and probe the result (minutes on a laptop)
	$(BIN)/python -m hjepa_jax.main --config=configs/shapes_tiny.py

test: $(VENV)/.dev  ## Quick tests; HJEPA_TEST_ORDER=1 puts them in another order
	$(BIN)/python $(PYTEST)

test-slow: $(VENV)/.dev  ## Tests that take minutes
	$(OTHER_PYTHON) $(BIN)/python $(PYTEST) -m slow --durations=20

# What jax-metal runs with; the set is that of the extra `metal`, and has wheels for Python 3.11.
$(VENV_JAX050)/.dev: pyproject.toml constraints/jax-0.5.0-py311-linux.txt
	$(PYTHON) -m venv $(VENV_JAX050)
	$(VENV_JAX050)/bin/pip install --quiet --disable-pip-version-check \
		-c constraints/jax-0.5.0-py311-linux.txt -e ".[dev,metal]"
	touch $@

install: $(VENV)/.dev  ## The environment of the tests; `make -j2 install install-jax050` makes both
install-jax050: $(VENV_JAX050)/.dev

test-jax050: $(VENV_JAX050)/.dev  ## Tests that touch JAX, and all of tests/metal, with jax 0.5.0
	$(VENV_JAX050)/bin/python $(PYTEST) -m "jax and not slow or metal"

test-exchange: $(VENV)/.dev  ## Tests against timm and transformers, which it installs (1 GB)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PINNED) -e ".[exchange]"
	$(BIN)/python $(PYTEST) tests/test_published.py

lint: $(VENV)/.dev  ## Style and common mistakes
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.dev  ## Static types
	$(BIN)/basedpyright

# The extra `docs` alone: the site's tools read the package, and import nothing of it.
$(VENV_DOCS)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV_DOCS)
	$(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']\
	['optional-dependencies']['docs'], sep='\n')" > $(VENV_DOCS)/requirements.txt
	$(VENV_DOCS)/bin/pip install --quiet --disable-pip-version-check \
		-r $(VENV_DOCS)/requirements.txt
	touch $@

install-docs: $(VENV_DOCS)/.ready

# Not --quiet, which would silence the count of warnings that makes strict fail.
docs: $(VENV_DOCS)/.ready  ## The site, in site/; strict: a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(VENV_DOCS)/bin/mkdocs build

check: lint types test  ## Before a commit (CI also runs docs, test-slow and test-jax050)

format: $(VENV)/.dev  ## Rewrite the code in the project's style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove the environment and the caches; runs/ stays
	rm -rf $(VENV) $(VENV_JAX050) $(VENV_DOCS) site .pytest_cache .ruff_cache .hypothesis
