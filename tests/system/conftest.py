"""Fixtures: ``pair`` runs a test once a Dovecot version, on nodes that are booted once a session."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.system.pair import Pair
from tests.system.pair import pair as make_pair


def _session_pair(version: str) -> Iterator[Pair]:
    with make_pair(version) as nodes:
        yield nodes


@pytest.fixture(scope="session")
def pair_23(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """On loopback where this machine's Dovecot is 2.3, else the hosts with 2.3."""
    version = subprocess.run(["dovecot", "--version"], capture_output=True, text=True, check=False).stdout
    if version.startswith("2.3."):
        yield from _session_pair("2.3")
    else:
        yield request.getfixturevalue("pair_23_hosts")


@pytest.fixture(scope="session")
def pair_24() -> Iterator[Pair]:
    yield from _session_pair("2.4")


@pytest.fixture(scope="session")
def pair_23_hosts() -> Iterator[Pair]:
    yield from _session_pair("2.3-hosts")


def _clean(nodes: Pair) -> Iterator[Pair]:
    nodes.reset()
    yield nodes
    nodes.reset()


@pytest.fixture(params=["2.3", "2.4"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Two clean nodes with Dovecot 2.3 (instances on loopback), then with 2.4 (hosts)."""
    yield from _clean(request.getfixturevalue({"2.3": "pair_23", "2.4": "pair_24"}[request.param]))


@pytest.fixture(params=["2.3-hosts", "2.4"])
def hosts(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Two clean hosts with systemd and a network that can be cut: Dovecot 2.3, then 2.4."""
    yield from _clean(
        request.getfixturevalue({"2.3-hosts": "pair_23_hosts", "2.4": "pair_24"}[request.param])
    )


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A test that fails shows what the daemons logged."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    nodes = getattr(item, "funcargs", {}).get("pair")
    if report.when == "call" and report.failed and isinstance(nodes, Pair):
        for node in nodes:
            report.sections.append((f"dovesyncd on {node.name}", "\n".join(node.daemon_log()[-150:])))
