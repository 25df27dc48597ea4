# Everything runs in $(VENV), which is made when it is missing or older than what it is made from.
VENV ?= .venv
PYTHON ?= python3
# Where pip finds torch, if not where it looks anyway; on Linux without a GPU, to spare 3 GB of CUDA libraries:
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
# The same for uv, which installs what `make test-lowest` tests.
UV_ARGS ?= $(PIP_ARGS)

BIN := $(VENV)/bin
# glibc gives large blocks back to the kernel after every step and faults them in again: these two settings made
# training of the embedded model 1.2 to 1.9 times as fast on 2 cores.
MALLOC := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456

# The tests that compare what the formulas give, and their gradients, within a bound.
NUMERICS := $(addprefix tests/diffusion_gym/test_,transitions.py samplers.py schedules.py predictions.py grids.py mixture.py) \
	$(addprefix tests/agents/test_,advantages.py losses.py steps.py) tests/agents/logs/test_diagnostics.py
# As on a processor without AVX-512, and one that is not of the maker of MKL.
OTHER_CPU := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=COMPATIBLE
# `make test-lowest` needs the oldest Python that pyproject.toml allows.
LOWEST_PYTHON ?= python3.10

.PHONY: demo test test-numerics test-lowest check format clean emoji-quick

demo: $(VENV)/.installed  ## train the embedded model with DDPO-IS and show before and after
	$(MALLOC) $(BIN)/python examples/ddpo_incompressibility.py

test: $(VENV)/.installed  ## run all tests, a process on each core, with as many threads each as OMP_NUM_THREADS says (1)
	$(MALLOC) OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n auto --dist loadfile

test-numerics: $(VENV)/.installed  ## run the numerical tests as on another processor, with two threads (`test` has one)
	$(OTHER_CPU) $(MALLOC) OMP_NUM_THREADS=2 $(BIN)/python -m pytest -m "not slow" $(NUMERICS)

test-lowest: $(VENV)/.lowest  ## run all tests with the lowest versions that pyproject.toml allows
	$(MALLOC) OMP_NUM_THREADS=1 $(VENV)/lowest/bin/python -m pytest -n auto --dist loadfile -W default

check: $(VENV)/.installed  ## run all that CI runs: formatting, linting, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test
	$(MAKE) test-numerics

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

# By uv: pip needs minutes to find the lowest versions that fit together, or gives up. Asked to look as pip does.
$(VENV)/.lowest: pyproject.toml
	$(LOWEST_PYTHON) -m venv --clear $(VENV)/lowest
	$(VENV)/lowest/bin/pip install --quiet --disable-pip-version-check $(PIP_ARGS) uv
	$(VENV)/lowest/bin/uv pip install --quiet --python $(VENV)/lowest/bin/python --resolution lowest-direct \
		--index-strategy unsafe-best-match $(UV_ARGS) -e '.[dev,tools]'
	touch $@
