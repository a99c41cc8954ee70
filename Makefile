# `make run-cluster` and `make test` do all of their own set-up; `make help` lists the rest.
SHELL := /bin/bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

MODEL ?=
PORT ?= 8000
ENCODE ?= 2
PREFILL ?= 1
DECODE ?= 1
GATEWAYS ?= 1
WORKERS ?=
DEVICE ?= cpu

VENV := .venv
BIN := $(VENV)/bin
comma := ,
DEVICE_KIND := $(firstword $(subst :, ,$(DEVICE)))
CUDA_EXTRA := $(if $(filter cuda,$(DEVICE_KIND)),cuda13)
PINS := setup.cfg constraints.txt pyproject.toml tools/install.sh
RUN_READY := $(VENV)/.ready-run-$(DEVICE_KIND)
TEST_READY := $(VENV)/.ready-test-$(DEVICE_KIND)
JOBS ?= 2
PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)

.PHONY: help run-cluster test check-deploy check-dashboard lint bench bench-article gpu-check eval clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22
	@echo "  variables (now): MODEL=$(or $(MODEL),the bundled model) PORT=$(PORT) GATEWAYS=$(GATEWAYS) ENCODE=$(ENCODE) PREFILL=$(PREFILL) DECODE=$(DECODE) WORKERS=$(WORKERS) DEVICE=$(DEVICE)"

run-cluster: $(RUN_READY)  ## serve MODEL on PORT with GATEWAYS, ENCODE, PREFILL and DECODE workers, or WORKERS; Ctrl-C drains and stops
	@exec $(BIN)/epd cluster $(if $(MODEL),--model "$(MODEL)") --port $(PORT) --gateways $(GATEWAYS) \
		$(if $(WORKERS),--workers "$(WORKERS)",--encode $(ENCODE) --prefill $(PREFILL) --decode $(DECODE)) --device $(DEVICE)

test: lint  ## the whole suite: lint, types, layers, tests (JOBS processes)
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

check-deploy: $(TEST_READY)  ## deploy/: alert rules and dashboard against a real Prometheus (needs its binaries)
	@for name in promtool prometheus; do command -v $$name >/dev/null || { echo "check-deploy needs $$name, which is not here: install it with" \
		"'sudo apt-get install prometheus', or from https://prometheus.io/download, and run this again" >&2; exit 1; }; done
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/deploy/check_prometheus.py $(PYTEST_ARGS)

check-dashboard: $(TEST_READY)  ## the live view in a real headless browser (needs Chromium)
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do command -v $$name >/dev/null && found=1; done; \
		[ -n "$$found" ] || { echo "check-dashboard needs Chromium, which is not here: install it with 'sudo apt-get install chromium'" \
		"and run this again" >&2; exit 1; }
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/http/check_dashboard.py $(PYTEST_ARGS)

lint: $(TEST_READY)  ## ruff, strict mypy and the layer contracts
	@$(BIN)/ruff check
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(TEST_READY)  ## measure every speed claim; prints a table and keeps it under bench/results/
	@$(BIN)/python -m tools.bench $(BENCH_ARGS)

bench-article: $(TEST_READY)  ## the article's experiment on emulated devices: table, plots and JSON under bench/results/, 7 minutes
	@$(BIN)/python -m tools.article $(ARTICLE_ARGS)

gpu-check:  ## on a machine with a GPU: its tests and figures, in ten minutes at most; installs nothing
	@$(PYTHON) -m tools.gpu_check $(GPU_CHECK_ARGS)

eval: $(TEST_READY)  ## exact-match accuracy of the bundled model through the served API
	@$(BIN)/python -m tools.with_server $(if $(MODEL),--model "$(MODEL)") -- $(BIN)/python -m tools.evaluate --url '{url}' $(EVAL_ARGS)

clean:  ## remove the virtual environment and all caches
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUN_READY): $(PINS)
	@tools/install.sh $(VENV) "$(CUDA_EXTRA)" $(DEVICE)
	@touch $@

$(TEST_READY): $(PINS)
	@tools/install.sh $(VENV) "test,bench$(addprefix $(comma),$(CUDA_EXTRA))" $(DEVICE)
	@touch $@ $(RUN_READY)
