# Two commands matter: `make demo` (the whole job on the shipped teacher; RESUME=1 continues an interrupted one) and
# `make test`.
PYTHON  ?= python3
VENV    ?= .venv
BIN     := $(VENV)/bin
DEVICE  ?= auto
OUT     ?= out/demo
MINUTES ?= 2

.PHONY: env demo test test-slow lint format clean

env: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: env
	$(BIN)/fla-swap demo --device $(DEVICE) --minutes $(MINUTES) --out $(OUT) $(if $(RESUME),--resume)

test: env
	$(BIN)/python -m pytest -q -n auto

test-slow: env
	$(BIN)/python -m pytest -q -n auto -m "slow and not gpu"

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info out .pytest_cache .ruff_cache
