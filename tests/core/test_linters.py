"""Each linter is a test. They run where they are installed, which ``make test`` sees to."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
SCRIPTS = ["tests/setup", "tests/pythons", ".ci/run"]


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "arguments",
    [("ruff", "check"), ("ruff", "format", "--check"), ("mypy",)],
    ids=["ruff", "ruff format", "mypy"],
)
def test_python(arguments: tuple[str, ...]) -> None:
    pytest.importorskip(arguments[0], reason="only in the environment of make test")
    run(sys.executable, "-m", *arguments)


def test_shell() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    run("shellcheck", *SCRIPTS)
