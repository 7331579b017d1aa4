# make reproduce: environment, main job, report.   make test: environment, tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RESULTS ?= results

.PHONY: reproduce test test-slow lint clean

reproduce: $(STAMP)
	$(BIN)/python -m experiments.run experiment=attention results=$(RESULTS)
	$(BIN)/python -m experiments.run -m experiment=ablation results=$(RESULTS)
	$(BIN)/python -m experiments.report --results $(RESULTS)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

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
