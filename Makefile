# make repro   everything, from nothing: environment, then the pipeline
# make test    the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: repro test test-all lint deps install lock check-hub bench-dpo bench-ppo

repro: install
	$(BIN)/dvc repro

test: install
	$(BIN)/python -m pytest

test-all: install
	$(BIN)/python -m pytest -m "not gpu"

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# rewrites the code deps of dvc.yaml from the imports
deps: install
	$(BIN)/python -m stages.lib.run.deps

check-hub: install
	$(BIN)/python -m stages.check_hub

bench-dpo: install
	$(BIN)/python -m bench.bench_dpo

bench-ppo: install
	$(BIN)/python -m bench.bench_ppo

install: $(VENV)/.installed

$(VENV)/.installed: requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 13) else f"Python 3.11 or 3.12 is needed, {sys.executable} is {v.major}.{v.minor}: make PYTHON=python3.11")'
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "Python's venv module is missing: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --progress-bar on -r requirements.lock
	@touch $@

# rewrites requirements.lock from the pins of pyproject.toml; local labels (+cpu) are left out
lock:
	rm -rf $(VENV)-lock && $(PYTHON) -m venv $(VENV)-lock
	$(PYTHON) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print("\n".join(p["dependencies"] + p["optional-dependencies"]["test"]))' > $(VENV)-lock/pins.txt
	$(VENV)-lock/bin/python -m pip install --quiet -r $(VENV)-lock/pins.txt
	{ echo "# Made by 'make lock' from pyproject.toml."; $(VENV)-lock/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' | grep -v '^nvidia-\|^triton=='; } > requirements.lock
	rm -rf $(VENV)-lock
