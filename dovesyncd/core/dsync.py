"""The arguments of ``doveadm sync`` (src/doveadm/doveadm-dsync.c, the same in 2.3 and 2.4)."""

from __future__ import annotations

from collections.abc import Sequence

from dovesyncd.core.model import SyncKind


def sync_args(
    kind: SyncKind,
    state: str,
    *,
    lock_timeout: int,
    stall_timeout: int,
    destination: Sequence[str],
    namespaces: Sequence[str] = (),
    all_namespaces: bool = False,
    exclude_mailboxes: Sequence[str] = (),
) -> list[str]:
    """What follows the command word ``sync``. The timeouts are in seconds.

    Without ``-l`` dsync takes no lock and runs beside another one of the same user. Without ``-s`` it
    prints no state; ``-s ''`` asks for one and compares every mailbox; ``-f`` compares every mail.
    """
    args = ["-l", str(lock_timeout), "-T", str(stall_timeout)]
    if kind is SyncKind.FULL:
        args.append("-f")
    args += ["-s", state if kind is SyncKind.STATEFUL else ""]
    if all_namespaces:
        args.append("-N")
    for namespace in namespaces:
        args += ["-n", namespace]
    for mailbox in exclude_mailboxes:
        args += ["-x", mailbox]
    return [*args, *destination]


def without_state(args: Sequence[str]) -> list[str]:
    """The same sync, comparing every mailbox instead of what changed since the state."""
    shorter = list(args)
    if "-s" in shorter[:-1]:
        shorter[shorter.index("-s") + 1] = ""
    return shorter
