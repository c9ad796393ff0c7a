# Needs Python >= 3.10 with its venv module, a C++ compiler, make, flock and PyPI. Everything is installed into .venv, and
# Horovod's wheel is kept in the user's cache.
#   make demo FRAMEWORK=tf         train with Keras instead of PyTorch
#   make demo ARGS="--help"        pass options to the example
#   make test-fast ARGS="-k ..."   pass options to pytest
#   make docs                      needs PyPI the first time; the site itself needs no network
#   make setup PYTHON=python3.12   make .venv anew with another Python

PYTHON ?= python3
ARGS ?=
FRAMEWORK ?= torch
MINUTES ?= 60
DEMO_torch := examples/digits_torch.py
DEMO_tf := examples/digits_keras.py
BIN := .venv/bin
INTEGRATIONS := .venv-integrations
# Processes of pytest: one more than a small machine has cores, since a test with workers waits for them most of the time.
# The tests of a file stay together, and so do the workers that they share. Files run in the order of their names: files
# with few tests, which are the long ones, would be left for the end.
PARALLEL := -n 3 --dist loadfile --no-loadscope-reorder
# TensorFlow logs a lot when it is imported.
QUIET := TF_CPP_MIN_LOG_LEVEL=3 TF_ENABLE_ONEDNN_OPTS=0
EVIDENCE := PYTHONPATH=benchmarks:examples OMP_NUM_THREADS=1 $(BIN)/python -m evidence

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup setup-demo docs demo demo-mixed demo-elastic soak evidence evidence-quick bench test test-all test-fast test-install test-integrations lint clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)$$/  make \1\t\2/p' Makefile | expand -t 20

# Steps of the set-up. The target of a step is a stamp in .venv, written after the step has succeeded: an up-to-date .venv
# costs nothing, and a failed or interrupted step is repeated. A stamp has the time at which its step started, so that a
# file edited meanwhile is newer. Two calls at once would write into one .venv, so `locked` locks the directory and
# builds the stamps in a second make, which keeps the lock until it ends.
#
# A demo needs one framework, and Horovod for one framework is compiled in half the time. KIND is "-torch" or "-tf" where
# .venv is made for one only, and empty where it is made for both, with the tools of development.
KIND :=
PACKAGES := .venv/.packages$(KIND)
HOROVOD := .venv/.horovod$(KIND)
REQUIREMENTS := requirements$(or $(KIND),-dev).txt
# Once .venv has been made for both, it stays so.
ONE_FRAMEWORK = $(if $(wildcard .venv/.packages),,-$(FRAMEWORK))

CPU_INDEX := https://download.pytorch.org/whl/cpu
# Exists while pip writes into .venv. Killed, pip can leave a package that it later takes for complete.
UNFINISHED := .venv/.unfinished
IDENTITY = -S -c 'import sys; print("Python", *sys.version_info[:3], sys.base_prefix, "in $(CURDIR)")'
# The Python that .venv must come from: the one that the command line or the environment names, else any.
WANTED = $(if $(filter file,$(origin PYTHON)),$(BIN)/python,$(PYTHON))

# $(call locked,STAMP [KIND=...]): bring a stamp of .venv up to date, alone.
define locked
command -v flock >/dev/null || { \
	echo "flock is missing, and two calls at once would damage .venv. Install util-linux, which has it." >&2; \
	exit 1; }; \
exec 9<. || exit 1; \
flock -n 9 || { echo "Another make is setting up .venv; waiting for it"; flock 9 || exit 1; }; \
if [ -e $(UNFINISHED) ] || [ "$$($(WANTED) $(IDENTITY) 2>&1)" != "$$(cat .venv/.python 2>&1)" ]; then \
	rm -f .venv/.python; \
fi; \
exec $(MAKE) --silent --no-print-directory $(1)
endef

# At the start of a recipe: FRAMEWORK is one that there is.
check_framework = $(if $(DEMO_$(FRAMEWORK)),,$(error FRAMEWORK is "$(FRAMEWORK)"; it must be torch or tf))

