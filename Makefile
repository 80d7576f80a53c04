# Two commands on a fresh machine: `make demo` and `make test`. Everything lives in .venv; nothing global is touched.
PYTHON ?= python3
# Files of tests that are run at a time: most tests keep one core busy.
TESTERS ?= 2
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CHECKED := src tests pretraining benchmarks examples

.PHONY: demo test test-all check format lint types contracts clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(INSTALLED)
	$(BIN)/pip install --quiet -c constraints.txt --group test --group check
	@touch $@

demo: $(INSTALLED)
	$(BIN)/tunesmith demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not slow and not gpu" -q -n $(TESTERS) --dist loadfile --no-loadscope-reorder

test-all: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not gpu" -q -n $(TESTERS) --dist loadfile --no-loadscope-reorder

check: format lint types contracts test

format: $(VENV)/.installed-test
	$(BIN)/ruff format --check $(wildcard $(CHECKED))

lint: $(VENV)/.installed-test
	$(BIN)/ruff check $(wildcard $(CHECKED))

types: $(VENV)/.installed-test
	$(BIN)/mypy

contracts: $(VENV)/.installed-test
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) .demo
