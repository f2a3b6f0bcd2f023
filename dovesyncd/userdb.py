"""Asks Dovecot for its users and for where each one's index files are.

One way for both series: the command ``user`` of doveadm-server (src/doveadm/doveadm-auth-server.c). It
lists (``{"userList": [...]}``) and looks many users up in one call (``{name: {field: value}}``), as JSON,
so that no user name can break out of its field. The ``doveadm`` program prints the same as text.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import signal
from collections import defaultdict
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Optional, Protocol

from dovesyncd.core import layout
from dovesyncd.core.doveconf import DovecotSettings, location_of, settings_from
from dovesyncd.core.errors import DovecotError
from dovesyncd.core.layout import Location, Place, UnknownLocation, UnknownVariable
from dovesyncd.core.model import Reply, User
from dovesyncd.core.userdb_wire import Fields, parse_list, parse_lookup, words
from dovesyncd.waiting import end

# Users looked up in one call, and the seconds that one call may take.
BATCH = 200
DEADLINE = 60.0
# doveadm processes that answer at once when users have to be asked about one by one.
_PARALLEL = 4
# A folder that need not exist: Dovecot computes its path all the same, except with LAYOUT=index.
_PROBE = "dovesyncd-probe"
# How many users of one kind are asked about before their kind is given up on.
_SAMPLES = 3
_OUTPUT_LIMIT = 4 * 1024 * 1024
_NO = frozenset(("no", "0", "n", "false"))


class Doveadm(Protocol):
    """Runs one doveadm command; ``deadline`` is a moment of the loop's clock."""

    async def run(self, user: str, command: str, args: Sequence[str], *, deadline: float) -> Reply: ...


