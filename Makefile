# Everything works from a clean clone with Python, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-interop lint docs clean

setup: $(STAMP)

# Installed again only when what it depends on has changed.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: setup
	$(BIN)/saelens-matryoshka demo

test: setup
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 8

test-interop: setup
	$(BIN)/nox --non-interactive

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html; or, with the search: $(BIN)/mkdocs serve"

clean:
	rm -rf $(VENV) .nox site
