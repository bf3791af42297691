# Two commands matter: `make run` (set up, then the main job) and `make test` (set up, then every
# check). Both need Python 3.11+, a C++ compiler and a package index, and nothing else.
#
#   make run     .venv, install, `llama2rt quickstart`; goes on where an earlier one was stopped
#                (another seed: make run ARGS="--seed 1" RUN=runs/seed-1)
#   make test    .venv, install with the test extra, ruff, mypy, pytest         (SEED=random explores)
#   make bench   the benchmarks; nothing else should be running. Records and figures of the ops go
#                to build/bench
#   make gpu     tests, benchmarks and checks of a GPU machine, with its own python3 and without a
#                network, in under nine minutes; all that it found in OUT/llama2rt-gpu.tar.gz
#   make native  the native modules built into the source tree, for work on them
#   make clean   remove all of this except runs/

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SEED ?= 0
RUN ?= runs/quickstart
ARGS ?=
OUT ?= build

# Without an NVIDIA GPU, torch is named exactly, at a version that is also offered as a CPU build:
# pip prefers 2.13.0+cpu to 2.13.0 where it finds both, while the open range of pyproject.toml could
# bring a later release and with it gigabytes of CUDA libraries. Where the index holds CUDA builds
# only, name PyTorch's own index of CPU builds: make run TORCH="torch --index-url URL"
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
TORCH ?= torch==2.13.0
# One that kernels/resources.json has a table for; a CUDA torch names its own.
TRITON ?= 'triton==3.6.0; sys_platform == "linux" and platform_machine == "x86_64"'
else
TORCH ?= torch
TRITON ?=
endif

# What an installed package is made of. Set-up is repeated when one of these is newer than its stamp.
SOURCES := pyproject.toml CMakeLists.txt LICENSE $(wildcard README.md) \
	$(shell find csrc kernels llama2rt -type f -not -name '*.so' -not -name '*.pyc')

.PHONY: run test bench gpu native clean

run: $(VENV)/.installed
	$(BIN)/llama2rt quickstart --out $(RUN) --resume $(ARGS)

$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet scikit-build-core pybind11 cmake ninja
	touch $@

# An isolated build, which is what a plain `pip install .` does, would compile everything each time.
$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation .
	touch $@

$(VENV)/.tested: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation '.[test]' $(TRITON)
	touch $(VENV)/.installed $@

# Plain pytest: `python -m pytest` would put this folder, not the installed package, first.
test: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	SEED=$(SEED) $(BIN)/pytest -q

# glibc returns large blocks to the system, and page faults then take half of a CPU training step.
# Both sides of every comparison keep their memory here; what that hides is measured apart, each
# side in a process of its own (docs and benchmarks say which figure is which).
bench: $(VENV)/.tested
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=67108864 \
		BENCH_OUT=build/bench $(BIN)/pytest -q -s benchmarks
	$(BIN)/python -P benchmarks/helpers/figures.py build/bench

# -P keeps this folder off sys.path, as plain pytest does.
gpu:
	$(PYTHON) -P benchmarks/gpu.py --out $(OUT)

# The finished module is moved into place: processes that have the old one loaded keep it.
native: $(VENV)/.torch
	$(BIN)/cmake -S . -B build/native -G Ninja -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
		-DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
		-Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build build/native
	mv build/native/_*.so llama2rt/

clean:
	rm -rf $(VENV) build dist .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f llama2rt/_*.so
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
