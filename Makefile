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

# Other RL libraries, each with an environment of its own: what pip installs there beside this package.
PLUG_INS := skrl rsl_rl tianshou rllib rl_zoo3 optuna sb3_video
INSTALL_skrl := skrl==2.1.1 array-api-compat==1.16.0
INSTALL_rsl_rl := rsl-rl-lib==5.5.1
INSTALL_tianshou := tianshou==2.0.1
INSTALL_rllib := ray[rllib]==2.60.0 array-api-compat==1.16.0
INSTALL_rl_zoo3 := rl-zoo3==2.9.2
INSTALL_optuna := optuna==5.0.0
INSTALL_sb3_video := moviepy==2.2.1
# Of constraints.txt, what decides how things are done here; the libraries disagree about the rest.
OURS := ^(torch|gymnasium|diffusers|transformers|stable_baselines3|peft)==

.PHONY: demo test test-numerics test-lowest check format clean emoji-quick plug-ins
.PRECIOUS: $(VENV)/plug_ins/%/.installed

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

plug-ins: $(addprefix plug-in-,$(PLUG_INS))  ## try each other RL library; `make plug-in-skrl` one of them

plug-in-rl_zoo3: $(VENV)/plug_ins/rl_zoo3/.installed
	$(MALLOC) $(<D)/bin/python -m rl_zoo3.train --algo ppo --env DenoisingMDP-v0 --gym-packages diffusion_gym \
		--conf-file examples/plug_ins/rl_zoo3_ppo.yml --n-timesteps 320 --eval-freq -1 --log-folder runs/rl_zoo3

plug-in-%: $(VENV)/plug_ins/%/.installed
	$(MALLOC) $(<D)/bin/python $(wildcard examples/plug_ins/$*.py examples/plug_ins/$*_*.py)

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

# The library first: RLlib asks for an older Gymnasium than it works with.
$(VENV)/plug_ins/%/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(@D)
	grep -E '$(OURS)' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/pip install --quiet --disable-pip-version-check $(PIP_ARGS) $$(grep '^torch==' constraints.txt)
	$(@D)/bin/pip install --quiet --disable-pip-version-check $(PIP_ARGS) $(INSTALL_$*)
	$(@D)/bin/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c $(@D)/constraints.txt -e .
	touch $@

# By uv: pip needs minutes to find the lowest versions that fit together, or gives up. Asked to look as pip does.
$(VENV)/.lowest: pyproject.toml
	$(LOWEST_PYTHON) -m venv --clear $(VENV)/lowest
	$(VENV)/lowest/bin/pip install --quiet --disable-pip-version-check $(PIP_ARGS) uv
	$(VENV)/lowest/bin/uv pip install --quiet --python $(VENV)/lowest/bin/python --resolution lowest-direct \
		--index-strategy unsafe-best-match $(UV_ARGS) -e '.[dev,tools]'
	touch $@
