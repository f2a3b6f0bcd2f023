"""What can be configured: ``OPTIONS`` is the schema, and reading, ``--show-config`` and the manual follow it.

``parse`` turns TOML data (dicts, lists, scalars) into a ``Config`` or into every problem at once.
Durations are seconds (float) in a ``Config``.
"""

from __future__ import annotations

import difflib
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional, Union

from dovesyncd.core.errors import Problem
from dovesyncd.core.kinds import (
    CHAR,
    SWITCH,
    Kind,
    array,
    choice,
    destination,
    integer,
    span,
    text,
)
from dovesyncd.core.model import PeerName, User

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0


@dataclass(frozen=True)
class PeerConfig:
    """``destination`` is what doveadm sync gets as its last arguments: a location, or a command's words."""

    name: PeerName
    destination: tuple[str, ...]
    workers: int
    namespaces: tuple[str, ...]
    all_namespaces: bool
    exclude_mailboxes: tuple[str, ...]


@dataclass(frozen=True)
class SyncConfig:
    settle: float
    settle_low: float
    longest_wait: float
    pass_interval: float
    lock_timeout: float
    stall_timeout: float
    deadline: float


@dataclass(frozen=True)
class UsersConfig:
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    list: tuple[User, ...]
    refresh: float


@dataclass(frozen=True)
class DovecotConfig:
    config: str
    socket: str
    doveadm: str
    doveconf: str
    index_root: str


@dataclass(frozen=True)
class DaemonConfig:
    state_directory: str
    log_level: str
    compare_interval: float


@dataclass(frozen=True)
class Config:
    peers: tuple[PeerConfig, ...]
    sync: SyncConfig
    users: UsersConfig
    dovecot: DovecotConfig
    daemon: DaemonConfig


@dataclass(frozen=True)
class Option:
    """One row of the schema. ``default`` is written as in TOML; None: the option is required."""

    section: str
    name: str
    kind: Kind
    default: Optional[object]
    sentence: str

    @property
    def unit(self) -> str:
        """The unit of a bare number, "" where there is none."""
        return self.kind.unit


_NAME = text(
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}",
    "a name of 1 to 63 letters, digits, dots, dashes and underscores that begins with a letter or a digit",
)
_PATH_OR_EMPTY = text(f"(/{CHAR}*)?", 'an absolute path, or ""')
_PROGRAM = text(f"/{CHAR}+|(?![-/])[^/\\x00-\\x1f\\x7f-\\x9f]+", "a program's name or absolute path")
_INDEX_ROOT = text(
    f"((/|~/|%h|%{{home){CHAR}*)?", 'an absolute path that may hold Dovecot\'s variables (%d, %n, %h), or ""'
)
_MASK = text(f"{CHAR}+", "a user name, in which * and ? match any text and any character")
_USER = text(f"(?!-)(?:(?![*?]){CHAR})+", "the name of one user, without * and ?")
_NAMESPACE = text(f"{CHAR}*", "a namespace as doveadm sync -n knows it")
_MAILBOX = text(f"{CHAR}+", "a mailbox name, in which * and % match, or a special use such as \\Trash")

