# make demo | test | soak | lint | docs | clean. Each does its own set-up; ARGS reach the command.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := guest host idc images testbed tests

.PHONY: demo test soak lint unit docs setup setup-dev python clean

demo: setup
	@$(BIN)/testbed demo $(ARGS)

test: setup-dev lint
	@$(BIN)/pytest -m "not soak" $(ARGS)

soak: setup-dev
	@$(BIN)/pytest -m soak --timeout 5400 $(ARGS)

lint: setup-dev
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/mypy

unit: setup-dev
	@$(BIN)/pytest tests/unit tests/process tests/qtest $(ARGS)

docs: setup-dev
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build $(ARGS) && echo "build/docs/index.html"

setup: python
	@$(PYTHON) testbed/bootstrap.py run

setup-dev: python
	@$(PYTHON) testbed/bootstrap.py dev

python:
	@command -v $(PYTHON) >/dev/null || { echo "setup: there is no $(PYTHON); as root: apt-get install python3, or name another one of 3.11 or newer: make PYTHON=..." >&2; exit 1; }

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis idc/_core.c idc/_core*.so
