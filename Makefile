# make demo | test | check | bench: each makes .venv first if need be. PYTHON=/path/to/python3.11 picks another one.
PYTHON ?= python3
# Two at a time, each file's tests one after the other: most wait for something half of the time.
TEST_ARGS ?= -q -rs -n 2 --dist loadfile

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PACKAGES := data_prep kernels launchers trainer

.PHONY: help demo test check fix bench ffcv grafana-schema clean

help:
	@echo "make demo   render clips, train a small model on two ranks, write report.html (about 15 minutes)"
	@echo "make test   the test suite (TEST_ARGS='-q -k name' for a part)"
	@echo "make check  formatting, lint and types; 'make fix' repairs the first two"
	@echo "make ffcv   the optional package for betons; compiles it (README.md names the system packages)"
	@echo "make grafana-schema   the types of dashboards, for a test; needs node and npm"
	@echo "make bench  the kernels' benchmarks, one line of JSON each (some minutes)"

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

demo: $(READY)
	@$(BIN)/tvr demo

test: $(READY)
	@echo "running the tests (a few minutes)"
	@$(BIN)/python -m pytest $(TEST_ARGS)

check: $(READY)
	@$(BIN)/ruff format --check -q . && $(BIN)/ruff check -q .
	@mkdir -p build/types/tvr && for package in $(PACKAGES); do ln -sfn ../../../$$package build/types/tvr/$$package; done
	@$(BIN)/pyright --pythonpath $(BIN)/python

fix: $(READY)
	@$(BIN)/ruff format -q . && $(BIN)/ruff check -q --fix .

# FFCV asks pkg-config for all of OpenCV and includes all of it, and needs two of its modules.
ffcv: $(READY)
	@mkdir -p build/ffcv/opencv2
	@printf '#include <opencv2/%s.hpp>\n' core imgproc > build/ffcv/opencv2/opencv.hpp
	@printf '%s\n' 'Name: opencv4' 'Description: what FFCV needs of OpenCV' 'Version: 4' \
		'Libs: -lopencv_imgproc -lopencv_core' 'Cflags: -I$${pcfiledir} -I/usr/include/opencv4' > build/ffcv/opencv4.pc
	@PKG_CONFIG_PATH="$(CURDIR)/build/ffcv:$$PKG_CONFIG_PATH" \
		$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[ffcv]'

# The types that a test holds dashboards against.
grafana-schema:
	@mkdir -p build/grafana_schema
	@cp tests/grafana_schema/package.json tests/grafana_schema/package-lock.json build/grafana_schema/
	@npm ci --prefix build/grafana_schema --silent --no-audit --no-fund

bench: $(READY)
	@$(BIN)/tvr bench kernels --json -
	@for script in tpm_cl rank_scaling; do $(BIN)/python tests/benchmarks/$$script.py || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
