# Everything runs in .venv, which the first command makes and fills with the versions of constraints.txt.

PYTHON ?= python3
ARGS ?=
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable
# The set for `make lint` has all others: where it is installed, no other one is.
ALL_PACKAGES := $(wildcard $(VENV)/.installed-dev)
TEST_PACKAGES := $(or $(ALL_PACKAGES),$(VENV)/.installed-test)
DOCS_PACKAGES := $(or $(ALL_PACKAGES),$(VENV)/.installed-docs)

.DELETE_ON_ERROR:
.PHONY: help train test lint docs clean

help:
	@echo 'make train [ARGS="experiment=quick"]   train; ARGS are Hydra overrides'
	@echo 'make test  [ARGS="-k tokenizer"]       run the tests; ARGS go to pytest, WORKERS=2 processes'
	@echo 'make lint                              check style, types and import rules'
	@echo 'make docs                              build the documentation: build/docs/index.html'
	@echo 'make clean                             remove .venv and tool caches; runs/ stays'
	@echo 'PYTHON=python3.12 chooses the interpreter (3.11 or newer) that makes .venv.'

train: $(VENV)/.installed
	$(BIN)/gptpl train $(ARGS)

# One thread a process: the tests' models are tiny, and their threads would only wait for each other.
test: $(TEST_PACKAGES)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --num-workers=2
	$(BIN)/lint-imports --no-logo

# From nothing, as pages of source code are not renewed by themselves. -W: a warning is an error.
docs: $(DOCS_PACKAGES)
	rm -rf build/docs
	$(BIN)/python -m sphinx -W --keep-going --quiet --jobs=auto docs build/docs

clean:
	rm -rf $(VENV) build/docs docs/generated .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

# One stamp for each set of packages; all sets share .venv.
$(VENV)/.installed: EXTRAS :=
$(VENV)/.installed-test: EXTRAS := [test]
$(VENV)/.installed-dev: EXTRAS := [test,docs,dev]
$(VENV)/.installed-docs: EXTRAS := [docs]

$(VENV)/.installed $(VENV)/.installed-test $(VENV)/.installed-dev $(VENV)/.installed-docs: pyproject.toml constraints.txt | $(BIN)/pip
	@echo 'Installing gptpl$(EXTRAS) into $(VENV) (the first time PyTorch alone takes minutes) ...'
	@$(INSTALL) '.$(EXTRAS)'
# pip would compile with one process; what no Python can compile (templates, old examples) stays as it is.
	@$(BIN)/python -m compileall -qq -j $(WORKERS) $(VENV)/lib || true
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit("gptpl needs Python 3.11 or newer, this is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
