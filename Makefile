# From a fresh clone: `make finetune` shows what this is for, and `make test` shows that it is right.
# The interpreter for the environment. If this is empty, scripts/find_python.sh takes the newest suitable one.
PYTHON ?=
VENV ?= .venv
# Both ends of the range of Core. `make test CORE=0.19.2 VENV=.venv-core-0.19.2` tests the newest one too.
OLDEST_CORE := 0.16.1
NEWEST_CORE := 0.19.2
# 3.10 to 3.13: the environment's, if there is one. Empty if none is found; `make install` then explains it.
PYTHON_VERSION := $(shell scripts/find_python.sh --version '$(VENV)' '$(PYTHON)' 2>/dev/null)
# Core 0.17 and later declare Python 3.12, and need triton, which is built for Linux only.
SYSTEM := $(shell uname -s)
CORE ?= $(if $(filter Linux-3.12 Linux-3.13,$(SYSTEM)-$(PYTHON_VERSION)),$(NEWEST_CORE),$(OLDEST_CORE))
TORCH ?= 2.13.0
# How many test files run at a time. They keep their order: short ones come last, so that no core waits for a long one
# at the end. Each starts processes of its own; with one at a time, a core is idle half of the time.
JOBS ?= 2
# What depends on the CPU's vector unit: products, Adam's bits, resumes, the demonstration.
CPU_TESTS = tests/unit_tests/utils/test_matrix_products.py $(addprefix tests/functional_tests/test_, \
	finetune_smollm2.py resume_matrix.py offloaded_finetune.py flat_step.py repairs.py)
# What another Python may read or write otherwise.
CHECKPOINT_TESTS = $(addprefix tests/functional_tests/test_,load_cases.py resume_matrix.py offloaded_finetune.py) \
	$(addprefix tests/unit_tests/,checkpoint core_repairs training)
PARALLEL = --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder
BIN := $(VENV)/bin
# The version of the extra `local` that goes with this Core. It is built for Linux only; elsewhere its tests are skipped.
NVRX = $(if $(filter newest,$(CORE)),newest,$(if $(filter $(OLDEST_CORE),$(CORE)),0.4.1,0.6.0))
# CORE and TORCH may also be `newest`: whatever the package index has.
is = $(if $(filter newest,$1),,==$1)
# Python compiles a module when it first imports it, and most are never imported.
UPGRADE = --quiet --no-compile $(if $(filter newest,$(CORE)),--upgrade --upgrade-strategy eager)
export OMP_NUM_THREADS ?= 1
# If it were set, each process would compile all sources again.
unexport PYTHONDONTWRITEBYTECODE

INSTALLED = $(VENV)/.installed-$(CORE)
# The environment of another Core has its own folder, beside this one.
venv_of = $(if $(filter $1,$(CORE)),$(VENV),.venv-core-$1)

.PHONY: help install finetune finetune-lora model test quick unit functional test-gpu test-checkpoints test-python test-cpu \
	test-newest test-sync sync-matrix test-resume resume-matrix test-streams soak mutants fuzz bench coverage docs wheel \
	lint format clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED) ## make the virtual environment

ifeq ($(PYTHON_VERSION),)
.PHONY: $(INSTALLED)
endif

# Nothing is made before an interpreter is found. An environment has the file .unfinished until it is first complete, so
# that one that was interrupted is made again.
# torch comes first: otherwise pip would take its newest CUDA build. Core 0.17 and later declare Python 3.12, but run on
# 3.11. nvidia-resiliency-ext is installed without its dependencies and for any glibc: only plain Python of it is used.
$(INSTALLED): pyproject.toml
	@python="$$(scripts/find_python.sh '$(VENV)' '$(PYTHON)')" || exit 2; \
	echo "megatron-core $(CORE), torch $(TORCH) into $(VENV)"; \
	if [ ! -d '$(VENV)' ] || [ -e '$(VENV)/.unfinished' ]; then \
		rm -rf '$(VENV)' && mkdir -p '$(VENV)' && touch '$(VENV)/.unfinished' && "$$python" -m venv '$(VENV)'; \
	fi
	rm -f $(VENV)/.installed-*
	$(BIN)/python -c "import torch" 2>/dev/null && test $(TORCH) != newest \
		|| $(BIN)/pip install $(UPGRADE) torch$(call is,$(TORCH))
	test "$(CORE)" = $(OLDEST_CORE) || $(BIN)/pip install $(UPGRADE) triton
	$(BIN)/pip install $(UPGRADE) --ignore-requires-python --no-deps megatron-core$(call is,$(CORE))
	$(BIN)/pip install $(UPGRADE) --editable ".[demo,docs,recipes,test]"
	$(BIN)/pip install --quiet --no-compile --no-deps --upgrade --only-binary :all: --target $$($(BIN)/python -c \
		"import sysconfig; print(sysconfig.get_path('purelib'))") --platform manylinux_2_31_$$(uname -m) \
		--platform manylinux_2_39_$$(uname -m) nvidia-resiliency-ext$(call is,$(NVRX)) \
		|| echo "no nvidia-resiliency-ext $(NVRX) for this machine: the tests of local checkpoints will be skipped"
	@rm -f $(VENV)/.unfinished
	touch $@

