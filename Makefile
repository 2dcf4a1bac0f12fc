# make demo | test | check | bench | gpu: each creates .venv first if it is missing. PYTHON=/path/to/python3.11 selects another
# interpreter.
PYTHON ?= python3
# Two files run at a time, the longest first; the tests of a file run in order.
TEST_ARGS ?= -q -rsfE -n 2 --dist loadfile --no-loadscope-reorder
# Maths, settings, model, sample order and imports: files that start no job of several ranks.
QUICK := tests/similarity tests/test_layers.py \
	$(patsubst %,tests/training/test_%.py,config schedule model tokenizer towers objective metrics stopwatch) \
	$(patsubst %,tests/data/test_%.py,order collate annotations captions storage span video_lookup safe_pickle)

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
COMPILED := $(VENV)/.compiled
PACKAGES := data_prep kernels launchers trainer

.PHONY: help demo test test-quick check fix bench gpu ffcv grafana-schema clean

help:
	@echo "make demo        render clips, train a small model on two ranks, write report.html (about 5 minutes)"
	@echo "make test        the test suite without further variants (TEST_ARGS='-q -k name' for a part)"
	@echo "TVR_CI=1 make test   everything, as .ci/run does (15 to 35 minutes on 2 cores)"
	@echo "make test-quick  the tests of maths, settings, model and sample order (a few minutes)"
	@echo "make check       formatting, lint and types; 'make fix' repairs the first two"
	@echo "make ffcv        the optional package FFCV, compiled (data_prep/README.md names the system packages)"
	@echo "make grafana-schema   Grafana's types, which a test checks dashboards against; needs node and npm"
	@echo "make bench       benchmarks of kernels, TPM-CL and rank scaling, one line of JSON each (some minutes)"
	@echo "make gpu         tests and measurements on one GPU, under 8 minutes; GPU_ARGS=--shrunk tries it on a CPU"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "tvr needs Python 3.11 or newer, and '$(PYTHON)' is not: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null \
		|| { echo "tvr needs a C++ compiler (DeepSpeed compiles an extension): apt-get install g++" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
		|| { echo "tvr needs Python's header files (DeepSpeed compiles an extension): apt-get install python3-dev" >&2; exit 1; }
	@echo "setting up $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(COMPILED): $(READY)
	@echo "compiling DeepSpeed's extension and the similarity kernels (a minute, once)"
	@$(BIN)/python -W ignore tests/builders/extensions.py
	@touch $@

demo: $(READY)
	@$(BIN)/tvr demo

test: $(COMPILED)
	@$(BIN)/python -m pytest $(TEST_ARGS)

test-quick: $(READY)
	@$(BIN)/python -m pytest $(TEST_ARGS) -m "not slow" $(QUICK)

check: $(READY)
	@$(BIN)/ruff format --check -q . && $(BIN)/ruff check -q .
	@mkdir -p build/types/tvr && for package in $(PACKAGES); do ln -sfn ../../../$$package build/types/tvr/$$package; done
	@$(BIN)/pyright --pythonpath $(BIN)/python

fix: $(READY)
	@$(BIN)/ruff format -q . && $(BIN)/ruff check -q --fix .

# FFCV requests all of OpenCV from pkg-config and includes all of its headers, but uses two modules.
ffcv: $(READY)
	@mkdir -p build/ffcv/opencv2
	@printf '#include <opencv2/%s.hpp>\n' core imgproc > build/ffcv/opencv2/opencv.hpp
	@printf '%s\n' 'Name: opencv4' 'Description: the OpenCV modules that FFCV uses' 'Version: 4' \
		'Libs: -lopencv_imgproc -lopencv_core' 'Cflags: -I$${pcfiledir} -I/usr/include/opencv4' > build/ffcv/opencv4.pc
	@PKG_CONFIG_PATH="$(CURDIR)/build/ffcv:$$PKG_CONFIG_PATH" \
		$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[ffcv]'

# Grafana's types; a test checks the dashboards against them.
grafana-schema:
	@mkdir -p build/grafana_schema
	@cp tests/grafana_schema/package.json tests/grafana_schema/package-lock.json build/grafana_schema/
	@npm ci --prefix build/grafana_schema --silent --no-audit --no-fund

bench: $(READY)
	@$(BIN)/tvr bench kernels --json -
	@for script in tpm_cl rank_scaling; do $(BIN)/python tests/benchmarks/$$script.py || exit 1; done

# Without make or $(VENV): python3 tests/benchmarks/gpu_kit
gpu: $(READY)
	@$(BIN)/python tests/benchmarks/gpu_kit $(GPU_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
