# make demo   transcribe samples/speech with the shipped model
# make test   ruff, mypy --strict and the whole test suite
# make oldest tests of budgets, reducers and media with the oldest versions that pyproject.toml allows, in .venv-oldest
#
# The first two first make an environment in .venv (about 6 GB, a minute or two), from Python 3.11 or newer and a package index.
# VENV=/elsewhere puts it somewhere else, PYTHON=python3.12 makes it from another interpreter.

VENV ?= .venv
PYTHON ?= python3

OLDEST ?= .venv-oldest

BIN := $(VENV)/bin
MODEL := model_cards/dllm-asr-tiny-en
# An environment holds one checkout at a time; the name says which one it is.
INSTALLED := $(VENV)/.tokenthrift-$(shell pwd | cksum | cut -d ' ' -f 1)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install demo test oldest lint clean

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

# Only uv can choose the oldest versions; each run makes the environment anew. PyAV 15 cannot write a turned film.
oldest: $(INSTALLED)
	$(BIN)/python -m pip install --quiet 'uv>=0.5'
	$(BIN)/uv venv --clear --quiet --python $(BIN)/python $(OLDEST)
	VIRTUAL_ENV=$(abspath $(OLDEST)) $(BIN)/uv pip install --resolution lowest-direct --editable '.[train,audio,video,test]'
	$(OLDEST)/bin/python -m pytest $(addprefix tests/multimodal/test_,budget.py reducers.py video.py audio.py) \
		--deselect tests/multimodal/test_video.py::test_a_turned_phone_gives_upright_frames

clean:
	rm -rf .venv .venv-oldest build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

# uv installs in seconds what takes pip minutes, but it is a convenience: pip alone does the same.
# With pip, constraints come by its environment variable, so that a machine's own constraints do not contradict ours.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer with venv is needed (Debian: apt-get install python3 python3-venv)' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.tokenthrift-*
	{ $(BIN)/python -m pip install --quiet 'uv>=0.5' && \
		VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install --constraint constraints.txt --editable '.[all,test]'; } || \
		PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --editable '.[all,test]'
	touch '$@'