finetune: install ## fetch SmolLM2 and data, finetune with CPU offload on 2 processes, export, compare
	$(BIN)/python scripts/finetune_smollm2/run.py $(ARGS)

finetune-lora: install ## the same with LoRA: train adapters, export them for the peft library, merge them
	$(BIN)/python scripts/finetune_smollm2/run_lora.py $(ARGS)

model: install ## fetch the model and the data only
	$(BIN)/python scripts/finetune_smollm2/prepare_model.py
	$(BIN)/python scripts/finetune_smollm2/prepare_data.py

test: install model ## run all tests
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

quick: install ## run the tests that need no ranks and no model, in a minute: for the inner loop
	$(BIN)/python -m pytest --quick $(PARALLEL) $(ARGS)

unit: install ## run the quick half of the tests; fetches no model
	$(BIN)/python -m pytest tests/unit_tests $(PARALLEL) $(ARGS)

functional: install model ## run the other half: whole runs, on 1 to 4 processes
	$(BIN)/python -m pytest tests/functional_tests $(PARALLEL) $(ARGS)

test-checkpoints: install ## run the checkpoint, load and resume tests
	$(BIN)/python -m pytest $(CHECKPOINT_TESTS) $(PARALLEL) $(ARGS)

test-python: install ## run what depends on Python: the quick tests, and those of checkpoints, loads and resumes
	$(BIN)/python -m pytest $(filter %.py,$(CHECKPOINT_TESTS)) tests/unit_tests \
		$(addprefix --slow-below=,$(CHECKPOINT_TESTS)) $(PARALLEL) $(ARGS)

# As on a CPU with AVX2 alone: `ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 make test-cpu`.
test-cpu: install model ## run what depends on the CPU's vector unit: products, Adam's bits, resumes, the demonstration
	$(BIN)/python -m pytest $(CPU_TESTS) $(PARALLEL) $(ARGS)

test-newest: ## run all tests on the newest release of everything, in an environment of its own
	$(MAKE) --no-print-directory test VENV=.venv-newest CORE=newest TORCH=newest

test-gpu: install ## run the tests that need a CUDA device; fails without one
	$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit('no CUDA device: all of them would skip')"
	$(BIN)/python -m pytest -m gpu $(ARGS)

test-sync: ## run the whole sync matrix, on both versions of megatron-core
test-resume: ## run the whole resume matrix, on both versions of megatron-core
test-sync test-resume: test-%:
	$(MAKE) --no-print-directory $*-matrix CORE=$(OLDEST_CORE) VENV=$(call venv_of,$(OLDEST_CORE))
	$(MAKE) --no-print-directory $*-matrix CORE=$(NEWEST_CORE) VENV=$(call venv_of,$(NEWEST_CORE))

sync-matrix resume-matrix: %-matrix: install # the whole matrix, on one of them
	$(BIN)/python -m pytest tests/functional_tests/test_$*_matrix.py --$@=whole -q \
		--numprocesses $(JOBS) --dist loadgroup $(ARGS)

# STREAMS=random:7 takes other orders than the latest one.
STREAMS ?= late
test-streams: install ## run all cells of the sync and the resume matrix on streams that order only what they promise
	$(BIN)/python -m pytest tests/functional_tests/test_sync_matrix.py::test_every_way_in \
		tests/functional_tests/test_resume_matrix.py::test_resumes --streams=$(STREAMS) \
		--sync-matrix=whole --resume-matrix=whole -q --numprocesses $(JOBS) --dist loadgroup $(ARGS)

soak: install ## strike a run with 200 random faults: it must resume each time and end bit-exact
	$(BIN)/python -W ignore -m tests.soak --write $(ARGS)

mutants: install ## break the sync, the guard, the load and the repairs: a test must fail each time
	$(BIN)/python -m tests.mutants $(ARGS)

fuzz: install ## feed 100,000 damaged and invented inputs and 500 damaged checkpoints: only documented errors may come
	$(BIN)/python -W ignore -m tests.fuzz --jobs $(JOBS) --write $(ARGS)

bench: install model ## measure speed and memory against their aims; writes docs/performance.md
	$(BIN)/pip install --quiet --editable ".[datasets]"
	$(BIN)/python -W ignore -m benchmarks $(ARGS)

coverage: install model ## run all tests, and show which lines they ran: build/coverage/index.html
	$(BIN)/python -m pytest $(PARALLEL) --cov --cov-report=html:build/coverage \
		--cov-report=term:skip-covered $(ARGS)

docs: install ## build the documentation into build/docs; a broken link is an error
	$(BIN)/python -W ignore -m mkdocs build

wheel: install ## build a wheel, install it into an environment of its own, and start its commands
	scripts/check_wheel.sh $(BIN)/python $(TORCH) $(CORE)

lint: install ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## fix style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove results, documentation and wheels
	rm -rf results build
