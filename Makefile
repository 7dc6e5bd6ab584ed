# make demo: from a fresh clone to a picture of sampled digits.  make test: the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
# Compilers for TPU and NVIDIA, beside and not in $(VENV): the tests' own jax must not find them.
COMPILERS ?= $(VENV)-aot
export JAX_DIFFUSION_COMPILERS := $(abspath $(COMPILERS))
# Python compiles a module when it is first imported; to compile all of them takes a minute.
PIP_ARGS := --quiet --disable-pip-version-check --no-compile
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder --durations=30

.PHONY: help demo test docs linkcheck gates gates-baseline lint clean

help:
	@echo "make demo   install into $(VENV), train on real 8x8 digits, sample, measure: $(RUN)/samples.png"
	@echo "make test   install what the tests need into $(VENV) and run lint and tests"
	@echo "make gates  compile tiny training steps for TPU and NVIDIA, which need not be there, and check them"
	@echo "make docs   the documentation as pages: docs/_build/html/index.html (make linkcheck asks other hosts' links)"
	@echo "make lint   ruff check, ruff format --check and mypy"
	@echo "make clean  remove $(VENV), $(COMPILERS) and caches (runs/ stays)"

# Stamps, so that a second call installs nothing.
$(VENV)/.demo: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP_ARGS) -e ".[cpu,data]"
	@touch $@

$(VENV)/.test: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP_ARGS) -e ".[test]"
	@# Networks to compare with. Without what they require: torchvision has no build for a CPU-only torch.
	$(BIN)/pip install $(PIP_ARGS) --no-deps azula==0.11.1 denoising-diffusion-pytorch==2.3.4 \
		ema-pytorch==0.8.3
	@touch $@ $(VENV)/.demo

$(COMPILERS)/.done: tests/plan/gates/requirements.py $(VENV)/.test
	rm -rf $(COMPILERS)
	$(BIN)/pip install $(PIP_ARGS) --no-deps --target $(COMPILERS) \
		$$($(BIN)/python tests/plan/gates/requirements.py)
	@touch $@

$(VENV)/.docs: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP_ARGS) -e ".[docs]"
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/jax-diffusion train --config=digits --workdir=$(RUN)
	$(BIN)/jax-diffusion sample --workdir=$(RUN) --num=100 --out=$(RUN)/samples.png --trajectory=$(RUN)/film.gif
	$(BIN)/jax-diffusion evaluate --workdir=$(RUN) --num=1000
	@echo "look at $(RUN)/samples.png and $(RUN)/film.gif"

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test:
	$(MAKE) --jobs=2 lint $(COMPILERS)/.done
	$(BIN)/python -m pytest $(PYTEST_ARGS)

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

linkcheck: $(VENV)/.docs
	$(BIN)/python -m sphinx -q -b linkcheck docs docs/_build/linkcheck

gates: $(COMPILERS)/.done
	$(BIN)/python -m pytest $(PYTEST_ARGS) tests/plan/test_gates_tpu.py tests/plan/test_gates_cuda.py

# After a look at why the figures changed.
gates-baseline: $(COMPILERS)/.done
	PYTHONPATH=. $(BIN)/python tests/plan/gates/checks.py

clean:
	rm -rf $(VENV) $(COMPILERS) .pytest_cache .mypy_cache .ruff_cache build dist docs/_build *.egg-info
