# make demo | make test: each does all its own set-up in $(VENV).
# make test TORCH=torch==2.14.1 VENV=.venv-cuda builds against a CUDA build of torch.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
EXTRA ?=
PYTEST_ARGS ?=
export CCP_CUDA ?= auto

PIP := $(VENV)/bin/pip --disable-pip-version-check
INSTALLED := $(VENV)/installed-$(subst =,,$(TORCH))
BUILT := $(VENV)/built-$(subst =,,$(TORCH))-cuda-$(CCP_CUDA)
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test lint machine clean
.DELETE_ON_ERROR:

demo: $(BUILT)
	$(VENV)/bin/ccp demo

test: $(BUILT)
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

lint: $(BUILT)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \
	  | xargs $(VENV)/bin/clang-format --dry-run --Werror

$(BUILT): $(INSTALLED) $(SOURCES)
	@echo "building the extension (log: $(VENV)/build.log)"
	@$(PIP) install --verbose --no-build-isolation --editable '.[data,demo,plots,dev]' \
	  >$(VENV)/build.log 2>&1 || { tail -n 40 $(VENV)/build.log; exit 1; }
	@! grep -E 'Registers are spilled|[1-9][0-9]* bytes spill (stores|loads)' $(VENV)/build.log
	@grep -o 'ccp_ext: CPU .*' $(VENV)/build.log
	@$(VENV)/bin/ccp info
	@rm -f $(VENV)/built-*
	@touch $@

$(INSTALLED): | machine
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --progress-bar on $(TORCH) $(EXTRA) numpy 'setuptools>=77' wheel ninja pybind11
	@rm -f $(VENV)/installed-* $(VENV)/built-*
	@touch $@

# What a fresh machine may lack, each with the line that brings it.
machine:
	@command -v $(PYTHON) >/dev/null || { echo "python3 is missing: apt-get install python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or later is needed, $(PYTHON) is older: apt-get install python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "Python's venv is missing: apt-get install python3-venv"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig as s; \
	  sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' \
	  || { echo "Python's C headers are missing: apt-get install python3-dev"; exit 1; }
	@command -v g++ >/dev/null || { echo "g++ is missing: apt-get install g++"; exit 1; }

clean:
	rm -rf $(VENV) build *.egg-info
	find ccp_ext -name '*.so' -delete
