# Requires only Python 3.11 or newer, pip and make: all dependencies are installed
# into a virtual environment of this checkout.
#
#     make demo            run a demonstration
#     make test            run the whole test suite
#     make check           lint, types and imports: the quick checks
#     make coverage        the suite, and the lines of each file that it does not reach
#     make soak            kill 1,000 writers of each durable backend (ROUNDS=...), and
#                          servers (FAILOVERS=...); inject every fault at every step; simulate
#                          power losses (POWER_STATES=...); change 2,000 bytes of closed ledgers
#                          (BYTE_FLIPS=...): an hour on two cores
#     make bench           run the benchmarks (see benchmarks/README.md)
#     make PYTHON=python3.13 VENV=.venv-3.13 test

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# Most tests wait for a disk, a server or a process, so several run in parallel.
PARALLEL ?= -n 3 --dist loadfile
ROUNDS ?= 1000
FAILOVERS ?= 20
POWER_STATES ?= 300
BYTE_FLIPS ?= 2000

python := $(VENV)/bin/python
pip := $(python) -m pip --disable-pip-version-check
made := $(VENV)/.made
runtime := $(VENV)/.runtime-installed
dev := $(VENV)/.dev-installed

# Rebuild the environment if its interpreter is missing or the checkout was moved.
stale := $(shell { $(python) -c '' && grep -qxF '$(CURDIR)' $(made); } 2>/dev/null || echo anew)

.PHONY: help demo test dev check lint format types imports coverage soak bench dist clean anew

help:
	@sed -n 's/^#     //p' Makefile

demo: $(runtime)
	$(VENV)/bin/taskstore demo

test: $(dev)
	$(python) -m pytest $(PARALLEL) $(PYTEST_ARGS)

dev: $(dev)

check: lint types imports

lint: $(dev)
	$(python) -m ruff check
	$(python) -m ruff format --check

format: $(dev)
	$(python) -m ruff check --fix
	$(python) -m ruff format

types: $(dev)
	$(python) -m mypy

imports: $(dev)
	$(VENV)/bin/lint-imports --no-logo --no-cache

coverage: $(dev)
	$(python) -m pytest --cov --cov-report=term-missing $(PYTEST_ARGS)

soak: $(dev)
	TASKSTORE_KILL_ROUNDS=$(ROUNDS) TASKSTORE_FAILOVERS=$(FAILOVERS) TASKSTORE_FAULT_STEPS=0 \
	  TASKSTORE_POWER_STATES=$(POWER_STATES) TASKSTORE_BYTE_FLIPS=$(BYTE_FLIPS) \
	  $(python) -m pytest -n 3 --dist load tests/crash $(PYTEST_ARGS)

bench: $(dev)
	$(python) benchmarks/lone.py
	$(python) benchmarks/growth.py
	$(python) benchmarks/contention.py
	$(python) benchmarks/feeds.py
	$(python) benchmarks/sharing.py
	$(python) benchmarks/stalls.py

# The sdist, and the wheel built from it.
dist: $(dev)
	rm -rf dist
	$(python) -m build --no-isolation

clean:
	rm -rf $(VENV) build dist

$(made): $(stale)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "taskstore needs Python 3.11 or newer, but $(PYTHON) is older or missing." \
	    "Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@# Debian packages ensurepip separately, in python3-venv; its pip is the fallback.
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then \
	  $(PYTHON) -m venv --clear $(VENV); \
	elif $(PYTHON) -m pip --version >/dev/null 2>&1; then \
	  $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(python) install --quiet pip; \
	else \
	  echo "$(PYTHON) has neither ensurepip nor pip: packages cannot be installed into" \
	    "a virtual environment. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; \
	fi
	@echo '$(CURDIR)' > $@

$(runtime): pyproject.toml $(made)
	$(pip) install --quiet --editable .
	@touch $@

$(dev): pyproject.toml $(made)
	$(pip) install --quiet --editable '.[dev]'
	@touch $(runtime) $@
