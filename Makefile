# `make demo` and `make test` do everything on a fresh machine; `make help` lists the rest.
PYTHON ?= python3
BIN := .venv/bin
PIP := pip install --quiet
EVERYTHING := '.[dev,llama,onnx]'
LOWEST := tests/test_contracts.py tests/test_relied_on.py tests/sources tests/quant/formats/test_quantize.py \
	tests/convert/gguf/test_output.py tests/convert/onnx/test_output.py

.PHONY: help demo test test-fast test-slow test-lowest lint types clean

help:  ## lists these
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' Makefile

demo: .venv/runtime  ## converts an embedded tiny checkpoint and compares it with its source
	$(BIN)/moecast demo

test: .venv/development  ## all tests but the slow ones
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-fast: .venv/development  ## those that take no seconds each, in two minutes
	$(BIN)/python -m pytest -n 2 -m "not slow and not whole"

test-slow: .venv/development  ## the slow ones
	$(BIN)/python -m pytest -n 2 -m slow

test-lowest: .venv-lowest/development  ## with the lowest versions that pyproject.toml allows
	.venv-lowest/bin/python -m moecast.cli --help
	.venv-lowest/bin/python -m pytest -n 2 -m "not slow" $(LOWEST)

lint: .venv/development  ## style, and which way imports go
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# mypy does not follow the editable install, so it finds the checkout under the package's name.
types: .venv/development  ## mypy, strict
	mkdir -p build/types && ln -sfn ../.. build/types/moecast
	$(BIN)/mypy

.venv/runtime: pyproject.toml constraints.txt setup.py $(wildcard quant/kernels/*)
	$(PYTHON) -m venv .venv
	$(BIN)/$(PIP) -c constraints.txt -e .
	touch $@

.venv/development: .venv/runtime
	$(BIN)/$(PIP) -c constraints.txt -e $(EVERYTHING)
	touch $@

.venv-lowest/development: pyproject.toml constraints-lowest.txt setup.py $(wildcard quant/kernels/*)
	$(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/$(PIP) -c constraints-lowest.txt -e $(EVERYTHING)
	touch $@

clean:  ## removes what the others made
	rm -rf .venv .venv-lowest build dist *.egg-info
