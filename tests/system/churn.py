"""Random work of mail clients on both nodes at once, from a seed."""

from __future__ import annotations

import imaplib
import random
import smtplib
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

from tests.system.clients import Imap, RefusedError, message, ok, quoted
from tests.system.mailstate import listed
from tests.system.node import Node
from tests.system.pair import Pair

_KEYWORDS = ("$Todo", "$Later", "NonJunk")
_FLAGS = (r"\Seen", r"\Flagged", r"\Answered", r"\Draft")
# Two clients at once get in each other's way: what one has just deleted, the other can't select.
EXPECTED = (RefusedError, imaplib.IMAP4.error, smtplib.SMTPException, OSError)


class Churn:
    """``common_names``: both nodes take the names of new folders from one small pool, so that a folder
    can be born on both at once. Dovecot 2.3.19 can't merge such folders; there each node has its own.
    ``keepers`` are users who never expunge a mail or delete a folder."""

    def __init__(
        self,
        pair: Pair,
        users: Sequence[str],
        seed: int,
        common_names: bool,
        keepers: Collection[str] = frozenset(),
    ) -> None:
        self._pair = pair
        self.users = users
        self.keepers = keepers
        # The Message-IDs of the mails of each user that LMTP accepted on either node.
        self.accepted: defaultdict[str, set[str]] = defaultdict(set)
        # What was done: Unix time, user, text.
        self.story: list[tuple[float, str, str]] = []
        self._seed = seed
        self._common_names = common_names
        self._names = 0
        self.done: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self._lock = threading.Lock()

    def run(self, seconds: float, clients: int = 3) -> None:
        """``clients`` on each node work for so long. Raises what a client could not expect."""
        until = time.monotonic() + seconds
        with ThreadPoolExecutor(2 * clients) as pool:
            runs = [
                pool.submit(self._client, node, number, until)
                for node in self._pair
                for number in range(clients)
            ]
        for run in runs:
            run.result()

    def _client(self, node: Node, number: int, until: float) -> None:
        rng = random.Random(f"{self._seed} {node.name} {number}")
        while time.monotonic() < until:
            self._session(node, rng, rng.choice(self.users), until)

    def _session(self, node: Node, rng: random.Random, user: str, until: float) -> None:
        """A few things that one client of one user does in a row."""
        table = [row for row in _WORK if user not in self.keepers or row[0] not in _LOSES_MAIL]
        work = rng.choices([one for one, _ in table], [weight for _, weight in table], k=rng.randrange(1, 6))
        try:
            with node.imap(user) as imap:
                for one in work:
                    self._try(one, node, imap, rng, user)
                    time.sleep(rng.random() * 0.05)
                    if time.monotonic() > until:
                        return
        except EXPECTED as error:
            self._count(self.refused, f"session {type(error).__name__}")
            # The server may be down: a client waits a little before it comes back.
            time.sleep(rng.random() * 0.4)

    def _try(self, work: Work, node: Node, imap: Imap, rng: random.Random, user: str) -> None:
        name = work.__name__.lstrip("_")
        try:
            work(self, node, imap, rng, user)
        except imaplib.IMAP4.abort:
            raise
        except EXPECTED:
            self._count(self.refused, name)
        else:
            self._count(self.done, name)
            self.story.append((time.time(), user, f"client on {node.name}: {name}"))

    def _count(self, counter: Counter[str], name: str) -> None:
        with self._lock:
            counter[name] += 1

    def deliver(self, node: Node, user: str) -> None:
        """A new mail by LMTP, noted once the server has taken it."""
        number = self.unique()
        identity = f"<delivered.{number}@example.org>"
        with node.lmtp() as client:
            client.deliver([user], message(f"delivered {number}", identity))
            with self._lock:
                self.accepted[user].add(identity)

    def new_folder(self, node: Node, rng: random.Random) -> str:
        if self._common_names:
            return rng.choice(("Work", "Play", "Old", "Lists", "Work/Sub", "Lists/Dev", "Trip"))
        with self._lock:
            self._names += 1
            return f"{node.name}{self._names}"

    def unique(self) -> str:
        with self._lock:
            self._names += 1
            return f"{self._seed}-{self._names}"