OPTIONS: tuple[Option, ...] = (
    Option("sync", "settle", span(0, MINUTE), "100ms",
           "How long a user's changes are collected after new mail was synced, so that a burst is one sync; "
           "the first new mail of an idle user goes at once."),
    Option("sync", "settle_low", span(0, MINUTE), "300ms",
           "How long changes that can wait (flags, keywords, expunges, subscriptions) are collected."),
    Option("sync", "longest_wait", span(0, HOUR), "2s",
           "The longest that a change waits for others to follow it."),
    Option("sync", "pass_interval", span(MINUTE, 365 * DAY), "1d",
           "Each user is compared with each peer once in this time, whatever the logs and the states say."),
    Option("sync", "lock_timeout", span(1, HOUR, whole=True), "30s",
           "How long a sync waits for another one of the same user (doveadm sync -l)."),
    Option("sync", "stall_timeout", span(1, HOUR, whole=True), "5min",
           "A sync whose peer sends nothing for so long gives up (doveadm sync -T)."),
    Option("sync", "deadline", span(1, 7 * DAY), "1h",
           "A sync that takes longer is ended and tried again later; it must leave time for the first sync "
           "of the largest user."),
    Option("users", "include", array(_MASK, at_least=1), ["*"],
           "Only users that match one of these are replicated."),
    Option("users", "exclude", array(_MASK), [],
           "Users that match one of these are not replicated, even if they are included."),
    Option("users", "list", array(_USER), [],
           "The users, where Dovecot's userdb can't list them; when empty, userdb is asked."),
    Option("users", "refresh", span(1, DAY), "5min",
           "How often userdb is asked for new and removed users."),
    Option("dovecot", "config", _PATH_OR_EMPTY, "",
           "The path of dovecot.conf, where it is not Dovecot's default (doveadm -c)."),
    Option("dovecot", "socket", _PATH_OR_EMPTY, "",
           "The path of the doveadm-server socket; when empty, it is looked for in Dovecot's base_dir."),
    Option("dovecot", "doveadm", _PROGRAM, "doveadm", "The doveadm program."),
    Option("dovecot", "doveconf", _PROGRAM, "doveconf", "The doveconf program."),
    Option("dovecot", "index_root", _INDEX_ROOT, "",
           "Where the index files of a user are, as a template with Dovecot's variables, such as "
           '"/var/vmail/%d/%n/Maildir"; when empty, Dovecot is asked.'),
    Option("daemon", "state_directory", _PATH_OR_EMPTY, "",
           "Where the queue is kept; when empty, $STATE_DIRECTORY as set by systemd, or /var/lib/dovesyncd."),
    Option("daemon", "log_level", choice("debug", "info", "warning", "error"), "info",
           "The least important messages that are logged."),
    Option("daemon", "compare_interval", span(1, DAY), "30s",
           "How often users are compared with what is known of them whose directories inotify can't watch, "
           "or that lie on a file system of other hosts."),
    Option("peer", "name", _NAME, None,
           "What this peer is called in the queue, in logs and in metrics; a new name is a new peer."),
    Option("peer", "destination", destination(), None,
           'Where doveadm sync connects to: "tcp:HOST:PORT", "tcps:HOST:PORT", "remote:[LOGIN@]HOST", '
           '"remoteprefix:[LOGIN@]HOST", or a command as an array of its words.'),
    Option("peer", "workers", integer(1, 100), 10,
           "How many users are synced with this peer at the same time."),
    Option("peer", "namespaces", array(_NAMESPACE), [],
           "Only these namespaces are synced (doveadm sync -n); when empty, Dovecot chooses."),
    Option("peer", "all_namespaces", SWITCH, False,
           "Sync all namespaces (doveadm sync -N); with shared or public ones this can duplicate mails."),
    Option("peer", "exclude_mailboxes", array(_MAILBOX), [],
           "Mailboxes that are not synced (doveadm sync -x)."),
)  # fmt: skip

SECTIONS: Mapping[str, type[Any]] = {
    "sync": SyncConfig,
    "users": UsersConfig,
    "dovecot": DovecotConfig,
    "daemon": DaemonConfig,
}


def options_of(section: str) -> tuple[Option, ...]:
    return tuple(option for option in OPTIONS if option.section == section)


class Parsed(NamedTuple):
    """``config`` is None exactly when there are problems. Warnings are unknown keys, which change nothing."""

    config: Optional[Config]
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...]


