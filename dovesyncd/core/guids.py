"""A mailbox that has two GUIDs, one on each node, and how both nodes come to choose the same.

Such a mailbox was born on both nodes, or was opened by a client while dsync was creating it. 2.4 merges
the two. On 2.3.19 each dsync gives either side the other's GUID, answers CHANGED, and would do so for ever.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

# What prints the identities, as arguments of doveadm.
STATUS = ("guid uidvalidity", "*")

_GUID = re.compile(r"[0-9a-f]{32}\Z")
# A line of the doveadm program, in place of three values of doveadm-server.
_LINE = re.compile(r"(?P<name>.+) uidvalidity=(?P<uidvalidity>\d+) guid=(?P<guid>[0-9a-f]{32})\Z", re.DOTALL)


class Identity(NamedTuple):
    uidvalidity: str
    guid: str


def parse(output: Sequence[str]) -> dict[str, Identity]:
    """The mailboxes in the output of ``mailbox status``; what is not understood is left out."""
    values = zip(output[0::3], output[1::3], output[2::3])
    if len(output) % 3 == 0 and all(_GUID.match(guid) for guid in output[2::3]):
        return {name: Identity(uidvalidity, guid) for name, uidvalidity, guid in values}
    lines = (_LINE.match(line) for line in output)
    return {line["name"]: Identity(line["uidvalidity"], line["guid"]) for line in lines if line}


def exchanged(
    before: Mapping[str, Identity],
    after: Mapping[str, Identity],
    seen: Collection[tuple[str, Identity]],
) -> dict[str, Identity]:
    """The identities to set, by mailbox, after a sync that ended with CHANGED.

    Where the GUID of a mailbox is another one after the sync, dsync may have taken over the peer's, and
    given it ours: back to that, and both have the same. A mailbox that was deleted and made anew must be let
    alone, for its old GUID may be in the peer's list of deleted ones. That one has a new UIDVALIDITY too, and
    never comes back to an identity that was ``seen`` before this sync, as an exchanged one does.
    """
    return {
        name: before[name]
        for name, now in after.items()
        if name in before
        and before[name].guid != now.guid
        and (before[name].uidvalidity == now.uidvalidity or (name, now) in seen)
    }
