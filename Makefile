# Two commands matter: `make run` (set up, then the main job) and `make test` (set up, then every
# check). Both need Python 3.11+, a C++ compiler and a package index, and nothing else.
#
#   make run     .venv, install, `llama2rt quickstart`; goes on where an earlier one was stopped
#                (another seed: make run ARGS="--seed 1" RUN=runs/seed-1)
#   make test    .venv, install with the test extra, ruff, mypy, pytest         (SEED=random explores)
#                from constraints.txt, exactly; with LATEST=1, in .venv-latest, the newest of all
#   make peers   the tests that touch transformers, on each release of it that we name; run before a
#                release, not in CI; recorded in benchmarks/results/peers.json
#   make bench   the benchmarks; nothing else should be running. Records and figures of the ops go
#                to build/bench
#   make gpu     tests, benchmarks and checks of a GPU machine, with its own python3 and without a
#                network, in under nine minutes; all that it found in OUT/llama2rt-gpu.tar.gz
#   make native  the native modules built into the source tree, for work on them
#   make clean   remove all of this except runs/

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv$(if $(LATEST),-latest)
BIN := $(VENV)/bin
SEED ?= 0
RUN ?= runs/quickstart
ARGS ?=
OUT ?= build

# constraints.txt names every package exactly. torch and triton are installed by what it says where
# there is no NVIDIA GPU: pip prefers 2.13.0+cpu to 2.13.0 where it finds both, while another version
# could bring gigabytes of CUDA libraries. Where the index holds CUDA builds only, name PyTorch's own
# index of CPU builds: make run TORCH="torch --index-url URL". With a GPU, torch is the newest.
named = "$(shell grep '^$(1)==' constraints.txt)"
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
TORCH ?= $(call named,torch)
# One that kernels/resources.json has a table for; a CUDA torch names its own.
TRITON ?= $(if $(LATEST),,$(call named,triton))
else
TORCH ?= torch
TRITON ?=
endif

# LATEST=1 ignores the file and takes the newest of what pyproject.toml allows, except for torch.
PIP := $(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt
NEWEST := $(if $(LATEST),--upgrade --upgrade-strategy eager)

# What an installed package is made of. Set-up is repeated when one of these is newer than its stamp.
SOURCES := pyproject.toml CMakeLists.txt LICENSE $(wildcard README.md) \
	$(shell find csrc kernels llama2rt -type f -not -name '*.so' -not -name '*.pyc')

.PHONY: run test bench peers gpu native clean

run: $(VENV)/.installed
	$(BIN)/llama2rt quickstart --out $(RUN) --resume $(ARGS)

$(VENV)/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(if $(LATEST),true,grep -vE '^(torch|triton)==' constraints.txt) > $(VENV)/constraints.txt
	$(PIP) --upgrade pip
	$(PIP) $(TORCH)
	$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
		>> $(VENV)/constraints.txt
	$(PIP) $(NEWEST) scikit-build-core pybind11 cmake ninja
	touch $@

# An isolated build, which is what a plain `pip install .` does, would compile everything each time.
$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(PIP) --no-build-isolation .
	touch $@

$(VENV)/.tested: $(VENV)/.torch $(SOURCES)
	$(PIP) $(NEWEST) --no-build-isolation '.[test]' $(TRITON)
	touch $(VENV)/.installed $@

# A worker for each core, of one thread: most tests are too small to feed two threads. At most 4, as
# each worker compiles and trains for itself what the tests of one folder share. Tests that need more
# threads ask for them. A file is one worker's (loadfile), because its costly fixtures are made once;
# in the order of the files, because the files of fewest tests, which come last otherwise, are among
# the longest. A worker that dies is not replaced: the next would begin with the test that killed it.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n : 4)))

# Plain pytest: `python -m pytest` would put this folder, not the installed package, first.
test: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	SEED=$(SEED) OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS) --dist loadfile \
		--no-loadscope-reorder --max-worker-restart 0

# glibc returns large blocks to the system, and page faults then take half of a CPU training step.
# Both sides of every comparison keep their memory here; what that hides is measured apart, each
# side in a process of its own (docs and benchmarks say which figure is which).
bench: $(VENV)/.tested
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=67108864 \
		BENCH_OUT=build/bench $(BIN)/pytest -q -s benchmarks
	$(BIN)/python -P benchmarks/helpers/figures.py build/bench

# One environment a release in build/peers, laid over this one.
peers: $(VENV)/.tested
	$(BIN)/python -P benchmarks/peer_releases.py --record benchmarks/results/peers.json

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
	rm -rf .venv .venv-latest build dist .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f llama2rt/_*.so
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
