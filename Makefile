# Everything runs in $(VENV), which is made when it is missing or older than what it is made from.
VENV ?= .venv
PYTHON ?= python3
# Where pip finds torch, if not where it looks anyway; on Linux without a GPU, to spare 3 GB of CUDA libraries:
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=

BIN := $(VENV)/bin
# glibc gives large blocks back to the kernel after every step and faults them in again: these two settings made
# training of the embedded model 1.2 to 1.9 times as fast on 2 cores.
MALLOC := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456

.PHONY: demo test check format clean emoji-quick

demo: $(VENV)/.installed  ## train the embedded model with DDPO-IS and show before and after
	$(MALLOC) $(BIN)/python examples/ddpo_incompressibility.py

test: $(VENV)/.installed  ## run all tests, a process on each core
	$(MALLOC) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

check: $(VENV)/.installed  ## run all that CI runs: formatting, linting, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

emoji-quick: $(VENV)/.installed  ## run the whole chain that makes the embedded model, for moments only
	$(MALLOC) $(BIN)/python -m tools.emoji.chain --quick --work build/emoji-quick

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build/lib build/bdist* dist *.egg-info runs

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	touch $@
