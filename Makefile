# What there is to type. A fresh Debian or Ubuntu machine with make and git, as root, needs nothing else first.

PYTHON ?= python3
BIN := .venv/bin
LAB := $(PYTHON) tests/lab/run.py

help:
	@echo 'make demo      see it: real IPsec between two hosts, in a virtual machine'
	@echo 'make test      everything: lint, types, tests with their coverage, and the lab'
	@echo 'make unit      the tests that need no kernel of their own; K=expression selects'
	@echo 'make lab       the tests on real IPsec, in a virtual machine; K=expression selects'
	@echo 'make bench     what tokens cost, beside the loops that have none: docs/performance.md;'
	@echo '               QUICK=1 for a first look, which writes nothing'
	@echo 'make lint      ruff: style and format'
	@echo 'make types     mypy and pyright, both strict'
	@echo 'make docs      these pages and the API, as HTML in build/docs'
	@echo 'make clean     remove what was made; make distclean removes downloads, too'

test: lint types unit lab

.venv/ready: pyproject.toml tests/lab/prepare.sh
	@PYTHON=$(PYTHON) sh tests/lab/prepare.sh python
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo 'prepare: ipsec_aio and its tools go into .venv (a minute)'
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

.lab/ready: tests/lab/prepare.sh
	@PYTHON=$(PYTHON) sh tests/lab/prepare.sh lab
	@touch $@

demo: .venv/ready .lab/ready
	@$(LAB) --limit 300 -- .venv/bin/python tests/lab/demo.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

unit: .venv/ready
ifdef K
	$(BIN)/pytest -k '$(K)'
else
	$(BIN)/pytest -n auto --dist worksteal --cov --cov-report=term --cov-report=json:.coverage.json
	$(BIN)/python tests/coverage_gate.py .coverage.json
endif

lab: .venv/ready .lab/ready
ifdef K
	$(LAB) --limit 3600 -- .venv/bin/pytest -p no:cacheprovider tests/lab -k '$(K)'
else
	$(LAB) --limit 3600 --spread -- .venv/bin/pytest -p no:cacheprovider tests/lab
endif

docs: .venv/docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo 'docs: open build/docs/index.html'

.venv/docs: .venv/ready
	@echo 'prepare: what builds the pages goes into .venv'
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[docs]'
	@touch $@

bench: .venv/ready
	@$(BIN)/python bench $(if $(QUICK),--quick)

clean:
	rm -rf build dist htmlcov .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache .lab/run-*
	find ipsec_aio tests examples -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .lab

.PHONY: help bench demo test lint types unit lab docs clean distclean
