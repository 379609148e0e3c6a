# The two commands of the README are `make report` and `make test`; both build the environment first.
#
#   PYTHON       the interpreter that the environment is made from
#   TORCH_INDEX  another package index for torch alone, for example one with builds for the CPU only
#   TESTS        what pytest runs, for example `make test TESTS=tests/models`

PYTHON ?= python3
TORCH_INDEX ?=
TESTS ?= tests fisherviz
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: report test trust soak peers architectures lint types notebooks docs clean

report: $(STAMP)
	$(BIN)/fisherviz report

test: $(STAMP)
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 -m "not peers and not soak" $(TESTS)

# What docs/trust.md states, measured again: a part of it in some minutes, or all of it, and the long tests, in some hours.
trust: $(STAMP)
	$(ONE_THREAD) $(BIN)/python -m benchmarks.trust

soak: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[mutation]"
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 -m soak $(TESTS)
	$(ONE_THREAD) $(BIN)/python -m benchmarks.trust --long

peers: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[bench]"
	$(ONE_THREAD) $(BIN)/python -m pytest -m peers $(TESTS)

architectures: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torchvision
	$(BIN)/python -m pip install -q -c constraints.txt transformers accelerate timm lightning
	$(ONE_THREAD) $(BIN)/python -m pytest tests/architectures

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

notebooks: $(STAMP)
	$(BIN)/python notebooks/refresh.py --check

# Offline; every warning is an error, and so is a public name that the reference lacks.
docs: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[docs]"
	$(BIN)/python -m sphinx -q -E -W --keep-going -j 2 -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

# torch comes first and pinned, so that nothing later in the resolution can choose another build of it.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev,notebook,sweep]"
	touch $@

clean:
	rm -rf report build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find fisherviz tests -name __pycache__ -type d -prune -exec rm -rf {} +
