# Two commands do everything on a fresh machine: `make run` and `make test`. `make help` lists the rest.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST_ARGS ?=
# As the tests are ordered: long files begin first, so that no worker is left alone with one at the end.
WORKERS := -n 2 --dist loadgroup --no-loadscope-reorder
# Real servers on a busy machine: a wait that timed out is tried once more, a wrong answer never is.
RETRY_WAITS := --reruns 1 --only-rerun TimedOutError
BENCH_ARGS ?=
IMAGE_ARGS ?=
FUZZ_SECONDS ?= 120
export UV_SYSTEM_CERTS ?= 1
# Without bytecode every process compiles torch and transformers anew: half of its start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup run test test-architectures fuzz e2e images lint hashes generate verify bench bench-full bench-operator clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(READY) ## create .venv with all dependencies (the other targets do it when needed)

$(READY): pyproject.toml constraints.txt hashes.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo "Python 3.11 or newer is needed: install it, or say which with make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
	  || { echo "Python's venv module is missing: apt-get install python3-venv (or your system's package)"; exit 1; }
	@sed -n '/^uv==/,/[0-9a-f]$$/p' hashes.txt | $(BIN)/python -m pip install --quiet --require-hashes --requirement /dev/stdin
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --constraint hashes.txt \
	  --editable '.[operator,trainer]' --group dev
	@touch $@

run: $(READY) ## fine-tune a small model end to end on this machine, and measure the improvement
	@$(BIN)/python examples/fetch_assets.py smollm2 tweets > /dev/null
	$(BIN)/finetune run examples/quickstart.yaml

test: verify ## run verify and all tests; lists at the end what this machine could not run
	$(BIN)/python -m pytest tests/unit tests/trainer tests/local tests/fuzz $(WORKERS) $(PYTEST_ARGS)
	$(BIN)/python -m pytest tests/integration $(WORKERS) $(RETRY_WAITS) $(PYTEST_ARGS)
	$(BIN)/python -m pytest tests/e2e $(RETRY_WAITS) --maxfail 3 $(PYTEST_ARGS)

test-architectures: $(READY) ## compare training and exports of every architecture with plain transformers and PEFT (minutes)
	FINETUNE_ALL_ARCHITECTURES=1 $(BIN)/python -m pytest tests/trainer/architectures $(PYTEST_ARGS)

fuzz: $(READY) ## try new hostile input on each parser of outside data; FUZZ_SECONDS=600 for each, PYTEST_ARGS="-k parquet" for one
	FINETUNE_FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest tests/fuzz -n 2 --timeout $$(($(FUZZ_SECONDS) + 300)) $(PYTEST_ARGS)

e2e: $(READY) ## run the end-to-end tests: real pods on this machine, with injected failures (needs root and about 40 GB)
	FINETUNE_REQUIRE_CLUSTER=1 $(BIN)/python -m pytest tests/e2e $(RETRY_WAITS) $(PYTEST_ARGS)

images: ## build both container images with podman, buildah or docker; IMAGE_ARGS="--base REF --prefix registry.example.com/ml/"
	$(PYTHON) images/build.py $(IMAGE_ARGS)

lint: $(READY) ## run ruff, mypy, import-linter, vulture and deptry
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/vulture
	$(BIN)/deptry operator trainer

hashes: $(READY) ## write hashes.txt after a change of constraints.txt or images/build-tools.txt (asks the package index)
	{ echo '# Generated from constraints.txt and images/build-tools.txt by `make hashes`; edits are lost.'; \
	  $(BIN)/uv pip compile --quiet --no-deps --universal --python-version 3.11 --generate-hashes --no-header \
	    --no-annotate constraints.txt images/build-tools.txt; } > hashes.new && mv hashes.new hashes.txt

generate: $(READY) ## write all generated files: CRD, reference page, chart values, code map
	$(BIN)/python -m finetune_api.generate
	$(BIN)/python charts/generate.py
	$(BIN)/python docs/code_map.py

verify: lint ## run lint, and check that generated files are up to date
	$(BIN)/python -m finetune_api.generate --check
	$(BIN)/python charts/generate.py --check
	$(BIN)/python docs/code_map.py --check

bench: $(READY) ## benchmark the trainer against TRL and the machine's limit, and its parts (under 30 minutes)
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

bench-full: $(READY) ## run bench with more samples, time to a fixed validation loss, and 5 million rows (hours)
	$(BIN)/python -m benchmarks --full $(BENCH_ARGS)

bench-operator: $(READY) ## benchmark the operator with 1,000 jobs on a real API server, and with 10,000 finished ones
	$(BIN)/python -m benchmarks.operator_scale $(BENCH_ARGS)

clean: ## remove the environment and local runs
	rm -rf $(VENV) runs build dist
