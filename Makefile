# make run      trains a small model on real text over 4 ranks; ARGS="key=value ..." are passed on
# make test     runs the tests, first those that measure time, alone; PYTEST_ARGS="-k merge" runs pytest once, with these options
# make gpu      on a machine with GPUs: the tests that need one, spread over all; those that need several (with
#               RINGFLASH_RANKS_PER_GPU=4 ranks share GPUs, for want of more); ringflash check over all
# make mutate   plants bugs one by one in a copy of the tree and shows that the tests catch each
# make lint     ruff, mypy, clang-format
# make kernels  builds the CUDA library and checks what ptxas said of it (needs nvcc)
# make wheel    dist/ringflash-*.whl
# make clean    removes all that was made
#
# Everything is installed into the folder .venv. PYTHON names the Python to make it from. On a machine whose Python already has a
# suitable torch and which should fetch nothing, SYSTEM_SITE=1 uses the packages of PYTHON as they are:
#   make test SYSTEM_SITE=1 PYTHON=python3

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: run test gpu mutate lint kernels wheel clean

PYTHON ?= python3
VENV ?= .venv
SYSTEM_SITE ?=
ARGS ?=
PYTEST_ARGS ?=
WORKERS_PER_GPU ?= 6

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
ifeq ($(SYSTEM_SITE),1)
INSTALL := $(PIP) install --quiet --no-build-isolation --no-deps
else
INSTALL := $(PIP) install --quiet --constraint constraints.txt
endif

# An editable install follows changes of Python files by itself, but knows no others than it was made with; these are what it is
# built from.
BUILD_INPUTS := pyproject.toml constraints.txt CMakeLists.txt scripts/keep_ptxas_log.sh $(shell find csrc) $(VENV)/.modules
CXX_FILES := $(shell find csrc -name '*.cu' -o -name '*.cuh' -o -name '*.h')

run: $(VENV)/.run
	$(BIN)/ringflash train $(ARGS)

# Files that have such tests. All files would do, but every worker would have to import them.
MARKED = $(sort $(shell grep -lr --include='test_*.py' 'pytest\.mark\.$(1)\b' tests))

test: $(VENV)/.dev
ifeq ($(PYTEST_ARGS),)
	@status=0; \
	$(BIN)/python -m pytest -m alone $(call MARKED,alone) || status=$$?; \
	$(BIN)/python -m pytest -m "not alone" -n 2 --dist worksteal || status=$$?; \
	exit $$status
else
	$(BIN)/python -m pytest $(PYTEST_ARGS)
endif

gpu: $(VENV)/.dev
	@gpus=$$($(BIN)/python -c 'import torch; print(torch.cuda.device_count())'); failed=; \
	if [ "$$gpus" = 0 ]; then echo "error: make gpu needs a GPU, and torch sees none" >&2; exit 1; fi; \
	part() { name=$$1; shift; echo "== $$name"; "$$@" || failed="$$failed, $$name"; }; \
	part "tests of one GPU" \
	  $(BIN)/python -m pytest -m gpu --instant --one-gpu -n $$((gpus * $(WORKERS_PER_GPU))) $(call MARKED,gpu); \
	if [ $$((gpus * $${RINGFLASH_RANKS_PER_GPU:-1})) -gt 1 ]; then \
	  part "tests of several GPUs" $(BIN)/python -m pytest -m multigpu --instant $(call MARKED,multigpu); \
	fi; \
	if [ "$$gpus" -gt 1 ]; then \
	  part "ringflash check" $(BIN)/ringflash check --device cuda --world "$$gpus"; \
	fi; \
	if [ -n "$$failed" ]; then echo "failed: $${failed#, }" >&2; exit 1; fi

mutate: $(VENV)/.dev
	$(BIN)/python scripts/mutate.py

lint: $(VENV)/.dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy ringflash scripts $(wildcard benchmarks/*.py)
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

kernels: $(VENV)/.dev
	$(BIN)/python scripts/check_ptxas.py build

wheel: $(VENV)/.made
	$(PIP) wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/*.whl

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV) || { echo "error: $(PYTHON) cannot make a virtual environment (on Debian: apt install python3-venv)" >&2; exit 1; }
ifeq ($(SYSTEM_SITE),1)
	@# Not --system-site-packages: if PYTHON is itself a virtual environment, that would show the packages of the Python below it.
	$(PYTHON) -c 'import site, sys; print("import site;", "; ".join(f"site.addsitedir({p!r})" for p in sys.path if p.endswith("-packages")))' \
	  > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent_packages.pth"
endif
	touch $@

# The names of all modules; touched only when these change.
$(VENV)/.modules: $(VENV)/.made FORCE
	@names=$$(find ringflash/ parallel launch -name '*.py' | sort); [ "$$names" = "$$(cat $@ 2>/dev/null)" ] || echo "$$names" > $@
FORCE:

$(VENV)/.run: $(VENV)/.made $(BUILD_INPUTS)
	@echo "installing into $(VENV) (minutes the first time)"
	$(INSTALL) --editable '.[train]'
	touch $@

$(VENV)/.dev: $(VENV)/.made $(BUILD_INPUTS)
	@echo "installing into $(VENV) (minutes the first time)"
	$(INSTALL) --editable '.[train,dev]'
	touch $@ $(VENV)/.run
