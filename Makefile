# The two commands of the README are `make report` and `make test`; both build the environment first.
#
#   PYTHON       the interpreter that the environment is made from
#   TORCH_INDEX  another package index for torch alone, for example one with builds for the CPU only
#   TORCH        the requirement for torch in `make lowest`, where its oldest version has no build for the machine
#   TESTS        what pytest runs, for example `make test TESTS=tests/models`

PYTHON ?= python3
TORCH_INDEX ?=
TESTS ?= tests fisherviz
TORCH ?=
LOWEST ?= .lowest
LOWEST_TESTS ?= tests/support tests/operators tests/statistics tests/results tests/report tests/plotting tests/datasets \
    tests/commands tests/training tests/matrices tests/models
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

# Images of machines often forbid Python's caches; without them every interpreter compiles its libraries anew, and the
# tests start a hundred.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: report test exhibits trust soak peers architectures lint types notebooks docs lock lowest clean

report: $(STAMP)
	$(BIN)/fisherviz report

test: $(STAMP)
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist worksteal -m "not peers and not soak" $(TESTS)

# Every exhibit of the papers at its smallest scale.
exhibits: $(STAMP)
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist worksteal tests/papers/test_exhibits.py

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
	$(BIN)/python -m sphinx -q -E -W --keep-going -j 2 -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

# Every file that is installed has one of the hashes of requirements.lock, but for torch: its builds differ from machine to
# machine, and it is pinned by its version alone. All that torch needs of others, but its libraries for a GPU, is there
# before it, and nothing later can choose another build of it.
$(STAMP): pyproject.toml constraints.txt requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-deps --no-compile --require-hashes -r requirements.lock
	$(BIN)/python -m pip install -q -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

# After a change of pyproject.toml or constraints.txt: the hashes of all files of the pinned versions.
lock:
	uv pip compile -q pyproject.toml .ci/torch.in --extra dev --extra notebook --extra sweep --extra docs \
	    -c constraints.txt --override .ci/without-torch.txt --no-emit-package torch --generate-hashes --universal \
	    --python-version 3.11.5 --no-header --no-annotate --no-emit-index-url -o requirements.lock

# The oldest versions that pyproject.toml admits, in an environment of their own, with a good part of the tests; it takes uv.
# TORCH is for machines that have no build of torch's oldest version: `make lowest TORCH=torch==2.13.0`.
lowest:
	uv venv -q --clear --python $(PYTHON) $(LOWEST)
	echo "$(TORCH)" > $(LOWEST)/torch.txt
	uv pip compile -q pyproject.toml --extra dev --extra sweep --resolution lowest-direct --no-annotate --no-header \
	    --override $(LOWEST)/torch.txt -o $(LOWEST)/versions.txt
	VIRTUAL_ENV=$(LOWEST) uv pip install -q --only-binary :all: -r $(LOWEST)/versions.txt
	PYTHONPATH=. $(ONE_THREAD) $(LOWEST)/bin/python -m pytest -q -n 2 -m "not peers and not soak and not slow" $(LOWEST_TESTS)

clean:
	rm -rf report build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find fisherviz tests -name __pycache__ -type d -prune -exec rm -rf {} +