def parse(documents: Sequence[tuple[str, Mapping[str, object]]]) -> Parsed:
    """Merge documents (a file's name and its TOML data, later ones win key by key) and check the result.

    Tables ``[[peer]]`` of different files with the same name are one peer. Never raises, whatever
    the data holds.
    """
    merged = _Merged()
    for file, document in documents:
        merged.add(file, document)
    problems = merged.problems
    sections = {}
    for section in SECTIONS:
        given = merged.sections[section]
        sections[section] = values = _read(section, given, None, problems)
        problems.extend(_broken_rules(section, values, given))
    peers = []
    for peer in merged.peers.values():
        peers.append(values := _read("peer", peer.given, peer, problems))
        problems.extend(_broken_rules("peer", values, peer.given))
    problems.extend(_shared_destinations(peers, merged.peers.values()))
    if not merged.saw_peer:
        file = documents[0][0] if documents else ""
        problems.append(Problem(file, "peer", None, "at least one [[peer]] table is required"))
    config = None
    if not problems:
        config = Config(
            tuple(PeerConfig(**values) for values in peers),
            **{section: SECTIONS[section](**values) for section, values in sections.items()},
        )
    return Parsed(config, tuple(problems), tuple(merged.warnings))


_comment = textwrap.TextWrapper(100, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def render(config: Config) -> str:
    """The configuration as TOML that parses back to an equal one, each option with its sentence."""
    tables = [(f"[{section}]", options_of(section), getattr(config, section), True) for section in SECTIONS]
    for number, peer in enumerate(config.peers):
        tables.append(("[[peer]]", options_of("peer"), peer, number == 0))
    blocks = []
    for header, options, values, explained in tables:
        lines = [header]
        for option in options:
            if explained:
                lines += _comment.wrap(option.sentence)
            lines.append(f"{option.name} = {option.kind.toml(getattr(values, option.name))}")
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


class _Given(NamedTuple):
    """A value with the place it was written at."""

    file: str
    key: str
    value: object

    def problem(self, expected: str, suffix: str = "", value: Optional[object] = None) -> Problem:
        return Problem(self.file, self.key + suffix, _shown(self.value if value is None else value), expected)


@dataclass(frozen=True)
class _PeerTable:
    """The keys of one peer, from all files, and where it came up first."""

    file: str
    key: str
    given: dict[str, _Given]


class _Merged:
    """What all documents say together, before any value is checked."""

    def __init__(self) -> None:
        self.sections: dict[str, dict[str, _Given]] = {section: {} for section in SECTIONS}
        # By name; a table that can't be merged by its name is alone under (file, index).
        self.peers: dict[Union[str, tuple[str, int]], _PeerTable] = {}
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []
        self.saw_peer = False

    def add(self, file: str, document: Mapping[str, object]) -> None:
        for name, table in document.items():
            if name == "peer":
                self._add_peers(_Given(file, name, table))
            elif name not in SECTIONS:
                self._warn(file, _dotted(name), name, (*SECTIONS, "peer"))
            elif isinstance(table, Mapping):
                self.sections[name].update(self._known_keys(file, name, name, table))
            else:
                self.problems.append(_Given(file, name, table).problem(f"a table [{name}]"))

    def _add_peers(self, array: _Given) -> None:
        self.saw_peer = self.saw_peer or array.value != []
        if not isinstance(array.value, list):
            self.problems.append(array.problem("an array of tables, each begun by [[peer]]"))
            return
        names: dict[str, str] = {}
        for index, table in enumerate(array.value):
            place = f"peer[{index}]"
            if not isinstance(table, Mapping):
                self.problems.append(array.problem("a table", f"[{index}]", table))
                continue
            given = self._known_keys(array.file, "peer", place, table)
            name = table.get("name")
            if not isinstance(name, str) or name in names:
                self.peers[array.file, index] = _PeerTable(array.file, place, given)
                if isinstance(name, str):
                    self.problems.append(given["name"].problem(f"another name than that of {names[name]}"))
                continue
            names[name] = place
            peer = self.peers.setdefault(name, _PeerTable(array.file, place, {}))
            # Problems of the name are told where it came up first.
            peer.given.update({**given, "name": peer.given.get("name", given["name"])})

    def _known_keys(
        self, file: str, section: str, place: str, table: Mapping[str, object]
    ) -> dict[str, _Given]:
        known = [option.name for option in options_of(section)]
        for name in table:
            if name not in known:
                self._warn(file, f"{place}.{_dotted(name)}", name, known)
        return {name: _Given(file, f"{place}.{name}", table[name]) for name in known if name in table}

    def _warn(self, file: str, key: str, name: str, known: Iterable[str]) -> None:
        """``known``: what belongs here. If none is meant, it may be an option in the wrong section."""
        elsewhere = [f"{option.section}.{option.name}" for option in OPTIONS if option.name == name]
        close = difflib.get_close_matches(name[:100].lower(), known, 1) or elsewhere[:1]
        hint = f", did you mean {close[0]}?" if close else ""
        self.warnings.append(Problem(file, key, None, f"unknown key{hint}"))


def _read(
    section: str, given: Mapping[str, _Given], peer: Optional[_PeerTable], problems: list[Problem]
) -> dict[str, Any]:
    """The values of a table, defaults included, without those that are wrong: they add to ``problems``."""
    values = {}
    for option in options_of(section):
        if option.name in given:
            item = given[option.name]
            faults = list(option.kind.faults(item.value))
            problems.extend(item.problem(fault.expected, fault.suffix, fault.value) for fault in faults)
            if not faults:
                values[option.name] = option.kind.convert(item.value)
        elif option.default is not None:
            values[option.name] = option.kind.convert(option.default)
        elif peer is not None:
            key = f"{peer.key}.{option.name}"
            problems.append(Problem(peer.file, key, None, f"required: {option.kind.expected}"))
    return values


class _Rule(NamedTuple):
    """What the values of ``names`` owe each other."""

    section: str
    names: tuple[str, ...]
    holds: Callable[..., bool]
    text: str


_RULES = (
    _Rule("sync", ("settle", "settle_low"), lambda a, b: a <= b, "settle to be at most settle_low"),
    _Rule("sync", ("settle_low", "longest_wait"), lambda a, b: a <= b,
          "settle_low to be at most longest_wait"),
    _Rule("sync", ("deadline", "lock_timeout", "stall_timeout"), lambda a, b, c: a > b + c,
          "deadline to be longer than lock_timeout and stall_timeout together"),
    _Rule("peer", ("namespaces", "all_namespaces"), lambda some, every: not (some and every),
          "namespaces or all_namespaces, not both"),
)  # fmt: skip


def _broken_rules(section: str, values: Mapping[str, Any], given: Mapping[str, _Given]) -> Iterator[Problem]:
    kinds = {option.name: option.kind for option in options_of(section)}
    for rule in _RULES:
        if rule.section != section or not all(name in values for name in rule.names):
            continue
        if not rule.holds(*(values[name] for name in rule.names)):
            # The defaults keep the rules, so one of the values was given.
            culprit = next(given[name] for name in rule.names if name in given)
            now = ", ".join(f"{name} = {kinds[name].toml(values[name])}" for name in rule.names)
            yield culprit.problem(f"{rule.text} (now {now})")


def _shared_destinations(
    peers: Sequence[Mapping[str, Any]], tables: Iterable[_PeerTable]
) -> Iterator[Problem]:
    first: dict[tuple[str, ...], _Given] = {}
    for values, table in zip(peers, tables):
        if "destination" in values:
            given = table.given["destination"]
            other = first.setdefault(values["destination"], given)
            if other is not given:
                yield given.problem(f"another destination than {other.key} in {other.file}")


def _dotted(key: str) -> str:
    """A key as TOML writes it: quoted where it is not a bare key."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)


def _shown(value: object) -> object:
    """The value of a problem, which has to survive ``repr``: Python refuses to print integers of
    more than 4300 digits, and nesting has its limit too."""
    try:
        repr(value)
    except (ValueError, RecursionError):
        return f"<{type(value).__name__}>"
    return value
