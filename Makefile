# make reproduce: environment, main job, report.   make test: environment, tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RESULTS ?= results

# make test-slurm: a sweep through a SLURM of one node, which root may install here (Debian, Ubuntu) and the test starts.
.PHONY: reproduce test test-slow test-slurm lint clean

reproduce: $(STAMP)
	$(BIN)/python -m experiments.run experiment=attention results=$(RESULTS)
	$(BIN)/python -m experiments.run -m experiment=ablation results=$(RESULTS)
	$(BIN)/python -m experiments.report --results $(RESULTS)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

test-slurm: $(STAMP)
	@command -v sbatch >/dev/null || test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge; }
	$(BIN)/python -m pytest -m slurm -rs

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "error: $(PYTHON) is not Python 3.10 to 3.13; name one that is: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) $(RESULTS)
