# make demo: from a fresh clone to a picture of sampled digits.  make test: the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
PYTEST_ARGS ?= -n 2 --dist loadfile

.PHONY: help demo test lint clean

help:
	@echo "make demo   install into $(VENV), train on real 8x8 digits, sample, measure: $(RUN)/samples.png"
	@echo "make test   install what the tests need into $(VENV) and run lint and tests"
	@echo "make lint   ruff check and ruff format --check"
	@echo "make clean  remove $(VENV) and caches (runs/ stays)"

# Stamps, so that a second call installs nothing.
$(VENV)/.demo: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[data]"
	@touch $@

$(VENV)/.test: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[test]"
	@# Networks to compare with. Without what they require: torchvision has no build for a CPU-only torch.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps azula==0.11.1 denoising-diffusion-pytorch==2.3.4 \
		ema-pytorch==0.8.3
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/jax-diffusion train --config=digits --workdir=$(RUN)
	$(BIN)/jax-diffusion sample --workdir=$(RUN) --num=100 --out=$(RUN)/samples.png --trajectory=$(RUN)/film.gif
	$(BIN)/jax-diffusion evaluate --workdir=$(RUN) --num=1000
	@echo "look at $(RUN)/samples.png and $(RUN)/film.gif"

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist *.egg-info
