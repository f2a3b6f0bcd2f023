# make test    installs what is missing (as root, on Debian) and runs every test
# make demo    two Dovecot servers and two daemons on loopback: watch mail replicate
# make fuzz    coverage-guided fuzzing of all that reads others' bytes, FUZZ_SECONDS for each
# make churn   random work on both nodes among faults for CHURN_SECONDS, CHURN_RUNS times; SEED repeats one

VENV := .venv
PYTEST := $(VENV)/bin/python -m pytest

.PHONY: test test-quick demo churn fuzz lint setup clean

setup:
	@tests/setup $(VENV)

test: setup
	tests/all $(VENV)/bin/python

test-quick: setup
	$(PYTEST) tests/core tests/shell

lint: setup
	$(PYTEST) tests/core/test_linters.py

demo: setup
	@$(VENV)/bin/python -m tests.demo

churn: CHURN_SECONDS ?= 600
churn: CHURN_RUNS ?= 1
churn: setup
	CHAOS_SECONDS=$(CHURN_SECONDS) CHURN_RUNS=$(CHURN_RUNS) $(PYTEST) -s -rA tests/system/test_churn.py

fuzz: FUZZ_SECONDS ?= 60
fuzz: setup
	@$(VENV)/bin/python -c 'import atheris' 2>/dev/null || \
		$(VENV)/bin/python -m pip --quiet --disable-pip-version-check install atheris
	$(VENV)/bin/python -m tests.fuzz $(FUZZ_SECONDS)

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
