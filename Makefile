# Every target does its own set-up in .venv: a machine with python3 and GNU make is enough. `make help` lists them.
#
# Variables: PYTHON       the interpreter that makes the environment (default python3, 3.10 or newer)
#            VENV         the environment's folder (default .venv)
#            DATA         make demo: a COLMAP folder of yours instead of the generated scene
#            OUT          make demo: where the results go (default demo-output)
#            ARGS         make test, make demo: further arguments, e.g. ARGS="-k ply"
#            TORCH_INDEX  the package index that torch comes from

PYTHON ?= python3
VENV ?= .venv
OUT ?= demo-output
DATA ?=
ARGS ?=
export TORCH_INDEX

BIN := $(VENV)/bin
SETUP := launch/install.py pyproject.toml submodules/masksplat/pyproject.toml $(wildcard constraints/*.txt)
RUN_READY := $(VENV)/.ready-run
TEST_READY := $(VENV)/.ready-tests
LPIPS_READY := $(VENV)/.ready-lpips

.DEFAULT_GOAL := help
.PHONY: help demo demo-baseline test test-slow lint types bench kernels lpips doctor setup constraints clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' Makefile

demo: $(RUN_READY)  ## generate a scene, train it with masks, measure it, write report.html (or DATA=folder)
	@$(BIN)/python -m launch.demo --output "$(OUT)" $(if $(DATA),--data "$(DATA)") $(ARGS)

test: $(TEST_READY)  ## run the tests (minutes)
	@$(BIN)/python -m pytest $(ARGS)

test-slow: $(TEST_READY)  ## run the tests that train for minutes
	@$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(TEST_READY)  ## check the style of the code
	@$(BIN)/python -m ruff check .

types: $(TEST_READY)  ## check the types
	@$(BIN)/python -m mypy

bench: $(TEST_READY)  ## measure the speed of the CPU body
	@$(BIN)/python -m bench.rasterize_cpu $(ARGS)

kernels: $(RUN_READY)  ## compile the CUDA kernels ahead of their first use (for another GPU: ARGS="--architecture sm_90a")
	@$(BIN)/python -m masksplat.cuda $(ARGS)

demo-baseline: $(RUN_READY)  ## train the demo with masks off and record what it keeps (maintainers)
	@$(BIN)/python -m launch.demo --output "$(OUT)" --record-baseline $(ARGS)

lpips: $(LPIPS_READY)  ## install the weights of LPIPS (64 MB)

doctor: $(RUN_READY)  ## say what is installed and what each missing part would give
	@$(BIN)/python train.py --doctor

setup: $(RUN_READY)  ## make .venv and install the dependencies

constraints: $(TEST_READY)  ## write the versions in .venv to constraints/ (after its tests have passed)
	@$(BIN)/python -m launch.install --venv $(VENV) --write-constraints

clean:  ## remove .venv, results and caches
	rm -rf $(VENV) demo-output output .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: python
python:
	@command -v $(PYTHON) > /dev/null || { echo "$(PYTHON) was not found. Install Python 3.10 or newer," \
	  "or name it: make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed, and \
	$(PYTHON) is %d.%d. Name another one: make PYTHON=/path/to/python3" % sys.version_info[:2])'

$(RUN_READY): $(SETUP) | python
	@$(PYTHON) launch/install.py --venv $(VENV) --extras view
	@touch $@

$(TEST_READY): $(SETUP) | python
	@$(PYTHON) launch/install.py --venv $(VENV) --extras view,tests,lint
	@touch $@ $(RUN_READY)

$(LPIPS_READY): $(RUN_READY)
	@$(PYTHON) launch/install.py --venv $(VENV) --lpips
	@touch $@
