# Shortcuts for people who work on the project; the README's commands need none of them.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: setup demo test slow lint format

setup: .venv/ready

.venv/ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e ".[test,bnb]"
	touch $@

demo: setup
	$(BIN)/offload-triforce demo

test: setup lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup

slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
