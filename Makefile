# Each target sets itself up: Python 3.10 or newer, make and a package index are enough.

PYTHON ?= python3
PACKAGES := $(patsubst %/pyproject.toml,%,$(wildcard */pyproject.toml))
BIN := .venv/bin

export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.PHONY: help demo test test-lowest test-harness check bench bench-sepweight bench-peers clean

help:
	@echo 'make demo         answer a question with the embedded model, within a budget smaller than its weights'
	@echo 'make test         each package alone in a fresh environment, then all of them together'
	@echo 'make test-lowest  each package with the oldest Python and dependencies that it declares (5 GB, 10 minutes)'
	@echo 'make test-harness install lm-evaluation-harness (600 MB) and hold the scores against it'
	@echo 'make check        lint, format, types'
	@echo 'make bench        measure; make bench ARGS=--help says what'
	@echo 'make bench-sepweight  measure split, verify and reading'
	@echo 'make bench-peers  install what bench compares with, each in an environment of its own'
	@echo 'make clean        remove what these made'

demo: .venv/ready
	$(BIN)/python demo/demo.py $(ARGS)

test: .venv/ready
	$(BIN)/python tests_integration/isolation.py $(PACKAGES)
	$(BIN)/pytest --doctest-modules tests_integration demo/facts.py

test-lowest: .venv/ready
	$(BIN)/python tests_integration/lowest.py $(PACKAGES) $(ARGS)

test-harness: .venv/ready
	$(BIN)/python -m pip install --quiet 'lm_eval>=0.4.9'
	$(BIN)/pytest -rs tests_integration/test_sampler_harness.py

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

bench: .venv/ready
	$(BIN)/python bench/bench.py $(ARGS)

bench-sepweight: .venv/ready
	$(BIN)/python bench/sepweight.py $(ARGS)

bench-peers: .venv/ready
	$(BIN)/python bench/peers.py $(ARGS)

clean:
	rm -rf .venv .venv-lowest .pytest_cache .ruff_cache .hypothesis */.hypothesis */dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/ready: pyproject.toml constraints.txt $(PACKAGES:%=%/pyproject.toml)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --group dev $(PACKAGES:%=-e ./%)
	@touch $@
