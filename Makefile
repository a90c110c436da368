# Everything runs in .venv, which the first command makes; only Python 3.10+, git and make are
# needed beforehand. A ComfyUI is looked for (of several, the newest is taken) and, where there is
# none, installed by comfy-cli.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
NO_COMFYUI := $(VENV)/no-comfyui.txt
TEST_PROCESSES ?= auto
FUZZ ?= 20
PYTEST = PYTHONPATH=tests $(PY) -m pytest -p skips_summary \
  -n $(TEST_PROCESSES) --maxprocesses 4 --dist loadfile
FAST_TESTS := tests/texts $(filter-out tests/core/training tests/core/conftest.py \
  tests/core/golden_unet.py,$(wildcard tests/core/*))

# Idle threads shall sleep: spinning ones make a busy computer ten times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help test test-fast test-uncached test-cores test-core test-diffusers fuzz security-table demo demo-check bench bench-demo gpu-check thumbnail lint format comfyui clean

define HELP
  make demo             what small models make of shipped references: demo/out/sheet.png
  make test             code checks and all tests
  make test-fast        code checks and the tests that need neither ComfyUI nor training, in a minute
  make test-uncached    encoding and nodes in ComfyUI once more, with nothing kept of earlier groups
  make test-cores CORES="FOLDER FOLDER"
                        the tests that need a ComfyUI, with each of these, each in an environment
                        of its own: .venv-<version of the ComfyUI>
  make test-diffusers   the tests of the adapter for diffusers, with the oldest diffusers
  make lint | format    code checks only | repair what can be repaired
  make fuzz             mutated files, twenty times as many as make test tries; FUZZ=100 for more
  make security-table   run every hostile file and request, and write SECURITY.md's figures
  make demo-check       measure the demo models; fails where a bar is missed
  make bench-demo       compare EasyRef with IP-Adapter, LoRA and others on the demo models: runs/bench;
                        fails where the expected ordering does not hold
  make bench            what a change of a group, a step and many prompts cost, against bars, on one CPU
                        core; half an hour: runs/speed
  make gpu-check        exactness, memory and time at real size on a GPU; eight minutes
  make thumbnail        the pictures of the templates, each one run on the demo models
  make clean            remove the environments and what was built; neither ComfyUI nor runs/

  PYTHON=python3.12     the Python that environments are made with
  COMFYUI_PATH=FOLDER   the ComfyUI to use; "none" goes without
  GPU_CHECK="--only step"
                        options of gpu-check; --help lists them
  TEST_PROCESSES=1      how many processes share the tests; by default one a core, four at most
endef
export HELP

help:
	@echo "$$HELP"

# The plugin's summary and the reason for a missing ComfyUI come last, where they are seen.
test: lint comfyui $(VENV)/.transformers-4.57 $(VENV)/.newest-page $(VENV)/.deepspeed \
  $(VENV)/.open-pictures $(VENV)/.face-models
	@$(PYTEST) tests; status=$$?; \
	if [ -s $(NO_COMFYUI) ]; then cat $(NO_COMFYUI); fi; exit $$status

test-fast: lint
	@$(PYTEST) -m "not slow" $(FAST_TESTS)

test-uncached: comfyui
	@EASYREF_CACHE_MB=0 $(PYTEST) -m "not keeps" \
	  tests/comfy/host tests/comfy/nodes tests/comfy/sampling/test_comfy_exactness.py

# Every ComfyUI is tested, also after one has failed; the summaries of all come last.
test-cores:
	@test -n "$(CORES)" || { echo 'no folder named: make test-cores CORES="FOLDER FOLDER"' >&2; exit 2; }
	@summary=$$(mktemp); failed=; \
	for core in $(CORES); do \
	  version=$$(COMFYUI_PATH="$$core" $(PYTHON) -m workshop.comfyui.find_comfyui --version) && \
	  EASYREF_SUMMARY="$$summary" $(MAKE) --no-print-directory test-core \
	    COMFYUI_PATH="$$core" VENV=".venv-$$version" || failed="$$failed $$core"; \
	done; \
	cat "$${EASYREF_SUMMARY:-/dev/null}" "$$summary"; rm -f "$$summary"; \
	if [ -n "$$failed" ]; then echo "failed:$$failed" >&2; exit 1; fi

test-core: comfyui $(VENV)/.newest-page
	@$(PYTEST) tests/comfy tests/hostile tests/server tests/browser

fuzz: $(VENV)/.project
	@EASYREF_FUZZ=$(FUZZ) $(PYTEST) --timeout 0 tests/hostile/test_fuzz.py

security-table: comfyui
	@if [ -s $(NO_COMFYUI) ]; then cat $(NO_COMFYUI); exit 1; fi
	@PYTHONPATH=tests:tests/hostile:. $(PY) tests/hostile/security_table.py

test-diffusers: $(VENV)/.diffusers-0.32 $(VENV)/.transformers-4.57
	@PYTHONPATH=$(VENV)/diffusers-0.32:$(VENV)/transformers-4.57:tests \
	  $(PY) -m pytest -p skips_summary tests/core/sdxl_diffusers

demo: comfyui
	@if [ -s $(NO_COMFYUI) ]; then cat $(NO_COMFYUI); fi
	@$(PY) -m workshop.demo run

demo-check: $(VENV)/.project
	@$(PY) -m workshop.demo check --out demo/out/check.json

bench-demo: $(VENV)/.project
	@$(PY) -m workshop.demo bench

bench: $(VENV)/.project
	@$(PY) -m benchmarks.speed

gpu-check: comfyui
	@if [ -s $(NO_COMFYUI) ]; then cat $(NO_COMFYUI); exit 1; fi
	@$(PY) -m benchmarks.gpu_check $(GPU_CHECK)

thumbnail: comfyui
	@$(PY) -m workshop.templates.template_pictures

lint: $(VENV)/.project
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .

format: $(VENV)/.project
	@$(PY) -m ruff check --fix . ; $(PY) -m ruff format .

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "EasyRef needs Python 3.10 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.project: $(VENV)/.made pyproject.toml constraints.txt
	@echo "installing EasyRef with its extras into $(VENV) (the first time this takes minutes)"
	@$(PIP) torch torchvision torchaudio --editable ".[bench,demo,docs,train,test]"
	@touch $@

# An older transformers, beside the newest, for tests that compare with both.
$(VENV)/.transformers-4.57: $(VENV)/.project
	@echo "installing transformers 4.57 beside the newest, for comparison"
	@$(PIP) --upgrade --no-deps --target $(VENV)/transformers-4.57 \
	  "transformers==4.57.*" "huggingface_hub<1" "tokenizers>=0.22,<0.23"
	@touch $@

# The oldest diffusers, with a transformers of its time.
$(VENV)/.diffusers-0.32: $(VENV)/.project
	@echo "installing diffusers 0.32 beside the newest, for comparison"
	@$(PIP) --upgrade --no-deps --target $(VENV)/diffusers-0.32 "diffusers==0.32.2"
	@touch $@

# The newest release of ComfyUI's page, for the browser tests: the one of the day it is fetched.
$(VENV)/.newest-page: $(VENV)/.project
	@echo "installing the newest page of ComfyUI beside its own, for browser tests"
	@$(PIP) --upgrade --no-deps --target $(VENV)/newest-page comfyui-frontend-package
	@touch $@

# Only for the tests of training; it cannot be built everywhere, and is left out there.
$(VENV)/.deepspeed: $(VENV)/.project
	@echo "installing DeepSpeed for the tests of training"
	@$(PIP) --upgrade --no-deps --target $(VENV)/deepspeed \
	  deepspeed hjson msgpack ninja py-cpuinfo || rm -rf $(VENV)/deepspeed
	@touch $@

# Pictures that nobody here made, for the tests of what builds groups of them.
OPEN_PICTURES := @iconify-json/noto@1.2.9 @iconify-json/twemoji@1.2.5 \
  @iconify-json/openmoji@1.2.29 @iconify-json/fluent-emoji-flat@1.2.6 \
  @dicebear/core@9.4.3 @dicebear/lorelei@9.4.3 @dicebear/pixel-art@9.4.3
$(VENV)/.open-pictures: $(VENV)/.made
	@if command -v npm >/dev/null; then \
	  echo "fetching open emoji and avatars for the tests of build-groups"; \
	  mkdir -p $(VENV)/open-pictures; \
	  npm pack --silent --pack-destination $(VENV)/open-pictures $(OPEN_PICTURES) >/dev/null && \
	    touch $@ || echo "they cannot be had; their tests are skipped"; \
	else echo "no npm: tests with open emoji and avatars are skipped"; fi

# Real weights and photographs, for the tests of face identity.
$(VENV)/.face-models: $(VENV)/.made
	@if command -v npm >/dev/null; then \
	  echo "fetching the weights of face-api for the tests of face identity"; \
	  mkdir -p $(VENV)/face-models; \
	  npm pack --silent --pack-destination $(VENV)/face-models @vladmandic/face-api@1.7.15 \
	    >/dev/null && tar -xzf $(VENV)/face-models/*.tgz -C $(VENV)/face-models && \
	    rm $(VENV)/face-models/*.tgz && touch $@ || \
	    echo "they cannot be had; their tests are skipped"; \
	else echo "no npm: tests with real weights of faces are skipped"; fi

# ComfyUI's own requirements go into the same environment, whenever they differ from last time.
comfyui: $(VENV)/.project
	@rm -f $(NO_COMFYUI); \
	root=$$($(PY) -m workshop.comfyui.find_comfyui --install 2> $(NO_COMFYUI)) || exit 0; \
	rm -f $(NO_COMFYUI); \
	if ! cmp -s "$$root/requirements.txt" $(VENV)/.comfyui-requirements; then \
	  echo "installing the requirements of $$root"; \
	  $(PIP) --requirement "$$root/requirements.txt" || exit 1; \
	  cp "$$root/requirements.txt" $(VENV)/.comfyui-requirements; \
	fi

clean:
	rm -rf .venv .venv-* $(VENV) demo/out build *.egg-info .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