def _moment(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


@dataclass(frozen=True)
class Account:
    """A user whose mailboxes can be watched. All index logs are below ``index_root``, except INBOX's
    where ``inbox`` names its directory. ``driver`` is Dovecot's name, "dbox" for one of its two forms, or
    "" where Dovecot finds out by itself."""

    user: User
    home: str
    uid: Optional[int]
    index_root: str
    driver: str
    layout: str
    inbox: str = ""


@dataclass(frozen=True)
class Accounts:
    """``problems`` are sentences for the log, ``skipped`` says why a user was left out on purpose, and
    ``aliases`` maps a user who has the same mail as another to that one."""

    accounts: dict[User, Account] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    aliases: dict[User, User] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------ doveconf


async def settings(
    program: str = "doveconf", config: Optional[str] = None, *, deadline: float = DEADLINE
) -> DovecotSettings:
    """Dovecot's configuration with its defaults. DovecotError with doveconf's words where it fails."""
    command = [program, *(("-c", config) if config else ())]
    found = settings_from(await _doveconf([*command, "-a"], deadline))
    if not found.base_dir:
        # 2.4.1 lists all settings but some that were not set, and names them when asked.
        base_dir = (await _doveconf([*command, "-h", "base_dir"], deadline)).strip()
        found = replace(found, base_dir=base_dir.rstrip("/"))
    if not found.base_dir.startswith("/"):
        raise DovecotError("doveconf did not say where base_dir is", "does 'doveconf -h base_dir' work?")
    return found


async def _doveconf(command: Sequence[str], deadline: float) -> str:
    """What it prints. DovecotError where it fails or prints without end."""
    program, hint = command[0], f"does {' '.join(command)!r} work?"
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise DovecotError(f"can't run {program}: {error.strerror}", "set dovecot.doveconf") from error
    reading = asyncio.ensure_future(_output(process))
    try:
        done, _ = await asyncio.wait({reading}, timeout=deadline)
        if not done:
            raise DovecotError(f"{program} did not end within {deadline:g} s", hint)
        output, said = reading.result()
    finally:
        await end({reading})
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # Not wait(): that waits for ever while something is left in a pipe.
            await process.communicate()
    if len(output) > _OUTPUT_LIMIT:
        raise DovecotError(f"{program} printed more than {_OUTPUT_LIMIT} bytes", hint)
    if process.returncode != 0:
        text = said.decode("utf-8", "replace").strip() or f"exit status {process.returncode}"
        raise DovecotError(f"{program} failed: {text[:1000]}", hint)
    return output.decode("utf-8", "surrogateescape")


async def _output(process: asyncio.subprocess.Process) -> tuple[bytes, bytes]:
    """What it printed to stdout and to stderr, when it has ended; or too much, while it still runs."""
    assert process.stdout is not None
    assert process.stderr is not None
    errors = asyncio.ensure_future(_read(process.stderr))
    try:
        output = await _read(process.stdout)
        if len(output) > _OUTPUT_LIMIT:
            return output, b""
        said = await errors
        await process.wait()
        return output, said
    finally:
        errors.cancel()


async def _read(stream: asyncio.StreamReader) -> bytes:
    """All of ``stream``, or a little more than the limit."""
    data = bytearray()
    while len(data) <= _OUTPUT_LIMIT and (piece := await stream.read(65536)):
        data += piece
    return bytes(data)


# --------------------------------------------------------------------------------------------- users


async def users(
    doveadm: Doveadm,
    *,
    names: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    deadline: float = DEADLINE,
) -> tuple[list[str], list[str]]:
    """The wanted names (``names``, or all that Dovecot lists) and the problems with others.

    The list is Dovecot's and may be empty. DovecotError where Dovecot can't list its users.
    """
    listed = names or await _list(doveadm, deadline)
    wanted: list[str] = []
    refused = _Refused()
    for name in dict.fromkeys(listed):
        if not _wanted(name, include, exclude):
            continue
        if reason := layout.unsafe_name(name):
            refused[f"the name {reason}"].append(name)
        else:
            wanted.append(name)
    return wanted, refused.sentences()


class _Refused(defaultdict[str, list[str]]):
    """The users that can't be replicated, by the reason, so that each reason is said once."""

    def __init__(self) -> None:
        super().__init__(list)

    def sentences(self) -> list[str]:
        return [f"left out {_named(names)}: {reason}" for reason, names in self.items()]


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(repr(str(name)) for name in names[:5])
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"user{'s' if len(names) > 1 else ''} {shown}{more}"


def _wanted(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    return (not include or layout.matches(name, include)) and not layout.matches(name, exclude)


async def _list(doveadm: Doveadm, deadline: float) -> list[str]:
    reply = await doveadm.run("", "user", ["*"], deadline=_moment(deadline))
    hint = "does \"doveadm user '*'\" work? SQL needs an iterate query, LDAP an iterate filter"
    if reply.exit_code != 0:
        raise DovecotError(f"Dovecot can't list its users: {words(reply)}", hint)
    return parse_list(reply)


# -------------------------------------------------------------------------------------------- lookup


async def _lookup(doveadm: Doveadm, names: Sequence[str], deadline: float) -> dict[str, Fields]:
    """The userdb fields of each name. A name that is not known, or can't be looked up, has ``error``."""
    reply = await doveadm.run("", "user", names, deadline=_moment(deadline))
    found = parse_lookup(reply, names)
    if found is not None:
        return found
    if reply.exit_code is None or not reply.output:
        raise DovecotError(f"Dovecot can't look users up: {words(reply)}", "does 'doveadm user NAME' work?")
    if len(names) == 1:
        return {names[0]: {"error": words(reply)}}
    single = [await _lookup(doveadm, [name], deadline) for name in names]
    return {name: fields for one in single for name, fields in one.items()}


# ------------------------------------------------------------------------------------------ accounts


async def accounts(
    doveadm: Doveadm,
    settings: DovecotSettings,
    *,
    names: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    index_root: str = "",
    deadline: float = DEADLINE,
) -> Accounts:
    """Every user that can be replicated, with the place of the index files.

    ``index_root`` is a template in the syntax of either series and beats what Dovecot says. Otherwise
    paths are computed from Dovecot's settings, one user of each kind is compared with what Dovecot
    answers for it, and where the two differ Dovecot is asked about every user of that kind.
    DovecotError where Dovecot can't list or look up users at all.
    """
    chosen, problems = await users(doveadm, names=names, include=include, exclude=exclude, deadline=deadline)
    result = Accounts(problems=problems)
    refused = _Refused()
    survey = _Survey(doveadm, settings, index_root, deadline, refused, problems)
    seen: set[str] = set()
    for start in range(0, len(chosen), BATCH):
        batch = chosen[start : start + BATCH]
        found = await _lookup(doveadm, batch, deadline)
        for asked in batch:
            fields = found.get(asked, {})
            name = fields.get("user") or asked
            if name in seen:
                continue
            seen.add(name)
            if reason := layout.unsafe_name(name):
                refused[f"the name {reason}"].append(name)
            elif "home" not in fields:
                # 2.3 does not say why, 2.4 does.
                error = fields.get("error", "Dovecot can't look the user up (below first_valid_uid?)")
                if "see first_valid_uid" in error:
                    result.skipped[name] = error
                else:
                    refused[error.replace(f"user {name} ", "the user ")].append(name)
            elif reason := _left_out(name, fields, settings, include, exclude):
                result.skipped[name] = reason
            else:
                survey.add(User(name), fields)
    located = await survey.accounts()
    problems += refused.sentences()
    _coalesce(located, result)
    return result


def _left_out(
    name: str, fields: Fields, settings: DovecotSettings, include: Sequence[str], exclude: Sequence[str]
) -> str:
    """Why a user is not to be replicated, or ""."""
    uid = _uid(fields.get("uid", ""))
    if not _wanted(name, include, exclude):
        return "excluded by the configuration"
    if "noreplicate" in fields and fields["noreplicate"].lower() not in _NO:
        return "has noreplicate in the userdb"
    if uid is not None and uid < settings.first_valid_uid:
        return f"uid {uid} is below first_valid_uid {settings.first_valid_uid}"
    if not fields["home"]:
        return "has no home directory"
    return ""


def _uid(text: str) -> Optional[int]:
    """``mail_uid`` may be a name."""
    try:
        # A number has its limits too.
        if text.isdecimal():
            return int(text)
        return pwd.getpwnam(text).pw_uid if text else None
    except (KeyError, ValueError):
        return None


def _coalesce(found: Iterable[Account], result: Accounts) -> None:
    """One account for each index root: two agents' syncs of one mailbox would not exclude each other."""
    by_root: dict[str, list[Account]] = defaultdict(list)
    for account in found:
        by_root[account.index_root].append(account)
    for root, same in by_root.items():
        first, *others = sorted(same, key=lambda account: (len(account.user), account.user))
        result.accounts[first.user] = first
        result.aliases.update((other.user, first.user) for other in others)
        if others:
            names = _named([other.user for other in others])
            result.problems.append(f"left out {names}: the mail is that of user {first.user!r}, {root}")


class _Survey:
    """Finds the places of many users' index files with few questions to Dovecot."""

    def __init__(
        self,
        doveadm: Doveadm,
        settings: DovecotSettings,
        template: str,
        deadline: float,
        refused: _Refused,
        problems: list[str],
    ) -> None:
        self._doveadm = doveadm
        self._settings = settings
        self._template = template
        self._deadline = deadline
        self._refused = refused
        self._problems = problems
        self._kinds: dict[tuple[object, ...], list[Account]] = defaultdict(list)
        self._unknown: list[tuple[Account, bool]] = []

    def add(self, user: User, fields: Fields) -> None:
        """``fields`` as Dovecot gave them, ``home`` among them."""
        home = fields["home"]
        account = Account(user, home, _uid(fields.get("uid", "")), "", "", "")
        location = Location()
        try:
            layout.absolute(home, "")
            try:
                location = location_of(user, fields, self._settings)
                account = replace(account, driver=location.driver, layout=location.list_layout)
                if not self._template:
                    root = layout.index_root(location, home)
                    account = replace(account, index_root=root, inbox=layout.inbox_directory(location, home))
            except (UnknownVariable, UnknownLocation):
                if not self._template:
                    self._unknown.append((account, bool(location.inbox)))
                    return
            if self._template:
                root = layout.absolute(layout.expand(self._template, user=user, home=home), home)
                account = replace(account, index_root=root)
        except DovecotError as error:
            self._refused[str(error)].append(user)
            return
        # Users for whom Dovecot takes the same ways through its settings.
        general = fields.get("mail") == self._settings.mail_location
        kind = (location.driver, location.layout, bool(location.index), bool(location.inbox), general)
        self._kinds[kind + tuple(sorted(fields))].append(account)

    async def accounts(self) -> list[Account]:
        found: list[Account] = []
        for kind in self._kinds.values():
            found += await self._compare(kind)
        found += await self._ask_all(self._unknown)
        return found

    async def _compare(self, kind: list[Account]) -> list[Account]:
        """Holds what was computed for users of one kind against Dovecot's answer for one of them."""
        for sample in kind[:_SAMPLES]:
            try:
                place = await self._ask(sample.user)
            except DovecotError:
                continue
            if self._template or place.root == sample.index_root:
                # 2.4.1 does not show a layout that is set to the general default.
                return [
                    replace(account, layout=place.layout, driver=account.driver or place.driver)
                    for account in kind
                ]
            self._problems.append(
                f"user {sample.user!r} has index files in {place.root}, not in {sample.index_root} as "
                "Dovecot's settings say: asking Dovecot about each user; set dovecot.index_root to save that"
            )
            return await self._ask_all([(account, bool(account.inbox)) for account in kind])
        if kind[0].layout != "index":
            # That layout has no path for a mailbox that is not there yet.
            names = _named([account.user for account in kind])
            self._problems.append(f"Dovecot does not tell the mail path of {names}: trusting its settings")
        return kind

    async def _ask_all(self, unknown: Sequence[tuple[Account, bool]]) -> list[Account]:
        slots = asyncio.Semaphore(_PARALLEL)

        async def one(account: Account, has_inbox: bool) -> Optional[Account]:
            async with slots:
                try:
                    place = await self._ask(account.user)
                    inbox = await self._ask_inbox(account.user) if has_inbox else ""
                except DovecotError as error:
                    self._refused[str(error)].append(account.user)
                    return None
            return replace(
                account,
                index_root=place.root,
                driver=account.driver or place.driver,
                layout=place.layout,
                inbox="" if (inbox + "/").startswith(place.root + "/") else inbox,
            )

        # Started piece by piece, so that a large site does not have a task for every user at once.
        found: list[Account] = []
        for start in range(0, len(unknown), BATCH):
            answers = await _gather(one(*item) for item in unknown[start : start + BATCH])
            found += [account for account in answers if account is not None]
        return found

    async def _ask(self, user: User) -> Place:
        """DovecotError where Dovecot does not tell."""
        path, reply = await self._path(user, self._settings.namespace_prefix + _PROBE)
        if path is not None:
            return layout.parse_index_path(path, _PROBE)
        path, again = await self._path(user, "INBOX")
        if path is None:
            raise DovecotError(words(again))
        place = layout.parse_index_path(path, "INBOX")
        if place.layout != "index":
            raise DovecotError(words(reply))
        return place

    async def _ask_inbox(self, user: User) -> str:
        path, reply = await self._path(user, "INBOX")
        if not path:
            raise DovecotError(words(reply))
        return layout.absolute(path, "")

    async def _path(self, user: User, mailbox: str) -> tuple[Optional[str], Reply]:
        args = ["-t", "index", mailbox]
        reply = await self._doveadm.run(user, "mailbox path", args, deadline=_moment(self._deadline))
        if reply.exit_code != 0:
            return None, reply
        return (reply.output[0].strip("\n") if reply.output else ""), reply


async def _gather(coroutines: Iterable[Coroutine[Any, Any, Optional[Account]]]) -> list[Optional[Account]]:
    return list(await asyncio.gather(*coroutines))
