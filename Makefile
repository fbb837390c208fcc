# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` need Python >= 3.10 and a C++20 compiler; `make help` lists the rest.

SYSTEM_PYTHON ?= python3
VENV ?= .venv
PYTHON = $(VENV)/bin/python
MOEGEN = $(PYTHON) -m moegen
PYTEST = $(PYTHON) -m pytest
PIP = $(PYTHON) -m pip install -q
STAMP = $(VENV)/.installed

OLD_VENV = .venv-nvrtc12
OLD_STAMP = $(OLD_VENV)/.installed
OLD_TOOLS = 'cuda-bindings==12.9.*' nvidia-cuda-nvrtc-cu12==12.8.93 jinja2 ninja typer rich

OLD_ARCHS = sm80,sm90

TEMPLATE_FILES = $(shell find templates -name '*.cuh' -o -name '*.hpp' -o -name '*.cpp' -o -name '*.jinja')
# Two processes are faster than one on two cores and more; the kernels' own threads fill the rest. What the tests of a
# file share is made once, in one of them.
TEST_JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install demo test lint types generated nvrtc-oldest pytest tsan asan format generate clean

help:
	@echo 'make demo          build the kernels of deepseek-v3 for sm90, then run an MoE layer across ranks'
	@echo 'make test          every check and test that needs no GPU'
	@echo 'make tsan asan     the protocols under ThreadSanitizer and AddressSanitizer'
	@echo 'make format        format Python and templates'
	@echo 'make generate      write generated/ and its manifest again'
	@echo 'make nvrtc-oldest  compile the catalog with the oldest supported NVRTC'
	@echo 'make clean         remove what was built; the kernel cache stays (moegen cache clear)'

install: $(STAMP)

# A torch that the system has already (a CUDA build, say) is taken as it is; else the pinned one is installed.
# CUDA builds of torch ask for an NVRTC of their own; the manifest's is put in its place.
$(STAMP): pyproject.toml constraints.txt
	@$(SYSTEM_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo 'moegen needs Python >= 3.10: make SYSTEM_PYTHON=python3.12 ...'; exit 1; }
	if [ ! -x $(PYTHON) ]; then site=; \
	    if $(SYSTEM_PYTHON) -c 'import torch' 2>/dev/null; then site=--system-site-packages; fi; \
	    $(SYSTEM_PYTHON) -m venv $$site $(VENV); \
	fi
	$(PYTHON) -c 'import torch' 2>/dev/null || $(PIP) $$(grep '^torch==' constraints.txt)
	grep -v '^torch==\|^nvidia-cuda-nvrtc==' constraints.txt > $(VENV)/constraints.txt
	$(PIP) -c $(VENV)/constraints.txt hatchling editables
	$(PIP) -c $(VENV)/constraints.txt --no-build-isolation -e '.[dev]'
	$(PIP) --no-deps $$(grep '^nvidia-cuda-nvrtc==' constraints.txt)
	touch $@

demo: $(STAMP)
	$(MOEGEN) build --arch sm90 --preset deepseek-v3 --ranks 2,4,8
	$(MOEGEN) demo

# One after the other, cheap checks first; pytest's closing line comes last.
test: $(STAMP)
	$(MAKE) --no-print-directory lint
	$(MAKE) --no-print-directory types
	$(MAKE) --no-print-directory generated
	$(MAKE) --no-print-directory nvrtc-oldest
	$(MAKE) --no-print-directory pytest

lint: $(STAMP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(TEMPLATE_FILES)

types: $(STAMP)
	$(PYTHON) -m mypy

# Text; and what the pinned NVRTC makes of it for sm90 and sm100: registers, shared memory, spills, digests.
generated: $(STAMP)
	$(MOEGEN) generate --check --resources

pytest: $(STAMP)
	$(PYTEST) -n $(TEST_JOBS) --dist loadfile

tsan asan: $(STAMP)
	SANITIZER_ROUNDS=10 $(PYTEST) tests/host -m $@

$(OLD_STAMP): Makefile
	$(SYSTEM_PYTHON) -m venv $(OLD_VENV)
	$(OLD_VENV)/bin/python -m pip install -q $(OLD_TOOLS)
	touch $@

nvrtc-oldest: $(OLD_STAMP)
	PYTHONPATH=. $(OLD_VENV)/bin/python -m moegen build --arch $(OLD_ARCHS) --catalog

format: $(STAMP)
	$(PYTHON) -m ruff check --fix-only -q .
	$(PYTHON) -m ruff format -q .
	$(VENV)/bin/clang-format -i $(TEMPLATE_FILES)

generate: $(STAMP)
	$(MOEGEN) generate --resources

clean:
	rm -rf $(VENV) $(OLD_VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
