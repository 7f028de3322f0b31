# make repro   everything, from nothing: environment, then the pipeline
# make test    the tests
# make lint    ruff and pyright
VENV := .venv
STOCK := .venv-trl112
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

# the first Python that fits makes the environment; make PYTHON=/path/to/python chooses another
PYTHONS := python3 python3.13 python3.12 python3.11 python3.14
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
PYTHON ?= $(shell for python in $(PYTHONS); do $$python -c '$(FITS)' 2>/dev/null && { echo $$python; break; }; done)

# TORCH_INDEX=<address or folder of wheels> make ...: PyTorch is taken from there, the CPU build for example
TORCH_FROM = $(if $(wildcard $(TORCH_INDEX)/.),--no-index --find-links,--index-url) $(TORCH_INDEX)
TORCH_PIN = $(shell grep '^torch==' requirements.lock)
NVIDIA := $(wildcard /proc/driver/nvidia/version /dev/nvidiactl /dev/dxg)

# what gpu-check measures on: data sets and models that are here already
GPU_BASE ?= models/base
GPU_PAIRS ?= data/pairs_embedded.jsonl

# tests run abreast, one process a core, four at most; tests/conftest.py says which stay together
ABREAST ?= -n logical --maxprocesses 4

.PHONY: repro test test-all lint deps install python lock check-hub bench-dpo bench-ppo bench-lora bench-generate bench-sizes gpu-check torch-build

repro: install
	$(BIN)/python -m stages.check_paths
	$(BIN)/dvc repro

test: install
	$(BIN)/python -m pytest $(ABREAST)

test-all: install
	$(BIN)/python -m pytest $(ABREAST) -m "not gpu"

lint: install
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pyright --pythonpath $(BIN)/python

# rewrites the code deps of dvc.yaml from the imports
deps: install
	$(BIN)/python -m stages.lib.run.deps

check-hub: install
	$(BIN)/python -m stages.check_hub

bench-dpo: install
	$(BIN)/python -m bench.bench_dpo

bench-ppo: install $(STOCK)/.installed
	$(BIN)/python -m bench.bench_ppo --stock-python $(STOCK)/bin/python
	$(BIN)/python -m bench.bench_ppo --stock-python $(STOCK)/bin/python --shapes defaults

bench-lora: install
	$(BIN)/python -m bench.bench_lora
	$(BIN)/python -m bench.one_step

bench-generate: install
	$(BIN)/python -m bench.bench_generate

bench-sizes: install
	$(BIN)/python -m bench.bench_sizes

# with a card of an H100's class, in about ten minutes (by estimate): its tests, the benchmarks, and the homework's
# settings on the pairs at hand, with an eighth of its episodes
gpu-check: install $(STOCK)/.installed
	$(BIN)/python -m pytest -m gpu
	$(BIN)/dvc repro fetch_base
	$(BIN)/python -m bench.bench_dpo --device cuda --base $(GPU_BASE) --pairs 960 --rounds 1 --no-growth
	$(BIN)/python -m bench.bench_ppo --device cuda --base $(GPU_BASE) --rounds 1 --stock-python $(STOCK)/bin/python
	$(BIN)/python -m bench.bench_generate --device cuda --base $(GPU_BASE) --rounds 1
	grep -v -e hub_id -e train_ppo.episodes recipes/homework.txt | \
	  xargs $(BIN)/dvc exp run -S train_ppo.episodes=512 -S fetch_pairs.path=$(GPU_PAIRS)

# the last TRL with a PPOTrainer: bench-ppo compares with it
$(STOCK)/.installed: bench/requirements-trl112.txt
	@$(MAKE) --no-print-directory python PYTHON='$(PYTHON)'
	$(PYTHON) -m venv $(STOCK)
	$(STOCK)/bin/python -m pip install --quiet --progress-bar on -r bench/requirements-trl112.txt
	@touch $@

install: $(VENV)/.installed

$(VENV)/.installed: requirements.lock
	@$(MAKE) --no-print-directory python PYTHON='$(PYTHON)'
	@$(MAKE) --no-print-directory torch-build
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --quiet --progress-bar on --no-deps $(TORCH_FROM) $(TORCH_PIN))
	$(BIN)/python -m pip install --quiet --progress-bar on -r requirements.lock
	@touch $@

# says what is about to be downloaded where it may not be wanted
torch-build:
	@test -n "$(TORCH_INDEX)$(NVIDIA)" -o "$$(uname -s)" != Linux || \
	  echo "no NVIDIA driver is here, and pip is about to take PyTorch's CUDA build, about 3 GB; for the CPU build: TORCH_INDEX=<its index> make (recipes/README.md, Other machines)"

# says which Python makes the environment, or what is wrong with it
python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 to 3.14 is needed, and none of $(PYTHONS) is one: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c '$(FITS)' || { echo "Python 3.11 to 3.14 is needed, $(PYTHON) is none: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "Python's venv module is missing: apt install python3-venv"; exit 1; }
	@echo $(PYTHON)

# rewrites requirements.lock from the pins of pyproject.toml; local labels (+cpu) and what torch itself pins for CUDA
# are left out
lock: python
	rm -rf $(VENV)-lock && $(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print("\n".join(p["dependencies"] + p["optional-dependencies"]["test"]))' > $(VENV)-lock/pins.txt
	$(VENV)-lock/bin/python -m pip install --quiet -r $(VENV)-lock/pins.txt
	{ echo "# Made by 'make lock' from pyproject.toml."; $(VENV)-lock/bin/python -m pip freeze --all --exclude-editable | sed 's/+.*//' | grep -v '^nvidia-\|^cuda-\|^triton==\|^pip==\|^wheel=='; } > requirements.lock
	rm -rf $(VENV)-lock
