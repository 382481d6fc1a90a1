# Each target sets itself up: on a bare clone, `make demo` or `make test` first builds .venv from constraints.txt.
#
#   make demo                  the whole method on this machine's CPU, within minutes
#   make test                  lint, then the default tests
#   make test-slow             the tests that take minutes
#   make test-reliability      those of them that CI runs too: killed processes above all
#   make lint                  ruff, pyright and the layer rule
#
# PYTHON=python3.12 chooses the interpreter (3.11 or newer), JOBS=8 the number of test processes.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
JOBS ?= 2
NEW_ENOUGH := import sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$p -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$p && break; done)

.PHONY: demo demo-ci test test-slow test-reliability lint

demo: $(STAMP)
	$(BIN)/tide demo

demo-ci: $(STAMP)
	$(BIN)/tide demo --ci --out "$$(mktemp -d)"

# One thread per test process: torch's threads only hinder each other when the processes fill the cores.
test test-slow test-reliability: export OMP_NUM_THREADS = 1

test: lint
	$(BIN)/python -m pytest -n $(JOBS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) -m slow

# A hundred kills of a dump, as many in the saves of a training, dead ranks, Ray's actors and drivers; and what takes
# long of code in the sandbox, of scores on several processes and of the teachers' real vocabularies.
test-reliability: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) -m slow --durations=10 tests/teacher_dump \
		tests/student_train/test_kill_checkpoint.py tests/student_train/test_heartbeat.py \
		tests/student_train/test_code_sandbox.py tests/student_train/test_evaluate.py tests/test_real_teachers.py

lint: export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer with its venv module is needed; name one with make PYTHON=..." >&2; exit 1; }
	@echo "Setting up $(VENV) with $(PYTHON); the first time takes some minutes ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
