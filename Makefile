# make demo: set up, plan a 70B model, then plan, emit and run a small one. make test: set up, lint, types and tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DONE := $(VENV)/.installed

.PHONY: demo test check install clean
install: $(DONE)

$(DONE): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e '.[hf,dev]' -c constraints.txt
	touch $(DONE)

demo: $(DONE)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo/run.sh

check: $(DONE)
	$(BIN)/ruff check meshwright tests examples
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) build *.egg-info
