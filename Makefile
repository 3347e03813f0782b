# From a fresh clone: `make finetune` shows what this is for, `make test` that it is right.
PYTHON ?= python3.11
VENV ?= .venv
# The tested pair of versions. `make test CORE=0.19.2 VENV=.venv-core-0.19.2` tests the other end of the range.
CORE ?= 0.16.1
TORCH ?= 2.13.0
# Test files at a time, in their order: the short ones come last, so that no core waits for a long one at the end. Each
# starts processes of its own; with one at a time a core is idle half of the time.
JOBS ?= 2
PARALLEL = --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder
BIN := $(VENV)/bin
# The version of the extra `local` that goes with it. It is built for Linux alone; elsewhere its tests are skipped.
NVRX := $(if $(filter 0.16.1,$(CORE)),0.4.1,0.6.0)
export OMP_NUM_THREADS ?= 1
# Where it is set, each process would compile all sources anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install finetune finetune-lora model test unit functional test-gpu test-resume resume-matrix soak mutants \
	fuzz bench coverage docs wheel lint format clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed-$(CORE) ## make the virtual environment

# torch first: left open, pip would take its newest CUDA build. Core 0.17 and later declare Python 3.12 and run on 3.11.
# nvidia-resiliency-ext without its dependencies and whatever the glibc: what is used of it is plain Python.
$(VENV)/.installed-$(CORE): pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet torch==$(TORCH)
	test "$(CORE)" = 0.16.1 || $(BIN)/pip install --quiet triton
	$(BIN)/pip install --quiet --ignore-requires-python --no-deps megatron-core==$(CORE)
	$(BIN)/pip install --quiet --editable ".[demo,docs,recipes,test]"
	$(BIN)/pip install --quiet --no-deps --upgrade --only-binary :all: --target $$($(BIN)/python -c \
		"import sysconfig; print(sysconfig.get_path('purelib'))") --platform manylinux_2_31_$$(uname -m) \
		--platform manylinux_2_39_$$(uname -m) nvidia-resiliency-ext==$(NVRX) \
		|| echo "no nvidia-resiliency-ext $(NVRX) for this machine: the tests of local checkpoints will be skipped"
	touch $@

finetune: install ## fetch SmolLM2 and data, finetune with CPU offload on 2 processes, export, compare
	$(BIN)/python scripts/finetune_smollm2/run.py $(ARGS)

finetune-lora: install ## the same with LoRA: adapters trained, exported for the peft library, merged
	$(BIN)/python scripts/finetune_smollm2/run_lora.py $(ARGS)

model: install ## fetch the model and the data only
	$(BIN)/python scripts/finetune_smollm2/prepare_model.py
	$(BIN)/python scripts/finetune_smollm2/prepare_data.py

test: install model ## run all tests
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

unit: install ## the quick half of the tests: no model is fetched
	$(BIN)/python -m pytest tests/unit_tests $(PARALLEL) $(ARGS)

functional: install model ## the other half: whole runs, on 1 to 4 processes
	$(BIN)/python -m pytest tests/functional_tests $(PARALLEL) $(ARGS)

test-gpu: install ## the tests that need CUDA, of which one must be there
	$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit('no CUDA device: all of them would skip')"
	$(BIN)/python -m pytest -m gpu $(ARGS)

test-resume: ## stop and resume in every way, on both versions of megatron-core: the whole matrix
	$(MAKE) --no-print-directory resume-matrix CORE=0.16.1 VENV=.venv
	$(MAKE) --no-print-directory resume-matrix CORE=0.19.2 VENV=.venv-core-0.19.2

resume-matrix: install # one half of it
	$(BIN)/python -m pytest tests/functional_tests/test_resume_matrix.py --resume-matrix=whole -q \
		--numprocesses $(JOBS) --dist loadgroup $(ARGS)

soak: install ## 200 random faults over a training run: resumed each time, it must end as the uninterrupted one
	$(BIN)/python -W ignore -m tests.soak --write $(ARGS)

mutants: install ## break the sync, the guard, the load and the repairs, and see that tests notice
	$(BIN)/python -m tests.mutants $(ARGS)

fuzz: install ## 100,000 damaged and invented inputs, 500 damaged checkpoints: only documented errors may come
	$(BIN)/python -W ignore -m tests.fuzz --jobs $(JOBS) --write $(ARGS)

bench: install model ## measure speed and memory beside what they must reach: docs/performance.md
	$(BIN)/pip install --quiet --editable ".[datasets]"
	$(BIN)/python -W ignore -m benchmarks $(ARGS)

coverage: install model ## all tests, and which lines they ran: build/coverage/index.html
	$(BIN)/python -m pytest $(PARALLEL) --cov --cov-report=html:build/coverage \
		--cov-report=term:skip-covered $(ARGS)

docs: install ## build the documentation into build/docs; a broken link is an error
	$(BIN)/python -W ignore -m mkdocs build

wheel: install ## build a wheel, install it into an environment of its own, start its commands
	scripts/check_wheel.sh $(BIN)/python $(TORCH) $(CORE)

lint: install ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what was made: results, documentation, wheels
	rm -rf results build