setup:  ## set up .venv: packages, this checkout, Horovod (minutes the first time, then nothing)
	@+$(call locked,.venv/.horovod)

setup-demo:
	$(check_framework)
	@+$(call locked,.venv/.horovod$(ONE_FRAMEWORK) KIND=$(ONE_FRAMEWORK))

.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "$(PYTHON) is missing or older than Python 3.10. Name another: make setup PYTHON=python3.12" >&2; exit 1; }
	@echo "Creating .venv with $$($(PYTHON) --version)"
	@$(start_clock); rm -rf .venv; $(PYTHON) -m venv .venv || { \
		echo "Install Python's venv module (Debian, Ubuntu: apt install python3-venv), or name another Python:" \
			"make setup PYTHON=python3.12" >&2; exit 1; }; \
	$(read_clock); $(PYTHON) $(IDENTITY) >$@

$(PACKAGES): $(foreach kind,demo torch tf dev,requirements-$(kind).txt) .venv/.python
	@echo "Installing the packages of $(REQUIREMENTS) (one to a few minutes)"
	@$(start_clock); $(find_index); \
	$(call pip_install,$$index -r $(REQUIREMENTS))

.venv/.checkout: setup.py pyproject.toml hvd_slowmo/version.py $(PACKAGES)
	@echo "Installing this checkout into .venv, editable"
	@$(start_clock); $(call pip_install,--no-deps --no-build-isolation --editable .)

