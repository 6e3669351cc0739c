# make demo: set up, plan a 70B model, then plan, emit and run a small one. make test: set up, lint, types and tests; of the parity matrix the
# 60 layouts that cover most pairs of choices. make parity: all of them, 200 and more, about a quarter of an hour.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DONE := $(VENV)/.installed

.PHONY: demo test parity check install clean
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
	$(BIN)/python -m pytest -n 2 --dist loadfile

parity: $(DONE)
	$(BIN)/python -m pytest tests/parity/test_parity.py --parity-full

clean:
	rm -rf $(VENV) build *.egg-info

# Compiles the shipped cost models again from a tree of aiconfigurator's tables: make costs TREE=path/to/tree
SHIPPED := h100_sxm:H100-SXM h200_sxm:H200-SXM a100_sxm:A100-SXM-80GB b200_sxm:B200
.PHONY: costs
costs: $(DONE)
	@test -n "$(TREE)" || { echo "make costs needs TREE=, the folder that holds systems/"; exit 2; }
	mkdir -p build
	set -e; for pair in $(SHIPPED); do gpu=$${pair%%:*}; name=$${pair##*:}; \
	  $(BIN)/meshwright profile import aiconfigurator $(TREE) --gpu $$gpu -o build/$$gpu.yaml; \
	  $(BIN)/meshwright costs compile build/$$gpu.yaml -o meshwright/costmodel/shipped/$$name.costs; done
