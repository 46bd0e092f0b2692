# Two commands set everything up on a machine with Python 3.11 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/pip install --quiet -c constraints.txt

MODEL  := smollm2-135m-instruct
BUNDLE ?= build/$(MODEL)-fp32
PROMPT ?= Write a Python function that reverses a string.
export BIN MODEL BUNDLE PROMPT

.PHONY: demo docs test test-release lint clean

$(VENV)/.export: pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[cpu,export]'
	touch $@

$(VENV)/.dev: $(VENV)/.export
	$(PIP) -e '.[dev]'
	touch $@

## demo: fetch the real model, export it, validate it, and decode with and without Medusa
demo: $(VENV)/.export
	sh scripts/demo.sh

$(VENV)/.docs: pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[docs]'
	touch $@

## docs: the documentation as a site, in build/site
docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict
	@echo "to read it, with search: $(BIN)/python -m http.server -d build/site, then http://localhost:8000"

## test: lint, types, import rules, and all tests but those of `test-release`. TEST_OPTIONS: more words for pytest
test: $(VENV)/.dev lint
	$(BIN)/python -m pytest -m "not release" --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --max-worker-restart 1 $(TEST_OPTIONS)

## test-release: build the packages, and install and run them in new environments, from the package index
test-release: $(VENV)/.dev
	$(BIN)/python -m pytest -m release tests/release $(TEST_OPTIONS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf build $(VENV)
