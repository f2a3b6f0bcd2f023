"""The five-minute start of README, word for word, on two hosts of each Debian release."""

from __future__ import annotations

import re
import textwrap
from functools import partial
from pathlib import Path

from tests.system.clients import message
from tests.system.mailstate import wait_until_equal
from tests.system.node import Node
from tests.system.pair import Pair
from tests.system.waiting import wait_until

README = (Path(__file__).parents[2] / "README.md").read_text()
UNIT = "/etc/systemd/system/dovesyncd.service"
CONFIG = "/etc/dovesyncd/dovesyncd.toml"


def _block(beginning: str) -> str:
    """The indented block of README that begins so."""
    found = re.search(rf"^( +){re.escape(beginning)}.*\n(?:(?:\1.*)?\n)*", README, re.MULTILINE)
    assert found, beginning
    return textwrap.dedent(found.group()).strip() + "\n"


def _logged(node: Node, line: str) -> bool:
    return bool(re.search(line, node.run("journalctl", "-u", "dovesyncd", "-o", "cat").stdout))


def _idle(node: Node) -> bool:
    status = node.run("systemctl", "status", "dovesyncd").stdout
    return 'Status: "1 users, 0 pending, 0 running"' in status


def test_the_five_minute_start(hosts: Pair) -> None:
    (user,) = hosts.fresh_users()
    hosts.a.deliver(user, message("before"))
    unit, listener = _block("[Unit]"), _block("service doveadm {")
    commands = _block("PYTHONPATH=")
    kept = hosts.a.run("cat", UNIT).stdout
    try:
        for node in hosts:
            other = hosts.other(node)
            main = re.sub(
                r"^service doveadm \{.*?^\}\n|^doveadm_(password|port) = .*?\n",
                "",
                node.run("cat", "/etc/dovecot/dovecot.conf").stdout,
                flags=re.DOTALL | re.MULTILINE,
            )
            assert "12345" not in main
            node.run("sh", "-c", "cat >/etc/dovecot/dovecot.conf", stdin=main + listener)
            node.run("systemctl", "restart", "dovecot")
            peer = (
                _block("[[peer]]").replace('"b"', f'"{other.name}"').replace("b.example.com", other.address)
            )
            node.run("sh", "-c", f"cat >{CONFIG}", stdin=peer)
            node.run("sh", "-c", f"cat >{UNIT}", stdin=unit)
            for command in commands.splitlines():
                if not command.startswith("journalctl"):
                    node.run("sh", "-ec", command)
        wait_until_equal(hosts.a, hosts.b, [user], timeout=20)
        hosts.b.deliver(user, message("on the other one"))
        wait_until_equal(hosts.a, hosts.b, [user])
        for node in hosts:
            wait_until(partial(_idle, node), 10, f"{node.name} is idle, and systemctl status says so")
            assert node.run("systemctl", "is-enabled", "dovesyncd").stdout == "enabled\n"
            line = rf"{re.escape(user)} -> \w: .*: (stateful|stateless) sync ok in "
            wait_until(partial(_logged, node, line), 10, f"a line of a sync in {node.name}'s journal")
            fields = node.run("journalctl", "-u", "dovesyncd", f"DOVESYNC_USER={user}", "-o", "json").stdout
            assert '"DOVESYNC_OUTCOME":"ok"' in fields
    finally:
        for node in hosts:
            node.run("systemctl", "disable", "--now", "dovesyncd", check=False)
            node.run("sh", "-c", f"cat >{UNIT}; systemctl daemon-reload", stdin=kept)
            node.configure(node.storage)
