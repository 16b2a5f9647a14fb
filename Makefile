# make demo      transcribe samples/speech with the shipped model
# make install   everything for developers, in .venv
# make test      ruff, mypy --strict and the whole test suite
# make lint      ruff and mypy alone
# make docs      the documentation as pages in site/, any warning an error
# make gallery   draw docs/images from the shipped models and samples
# make minimal   install the wheel with no extra into .venv-minimal and import every module
# make oldest    tests of budgets, reducers and media with the oldest versions that pyproject.toml allows, in .venv-oldest
# make newest    the same tests with the newest versions of everything, in .venv-newest
# make harness   tests inside the real lmms-eval and of the demo page, in .venv-harness, and VLMEvalKit, in .venv-vlmevalkit
# make build     wheel and source distribution in dist/, checked
# make clean     remove environments, caches and builds
#
# The first ones make an environment in .venv before (about 6 GB, a minute or two), from Python 3.11 or newer and a
# package index. VENV=/elsewhere puts it somewhere else, PYTHON=python3.12 makes it from another interpreter; MINIMAL,
# OLDEST, NEWEST, HARNESS and VLMEVALKIT do the same for the others.

VENV ?= .venv
PYTHON ?= python3

MINIMAL ?= .venv-minimal
OLDEST ?= .venv-oldest
NEWEST ?= .venv-newest
HARNESS ?= .venv-harness
VLMEVALKIT ?= .venv-vlmevalkit

BIN := $(VENV)/bin
MODEL := model_cards/dllm-asr-tiny-en
# An environment holds one checkout at a time; the name says which one it is.
INSTALLED := $(VENV)/.tokenthrift-$(shell pwd | cksum | cut -d ' ' -f 1)
LIGHT_TESTS := $(addprefix tests/multimodal/test_,budget.py reducers.py video.py audio.py)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install demo test lint docs gallery minimal oldest newest harness build clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

install: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/tokenthrift transcribe samples/speech --model $(MODEL) --references

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two processes of one thread each: two of two threads would wait for each other.
test: $(INSTALLED) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

docs: $(INSTALLED)
	$(BIN)/uv pip install --python $(BIN)/python --quiet --constraint constraints.txt --group docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

gallery: $(INSTALLED)
	$(BIN)/python docs/gallery.py

minimal: $(INSTALLED)
	$(BIN)/python -m build --wheel --outdir $(MINIMAL)/dist
	$(BIN)/uv venv --clear --quiet --python $(BIN)/python $(MINIMAL)/env
	$(BIN)/uv pip install --python $(MINIMAL)/env/bin/python $(MINIMAL)/dist/*.whl
	cd $(MINIMAL) && env/bin/python $(CURDIR)/.ci/import_everything.py

# Only uv can choose the oldest versions; each run makes the environment anew. PyAV 15 cannot write a turned film.
oldest: $(INSTALLED)
	$(BIN)/uv venv --clear --quiet --python $(BIN)/python $(OLDEST)
	$(BIN)/uv pip install --python $(OLDEST)/bin/python --resolution lowest-direct --editable '.[train,audio,video,test]'
	$(OLDEST)/bin/python -m pytest $(LIGHT_TESTS) \
		--deselect tests/multimodal/test_video.py::test_a_turned_phone_gives_upright_frames

# On Python 3.12 and newer that is PyAV 19, which reads AMR and writes none.
newest: $(INSTALLED)
	$(BIN)/uv venv --clear --quiet --python $(BIN)/python $(NEWEST)
	$(BIN)/uv pip install --python $(NEWEST)/bin/python --upgrade --editable '.[train,audio,video,test]'
	$(NEWEST)/bin/python -m pytest $(LIGHT_TESTS) tests/multimodal/test_auto.py \
		--deselect 'tests/multimodal/test_audio.py::test_every_format_gives_the_same_signal[amr]'

# lmms-eval asks for PyAV below 16 and a filelock that newer ones broke; docs/harnesses.md says what and why.
harness: $(INSTALLED)
	$(BIN)/uv venv --clear --quiet --python $(BIN)/python $(HARNESS)
	$(BIN)/uv pip install --python $(HARNESS)/bin/python --constraint tests/harnesses/constraints.txt \
		--editable '.[demo]' lmms-eval hypothesis pytest pytest-timeout
	$(HARNESS)/bin/python -m pytest tests/harnesses --ignore tests/harnesses/test_vlmevalkit.py
	$(BIN)/uv venv --clear --quiet --python $(BIN)/python $(VLMEVALKIT)
	$(BIN)/uv pip install --python $(VLMEVALKIT)/bin/python --constraint tests/harnesses/vlmevalkit.txt \
		--editable '.[video,vision]' ms-vlmeval hypothesis pytest pytest-timeout
	$(VLMEVALKIT)/bin/python -m pytest tests/harnesses/test_vlmevalkit.py

build: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python .ci/check_distribution.py dist

clean:
	rm -rf .venv $(MINIMAL) $(OLDEST) $(NEWEST) $(HARNESS) $(VLMEVALKIT) build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis

# uv installs in seconds what takes pip minutes, but it is a convenience: pip alone does the same.
# With pip, constraints come by its environment variable, so that a machine's own constraints do not contradict ours.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer with venv is needed (Debian: apt-get install python3 python3-venv)' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.tokenthrift-*
	{ $(BIN)/python -m pip install --quiet 'uv>=0.5' && \
		$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt --editable '.[all,test]'; } || \
		PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --editable '.[all,test]'
	touch '$@'
