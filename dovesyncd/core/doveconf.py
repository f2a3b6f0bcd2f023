"""The output of ``doveconf``: nested braces in, the settings that matter here out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Optional

from dovesyncd.core.errors import DovecotError
from dovesyncd.core.layout import Location, expand, parse_location

_VERSION = re.compile(r"#\s*(\d{1,9})\.(\d{1,9})(\S*)")
_SETTING = re.compile(r"([^\s={}]+)\s=(?:\s(.*))?")
_NUMBER = re.compile(r"[0-9]{1,18}")
# The settings of 2.4 that decide where index files are; each can be overridden per namespace and user.
PATH_SETTINGS = ("mail_driver", "mail_path", "mail_index_path", "mail_inbox_path", "mailbox_list_layout")


@dataclass
class Section:
    """A block: ``kind name { ... }``; the whole output has neither."""

    kind: str = ""
    name: str = ""
    values: dict[str, str] = field(default_factory=dict)
    sections: list[Section] = field(default_factory=list)

    def find(self, kind: str) -> Iterator[Section]:
        return (section for section in self.sections if section.kind == kind)


def parse_doveconf(text: str) -> Section:
    """Lines that are neither a setting nor a brace (comments, warnings) are passed over."""
    path = [Section()]
    for line in map(str.strip, text.splitlines()):
        if line.startswith("#"):
            continue
        if match := _SETTING.fullmatch(line):
            path[-1].values[match[1]] = _unquote(match[2] or "")
        elif line.endswith("{"):
            kind, _, name = line[:-1].strip().partition(" ")
            section = Section(kind, _unquote(name.strip()))
            path[-1].sections.append(section)
            path.append(section)
        elif line == "}" and len(path) > 1:
            path.pop()
    return path[0]


def _unquote(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] == '"':
        return re.sub(r"\\(.)", r"\1", value[1:-1])
    return value


@dataclass(frozen=True)
class DovecotSettings:
    """What of Dovecot's configuration decides how it is talked to and where the index files are.

    ``location`` is 2.3's ``mail_location``, or the inbox namespace's own. ``paths`` holds those of
    ``PATH_SETTINGS`` (2.4) that are set for everyone, ``namespace_paths`` those of the inbox namespace.
    All are unexpanded. ``process_limit`` is how many doveadm-server processes may run at once.
    """

    version: str
    series: tuple[int, int]
    base_dir: str
    first_valid_uid: int
    process_limit: int
    mail_location: str = ""
    namespace: str = "inbox"
    namespace_prefix: str = ""
    namespace_location: str = ""
    paths: Mapping[str, str] = field(default_factory=dict)
    namespace_paths: Mapping[str, str] = field(default_factory=dict)

    @property
    def doveadm_socket(self) -> str:
        return f"{self.base_dir}/doveadm-server"


def settings_from(text: str) -> DovecotSettings:
    """The settings in the output of ``doveconf -a``, which has the defaults too."""
    version = _VERSION.match(text)
    if version is None:
        raise DovecotError(
            "doveconf did not say which version Dovecot has",
            "is dovecot.doveconf the path of Dovecot's doveconf program?",
        )
    top = parse_doveconf(text)
    values = top.values
    if values.get("mailbox_list_layout") == "fs":
        # 2.4 prints its general default, which a driver's own default beats, just like a value that is set.
        del values["mailbox_list_layout"]
    inbox = _inbox_namespace(top)
    return DovecotSettings(
        version=version[1] + "." + version[2] + version[3].rstrip(":"),
        series=(int(version[1]), int(version[2])),
        base_dir=values.get("base_dir", "").rstrip("/"),
        first_valid_uid=_number(values.get("first_valid_uid"), 500),
        process_limit=_process_limit(top),
        mail_location=values.get("mail_location", ""),
        namespace=inbox.name,
        namespace_prefix=inbox.values.get("prefix", ""),
        namespace_location=inbox.values.get("location", ""),
        paths={key: values[key] for key in PATH_SETTINGS if values.get(key)},
        namespace_paths={key: inbox.values[key] for key in PATH_SETTINGS if inbox.values.get(key)},
    )


def _inbox_namespace(top: Section) -> Section:
    for section in top.find("namespace"):
        if section.values.get("inbox") == "yes" and section.values.get("disabled") != "yes":
            return section
    return Section("namespace", "inbox")


def _process_limit(top: Section) -> int:
    """0 means the default (service-settings.c, both series)."""
    own = next(
        (one.values.get("process_limit") for one in top.find("service") if one.name == "doveadm"), None
    )
    return _number(own, 0) or _number(top.values.get("default_process_limit"), 100)


def _number(text: Optional[str], default: int) -> int:
    return int(text) if text is not None and _NUMBER.fullmatch(text) else default


def location_of(user: str, fields: Mapping[str, str], settings: DovecotSettings) -> Location:
    """Where the mail of ``user`` lies, from what ``doveadm user`` says and from the configuration.
    UnknownVariable where only Dovecot can tell.

    What comes first (tried on 2.3.19.1 and 2.4.1): the userdb's setting of the inbox namespace, that
    namespace's in the configuration, the userdb's general one, the general one. Dovecot expands no
    variable in what the userdb says.
    """
    own = f"namespace/{settings.namespace}/"
    if settings.series < (2, 4):
        if own + "location" in fields:
            return parse_location(fields[own + "location"])
        mail = settings.namespace_location or fields.get("mail", "")
        if mail not in (settings.namespace_location, settings.mail_location):
            return parse_location(mail)
        return parse_location(expand(mail, user=user, home=fields["home"]))
    values = {}
    for key in PATH_SETTINGS:
        if own + key in fields:
            values[key] = fields[own + key]
        elif key not in settings.namespace_paths and fields.get(key):
            values[key] = fields[key]
        else:
            template = settings.namespace_paths.get(key) or settings.paths.get(key, "")
            values[key] = expand(template, user=user, home=fields["home"])
    return Location(
        driver=values["mail_driver"],
        root=values["mail_path"],
        index=values["mail_index_path"],
        inbox=values["mail_inbox_path"],
        layout=values["mailbox_list_layout"].lower(),
    )
