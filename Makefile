.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.SUFFIXES:

BIN := .venv/bin
READY := .venv/.installed

# Options of a target's own command, as in `make demo ARGS="--workers 4 --epochs 2"`.
ARGS ?=

.PHONY: help
help:  ## show this list
	@echo "Targets (the first use makes .venv; options go in ARGS=\"...\"):"
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(READY)  ## train on MNIST with Dask and compare with sequential training
	@$(BIN)/dask-nn mnist --report report $(ARGS)

.PHONY: test
test: $(READY)  ## run the tests
	@$(BIN)/python -m pytest $(ARGS)

.PHONY: storm
storm: $(READY)  ## one long run with a hundred random kills
	@DASK_NN_STORM_KILLS=100 $(BIN)/python -m pytest tests/faults/test_storm.py $(ARGS)

.PHONY: lint
lint: $(READY)  ## ruff, mypy and the contract of the floors
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

.PHONY: bench
bench: $(READY)  ## measure against sequential training, torchrun, kills and checkpoints
	@$(BIN)/python -m benchmarks $(ARGS)
	@$(BIN)/python -m benchmarks.reliability

.PHONY: clean
clean:  ## remove .venv and everything that was built or measured
	@rm -rf .venv build dist report bench-report .hypothesis .mypy_cache .pytest_cache \
		.ruff_cache .import_linter_cache dask-scratch-space dask-worker-space
	@find src tests $(wildcard benchmarks) -name __pycache__ -type d -prune -exec rm -rf {} +

# Looked for in this order: python3.13, uv, a python3 that is new enough.
$(READY): pyproject.toml constraints.txt
	@new_enough='import sys; sys.exit(sys.version_info < (3, 13))'; \
	if $(BIN)/python -c "$$new_enough" 2>/dev/null; then \
		:; \
	elif python3.13 -c 'import ensurepip, venv' 2>/dev/null; then \
		echo "Making .venv with $$(python3.13 --version)"; \
		python3.13 -m venv --clear .venv; \
	elif command -v uv >/dev/null; then \
		echo "Making .venv with $$(uv --version)"; \
		uv venv --quiet --clear --seed --python 3.13 .venv; \
	elif python3 -c "$$new_enough" 2>/dev/null && python3 -c 'import ensurepip, venv' 2>/dev/null; then \
		echo "Making .venv with $$(python3 --version)"; \
		python3 -m venv --clear .venv; \
	else \
		found=$$(python3 --version 2>/dev/null || echo none); \
		echo "dask-nn needs Python 3.13 or newer; found: $$found." >&2; \
		echo "Install one of: python3.13 with its venv package, pyenv (pyenv install 3.13), uv." >&2; \
		exit 1; \
	fi
	@echo "Installing the packages of constraints.txt into .venv (PyTorch is large: some minutes)"
	@if command -v uv >/dev/null; then \
		uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]'; \
	else \
		$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	fi
	@touch $@
