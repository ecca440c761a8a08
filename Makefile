# A fresh machine needs Python 3.11 or 3.12 with venv and a C++ compiler; everything else is installed here.
PYTHON ?= $(firstword $(shell command -v python3.11; command -v python3.12))
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OUTPUT ?= demo-output
# For `make gpu-kit`: a wheel of mamba-ssm that was built before. Without one it is built, which takes eight minutes.
MAMBA_WHEEL ?= $(firstword $(wildcard ../shared/gpu-kit/mamba_ssm-*.whl))
# JOBS files of tests at a time, each on one thread: cores that are shared by more threads than there are stall each other.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --durations 25

.PHONY: demo test quick test-slow check drills docs gpu-kit install clean

demo: $(INSTALLED)
	$(BIN)/satfusion demo --output $(OUTPUT) $(if $(WORLDSTRAT),--worldstrat "$(WORLDSTRAT)")

test: $(INSTALLED)
	$(PYTEST) -m "not slow and not gpu"

# What starts no other process, needs no server, and compares with no golden output.
quick: $(INSTALLED)
	$(PYTEST) -m "not slow and not gpu and not distributed" tests/models tests/test_house.py tests/pipeline/quality \
		--ignore tests/models/test_golden.py \
		tests/sharding/format tests/sharding/prepare tests/sharding/run/test_plan.py tests/sharding/run/test_splits.py \
		tests/pipeline/test_config.py tests/pipeline/test_order.py

test-slow: $(INSTALLED)
	$(PYTEST) -m slow $(TESTS)

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(PYTEST) -m "not slow and not gpu"

# Faults on local Ray nodes, and what each costs: minutes.
drills: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.drills $(FAULTS)

# docs/ as a site in site/; a broken link ends it.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

gpu-kit: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu_kit $(if $(MAMBA_WHEEL),--mamba-wheel "$(MAMBA_WHEEL)")

install: $(INSTALLED)

# Torch first, because DeepSpeed's build looks for it; its CPU op is compiled once here, not in the first training.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip setuptools wheel ninja
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable .[dev]
	$(BIN)/python -m pipeline.engines.build_op
	touch $@

clean:
	rm -rf $(VENV) $(OUTPUT) site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
