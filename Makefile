# make demo   the main job on a real model: a table, out/compare.json, a picture and a page
# make test   the whole test suite
# make lint   ruff and mypy
#
# Both make a virtual environment in .venv first and install into it; the second run finds it there.
# PYTHON names another interpreter (3.11 or newer), VENV another place.

PYTHON ?= python3
VENV ?= .venv

RUN := $(VENV)/bin/python -m
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(RUN) pip install
# What is installed, by extra: a stamp is as new as the pyproject.toml it was made from.
READY_TEST := $(VENV)/.ready-test
READY_DEMO := $(VENV)/.ready-demo

.PHONY: help test demo lint format clean
help:
	@sed -n '1,7s/^# \{0,1\}//p' Makefile

$(READY_TEST): pyproject.toml
	@sh tools/make_venv.sh "$(PYTHON)" "$(VENV)"
	$(PIP) -e '.[test]'
	@touch $@

# `test` holds all that the demo needs.
$(READY_DEMO): pyproject.toml
	@sh tools/make_venv.sh "$(PYTHON)" "$(VENV)"
	@if [ $(READY_TEST) -nt pyproject.toml ]; then :; else echo "$(PIP) -e '.[llm,lens]'"; $(PIP) -e '.[llm,lens]'; fi
	@touch $@

test: $(READY_TEST)
	@sh tools/system_packages.sh $(VENV)/bin/python
	$(RUN) pytest

demo: $(READY_DEMO)
	@mkdir -p out
	$(VENV)/bin/regard compare --model smollm2-135m --json out/compare.json --html out/compare.html --png out/compare.png
	@printf '\n%s\n' "table:   $(CURDIR)/out/compare.json" "picture: $(CURDIR)/out/compare.png" "page:    $(CURDIR)/out/compare.html"

lint: $(READY_TEST)
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

format: $(READY_TEST)
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

clean:
	rm -rf $(VENV) out dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
