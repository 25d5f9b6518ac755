# `make` lists what can be made. Everything runs in a private .venv, made on first use from a Python 3.11 or newer
# (PYTHON=/path/to/python chooses which) and brought up to date when pyproject.toml changes.

VENV := .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
SHELL := /bin/sh
MAKEFLAGS += --no-print-directory
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet install
ARGS ?=
JOBS ?= 6
MINUTES ?= 10
# Where psycopg has no wheel: EXTRAS=embedded,cli, and the libpq of the machine.
EXTRAS ?= binary,embedded,cli
# The group of what the checkouts import is installed where there are any.
UPSTREAM = $(if $(or $(PGKV_UPSTREAM),$(wildcard .servers/upstream)),$(VENV)/.upstream)
# Where nothing may be compiled to files, each of the hundreds of processes that tests start compiles pgkv again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.NOTPARALLEL: # one check after the other: the first failure is the last thing on the screen
.PHONY: help demo servers upstream test test-all lint types imports tests interleavings soak bench bench-growth docs package fmt clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## see pgkv at work; starts its own database
	@$(BIN)/python -m pgkv demo

test: lint types imports tests ## all checks and all tests: what CI runs

test-all: export PGKV_TESTS = full
test-all: upstream test interleavings soak ## make test in full, suites of other projects, all interleavings, ten minutes of soak

lint: $(VENV)/.dev ## style and likely mistakes
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet --output-format concise . || { echo "Run: make fmt"; exit 1; }

# Beside mypy the tests are compiled, once, or each process that runs them would do it.
types: $(VENV)/.dev ## mypy, strict
	@$(BIN)/python -m pytest --collect-only -qq >/dev/null & $(BIN)/mypy --num-workers 2; status=$$?; wait; exit $$status

imports: $(VENV)/.dev ## the direction of imports
	@out=$$($(BIN)/lint-imports --no-cache 2>&1) || { echo "$$out"; exit 1; }

# Faults are real here, and so is time: many tests wait, so JOBS processes run them side by side.
tests: $(VENV)/.dev $(UPSTREAM) ## the tests; ARGS="tests/unit -k ttl" chooses some
	@$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal $(ARGS)

servers: ## more to test with, into .servers/: PostgreSQL 14, a PgBouncer that keeps prepared statements
	@sh tests/more_servers.sh

upstream: $(VENV)/.upstream ## more to test with, into .servers/: projects with adapters, whose own suites run too (or PGKV_UPSTREAM=DIR)
	@$(if $(PGKV_UPSTREAM),,sh tests/upstream.sh)

interleavings: $(VENV)/.dev ## every order of statements, steps and bytecodes, within bounds; ARGS="lock 0000021" runs one again
	@$(if $(ARGS),,PGKV_TESTS=full PGKV_INTERLEAVINGS=full $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal -rP -q \
		--timeout=3600 tests/interleavings -k "pairs or pool")
	@$(BIN)/python -m tests.interleavings $(ARGS)

soak: $(VENV)/.dev ## all patterns under random faults for MINUTES; ends with exact totals
	@$(BIN)/python -m tests.interleavings.soak --minutes $(MINUTES)

bench: $(VENV)/.dev ## the benchmarks; ARGS are passed on
	@$(BIN)/python -m tests.benchmarks $(ARGS)

bench-growth: $(VENV)/.dev ## what grows with use and where it stops, for ten minutes; figures go into the page
	@$(BIN)/python -m tests.benchmarks --big --only growth --output docs $(ARGS)

docs: $(VENV)/.dev ## the documentation, into docs/_build/html
	@echo "Building the documentation (about half a minute) ..."
	@$(BIN)/sphinx-build -q -W --keep-going -j auto -b html docs docs/_build/html
	@echo "Built without a warning. Open docs/_build/html/index.html"

package: $(VENV)/.dev ## the wheel and the sdist, into dist/, checked as PyPI will
	@rm -rf dist
	@$(BIN)/python -m build --quiet
	@$(BIN)/twine check --strict dist/*
	@$(BIN)/check-wheel-contents dist/*.whl
	@$(BIN)/pyroma --min 8 dist/*.tar.gz # 10 needs the address of a project page

fmt: $(VENV)/.dev ## format the code, fix what can be fixed
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format --quiet .

clean: ## remove .venv, builds and caches
	@rm -rf $(VENV) build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- the environment ---------------------------------------------------------------------------------------------

$(VENV)/.demo: $(VENV)/.made pyproject.toml
	@echo "Installing pgkv and an embedded PostgreSQL into $(VENV) ..."
	@$(PIP) --editable '.[$(EXTRAS)]'
	@touch $@

# Dependency groups need a newer pip than the one that Python 3.11 brings.
$(VENV)/.dev: $(VENV)/.made pyproject.toml
	@echo "Installing pgkv and the tools of its developers into $(VENV) ..."
	@$(PIP) --upgrade 'pip>=25.1'
	@$(PIP) --group dev --editable '.[$(EXTRAS)]'
	@touch $@ $(VENV)/.demo

$(VENV)/.upstream: $(VENV)/.dev
	@$(PIP) --group upstream
	@touch $@

# A python3 without venv or ensurepip (Debian without python3-venv) cannot make an environment: try the next one.
$(VENV)/.made:
	@rm -rf $(VENV)
	@for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11); do \
		if "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			"$$python" -m venv $(VENV) && touch $@ && exit 0; \
		fi; \
	done; \
	echo "make: found no Python 3.11 or newer that has the venv module."; \
	echo "Install one (on Debian and Ubuntu: apt install python3-venv), or say where it is: make PYTHON=/path/to/python3"; \
	exit 1
