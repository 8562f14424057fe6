# moleprint: `make` lists what can be made.
PYTHON ?= python3
BIN    := .venv/bin
UV     := $(BIN)/uv
UV_VERSION := 0.13.9
STAMP  := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format lock clean gpu-check

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: $(STAMP) ## install everything into .venv, from the hash-pinned requirements.lock

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit("moleprint needs Python 3.11 or newer, found " + sys.version.split()[0] + "; try: make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "could not make .venv; on Debian: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

$(STAMP): requirements.lock pyproject.toml | $(UV)
	$(UV) pip sync --quiet --compile-bytecode --python $(BIN)/python --require-hashes requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup ## synthetic data set -> shards -> encoder on 2 processes -> classifier -> report (minutes)
	$(BIN)/moleprint demo

test: setup ## run the tests
	$(BIN)/python -m pytest

lint: setup ## format check, lint, strict types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup ## format and apply safe lint fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: | $(UV) ## renew requirements.lock from pyproject.toml, keeping the three pins
	printf 'torch==2.10.0\ntorchvision==0.25.0\nnvidia-dali-cuda120==2.4.0\n' | \
	$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	  --extra dev --constraint /dev/stdin --custom-compile-command 'make lock' \
	  --output-file requirements.lock pyproject.toml

OUT ?= runs/gpu-check
BENCH := configs/demo.yaml pack.output=data/demo/shards-256 pack.encode.size=256 loader.size=256 \
  loader.global_batch=256 loader.dtype=bfloat16 loader.channels_last=true model.backbone=resnet50 \
  train.precision=auto

gpu-check: setup ## on a machine with a GPU: its tests and benchmarks, short tables last; files in OUT
	mkdir -p "$(OUT)"
	$(BIN)/python -m pytest tests/gpu -rs; echo $$? > "$(OUT)/tests.status"
	test -e data/demo/images/metadata.csv || $(BIN)/moleprint synthesize configs/demo.yaml
	test -e data/demo/shards-256/dataset.json || $(BIN)/moleprint pack $(BENCH)
	for verb in loader step train; do \
	  $(BIN)/moleprint bench $$verb $(BENCH) --json "$(OUT)/$$verb.json" > "$(OUT)/$$verb.txt" || exit 1; done
	$(BIN)/moleprint bench train $(BENCH) train.compile=true --json "$(OUT)/compiled.json" > "$(OUT)/compiled.txt"
	@for name in loader step train compiled; do cat "$(OUT)/$$name.txt"; echo; done
	@exit $$(cat "$(OUT)/tests.status")

clean: ## remove .venv, caches, the demo's data and runs
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache build *.egg-info data/demo runs/demo runs/gpu-check
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
