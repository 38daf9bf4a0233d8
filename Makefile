# `make run` on a fresh clone needs python3 (3.11 to 3.13), git and make, nothing else.

override PROFILE := $(or $(PROFILE),tiny_qwen3_vl)
RUNS ?=
# Trials of `make chaos`, a minute each.
N ?= 100
PORT ?= 5000
# Another Python, in an environment of its own: make test PYTHON=3.13 VENV=.venv-3.13
PYTHON ?= >=3.11,<3.14
VENV ?= .venv

# uv from the machine when there is one, else a private copy in .uv/
UV = $(shell command -v uv || echo .uv/bin/uv)
ENVIRONMENT := $(VENV)/.up-to-date
KEDRO_RUN := kedro run$(if $(filter-out tiny_qwen3_vl,$(PROFILE)), --env $(PROFILE))
EMPTY :=
COMMA := ,
# Kedro takes a comma in --params for the start of another parameter.
COMPARED := $(subst $(EMPTY) $(EMPTY),+,$(strip $(subst $(COMMA), ,$(RUNS))))

# Recipes, DVC stages and their children find this project's commands first. Nothing reports home.
export PATH := $(abspath $(VENV))/bin:$(PATH)
export DO_NOT_TRACK := true
export MLFLOW_DISABLE_TELEMETRY := true
export HF_HUB_DISABLE_TELEMETRY := 1
# uv comes with certificates of its own; a company's proxy is known to the system only.
export UV_SYSTEM_CERTS := true

.DEFAULT_GOAL := help
.PHONY: help setup run test chaos docs compare ui viz viz-static repro replay clean

help: ## Show this help.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: $(ENVIRONMENT) ## Make or update .venv; the other targets do it when needed.

run: $(ENVIRONMENT) ## Run all stages, from data to report. PROFILE=tiny_qwen2_5_vl for another profile.
	@echo "==> $(KEDRO_RUN)"
	@$(KEDRO_RUN)
	@echo "==> data:   data/08_reporting/$$(awk '/^dataset:/ {print $$2}' conf/$(PROFILE)/globals.yml)/validation.html"
	@echo "==> labels: data/08_reporting/$(PROFILE)/label_preview.html"
	@echo "==> report: data/08_reporting/$(PROFILE)/report.html"
	@echo "==> model:  data/06_models/$(PROFILE)/trained"
	@echo "==> 'make compare' puts two or more trainings on data/08_reporting/compare.html"
	@echo "==> 'make ui' shows all runs; 'make repro' runs only what has changed"

test: $(ENVIRONMENT) ## Lint, check the import rules, run the tests, measure the coverage (at least 85 %).
	@echo "==> ruff"
	@ruff check .
	@ruff format --check .
	@echo "==> import rules"
	@lint-imports
	@{ command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null || { [ "$$(id -u)" = 0 ] && \
	    echo "==> installing Chromium for the tests of pages" && apt-get update --quiet=2 && \
	    DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends chromium >/dev/null; } || { \
	    echo "The tests open pages in Chromium: install it (Debian: apt-get install chromium) and try again." >&2; exit 1; }
	@echo "==> tests"
	@coverage erase
	@OMP_NUM_THREADS=1 coverage run -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
	@echo "==> line coverage of src/, worker processes included"
	@coverage combine --quiet
	@coverage report

chaos: $(ENVIRONMENT) ## Kill processes of runs at random, and see that the same command ends the same. N=10 for ten trials.
	@python -m tests.chaos --trials $(N)

docs: $(ENVIRONMENT) ## Write docs/parameters.md and the JSON schema of parameters from their declarations.
	@python -m qvl_pipeline.profiles.reference

compare: $(ENVIRONMENT) ## Put trainings side by side on one page: RUNS="tiny_qwen3_vl tiny_qwen2_5_vl", profiles or run ids; none for all.
	@kedro run --pipelines compare$(if $(COMPARED), --params compare.runs=$(COMPARED))
	@echo "==> data/08_reporting/compare.html"

ui: $(ENVIRONMENT) ## Compare the runs in the browser: MLflow on http://127.0.0.1:5000. PORT=5001 for another port.
	@python -m qvl_pipeline.tracking.mlflow.view $(PORT)
	@MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow ui --workers 1 --host 127.0.0.1 --port $(PORT) \
	    --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}"

viz: $(ENVIRONMENT) ## Show the pipelines and the catalog in the browser.
	@kedro viz run

viz-static: $(ENVIRONMENT) ## Write the same, with what is in data/ now, as a web site into build/.
	@kedro viz build --include-previews
	@echo "==> show it with 'python3 -m http.server --directory build 4141'"

repro: $(ENVIRONMENT) ## Run what has changed since the last time, by DVC.
	@dvc repro

replay: $(ENVIRONMENT) ## Repeat a run and compare it bit for bit. RUN=<id in MLflow>
	@test -n "$(RUN)" || { echo "Which run? make replay RUN=<id in MLflow>" >&2; exit 1; }
	@kedro run --pipelines replay --params run_id=$(RUN)

clean: ## Remove .venv and everything tools have cached. Data, models and MLflow runs stay.
	rm -rf .venv* .uv .pytest_cache .ruff_cache .import_linter_cache .grimp_cache .hypothesis .coverage* htmlcov build dist .viz
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --compile-bytecode: every process starts from it, also where Python may not write into .venv; without, a `kedro run`
# and each training process compile their imports anew, which takes longer than importing them.
$(ENVIRONMENT): requirements.lock pyproject.toml
	@command -v "$(UV)" >/dev/null || { echo "==> uv is not installed: getting a private copy into .uv/"; \
	    python3 -m venv .uv && .uv/bin/pip install --quiet --disable-pip-version-check uv; } || { \
	    echo "Install uv (https://docs.astral.sh/uv) or the venv module of python3, and try again." >&2; exit 1; }
	@test -x "$(VENV)/bin/python" || "$(UV)" venv --quiet --python "$(PYTHON)" "$(VENV)"
	@echo "==> installing requirements.lock into $(VENV) (several GB the first time)"
	@"$(UV)" pip install --quiet --compile-bytecode --python "$(VENV)/bin/python" --requirement requirements.lock
	@"$(UV)" pip install --quiet --python "$(VENV)/bin/python" --no-deps --editable .
	@touch $@
