# Lacuna: everything a newcomer or CI runs. Each target prints what it does and where its results are.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.lacuna-installed
DEMO_OUT ?= demo-out
PYTEST_WORKERS ?= 2
export OMP_NUM_THREADS ?= 1
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help install demo test test-all check format bench bench-utility clean

help:
	@echo "make demo      a whole three-hospital study on this machine, from plan to synthetic scans"
	@echo "make test      format, lint, types, import contracts and the tests"
	@echo "make test-all  the same with the slow suites"
	@echo "make check     format, lint, types and import contracts alone"
	@echo "make bench     benchmarks; tables go to tests/benchmarks/"
	@echo "make bench-utility  what synthetic scans are worth at each epsilon (an hour and a quarter on two cores; goes on where it stopped)"
	@echo "make clean     remove the virtual environment and caches"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Lacuna needs Python 3.11 or later; this is " + sys.version.split()[0] + " (set PYTHON=...)")'
	@echo "== installing into $(VENV) with the versions of constraints.txt (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	@echo "== lacuna demo: three hospitals on this machine; results in $(DEMO_OUT)/"
	$(BIN)/lacuna demo --out $(DEMO_OUT)

check: $(STAMP)
	@echo "== format, lint, types, import contracts"
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: check
	@echo "== tests (results below; slow suites: make test-all)"
	$(BIN)/python -m pytest -m "not slow" -n $(PYTEST_WORKERS)

test-all: check
	@echo "== all tests, slow ones too (this takes a while)"
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS)
	@echo "== bill of materials of this environment (CycloneDX): sbom.json"
	$(BIN)/python -m cyclonedx_py environment --output-reproducible --of JSON -o sbom.json $(BIN)/python

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	@echo "== benchmarks; each prints a table of ratios measured in this run"
	$(BIN)/python -m tests.benchmarks

bench-utility: $(STAMP)
	@echo "== utility benchmark; figures in tests/benchmarks/results/utility, tables and curves in tests/benchmarks/utility"
	$(BIN)/python -m tests.benchmarks.utility --at-once 2

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
