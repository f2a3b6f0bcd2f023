# make test    installs what is missing (as root, on Debian) and runs every test
# make demo    two Dovecot servers and two daemons on loopback: watch mail replicate
# make churn   random work on both nodes, for as long as CHURN_SECONDS and CHURN_RUNS say

VENV := .venv
PYTEST := $(VENV)/bin/python -m pytest

.PHONY: test test-quick demo churn lint setup clean

setup:
	@tests/setup $(VENV)

test: setup
	tests/pythons tests/core tests/shell
	$(PYTEST) tests

test-quick: setup
	$(PYTEST) tests/core tests/shell

lint: setup
	$(PYTEST) tests/core/test_linters.py

demo: setup
	@$(VENV)/bin/python -m tests.demo

churn: CHURN_SECONDS ?= 30
churn: CHURN_RUNS ?= 20
churn: setup
	CHURN_SECONDS=$(CHURN_SECONDS) CHURN_RUNS=$(CHURN_RUNS) $(PYTEST) -s -rA tests/system/test_churn.py

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
