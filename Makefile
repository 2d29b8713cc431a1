# Two commands, each alone on a fresh machine with Python 3.11 or newer: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test quick lint format clean

demo: $(STAMP)
	$(RUN)/diffward demo

# One thread a process: two processes of two threads each get in each other's way.
test: $(STAMP) lint
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(RUN)/python -m pytest -n 2

# What changes every minute: without the slow tests.
quick: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(RUN)/python -m pytest -n 2 -m "not slow"

lint: $(STAMP)
	$(RUN)/ruff check src tests bench
	$(RUN)/ruff format --check src tests bench
	$(RUN)/mypy

format: $(STAMP)
	$(RUN)/ruff check --fix src tests bench
	$(RUN)/ruff format src tests bench

# Compiled once here: where PYTHONDONTWRITEBYTECODE is set, each import would compile anew.
$(STAMP): pyproject.toml constraints.txt
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet -c constraints.txt -e ".[dev,track,dp,zoo,cluster]"
	$(RUN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null || true
	touch $(STAMP)

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
