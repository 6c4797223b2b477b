# make demo       quantize the mini Wan2.2 and show what it cost
# make test       the whole test suite
# make lint       style, format and types
# make reproduce  run every stage once more in a copy and compare
# make gpu        on a machine with an NVIDIA GPU: tests, stages, linear and a video there; writes docs/gpu.md
# make clean      remove everything that was computed
.PHONY: demo test lint reproduce gpu clean

CODE := lib stages tests benchmarks ci data/training
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export HF_HUB_OFFLINE := 1
export DVC_NO_ANALYTICS := 1

demo: $(VENV)/installed
	dvc repro
	stepquant show

test: $(VENV)/installed $(VENV)/peers/installed $(VENV)/ray/installed $(VENV)/peft/installed
	python -m pytest -n 2 --dist worksteal

reproduce: demo
	python ci/reproduce.py

lint: $(VENV)/installed
	ruff check $(CODE)
	ruff format --check $(CODE)
	mypy

gpu: $(VENV)/installed
	python benchmarks/gpu.py

clean:
	rm -rf artifacts .units .dvc/cache .dvc/tmp metrics.json

# torch first and exactly: an open range would pull another build.
$(VENV)/installed: requirements.lock pyproject.toml
	python3 -m venv $(VENV)
	pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.lock)"
	pip install --quiet --disable-pip-version-check -r requirements.lock
	pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# Independent implementations that the tests compare with; apart, because diffusers would pick up torchao.
$(VENV)/peers/installed: requirements-peers.lock $(VENV)/installed
	pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/peers -r requirements-peers.lock
	touch $@

# The extra `ray` and what it needs beyond requirements.lock; apart, because only tests need it here, and it takes 250 MB.
$(VENV)/ray/installed: requirements-ray.lock $(VENV)/installed
	pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/ray -r requirements-ray.lock
	touch $@

# PEFT, for the tests of LoRAs; apart, because diffusers imports it wherever it finds it, two seconds at every start.
$(VENV)/peft/installed: requirements-peft.lock $(VENV)/installed
	pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/peft -r requirements-peft.lock
	touch $@
