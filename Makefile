# demo: from a bare clone to a proved specialist. test: the suite. check: lint and types. See README.md.
PYTHON ?= python3
BIN := .venv/bin

demo: .venv/demo
	$(BIN)/metier run recipes/licence-clerk

test: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m ""

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

docs: .venv/dev
	$(BIN)/python docs/generate.py
	$(BIN)/zensical build

bench: .venv/bench
	$(BIN)/python bench/sft_speed.py

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[all]'
	@touch $@

.venv/dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

.venv/bench: .venv/dev
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt trl
	@touch $@

.PHONY: demo test test-all check docs bench
