# Needs Python >= 3.10 with venv, a C++ compiler, make, and the package index; everything else goes into .venv and the user's cache.
#   make demo FRAMEWORK=tf       trains with Keras instead of PyTorch
#   make demo ARGS="--help"      hands options to the example
#   make test-fast ARGS="-k ..." hands options to pytest
#   make setup PYTHON=python3.12 sets .venv up with another Python

PYTHON ?= python3
ARGS ?=
FRAMEWORK ?= torch
DEMO_torch := examples/digits_torch.py
DEMO_tf := examples/digits_keras.py
BIN := .venv/bin
# Processes of pytest; a test of workers starts more. A file's tests stay together, and so do workers that serve them.
PARALLEL := -n auto --maxprocesses 2 --dist loadfile
# The launcher imports TensorFlow where it is installed, which has much to say about itself.
QUIET := TF_CPP_MIN_LOG_LEVEL=3 TF_ENABLE_ONEDNN_OPTS=0

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-mixed bench test test-all test-fast test-install lint clean

help:  ## say what there is
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)$$/  make \1\t\2/p' Makefile | expand -t 20

setup:  ## set .venv up: packages, this checkout, Horovod (minutes the first time, then nothing)
	@$(PYTHON) tools/setup_venv.py

demo: setup  ## train a classifier with SlowMo on four workers of this machine; FRAMEWORK=tf: with Keras
	$(if $(DEMO_$(FRAMEWORK)),,$(error FRAMEWORK is "$(FRAMEWORK)"; it must be torch or tf))
	@$(QUIET) $(BIN)/horovodrun -np 4 $(BIN)/python $(DEMO_$(FRAMEWORK)) $(ARGS)

demo-mixed: setup  ## train one model with PyTorch and Keras workers together, and with each framework alone
	@$(QUIET) $(BIN)/python examples/digits_mixed.py $(ARGS)

bench: setup  ## what a step costs, beside what else one could use; loopback and 1 Gbit/s (about half an hour)
	@$(QUIET) benchmarks/run.sh $(ARGS)

test: setup  ## run all tests
	@$(BIN)/python -m pytest -m "not install and not thorough" $(PARALLEL) $(ARGS)

test-all: setup  ## run all tests, those with more sizes and settings too
	@$(BIN)/python -m pytest -m "not install" $(PARALLEL) $(ARGS)

test-fast: setup  ## run the tests that take no more than a few seconds
	@$(BIN)/python -m pytest -m "not slow" $(PARALLEL) $(ARGS)

test-install: setup  ## run the tests that make environments of one framework each, from nothing (about ten minutes)
	@$(BIN)/python -m pytest -m install $(ARGS)

lint: setup  ## check style, format, layers and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/mypy

clean:  ## remove .venv and what the tools left (the user's cache keeps Horovod's wheel)
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
