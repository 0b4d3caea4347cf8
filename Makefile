# `make demo` shows what kt does, `make test` checks that it does; each sets up what it needs first.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Small models on few cores are many times faster with one thread per process.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1

.PHONY: help demo demo-real docs notebooks test test-real test-real-ci test-slow test-versions real-models lint format bench clean
.DEFAULT_GOAL := help

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

demo: $(VENV)/.installed  ## Install, then run the whole loop on the embedded model (one HTML report)
	$(PY) -m kt demo

test: lint docs  ## Install, then lint, type-check, build the documentation and test
	$(TEST_ENV) $(PY) -m pytest -n 2 --dist worksteal

test-slow: $(VENV)/.installed-dev  ## The tests that take minutes
	$(TEST_ENV) $(PY) -m pytest -m slow

test-versions: $(VENV)/.installed-dev  ## The tests on the oldest and the newest transformers and nnsight that kt allows
	$(TEST_ENV) $(PY) tools/test_versions.py

real-models: $(VENV)/.installed-dev  ## Fetch two small pretrained models (330 MB) into kt's cache
	$(PY) tools/real_models.py

test-real: real-models  ## The tests on those models
	$(TEST_ENV) $(PY) -m pytest -m real tests/real

test-real-ci: $(VENV)/.installed-dev  ## The part of them, on SmolLM2, that takes two CPU minutes
	$(PY) tools/real_models.py smollm2
	$(TEST_ENV) $(PY) -m pytest -n 2 --dist loadfile -m real_ci tests/real

demo-real: $(VENV)/.installed-dev  ## The loop on SmolLM2 and facts that it knows (one HTML report)
	OMP_NUM_THREADS=1 $(PY) tools/demo_real.py

notebooks: $(VENV)/.installed-dev  ## Run the notebooks on the demo model and save them with what they show
	$(TEST_ENV) $(PY) tools/notebooks.py --write

docs: $(VENV)/.installed-dev  ## Build the documentation site (build/site); every link and name is checked
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "built: $(PY) -m http.server -d build/site shows it at http://localhost:8000"

lint: $(VENV)/.installed-dev  ## Style and types only
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/.installed-dev  ## Let ruff put the style right
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(VENV)/.installed-dev  ## Time each part beside the obvious way (an hour); writes docs/performance.md
	OMP_NUM_THREADS=1 $(PY) benchmarks/speed/suite.py

clean:  ## Remove the virtual environment and caches (runs/ stays)
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest build dist .pytest_cache .mypy_cache .ruff_cache src/*.egg-info

# The stamps are newer than pyproject.toml only after a whole installation: an interrupted one is done again.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(PY) -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/.installed
