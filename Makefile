PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# torch from here has no CUDA packages; where it cannot be reached, pip takes what the other indexes have.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help demo app test test_slow lint wheel clean

help:            ## this list
	@sed -n 's/^\([a-z_]*\):[^#]*## */\1|/p' $(MAKEFILE_LIST) | while IFS='|' read name what; do printf '  make %-10s %s\n' "$$name" "$$what"; done

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --no-deps --retries 1 --extra-index-url $(TORCH_INDEX) $$(grep '^torch==' requirements.txt)
	$(BIN)/pip install -q -r requirements.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

$(VENV)/.installed-serve: $(VENV)/.installed requirements-serve.txt
	$(BIN)/pip install -q -r requirements-serve.txt
	touch $@

demo: $(VENV)/.installed      ## every stage on lance-nano, then a table, demo_out/report.html and side_by_side.png
	rm -rf demo_out
	$(BIN)/python examples/demo.py --out demo_out

# A file's tests share what it sets up: they stay in one process.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

test: $(VENV)/.installed-dev lint      ## lint and the test suite, 4 minutes on two cores
	$(PYTEST) -m "not slow"

test_slow: $(VENV)/.installed-dev      ## what `make test` leaves out: stages in processes of their own, 4 minutes more
	$(PYTEST) -m slow

lint: $(VENV)/.installed-dev      ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

app: $(VENV)/.installed-serve      ## the web page and the API on lance-nano, http://127.0.0.1:8000
	$(BIN)/python serve.py

wheel: $(VENV)/.installed-dev      ## dist/*.whl, after its test
	$(BIN)/python -m pytest tests/test_packaging.py
	$(BIN)/pip wheel -q --no-deps --wheel-dir dist .

clean:            ## remove the venv, demo_out and dist
	rm -rf $(VENV) demo_out dist build
