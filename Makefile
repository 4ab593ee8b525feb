# `make serve` and `make test` set up what they need; everything lives in $(VENV).
# ARGS passes on to `baton serve`, e.g. make serve ARGS="--decode 2".

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
STAMP := $(VENV)/.installed
PACKAGES := protos kvstore engine prefill_workers decode_workers router planner cluster simulator

.PHONY: serve test test-all check bench install protos lock clean

serve: install
	@exec $(BIN)/baton serve $(ARGS)

# What every change must pass: 20 minutes at most.
test: install
	$(BIN)/python -m pytest -m "not slow" tests

# What CI runs: also faults and long proofs; 60 minutes at most.
test-all: install
	$(BIN)/python -m pytest tests

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(PACKAGES)
	$(BIN)/lint-imports
	$(BIN)/python -m tests.check_protos

bench: install
	$(BIN)/python -m benchmarks.handoff

install: $(STAMP)

$(STAMP): requirements/cpu.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info[:2] == (3, 11) else "Baton is locked for Python 3.11; set PYTHON to one, e.g. make PYTHON=python3.11 serve")'
	@echo "Installing into $(VENV): about 2 minutes and 3.5 GB."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/cpu.lock 2>$(VENV)/pip.log || { cat $(VENV)/pip.log >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable . 2>>$(VENV)/pip.log || { cat $(VENV)/pip.log >&2; exit 1; }
	$(BIN)/python -m router.unit.fronts.vllm_rs $(BIN)/vllm-rs
	touch $(STAMP)

protos: install
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. protos/worker.proto protos/inference.proto

lock:
	$(PYTHON) requirements/lock.py

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
