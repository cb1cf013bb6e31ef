# Everything from a fresh machine with Python 3.11 or newer, pip and make. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# A worker that dies ends the run: its replacement has been seen to wait for ever.
# Files go to the workers in the order of tests/conftest.py, long ones first; xdist's own, by their number of tests, ends with
# one worker at the longest file.
WORKERS ?= -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0
PYTEST_ARGS ?=
SERVE_ARGS ?=
DEMO := runs/demo

# A puzzle as the nano model learns them: 0 is an empty cell, the last line ends with a newline. Its
# solution is in the test split: no training row shows it.
define DEMO_PROMPT
4000
0124
2031
0000

endef
export DEMO_PROMPT

# Most of what is installed is never imported, so only what is gets byte-compiled (by WARM_UP, below): a minute less than compiling everything.
# Much faster where uv is at hand and finds your package index: make setup INSTALL='uv pip install --constraint constraints.txt'
INSTALL ?= $(PY) -m pip install --no-compile --constraint constraints.txt
WARM_UP := import jax.numpy, flax.nnx, optax, orbax.checkpoint, grain, datasets, tensorboardX, tyro, rich, safetensors.numpy, jaxtyping; \
  from transformers import Qwen2Tokenizer

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo life serve test test-all test-optimised lint docs bench clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST)

setup: $(VENV)/.test-installed  ## .venv with everything the tests need, pinned

demo: export JAX_PLATFORMS ?= cpu
demo: $(VENV)/.core-installed  ## train a nano model on sudoku on this CPU (runs/demo), then sample it: no download of data or weights
	$(PY) train.py --mesh 8x1 --model nano --data sudoku --out $(DEMO) --overwrite
	$(PY) sample.py --model $(DEMO)/model --prompt "$$DEMO_PROMPT" --max-new-tokens 20 --watch

life: export JAX_PLATFORMS ?= cpu
life: $(VENV)/.core-installed  ## a nano model from random weights through documents, fine-tuning, preferences and rewards (runs/life)
	$(PY) bench/life.py

serve: export JAX_PLATFORMS ?= cpu
serve: $(VENV)/.serve-installed  ## a server with the demo model (trained first if runs/demo has none): a page, and OpenAI's API
	@[ -d $(DEMO)/model ] || $(PY) train.py --mesh 8x1 --model nano --data sudoku --out $(DEMO) --overwrite
	$(PY) serve.py --model $(DEMO)/model $(SERVE_ARGS)

test: setup  ## the default tests, of every module; PYTEST_ARGS="-k masks -x" narrows them
	$(PY) -m pytest $(WORKERS) -m "not slow" $(PYTEST_ARGS)

# Long tests of what XLA optimises say nothing about programs that are not optimised, so they run only in test-optimised.
test-all: setup  ## every test, those of what XLA optimises at its default optimisation (two reports)
	@status=0; \
	  $(PY) -m pytest $(WORKERS) -m "not (slow and optimised)" $(PYTEST_ARGS) || status=1; \
	  DREAM_JAX_XLA=default $(PY) -m pytest $(WORKERS) -m optimised $(PYTEST_ARGS) || status=1; \
	  exit $$status

test-optimised: export DREAM_JAX_XLA = default
test-optimised: setup  ## golden numbers, resuming bit for bit, losses and sampler at XLA's default optimisation
	$(PY) -m pytest $(WORKERS) -m optimised $(PYTEST_ARGS)

lint: setup  ## formatting, lint and types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.docs-installed  ## the pages of docs/ and the API reference as a site in build/site; a warning is an error
	$(PY) -m mkdocs build --strict

bench: $(VENV)/.bench-installed  ## time and memory against the published PyTorch code
	$(PY) bench/compare_pytorch.py

clean:  ## remove what make and the tools created, runs/ excepted
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp a set of packages, written only when pip has finished. The .installing marker betrays an install that was cut short: pip would take
# its half-written packages for whole ones, so such an environment is thrown away. Your own .venv has no marker and is only added to.
$(VENV)/.core-installed: pyproject.toml constraints.txt
	$(call install,.)
	@touch $@

$(VENV)/.test-installed: pyproject.toml constraints.txt
	$(call install,.[test])
	@touch $(VENV)/.core-installed $@

$(VENV)/.serve-installed: pyproject.toml constraints.txt
	$(call install,.[serve])
	@touch $(VENV)/.core-installed $@

$(VENV)/.docs-installed: pyproject.toml constraints.txt
	$(call install,.[docs])
	@touch $(VENV)/.core-installed $@

$(VENV)/.bench-installed: pyproject.toml constraints.txt
	$(call install,.[bench])
	@touch $(VENV)/.core-installed $@

define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "dream_jax needs Python 3.11 or newer; $(PYTHON) is: $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@if [ -e $(VENV)/.installing ]; then echo "$(VENV) was left half-installed; starting over"; rm -rf $(VENV); fi
	@mkdir -p $(VENV) && touch $(VENV)/.installing
	@[ -x $(PY) ] && $(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '$(1)'
	@env -u PYTHONDONTWRITEBYTECODE TRANSFORMERS_NO_ADVISORY_WARNINGS=1 $(PY) -c "$(WARM_UP)"
	@rm $(VENV)/.installing
endef
