# make train   set up, then train a small Ling-2.0            make lint    the checks that CI runs before the tests
# make install only set up, with everything for development   make clean   remove everything that make wrote
# make test    set up, then run the tests; FAST=1: the fast ones, 3 minutes on two cores, for use while working
# make test-integrations run the tests of ling_kernels inside other libraries, in virtual environments kept in ~/.cache;
#              ONLY="lm_eval hub": only these
# make fuzz    try random files, requests and arguments of ops for MINUTES=10; `make test` tries the same few in every run
# make soak    let clients of many kinds use a server for an hour, or MINUTES=5: build/soak/soak.png shows its memory and load
# make hub     write the Triton kernels as a repository of the Hugging Face Hub into HUB=build/hub
# make cutlass build the optional ling_kernels._cutlass: CUTLASS's grouped FP8 GEMM (minutes, 4 GB of memory a file)
# make tables  write docs/kernels-{resources*,clocks,predicted,counters}.md: registers, shared memory, clocks and counters
#              of every kernel, as it is built for Hopper, and the rates that follow
# make gpu     on a machine with a Hopper GPU: STAGE=1 build, test, sanitizers, four minutes; STAGE=2 benchmark, five minutes.
#              It installs nothing and uses PYTHON as it is. ARGS=--commit=ID names the commit in a copy without git history.
# make gpu-pack compile csrc/ here for such a machine, into build/gpu-pack; make gpu then only links it
# make wheels  write wheels into dist/, without csrc/, with it, and with it for every Python from 3.10 on, and try each in a
#              fresh environment. ARGS=--pure: only the first
# make bench   benchmark ops, peers, layers, decoding and the host into benchmarks/results/ and docs/performance.md (a CPU
#              has no ops and peers). QUICK=1: at most 8 minutes on a GPU. ARGS="-k rms_norm": a selection
#
# Set up: a virtual environment in .venv that sees the packages of PYTHON, so that an installed torch is used. It is
# repeated only when pyproject.toml, setup.py or csrc/ has changed. Variables: PYTHON=python3.12, ARGS="--steps 100" (for
# train and test), TORCH and TRITON (the versions to install where PYTHON has none), LING_CUDA=0.

PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.8.0
CUTLASS ?= nvidia-cutlass==4.2.0.0
ARGS ?=
ONLY ?=
MINUTES ?= 10
HUB ?= build/hub
export LING_CUTLASS ?= 0

VENV := .venv
PY := $(VENV)/bin/python
# Tools that PYTHON's environment has (ruff, cmake) are found there and not installed again.
OUTER := $(shell command -v $(PYTHON))
export PATH := $(CURDIR)/$(VENV)/bin:$(if $(OUTER),$(dir $(OUTER)):)$(PATH)
PIP := $(PY) -m pip install -qq
CSRC := CMakeLists.txt $(shell find csrc -type f)
CXX_FILES := $(shell find csrc tests/gpu tests/cuda \
	-type f \( -name '*.cu*' -o -name '*.h' -o -name '*.cpp' \) -print)

.PHONY: help train test test-integrations fuzz soak lint install hub wheels cutlass tables clean gpu gpu-pack bench
.DEFAULT_GOAL := help

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

train: $(VENV)/.train
	@$(PY) -m ling_kernels.train --model tiny $(ARGS)

test: $(VENV)/.dev
	@OMP_NUM_THREADS=1 $(PY) -m pytest -p no:benchmark -n auto --maxprocesses 4 $(if $(FAST),-m "not slow") $(ARGS)

test-integrations: $(VENV)/.dev
	@$(PY) -m tests.integrations.environments $(ONLY) -- $(ARGS)

# One seed after another, until the time is over or a test fails, which prints how to repeat it.
fuzz: $(VENV)/.dev
	@end=$$(($$(date +%s) + 60 * $(MINUTES))); while [ $$(date +%s) -lt $$end ]; do \
	seed=$$(od -An -N4 -tu4 /dev/urandom | tr -d ' ') && echo "[make] --hypothesis-seed=$$seed" && OMP_NUM_THREADS=1 \
	$(PY) -m pytest -p no:benchmark -n auto --maxprocesses 4 --hypothesis-seed=$$seed tests/test_fuzz_*.py $(ARGS) \
	|| exit 1; done

