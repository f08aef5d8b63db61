# Each target takes a fresh machine (Python >= 3.11 with venv and pip) to its result.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# DeepSpeed finds its command and helpers through PATH.
RUN := PATH="$(abspath $(BIN)):$$PATH"
# Test files in parallel, one thread per process: ranks wait for each other, clusters for timeouts. Three files at a time
# keep two cores busy.
WORKERS ?= 3
PYTEST := $(RUN) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# In this order: the longest files first, the many short ones fill the gaps at the end.
TESTS := tests/cluster tests/distributed tests/docs tests/unit

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-unit test-distributed test-cluster mutants lint docs docs-serve clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## create the virtual environment with all dependencies

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train,dev]'
	touch $@

demo: install ## build a corpus, train on it, evaluate: a few minutes on a CPU
	$(RUN) $(BIN)/maskvr demo --output demo_run

test: install ## all tests, matrices of settings by a covering subset: 20 minutes on 2 cores
	$(PYTEST) $(TESTS)

test-all: install ## all tests with complete matrices, all fault cases and many more random kills: hours
	$(PYTEST) --whole-matrix --whole-survival $(TESTS)

test-unit: install ## tests without ranks: 3 minutes
	$(PYTEST) tests/unit tests/docs

test-distributed: install ## trainings on gloo ranks of this machine
	$(PYTEST) tests/distributed

test-cluster: install ## Slurm and ssh hosts in namespaces of this machine; needs root
	$(PYTEST) tests/cluster

mutants: install ## apply each fault of tests/mutation/mutants.toml in a copy: its test must fail
	$(RUN) $(BIN)/python -m tests.mutation.run

lint: install ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy docs/experiments

# The site needs the packages' light dependencies only: no torch.
$(VENV)/.installed-docs: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

docs: $(VENV)/.installed-docs ## build the documentation site (strict) into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --clean

docs-serve: $(VENV)/.installed-docs ## serve the documentation locally
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

clean: ## remove the environment and all outputs
	rm -rf $(VENV) build dist *.egg-info demo_run site
