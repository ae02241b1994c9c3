# What there is to type. A fresh Debian 12 or Ubuntu machine, as root, needs nothing else first.

PYTHON ?= python3
BIN := .venv/bin
LAB := $(PYTHON) tests/lab/run.py

help:
	@echo 'make demo      see it: real IPsec between two hosts, in a virtual machine'
	@echo 'make test      everything: lint, types, tests, coverage, and the lab'
	@echo 'make lab       the tests that need a real kernel; K=expression selects some'
	@echo 'make unit      the tests that need none; K=expression selects some'
	@echo 'make lint      ruff: style and format'
	@echo 'make types     mypy and pyright, both strict'
	@echo 'make clean     remove what was built; make distclean removes downloads too'

test: lint types unit lab

.venv/ready: pyproject.toml tests/lab/prepare.sh
	@PYTHON=$(PYTHON) sh tests/lab/prepare.sh python
	@echo 'installing ipsec_aio and its tools into .venv (a minute)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@

.lab/ready: tests/lab/prepare.sh
	@PYTHON=$(PYTHON) sh tests/lab/prepare.sh lab
	@touch $@

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy
	$(BIN)/pyright

unit: .venv/ready
	$(BIN)/pytest $(if $(K),-k '$(K)')

lab: .venv/ready .lab/ready
	$(LAB) -- .venv/bin/pytest -p no:cacheprovider tests/lab $(if $(K),-k '$(K)')

demo: .venv/ready .lab/ready
	@$(LAB) --limit 300 -- .venv/bin/python tests/lab/demo.py

clean:
	rm -rf build dist htmlcov .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache .lab/run-*
	find ipsec_aio tests examples -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .lab

.PHONY: help demo test lint types unit lab clean distclean
