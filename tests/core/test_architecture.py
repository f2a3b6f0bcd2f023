"""The layers: core, adapters, tasks, entry points. A module imports only from layers below its own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "dovesyncd"
LAYERS = (
    {"__init__"},
    {"core", "waiting"},
    {"config", "watch", "logreader", "store", "doveadm", "userdb", "notify", "journal", "peer"},
    {"unwatched", "doubt"},
    {"intake", "brain", "users"},
    {"daemon"},
)
# Adapters that may use another one's types.
ALLOWED: set[tuple[str, str]] = set()
# Who alone may import what from outside.
OWNERS = {
    "pyinotify": {"watch"},
    "sqlite3": {"store"},
    "sdnotify": {"notify"},
    "systemd": {"notify", "journal"},
    "tomllib": {"config"},
    "tomli": {"config"},
    "subprocess": set(),
    "socket": {"doveadm"},
    "threading": set(),
    "concurrent": {"store"},
}
# Core does no I/O, and reads no clock and no dice.
NOT_IN_CORE = {"os", "time", "random", "asyncio", "logging", "socket", "datetime", "pathlib", "io"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE).with_suffix("")).replace("/", ".")


def layer_of(name: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if name.split(".")[0] in layer)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(path: Path) -> set[str]:
    """The modules of this package that are imported."""
    names = set()
    for name in imports(path):
        if name.startswith("dovesyncd."):
            rest = name.removeprefix("dovesyncd.") if hasattr(name, "removeprefix") else name[10:]
            parts = rest.split(".")
            names.add(".".join(parts[:2]) if parts[0] == "core" else parts[0])
    return {name for name in names if not name.startswith("__")}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down(path: Path) -> None:
    name = name_of(path)
    for other in own_imports(path):
        if name.startswith("core") and other.startswith("core"):
            continue
        assert layer_of(other) < layer_of(name) or (name, other) in ALLOWED, f"{name} imports {other}"


def test_core_has_no_cycle() -> None:
    graph = {name_of(path): own_imports(path) for path in MODULES if name_of(path).startswith("core.")}
    while graph:
        leaves = {name for name, others in graph.items() if not others & graph.keys()}
        assert leaves, f"cycle among {sorted(graph)}"
        for leaf in leaves:
            del graph[leaf]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_foreign_libraries_have_one_owner(path: Path) -> None:
    name = name_of(path)
    for imported in imports(path):
        top = imported.split(".")[0]
        assert name in OWNERS.get(top, {name}), f"{name} imports {imported}"
        if name.startswith("core"):
            assert top not in NOT_IN_CORE, f"{name} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_broad_excepts(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None
            assert "Exception" not in {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}, path
