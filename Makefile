.PHONY: demo test quick nightly coverage docs test-vllm-matrix install install-test lint clean
PY = .venv/bin/python
# In the order of collection, so that the engines come first; tests/conftest.py says which files stay on one worker.
TWO = $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
# Two busy cores: one thread each is faster than two that spin, and the results do not depend on the core count.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
# The tests start hundreds of processes: each module is compiled once, also where the environment says otherwise.
unexport PYTHONDONTWRITEBYTECODE

demo: install            ## install, then a real GRPO run on this machine
	$(PY) -m rlalign.cli train --config-name demo

test: install-test       ## every law once, two files at a time; the tests of a file share their engines
	$(TWO) -m "not nightly"

nightly: install-test    ## every test: more kinds, ranks and processors
	$(TWO)

quick: install-test      ## the tests that start no engine
	$(TWO) -p no:schemathesis --ignore=tests/engine --ignore=tests/slurm -m "not engine and not slurm and not slow and not nightly"

coverage: install-test   ## every test, and htmlcov/index.html says which lines ran, in the engines' own processes too
	$(PY) -m coverage erase
	$(TWO) --cov --cov-report=
	$(PY) -m coverage html -q && $(PY) -m coverage report --skip-covered --sort=miss | tail -n 40

docs: install-test       ## site/index.html; a link to nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict -q

install:                 ## .venv with the locked CPU requirements
	@scripts/setup.sh cpu

install-test:
	@scripts/setup.sh test

test-vllm-matrix: install-test ## the engine tests on every supported vLLM, each in an environment of its own
	$(PY) scripts/test_vllm_matrix.py

lint: install-test       ## style, the order of rooms, and types (pyright comes with the first call)
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && .venv/bin/lint-imports
	@[ -x .venv/bin/pyright ] || $(PY) -m pip install -q "pyright==1.1.414"
	.venv/bin/pyright

clean:
	rm -rf .venv runs site htmlcov
