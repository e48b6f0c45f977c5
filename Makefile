# fastmtl by hand: `make train` and `make test` need nothing but make and Python 3.11 or newer (and, for the native
# library, a C++20 compiler). Everything is installed into $(VENV), which `make clean` takes away again.
#
# The package is installed in editable mode: a change to a Python file needs no new installation, a change to the C++,
# to CMakeLists.txt or to pyproject.toml is noticed here. torch is installed once and serves the build and the package,
# hence no build isolation.

VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# the first Python that is new enough; a shell is not asked before it is needed
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13; do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$python; break; }; done)
# without isolation: torch is there; a folder of its own for each environment: CMake remembers where torch lies
BUILD := --no-build-isolation --config-settings=build-dir=build/$(notdir $(VENV))
NATIVE_SOURCES := CMakeLists.txt $(shell find csrc -type f)
INSTALL_LOG := build/install.log
# most tests keep one core busy, so two run at a time; ARGS="-n0 --pdb" to look into one
PYTEST = $(BIN)/python -m pytest -n 2
# what -k names need not be in each of several runs
OR_NONE = $(if $(filter -k,$(ARGS)),|| test $$? -eq 5)

# Census-Income is looked for there; without it, training falls back to a log made on the spot
ifneq ($(wildcard ../shared/data),)
export FASTMTL_DATA ?= $(abspath ../shared/data)
endif
# threads that spin while they wait make small parallel regions slow where others use the machine too
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help train test gpu-check gpu lint format wheel bench soak sanitize clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: $(VENV)/.package  ## install, build, train MMoE and print each task's AUC; ARGS="--model ple" for more
	$(BIN)/fastmtl train $(ARGS)

test: $(VENV)/.dev  ## install the development tools and run the tests; ARGS="-k census" for some
	$(PYTEST) --dist loadfile $(ARGS)

gpu-check: $(VENV)/.gpu  ## install Triton and check the GPU kernels without a GPU: compilers and interpreter
	$(PYTEST) --dist loadfile tests/gpu $(ARGS) $(OR_NONE)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PYTEST) --dist worksteal tests/gpu/kernels $(ARGS) $(OR_NONE)

gpu:  ## on a CUDA machine: build, test, sanitize and measure into bench/results, with what it has installed
	@test -n "$(PYTHON)" || { echo "make gpu: no Python 3.11 or newer here: make gpu PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m bench.gpu_session $(ARGS)

lint: $(VENV)/.dev  ## ruff, clang-format and mypy; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests/gpu -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy

format: $(VENV)/.dev  ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc tests/gpu -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

wheel: $(VENV)/.package  ## dist/*.whl with the native library
	rm -rf dist
	$(PIP) wheel -qq $(BUILD) --no-deps --wheel-dir dist .
	@$(BIN)/python -m zipfile --list dist/*.whl | grep -q '^fastmtl/_native\.so ' || \
	  { echo "dist/*.whl carries no native library: it could not be built here, see $(INSTALL_LOG)" >&2; exit 1; }
	@ls -l dist

bench: $(VENV)/.dev  ## fastmtl against torch-rechub and others, docs/performance.md; ARGS="-k 'steps and ali' --json FILE"
	$(BIN)/python -m pytest bench -q -W ignore --benchmark-columns=median,rounds $(ARGS)

soak: $(VENV)/.dev  ## what must never go wrong, at length, docs/reliability.md; ARGS="--row 1 --count 2000 --seed 7"
	PYTHONPATH=tests $(BIN)/python -m reliability.soak $(ARGS)

sanitize: $(VENV)/.dev  ## the native library under the address and undefined-behaviour sanitizers; ARGS="--count 1000000"
	PYTHONPATH=tests $(BIN)/python -m reliability.sanitize $(ARGS)

clean:  ## remove $(VENV) and all that was built
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find fastmtl tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

# ------------------------------------------------------------------------------------------------------- installation

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "fastmtl needs Python 3.11 or newer, and no python3 here is one; \
	install it, or name yours: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "fastmtl needs Python 3.11 or newer, \
	$(PYTHON) is `$(PYTHON) -V 2>&1`" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "$(PYTHON) can't make environments: install its venv module \
	(Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# what pyproject.toml says a build requires, torch among it
$(VENV)/.tools: pyproject.toml | $(BIN)/python
	@echo "installing torch and the build tools into $(VENV) (once)"
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], \
	sep="\n")' > $(VENV)/requires.txt
	$(PIP) install -qq --requirement $(VENV)/requires.txt
	@touch $@

$(VENV)/.package: $(VENV)/.tools $(NATIVE_SOURCES)
	@mkdir -p $(dir $(INSTALL_LOG))
	@echo "installing fastmtl and building its native library; the log is $(INSTALL_LOG)"
	@$(PIP) install --verbose $(BUILD) --editable '.[plot,report]' > $(INSTALL_LOG) 2>&1 || \
	  { tail -n 40 $(INSTALL_LOG) >&2; exit 1; }
	@$(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("fastmtl._native") is None)' || \
	  echo "no native library: a C++20 compiler (g++ or clang++) is missing or failed, see $(INSTALL_LOG); fastmtl runs \
	on its 'eager' backend (to try again: touch CMakeLists.txt)" >&2
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.package
	@echo "installing the development tools into $(VENV) (once)"
	$(PIP) install -qq $(BUILD) --editable '.[dev]'
	@touch $@

# apart from the development tools: Triton takes no part in anything that runs on a CPU
$(VENV)/.gpu: pyproject.toml | $(VENV)/.dev
	@echo "installing Triton into $(VENV) (once)"
	$(PIP) install -qq $(BUILD) --editable '.[gpu]'
	@touch $@
