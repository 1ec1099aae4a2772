# Every target does its own set-up in a fresh clone: a virtual environment in $(VENV), torch, this package.
#
#   make demo        decode over a growing context; table, CSV and picture in $(OUT)
#   make test        ruff, then every test that is not marked slow (what .ci/run calls)
#   make test-full   every test
#   make test-engines  the integrations against the real engines, each in an environment of its own under $(ENGINES)
#   make example     MiniMax-M3 of transformers generating text with three attention functions; picture in $(EXAMPLE_OUT)
#   make wheel       a wheel with kernels in dist/, its compiler from the package index
#   make lint        ruff, mypy, clang-format: all of them, changing nothing
#   make bench       the pytest-benchmark suites
#   make gpu         on a GPU machine, without network: build, prove, measure, judge; results in OUT (docs/gpu-round.md)
#   make clean       remove what was built; `make distclean` removes the virtual environment too
#
# Plain `torch` is a CUDA build of several gigabytes on x86-64 Linux. Without a GPU, a CPU build serves as well: point pip at
# one by its own settings (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL, pip.conf) or name a wheel: make test TORCH=/path/to/torch.whl
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
JOBS ?= 2
OUT ?= demo_out
EXAMPLE_OUT ?= example_out
ENGINES ?= build/engines
DEMO_ARGS ?=
PYTEST_ARGS ?=
# ON: a build without kernels fails. Off Linux there is no compiler to be had from the index, so it defaults to OFF there.
NSA_SEL_REQUIRE_KERNELS ?= $(if $(filter Linux,$(shell uname -s)),ON,OFF)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
BUILD_INPUTS := pyproject.toml CMakeLists.txt $(wildcard cmake/* cpp/*.* cuda/*.* cuda/*/*.* python/*.*)

# A CUDA 13 toolkit on this machine is used as it is and allows builds that recompile only what changed. Otherwise pip
# fetches the pinned compiler into an isolated build, which compiles everything each time.
ifndef NSA_SEL_SYSTEM_CUDA
  NSA_SEL_SYSTEM_CUDA := $(if $(shell nvcc --version 2>/dev/null | grep -E 'release 1[3-9]'),true,false)
endif
INSTALL_FLAGS := $(if $(filter true,$(NSA_SEL_SYSTEM_CUDA)),--no-build-isolation)
# The demo on a machine without a GPU cannot run a kernel, so it does not wait for one to be compiled.
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
DEMO_INSTALL := $(if $(HAS_GPU)$(wildcard $(VENV)/.stamp-dev),$(VENV)/.stamp-dev,$(VENV)/.stamp-demo)

.PHONY: demo test test-full test-engines example wheel lint bench gpu clean distclean
.DELETE_ON_ERROR:

demo: $(DEMO_INSTALL)
	$(BIN)/nsa-sel demo --out $(OUT) $(DEMO_ARGS)

# One thread for each of the JOBS processes: more would fight over the cores.
test: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow" $(PYTEST_ARGS)

test-full: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

# About 5 GB and ten minutes the first time. Warnings are the engines' own affair here, so they are no errors.
ENGINE_TESTS := tests/integrations/engines
test-engines: $(ENGINES)/transformers/.stamp
	OMP_NUM_THREADS=1 $(ENGINES)/transformers/bin/python -m pytest -o filterwarnings= $(PYTEST_ARGS) \
	  $(ENGINE_TESTS)/test_transformers.py

example: $(ENGINES)/transformers/.stamp
	$(ENGINES)/transformers/bin/python examples/minimax_m3.py --out $(EXAMPLE_OUT) $(EXAMPLE_ARGS)

wheel: $(VENV)/.stamp-torch
	NSA_SEL_REQUIRE_KERNELS=$(NSA_SEL_REQUIRE_KERNELS) $(PIP) wheel . --no-deps --wheel-dir dist
	@ls -l dist

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(wildcard cpp/*.* cuda/*.* cuda/*/*.* python/*.cpp)

bench: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest benchmarks $(PYTEST_ARGS)

# Resumable: the same command goes on where it stopped. A GPU machine may lack network and most of our tools, so nothing is
# installed but this package, into an environment of its own; DRY=1 takes the development environment of this checkout.
GPU_OUT = $(if $(filter file,$(origin OUT)),build/gpu/round,$(OUT))
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu: $(if $(DRY),$(VENV)/.stamp-dev)
	$(GPU_PYTHON) -m benchmarks.gpu --out $(GPU_OUT) $(if $(DRY),--dry) $(if $(SMALL),--small) $(if $(FORCE),--force) \
	  $(if $(STEPS),--steps $(STEPS)) $(if $(WHEELS),--wheels $(WHEELS)) $(if $(BUDGET),--seconds $(BUDGET)) \
	  $(if $(PACK),--pack $(PACK))

clean:
	rm -rf build dist demo_out example_out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(VENV)/.stamp-dev $(VENV)/.stamp-demo

distclean: clean
	rm -rf $(VENV)

$(VENV)/.stamp-torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install '$(TORCH)'
	@touch $@

# A stamp is as old as the beginning of its build, so that what is edited meanwhile is built the next time.
$(VENV)/.stamp-demo: $(VENV)/.stamp-torch $(BUILD_INPUTS)
	@touch $@.begun
	@echo "no GPU here: this install leaves the CUDA kernels out, and the demo takes the PyTorch path"
	NSA_SEL_WITHOUT_KERNELS=ON NSA_SEL_REQUIRE_KERNELS=OFF $(PIP) install --editable .
	@mv $@.begun $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-torch $(BUILD_INPUTS)
	@touch $@.begun
	$(if $(INSTALL_FLAGS),$(PIP) install cmake ninja pybind11 scikit-build-core)
	NSA_SEL_SYSTEM_CUDA=$(NSA_SEL_SYSTEM_CUDA) NSA_SEL_REQUIRE_KERNELS=$(NSA_SEL_REQUIRE_KERNELS) \
	  $(PIP) install $(INSTALL_FLAGS) --editable '.[dev]'
	@mv $@.begun $@

# The engine is pinned: another version is another trial. No kernels: these machines have no GPU, and the tests name sdpa.
$(ENGINES)/%/.stamp: $(ENGINE_TESTS)/%.txt pyproject.toml CMakeLists.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install '$(TORCH)'
	$(@D)/bin/python -m pip --disable-pip-version-check install $(if $(filter vllm,$*),--no-deps) -r $<
	NSA_SEL_WITHOUT_KERNELS=ON NSA_SEL_REQUIRE_KERNELS=OFF \
	  $(@D)/bin/python -m pip --disable-pip-version-check install pytest --editable .
	@touch $@
