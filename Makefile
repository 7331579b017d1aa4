# make reproduce: environment, main job, report.   make test: environment, tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RESULTS ?= results

# make test-slurm: a sweep through a SLURM of one node, which root may install here (Debian, Ubuntu) and the test starts.
# make test-browser: the attention page in Chromium, which root may install here too.
# make test-benchmarks: the public benchmarks through lmms-eval, in an environment of their own (docs/benchmarks.md).
# make gpu: what a GPU is needed for, in under ten minutes and without network (results/gpu/README.md).
# make bench: ratios of CPU time beside the committed ones (docs/performance.md).
.PHONY: reproduce smol test test-slow test-slurm test-browser test-benchmarks gpu bench docs notebooks lint lint-js dist clean

reproduce: $(STAMP)
	$(BIN)/python -m experiments.run -m experiment=attention,ablation results=$(RESULTS)
	$(BIN)/python -m experiments.report --results $(RESULTS)

# make smol PHOTOS=FOLDER: the study on a real language model anew, training with it (hours of two cores; it goes on where it
# was cut). VISION and LANGUAGE are folders or hub names.
VISION ?= facebook/dinov2-small
LANGUAGE ?= HuggingFaceTB/SmolLM2-135M-Instruct
AGAIN = $(RESULTS)/smol-again
SMOL = data.photos=$(PHOTOS)
PARTS = model.vision=$(VISION) model.language=$(LANGUAGE)

smol: $(STAMP)
	@test -n "$(PHOTOS)" || { echo "error: name the folder of photographs: make smol PHOTOS=FOLDER (docs/data.md, Photographs)"; exit 1; }
	$(BIN)/python -m experiments.run experiment=smol_stage1 results=$(AGAIN)/training save=$(AGAIN)/stage1 $(SMOL) $(PARTS)
	$(BIN)/python -m experiments.run experiment=smol_stage2 results=$(AGAIN)/training model.path=$(AGAIN)/stage1 save=$(AGAIN)/stage2 $(SMOL)
	$(BIN)/python -m experiments.run -m experiment=smol_attention "data.parts=[2x2],[3x3],[one]" results=$(AGAIN) \
	    model.adapter=$(AGAIN)/stage2/adapter $(SMOL) $(PARTS)
	$(BIN)/python -m experiments.run -m experiment=swaps model=smol_grids model.dtype=bfloat16 data=photos "data.parts=[2x2],[3x3]" \
	    data.test_samples=100 results=$(AGAIN) model.adapter=$(AGAIN)/stage2/adapter $(SMOL) $(PARTS)
	$(BIN)/python -m experiments.run -m experiment=smol_ablations seed=0,1 results=$(AGAIN) model.adapter=$(AGAIN)/stage2/adapter $(SMOL) $(PARTS)
	$(BIN)/python -m experiments.report --results $(AGAIN)

# worksteal: each worker gets neighbouring tests, so that fixtures of a module are made once
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

test-slurm: $(STAMP)
	@command -v sbatch >/dev/null || test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge; }
	$(BIN)/python -m pytest -m slurm -rs

test-browser: $(STAMP)
	@command -v chromium >/dev/null || test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt playwright
	$(BIN)/python -m pytest -m browser tests/browser -rs

# lmms-eval without its own requirements: they bring a torchvision that does not fit this torch, and other versions of
# packages that are here already. It needs filelock 3, which nothing else here minds.
BENCHMARKS ?= .venv-benchmarks
LMMS_EVAL = datasets evaluate loguru "tenacity>=8.3" sacrebleu pytablewriter openpyxl "filelock<4"

test-benchmarks: $(BENCHMARKS)/.installed
	OMP_NUM_THREADS=1 $(BENCHMARKS)/bin/python -m pytest -n 2 --dist loadfile -m lmms tests/lmms

$(BENCHMARKS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(BENCHMARKS)
	$(BENCHMARKS)/bin/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[video]" $(LMMS_EVAL) pytest pytest-xdist hypothesis
	$(BENCHMARKS)/bin/python -m pip install --quiet --no-compile --no-deps lmms-eval==0.7.3
	@touch $@

gpu: $(STAMP)
	$(BIN)/python -m experiments.benchmarks.gpu

bench: $(STAMP)
	$(BIN)/python -m experiments.benchmarks.ratios

# make docs: the site, in docs/_build/html, in an environment of its own. Any warning ends it, a broken internal link too.
DOCS ?= .venv-docs

docs: $(DOCS)/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(DOCS)/bin/python -m sphinx --fail-on-warning --keep-going -c docs -d docs/_build/doctrees . docs/_build/html

$(DOCS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	@touch $@

# make notebooks: execute them and keep their outputs, which tests compare.
notebooks: $(STAMP)
	$(BIN)/python notebooks/execute.py

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

# The page's JavaScript. It needs node, which nothing else does.
lint-js:
	npm install --silent --no-save --no-package-lock prettier@3 eslint@9 @eslint/js@9 globals@16
	npx prettier --check probes/view/static/*.js probes/view/static/*.css
	npx eslint probes/view/static/*.js

# The wheel is built from the source distribution, so that what that lacks is missed here.
dist: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "error: $(PYTHON) is not Python 3.10 to 3.13; name one that is: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) $(BENCHMARKS) $(DOCS) docs/_build
	git clean -fdXq results
