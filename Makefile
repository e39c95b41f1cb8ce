# Everything happens in .venv, with exactly the versions of constraints.txt.
VENV := .venv
BIN := $(VENV)/bin
# pyenv picks the version in .python-version for a bare `python`; elsewhere python3.12 is what distributions call it.
PYTHON ?= $(shell command -v python3.12 || echo python3.12)
INSTALLED := $(VENV)/.installed
# XLA's GPU compiler lives apart: with it in .venv every program that uses JAX would look for a GPU.
AOT := .venv-aot
AOT_INSTALLED := $(AOT)/.installed
AOT_PIP := $(AOT)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -c constraints-aot.txt
TINY := checkpoints/tiny

.PHONY: run test aot lint bench format clean

run: $(TINY)/config.json
	$(BIN)/python scripts/generate.py --model=$(TINY) --num_attention_workers=2 --dtype=float32 --max_tokens=48 --temperature=0.6 \
		--prompt="The " --prompt="If the file " --prompt="A class "

test: $(INSTALLED) lint
	$(BIN)/python -m pytest -q -n 2

aot: $(AOT_INSTALLED)
	$(AOT)/bin/python scripts/aot_check.py --targets=h100,h20 --model=configs/models/llama3_70b.json --dop=2,4

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(INSTALLED)
	$(BIN)/python benchmarks/channel_latency.py
	$(BIN)/python benchmarks/pipeline.py
	$(BIN)/python benchmarks/host.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(AOT) build checkpoints

$(TINY)/config.json: $(INSTALLED)
	$(BIN)/python scripts/make_tiny_checkpoint.py --output=$(TINY) --train_seconds=60

# The custom calls are compiled here, so a change of theirs installs again.
$(INSTALLED): pyproject.toml constraints.txt $(wildcard custom_calls/* custom_calls/cuda/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --group dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt jax jaxlib
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation --editable .
	touch $@

# The plugin's own dependencies are the libraries that run programs (cuDNN, NCCL, ..), gigabytes that no compiler needs.
$(AOT_INSTALLED): pyproject.toml constraints.txt constraints-aot.txt $(wildcard custom_calls/*)
	test -x $(AOT)/bin/python || $(PYTHON) -m venv $(AOT)
	$(AOT_PIP) --upgrade pip
	$(AOT_PIP) jax jaxlib nvidia-cuda-nvcc scikit-build-core nanobind ninja cmake
	$(AOT_PIP) --no-deps jax-cuda13-plugin jax-cuda13-pjrt
	$(AOT_PIP) --no-build-isolation --config-settings=build-dir=build/aot --editable .
	touch $@