Work = Callable[[Churn, Node, Imap, random.Random, str], None]


def _folders(imap: Imap, rng: random.Random, count: int, inbox: bool = True) -> list[str]:
    names = sorted(set(listed(imap, "LIST")) | ({"INBOX"} if inbox else set()))
    if not inbox:
        names = [name for name in names if name != "INBOX"]
    if len(names) < count:
        raise RefusedError("not enough folders")
    return rng.sample(names, count)


def _some(imap: Imap, rng: random.Random) -> str:
    """Selects a folder, and chooses a few of its mails."""
    (folder,) = _folders(imap, rng, 1)
    count = int(ok(imap.select(quoted(folder)))[0])
    if not count:
        raise RefusedError("no mail")
    return ",".join(str(rng.randrange(1, count + 1)) for _ in range(rng.randrange(1, 4)))


def _deliver(churn: Churn, node: Node, imap: Imap, rng: random.Random, user: str) -> None:
    churn.deliver(node, user)


def _append(churn: Churn, node: Node, imap: Imap, rng: random.Random, user: str) -> None:
    (folder,) = _folders(imap, rng, 1)
    flags = "(" + " ".join(rng.sample([*_FLAGS, *_KEYWORDS], rng.randrange(3))) + ")"
    ok(imap.append(quoted(folder), flags, "", message(f"appended {churn.unique()}")))


def _store(churn: Churn, node: Node, imap: Imap, rng: random.Random, user: str) -> None:
    mails = _some(imap, rng)
    ok(imap.store(mails, rng.choice(("+FLAGS", "-FLAGS")), f"({rng.choice([*_FLAGS, *_KEYWORDS])})"))


def _expunge(churn: Churn, node: Node, imap: Imap, rng: random.Random, user: str) -> None:
    ok(imap.store(_some(imap, rng), "+FLAGS", r"(\Deleted)"))
    ok(imap.expunge())


def _copy(churn: Churn, node: Node, imap: Imap, rng: random.Random, user: str) -> None:
    mails = _some(imap, rng)
    ok(imap.copy(mails, quoted(_folders(imap, rng, 1)[0])))


def _move(churn: Churn, node: Node, imap: Imap, rng: random.Random, user: str) -> None:
    mails = _some(imap, rng)
    # imaplib knows the command only as an extension.
    ok(imap.xatom("MOVE", mails, quoted(_folders(imap, rng, 1)[0])))


def _create(churn: Churn, node: Node, imap: Imap, rng: random.Random, user: str) -> None:
    ok(imap.create(quoted(churn.new_folder(node, rng))))


def _rename(churn: Churn, node: Node, imap: Imap, rng: random.Random, user: str) -> None:
    ok(imap.rename(quoted(_folders(imap, rng, 1, inbox=False)[0]), quoted(churn.new_folder(node, rng))))


def _delete(churn: Churn, node: Node, imap: Imap, rng: random.Random, user: str) -> None:
    ok(imap.delete(quoted(_folders(imap, rng, 1, inbox=False)[0])))


def _subscribe(churn: Churn, node: Node, imap: Imap, rng: random.Random, user: str) -> None:
    ok(imap.subscribe(quoted(_folders(imap, rng, 1)[0])))


def _unsubscribe(churn: Churn, node: Node, imap: Imap, rng: random.Random, user: str) -> None:
    ok(imap.unsubscribe(quoted(rng.choice(sorted(listed(imap, "LSUB")) or ["INBOX"]))))


_WORK: tuple[tuple[Work, int], ...] = (
    (_deliver, 20),
    (_append, 10),
    (_store, 20),
    (_expunge, 5),
    (_copy, 5),
    (_move, 6),
    (_create, 4),
    (_rename, 2),
    (_delete, 2),
    (_subscribe, 2),
    (_unsubscribe, 1),
)
_LOSES_MAIL = (_expunge, _delete)
