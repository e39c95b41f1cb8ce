# Everything happens in .venv, with exactly the versions of constraints.txt.
VENV := .venv
BIN := $(VENV)/bin
# pyenv picks the version in .python-version for a bare `python`; elsewhere python3.12 is what distributions call it.
PYTHON ?= $(shell command -v python3.12 || echo python3.12)
INSTALLED := $(VENV)/.installed
INSTALL_PROJECT := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	--no-build-isolation --editable .
# XLA's GPU compiler lives apart: with it in .venv every program that uses JAX would look for a GPU.
AOT := .venv-aot
AOT_INSTALLED := $(AOT)/.installed
AOT_PIP := $(AOT)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -c constraints-aot.txt
TINY := checkpoints/tiny
# On a machine with a GPU nothing is installed: its own Python has the JAX that goes with its driver.
GPU_PYTHON := $(if $(filter file,$(origin PYTHON)),python3,$(PYTHON))
GPU_WHEELS := .gpu-wheels
# pip takes a wheel's manylinux version literally; aliases and all that are in use up to that of Ubuntu 24.04.
GPU_PLATFORMS := $(foreach n,5 12 17 24 26 27 28 31 34 35 38 39,--platform manylinux_2_$(n)_x86_64) \
	--platform manylinux1_x86_64 --platform manylinux2010_x86_64 --platform manylinux2014_x86_64

.PHONY: run install test aot rdma rdma-test lint bench gpu-wheels gpu-test gpu-bench format clean

run: $(TINY)/config.json
	$(BIN)/python scripts/generate.py --model=$(TINY) --num_attention_workers=2 --dtype=float32 --max_tokens=48 --temperature=0.6 \
		--prompt="The " --prompt="If the file " --prompt="A class "

install: $(INSTALLED)

test: $(INSTALLED) lint
ifdef CI
	-$(MAKE) rdma
endif
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --durations=25
ifdef CI
	$(MAKE) rdma-test RDMA_OPTIONS=--limit_s=1500
endif

aot: $(AOT_INSTALLED)
	$(AOT)/bin/python scripts/aot_check.py --targets=h100,h20 --model=configs/models/llama3_70b.json --dop=2,4

# Installs Debian packages that are missing, if root runs it. Custom calls compiled before that lack the RDMA channels.
rdma: $(INSTALLED)
	$(BIN)/python scripts/build_pyverbs.py
	grep -q VerbsHandle $(VENV)/lib/python3.12/site-packages/lamina_jax/_custom_calls*.so || $(INSTALL_PROJECT)

rdma-test: rdma
	$(BIN)/python scripts/rdma_test.py $(RDMA_OPTIONS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(INSTALLED)
	$(BIN)/python benchmarks/channel_latency.py
	$(BIN)/python benchmarks/pipeline.py
	$(BIN)/python benchmarks/host.py

# What the machine with the GPU may lack, to be carried there; needs the network, as the two below do not.
gpu-wheels:
	rm -rf $(GPU_WHEELS)
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
		--python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none $(GPU_PLATFORMS) \
		-c constraints.txt -r requirements-gpu.txt -d $(GPU_WHEELS)
	du -sh $(GPU_WHEELS)

gpu-test:
	$(GPU_PYTHON) scripts/gpu_run.py test $(GPU_OPTIONS)

gpu-bench:
	$(GPU_PYTHON) scripts/gpu_run.py bench $(GPU_OPTIONS)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(AOT) $(GPU_WHEELS) .rdma build checkpoints

$(TINY)/config.json: $(INSTALLED)
	$(BIN)/python scripts/make_tiny_checkpoint.py --output=$(TINY) --train_seconds=60

# The custom calls are compiled here, so a change of theirs installs again.
$(INSTALLED): pyproject.toml constraints.txt $(wildcard custom_calls/* custom_calls/cuda/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --group dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt jax jaxlib
	$(INSTALL_PROJECT)
	touch $@

# The plugin's own dependencies are the libraries that run programs (cuDNN, NCCL, ..), gigabytes that no compiler needs.
$(AOT_INSTALLED): pyproject.toml constraints.txt constraints-aot.txt $(wildcard custom_calls/* custom_calls/cuda/*)
	test -x $(AOT)/bin/python || $(PYTHON) -m venv $(AOT)
	$(AOT_PIP) --upgrade pip
	$(AOT_PIP) jax jaxlib nvidia-cuda-nvcc scikit-build-core nanobind ninja cmake
	$(AOT_PIP) --no-deps jax-cuda13-plugin jax-cuda13-pjrt
	$(AOT_PIP) --no-build-isolation --config-settings=build-dir=build/aot --editable .
	touch $@
