# `make demo` and `make test` do everything on a fresh machine; the rest is for development.
PYTHON ?= python3
BIN := .venv/bin
PACKAGES := archs quant sources runner convert commands
MODULES := cli documents errors progress

.PHONY: demo test lint types clean

demo: .venv/runtime
	$(BIN)/moecast demo

test: .venv/development
	$(BIN)/python -m pytest

lint: .venv/development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# mypy does not follow the editable install, so it looks at the checkout under the package's name.
types: .venv/development
	mkdir -p build/types && ln -sfn ../.. build/types/moecast
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml \
		$(PACKAGES:%=-p moecast.%) $(MODULES:%=-m moecast.%)

.venv/runtime: pyproject.toml constraints.txt setup.py $(wildcard quant/kernels/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

.venv/development: .venv/runtime
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,llama,onnx]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