$(HOROVOD): $(wildcard hvd_slowmo/installer/*.py) $(PACKAGES) | .venv/.checkout
	@echo "Installing Horovod (some minutes to build it, once; seconds from your cache)"
	@[ ! -e $@.started ] || rm -rf .venv/lib/python*/site-packages/horovod*  # an interrupted pip can leave half of it
	@rm -f $@; touch $@.started; $(BIN)/hvd-slowmo install-horovod && mv $@.started $@

# The site needs none of the frameworks: the API reference is read from the sources.
.venv/.docs: requirements-docs.txt .venv/.python
	@echo "Installing the packages of requirements-docs.txt"
	@$(start_clock); $(call pip_install,-r requirements-docs.txt)

# $(find_index): set index to pip's option for PyTorch's CPU builds, where they can be had.
define find_index
index=; \
	if timeout 5 $(PYTHON) -c 'from urllib.request import urlopen; urlopen("$(CPU_INDEX)/torch/", timeout=4)' 2>&- >&-; \
	then index="--extra-index-url $(CPU_INDEX)"; echo "  PyTorch: CPU build from $(CPU_INDEX)"; \
	else echo "  PyTorch: from pip's own indexes, since $(CPU_INDEX) does not answer (PyPI has a CUDA build of several GB)"; fi
endef

# Ray, Spark, Lightning and accelerate want other versions of packages that the rest has too.
$(INTEGRATIONS)/.horovod: $(foreach kind,integrations torch tf demo,requirements-$(kind).txt) $(wildcard hvd_slowmo/installer/*.py)
	@command -v java >/dev/null || [ -n "$$JAVA_HOME" ] || { \
		echo "Spark needs Java 17 or later (Debian, Ubuntu: apt install default-jre-headless)." >&2; exit 1; }
	@echo "Setting up $(INTEGRATIONS) with Ray, Spark, Lightning, accelerate and Horovod (minutes, once)"
	@$(start_clock); rm -rf $(INTEGRATIONS); $(PYTHON) -m venv $(INTEGRATIONS) && $(find_index) && \
	pip="$(INTEGRATIONS)/bin/python -m pip --disable-pip-version-check --no-input --quiet" && \
	$$pip install $$index -r requirements-integrations.txt && \
	$$pip install --no-deps --no-build-isolation --editable . && \
	$(INTEGRATIONS)/bin/hvd-slowmo install-horovod && $(read_clock)
	@touch $@

start_clock = started=$$(date +%s)
read_clock = echo "  done in $$(($$(date +%s) - started)) s"

# $(call pip_install,ARGUMENTS): install, log the output, and write the stamp; after a failure, show the errors. pip undoes a
# failed installation itself, but not an interrupted one (status 128 and above), which leaves UNFINISHED behind.
define pip_install
log=$(subst /.,/,$@).log; rm -f $@; touch $(UNFINISHED); trap 'exit 130' INT; \
	$(BIN)/python -m pip --disable-pip-version-check --no-input install $(1) >$$log 2>&1; status=$$?; \
	if [ $$status -ne 0 ]; then \
		[ $$status -ge 128 ] || rm $(UNFINISHED); \
		{ grep -i '^ *error' $$log || cat $$log; } | tail -n 25 >&2; \
		echo "pip failed; the full log is $(CURDIR)/$$log. Check the network and pip's settings (pip config list)," \
			"then run make setup again." >&2; \
		exit 1; \
	fi; \
	$(read_clock); mv $(UNFINISHED) $@
endef

demo: setup-demo  ## train a classifier with SlowMo on four local workers; FRAMEWORK=tf: with Keras
	@echo "Training on four workers of this machine, whose start takes some seconds"
	@$(QUIET) $(BIN)/horovodrun -np 4 $(BIN)/python $(DEMO_$(FRAMEWORK)) $(ARGS)

demo-mixed: setup  ## train one model with PyTorch and Keras workers together, and with each framework alone
	@$(QUIET) $(BIN)/python examples/digits_mixed.py $(ARGS)

demo-elastic: setup-demo  ## kill a worker of an elastic job and add another, and draw the loss (two minutes; FRAMEWORK=tf too)
	@$(QUIET) PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python examples/elastic_demo.py \
		--framework $(FRAMEWORK) $(ARGS)

soak: setup  ## train elastic jobs under random faults; MINUTES=60 for both frameworks together, and a report
	@$(QUIET) PYTHONPATH=tests PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m soak --minutes $(MINUTES) $(ARGS)

docs:  ## build the documentation as a site, build/site/index.html
	@+$(call locked,.venv/.docs)
	@$(BIN)/zensical build --clean --strict $(ARGS)
	@echo "Open $(CURDIR)/build/site/index.html. The search needs a server:" \
		"$(BIN)/python -m http.server -d build/site"

evidence: setup  ## write docs/evidence.md: the paper's questions at a small scale (hours, resumable; ARGS="--size eight": a part)
	@$(EVIDENCE) --size full $(ARGS)

evidence-quick: setup  ## the same with fewer seeds, workers and steps, without translation (about ten minutes)
	@$(EVIDENCE) --size quick $(ARGS)

bench: setup  ## compare the time of a step with the alternatives, on loopback and at 1 Gbit/s (about half an hour)
	@$(QUIET) benchmarks/run.sh $(ARGS)

test: setup  ## run the tests that every change must pass
	@$(BIN)/python -m pytest -m "not install and not integration and not thorough" $(PARALLEL) $(ARGS)

test-all: setup  ## run more sizes and settings too (hours)
	@+$(call locked,.venv/.docs)
	@$(BIN)/python -m pytest -m "not install and not integration" $(PARALLEL) $(ARGS)

test-fast: setup  ## run the tests that take no more than a few seconds and start no workers
	@$(BIN)/python -m pytest -m "not slow and not workers and not thorough and not install and not integration" \
		-n logical --maxprocesses 8 --dist loadfile $(ARGS)

test-install: setup  ## install each framework alone into a new environment and train (about ten minutes)
	@$(BIN)/python -m pytest -m install $(ARGS)

test-integrations:  ## train under Ray and Spark, and in loops of Lightning and accelerate, in .venv-integrations (needs Java)
	@+$(call locked,$(INTEGRATIONS)/.horovod)
	@$(QUIET) PATH="$(abspath $(INTEGRATIONS)/bin):$$PATH" $(INTEGRATIONS)/bin/python -m pytest -m integration \
		tests/examples/test_integrations.py $(ARGS)

lint: setup  ## check style, format, layers and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/mypy

clean:  ## remove .venv and the tools' caches (the user's cache keeps Horovod's wheel)
	rm -rf .venv $(INTEGRATIONS) .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info .cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
