# make demo | test | test-gpu | bench | lint | clean. The first call installs everything into .venv, once.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu bench lint clean install check

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
LOG := $(VENV)/install.log
# The first Python 3.11 or 3.12 with venv, until .venv has its own. Another one: make PYTHON=/path/to/python3.12
PYTHON ?= $(shell for p in $(PY) python3.11 python3.12 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1 \
	&& { echo $$p; break; }; done)

help:
	@echo "make demo      train the embedded world with and without the teacher, and compare (4 minutes on 2 cores)"
	@echo "make test      all tests, and each benchmark's body once"
	@echo "make test-gpu  the tests that need a CUDA device, kernels compiled"
	@echo "make bench     the benchmarks, timed (for a machine with a GPU)"
	@echo "make lint      ruff"
	@echo "make clean     remove what make and Python made, .venv included; runs/ stays"

demo: $(STAMP)
	@$(VENV)/bin/fastsds demo $(ARGS)

test: $(STAMP)
	@$(PY) -m pytest -q --benchmark-disable tests/ $(wildcard benchmarks/) $(ARGS)

test-gpu: $(STAMP)
	@$(PY) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("error: make test-gpu needs a CUDA device; torch sees none")'
	@$(PY) -m pytest -q -m gpu --benchmark-disable tests/ $(ARGS)

bench: $(STAMP)
	@$(PY) -m pytest -q benchmarks/ $(ARGS)

lint: $(STAMP)
	@$(PY) -m ruff check .

install: $(STAMP)

clean:
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .benchmarks
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# One clear sentence for each thing that is missing.
check:
	@for tool in git g++; do command -v $$tool >/dev/null || { \
		echo "error: $$tool is missing; install it with your system's package manager (Debian, Ubuntu: apt install $$tool)" >&2; \
		exit 2; }; done
	@[ -n "$(PYTHON)" ] || { \
		echo "error: Python 3.11 or 3.12 with venv is missing (Debian, Ubuntu: apt install python3 python3-venv);" \
		"make PYTHON=/path/to/python names another one" >&2; exit 2; }
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null || { \
		echo "error: $(PYTHON) is not Python 3.11 or 3.12 with venv (Debian, Ubuntu: apt install python3-venv)" >&2; exit 2; }

$(STAMP): setup.py constraints.txt | check
	@[ -x $(PY) ] || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 2; }
	@echo "Installing into $(VENV), once: 5.9 GB on disk, about 3 minutes on a fast machine and line. Log: $(LOG)"
	@.ci/install $(PY) $(LOG)
	@touch $@
