# Each target brings a fresh machine (Python >= 3.11 with venv and pip) to a result.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The deepspeed command and its helpers are found through PATH.
RUN := PATH="$(abspath $(BIN)):$$PATH"

.PHONY: demo test test-unit test-unit-and-lamb test-cluster test-distributed lint docs docs-serve install clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train,dev]'
	touch $@

demo: install
	$(RUN) $(BIN)/maskvr demo --output demo_run

# Tests of clusters mostly wait; ranks keep two cores busy by themselves. Those of LAMB compute and wait for nothing.
LAMB := tests/distributed/test_lamb.py
test: install
	$(MAKE) -j 2 --output-sync=target test-unit-and-lamb test-cluster
	$(MAKE) test-distributed LEFT_OUT=$(LAMB)

test-unit-and-lamb: install
	$(MAKE) test-unit
	$(RUN) $(BIN)/python -m pytest $(LAMB)

test-unit: install
	# Two at a time, of one thread each.
	$(RUN) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/unit tests/docs

test-cluster: install
	$(RUN) $(BIN)/python -m pytest tests/cluster

test-distributed: install
	$(RUN) $(BIN)/python -m pytest tests/distributed $(LEFT_OUT:%=--ignore=%)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy docs/experiments

# The site needs the packages' light dependencies only: no torch.
$(VENV)/.installed-docs: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --clean

docs-serve: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

clean:
	rm -rf $(VENV) build dist *.egg-info demo_run site
