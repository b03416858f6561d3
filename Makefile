# Every target sets up what it needs: Python >= 3.11 and make are enough.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= $(shell $(PYTHON) -c "import os; print(max(1, min(4, os.cpu_count() or 1)))")
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test bench lint types format wheel shapes constraints clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(READY)  ## make .venv and install the tested versions into it

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "diffalign needs Python >= 3.11, $(PYTHON) is %s. Name another: make PYTHON=python3.12 ..." % sys.version.split()[0])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the tested versions into $(VENV) (once; a few GB with PyTorch) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(READY)  ## align the bundled model on the bundled pairs; ends with a report
	@$(BIN)/diffalign demo

# One thread a worker: on few cores, torch's own threads would fight the workers for them.
test: $(READY)  ## run all tests (those that need a GPU are skipped without one)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

bench: $(READY)  ## measure again and say what became slower than the stored results (minutes, on a quiet machine)
	@$(BIN)/python benchmarks/guard.py

lint: $(READY)  ## check style and formatting
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --check --quiet . && echo "lint: clean"

types: $(READY)  ## check types
	@$(BIN)/mypy --no-error-summary && echo "types: clean"

format: $(READY)  ## mend style and formatting
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

wheel: $(READY)  ## build dist/*.whl
	@rm -rf build dist && $(BIN)/python -m build --wheel --outdir dist .

shapes: $(READY)  ## train the bundled models again and write their pairs (an hour on 2 cores)
	@$(BIN)/python scripts/build_shapes.py --work runs/shapes --install

# After trying newer versions: write what is installed now as what is tested.
constraints:  ## write constraints.txt from what is installed in .venv
	@$(BIN)/python -m pip freeze --exclude-editable \
		| sed -E '/^(cuda|nvidia|triton|setuptools|pip|wheel)/d' > constraints.new
	@(sed -n '/^#/p' constraints.txt; cat constraints.new) > constraints.both
	@mv constraints.both constraints.txt && rm constraints.new

clean:  ## remove what was built (not .venv)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
