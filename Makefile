# make demo   quantize the bundled language model and write a report to $(OUT)
# make test   everything that CI runs: format, lint, types, tests
# Both need Python >= 3.11 and make the environment $(VENV) themselves, once.

PYTHON ?= python3
OUT ?= demo-report
VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.runtime
DEV := $(VENV)/.dev
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check
has_gpu = test -e /dev/nvidia0 || nvidia-smi -L >/dev/null 2>&1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test format venv clean

help:
	@sed -n 's/^# //p' Makefile

demo: $(RUNTIME)
	$(BIN)/eightfold demo --out $(OUT)

# Every check runs even when one before it fails; the last line says which did.
test: $(DEV)
	@failed=; \
	run() { name=$$1; shift; echo "==> $$*"; $(BIN)/"$$@" || failed="$$failed $$name"; }; \
	run format ruff format --check .; \
	run lint ruff check .; \
	run types pyright --pythonpath $(BIN)/python; \
	run tests pytest -n 2 --dist loadfile; \
	if [ -n "$$failed" ]; then echo "==> failed:$$failed"; exit 1; fi; \
	echo "==> all checks passed"

format: $(DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

venv: $(DEV)

$(RUNTIME): pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    "eightfold needs Python >= 3.11, $(PYTHON) is " + sys.version.split()[0] + ": set PYTHON=python3.x")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	if $(has_gpu); then $(PIP_INSTALL) -e .; else $(PIP_INSTALL) -c constraints-cpu.txt -e .; fi
	@touch $@

$(DEV): $(RUNTIME)
	if $(has_gpu); then $(PIP_INSTALL) -e '.[dev]'; else $(PIP_INSTALL) -c constraints-cpu.txt -e '.[dev]'; fi
	@touch $@

clean:
	rm -rf $(VENV) build dist demo-report .pytest_cache .ruff_cache
	find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
