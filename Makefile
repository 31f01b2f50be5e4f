# Everything a newcomer needs: make demo, make test, make check, make bench, make fuzz. Works in folders with spaces.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# threads that spin while they wait starve each other on shared cores
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help demo test check format bench fuzz clean

help:  ## show this list
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*##/\t/'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedlora needs Python 3.11 or newer; say PYTHON=... to name one")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $(STAMP)

demo: $(STAMP)  ## train a real model with four methods on one federation, and compare them
	$(BIN)/python -m fedlora demo

test: $(STAMP)  ## run the tests, offline
	$(BIN)/python -m pytest -n 2

check: $(STAMP)  ## formatting, lint, types
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

format: $(STAMP)  ## put the formatting right
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

bench: $(STAMP)  ## measure speed and memory against plain references
	$(BIN)/python -m benchmarks.run --out benchmarks/out

SECONDS ?= 600
fuzz: $(STAMP)  ## search for messages that decoding does not refuse as it should; SECONDS=600 says for how long
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[fuzz]' -c constraints.txt
	mkdir -p build/fuzz
	PYTHONPATH=tests $(BIN)/python tests/fuzz/fuzz_wire.py build/fuzz tests/fuzz/corpus \
		-artifact_prefix=tests/fuzz/corpus/ -max_total_time=$(SECONDS) -max_len=2048 -timeout=10

clean:  ## remove what these commands made, runs excepted
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache benchmarks/out build/fuzz