soak: $(VENV)/.dev
	@OMP_NUM_THREADS=1 $(PY) -m tests.soak $(if $(filter command line,$(origin MINUTES)),--minutes $(MINUTES)) $(ARGS)

lint: $(VENV)/.dev
	@ruff check
	@ruff format --check
	@clang-format --dry-run -Werror $(CXX_FILES)
	@$(PY) -m mypy

install: $(VENV)/.dev

hub: $(VENV)/.dev
	@$(PY) -m ling_kernels.integrations.hub $(HUB)

# Only the headers of nvidia-cutlass are used: its dependencies are not installed.
cutlass: $(VENV)/.dev
	@$(PY) -c 'import setup, sys; sys.exit(setup.cutlass() is None)' || $(PIP) --no-deps "$(CUTLASS)"
	@LING_CUTLASS=1 $(PY) setup.py -q build_ext --inplace

tables: $(VENV)/.dev
	@$(PY) -m tests.tables

# An older Triton beside the installed one: the kernels must build under both (tests/test_compiles_for_hopper.py).
build/triton-3.6: $(VENV)/.dev
	@echo "[make] triton==3.6.0 in $@"
	@rm -rf $@ && $(PIP) --no-deps --target $@ triton==3.6.0

wheels: $(VENV)/.dev
	@$(PY) .ci/wheels.py $(ARGS)

gpu:
	@$(OUTER) -m tests.on_gpu $(if $(STAGE),--stage $(STAGE)) $(ARGS)

gpu-pack: $(VENV)/.dev
	@$(PY) -m tests.pack

# What `make install` has set up, or PYTHON as it is: a GPU machine may have no network.
bench:
	@$(if $(wildcard $(VENV)/.dev),$(PY),$(OUTER)) -m benchmarks $(if $(QUICK),--quick) $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info ling_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis

# --system-site-packages does not show the packages of a virtual environment: where PYTHON is in one, a .pth file does.
$(VENV)/.python:
	@[ -n "$(OUTER)" ] || { echo "error: there is no $(PYTHON); name another: make PYTHON=..." >&2; exit 1; }
	@echo "[make] a virtual environment in $(VENV)"
	@rm -rf $(VENV)
	@$(OUTER) -m venv --system-site-packages $(VENV) || { rm -rf $(VENV); echo "error: $(OUTER) cannot make a virtual \
	environment; install its venv module (python3-venv on Debian), or name another: make PYTHON=..." >&2; exit 1; }
	@$(OUTER) -c 'import site, sys; [print(f"import site; site.addsitedir({p!r})") \
	for p in site.getsitepackages() if sys.prefix != sys.base_prefix]' \
	> "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
	@touch $@

# Installed before the packages that depend on torch: pip would choose the newest build for them.
$(VENV)/.torch: $(VENV)/.python
	@$(call has,torch,2.10) || { echo "[make] $(TORCH)" && $(PIP) "$(TORCH)"; }
	@$(call has,triton,3.0) || [ "$$(uname)" != Linux ] || { echo "[make] $(TRITON)" && $(PIP) "$(TRITON)"; }
	@touch $@

has = $(PY) -c 'import sys, importlib.metadata as m; \
	v = ([x.version for x in m.distributions(name="$(1)")] or ["0"])[0]; \
	sys.exit([int(n) for n in v.split(".")[:2]] < [int(n) for n in "$(2)".split(".")])' 2>/dev/null

INSTALLED_FROM := pyproject.toml setup.py $(VENV)/.torch

$(VENV)/.train: $(INSTALLED_FROM) $(CSRC)
	@$(call install,train)
	@touch $@

$(VENV)/.dev: $(INSTALLED_FROM) $(CSRC)
	@$(call install,train$(,)server$(,)dev)
	@touch $@ $(VENV)/.train

, := ,
NEEDS = import setup; print(*setup.get_requires_for_build_editable(), sep="\n")

# If only csrc/ has changed, only csrc/ is built.
install = $(if $(filter $(INSTALLED_FROM),$?),\
	echo "[make] ling_kernels[$(1)]" \
	&& $(PIP) "setuptools>=77" \
	&& $(PY) -c '$(NEEDS)' > $(VENV)/needs.txt && $(PIP) -r $(VENV)/needs.txt \
	&& $(PIP) --no-build-isolation -e ".[$(1)]",\
	echo "[make] csrc/" && $(PY) setup.py -q build_ext --inplace)
