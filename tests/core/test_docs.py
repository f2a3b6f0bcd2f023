"""What the documentation promises is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
COLUMNS = ["Fault", "You see", "dovesyncd does", "You do", "Tests"]


def failures() -> list[list[str]]:
    lines = (TOP / "docs" / "failures.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in rows if row != COLUMNS and set("".join(row)) != {"-"}]


@pytest.mark.parametrize("row", failures(), ids=lambda row: row[0][:40])
def test_each_failure_has_its_tests(row: list[str]) -> None:
    assert len(row) == len(COLUMNS)
    assert row[0]
    tests = re.findall(r"`(tests/[^`]+)`", row[-1])
    assert tests
    assert re.sub(r"`[^`]*`", "", row[-1]).strip() == ""
    for test in tests:
        file, _, name = test.partition("::")
        text = (TOP / file).read_text()
        assert re.search(rf"^(async )?def {name or 'test_[a-z_]+'}\(", text, re.MULTILINE), test
        if name:
            marks = text[: text.index(f"def {name}(")].rpartition("\n\n\n")[2]
            assert "skip" not in marks.split("\ndef ")[-1] or "skipif" in marks
            assert "xfail" not in marks


def test_there_are_failures() -> None:
    assert len(failures()) > 40
