"""Where Dovecot keeps a user's index files: path templates, mail locations, and the shape of the tree.

2.3 has one string, ``mail_location = driver:root[:KEY=value]...`` with variables like ``%d/%n``
(src/lib-storage/mailbox-list.c, src/lib/var-expand.c); 2.4 has a setting for each part, with variables
like ``%{user | domain}`` (src/lib-storage/mail-storage-settings.c, src/lib-var-expand). What is not
understood here is refused with a typed error, never guessed: Dovecot can be asked instead.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Optional

from dovesyncd.core.errors import DovecotError

MAILDIRPP = "maildir++"
_DBOX = frozenset(("sdbox", "mdbox", "dbox"))
# DBOX_MAILDIR_NAME and DBOX_MAILBOX_DIR_NAME, src/lib-storage/index/dbox-common/dbox-storage.h.
_DBOX_LEAF = b"dbox-Mails"
_DBOX_MAILBOXES = "mailboxes"
# Where 2.4 keeps mail when only the driver is set: <driver>_default_settings_keyvalue.
_DEFAULT_ROOT = {"maildir": "~/Maildir", "sdbox": "~/sdbox", "mdbox": "~/mdbox", "mbox": "~/mail"}


class UnknownVariable(DovecotError):
    """A template uses ``variable``, which only Dovecot itself can expand."""

    def __init__(self, template: str, variable: str) -> None:
        super().__init__(f"{variable!r} in {template!r} is not a variable that can be expanded here")
        self.template = template
        self.variable = variable


class UnknownLocation(DovecotError):
    """Dovecot looks for the mail by itself (``mail_location`` or ``mail_driver`` is empty)."""


class UnusablePath(DovecotError):
    """The index files of a user are nowhere that can be watched."""


# ----------------------------------------------------------------------------------------- templates

_VARIABLE = re.compile(
    rb"%(?:(?P<literal>%)"
    rb"|(?P<size>-?\d*(?:\.-?\d*)?)(?P<modifiers>[A-Z]*)(?:\{(?P<program>[^{}]*)\}|(?P<short>[^A-Z{%]))"
    rb"|(?P<bad>.?))",
    re.DOTALL,
)
_SHORT = {b"u": b"user", b"n": b"username", b"d": b"domain", b"h": b"home"}


def _bytes(text: str) -> bytes:
    """As ``os.fsencode``, on every system."""
    return text.encode("utf-8", "surrogateescape")


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def expand(template: str, *, user: str, home: str = "") -> str:
    """``template`` with its 2.3 or 2.4 variables replaced.

    Known are the user's name and its parts, the home directory, the 2.3 modifiers ``L U R T M N H`` with
    offset and width, and the 2.4 filters in ``_FILTERS``. Dovecot counts bytes, and so does this.
    """
    name = _bytes(user)
    username, _, domain = name.partition(b"@")
    variables = {b"user": name, b"username": username, b"domain": domain, b"home": _bytes(home)}
    variables[b"owner_user"], variables[b"owner_home"] = variables[b"user"], variables[b"home"]

    def replace(match: re.Match[bytes]) -> bytes:
        if match["literal"]:
            return b"%"
        text = _text(match[0])
        if match["bad"] is not None:
            raise UnknownVariable(template, text)
        key, *filters = (match["program"] or _SHORT.get(match["short"] or b"", b"")).split(b"|")
        value = variables.get(key.strip())
        if value is None or (value == b"" and key.strip().endswith(b"home")):
            raise UnknownVariable(template, text)
        try:
            for one in filters:
                value = _filter(value, one.strip())
            return _modify(value, match["size"], match["modifiers"])
        except (ValueError, KeyError):
            raise UnknownVariable(template, text) from None

    return _text(_VARIABLE.sub(replace, _bytes(template)))


def _domain(value: bytes) -> bytes:
    return value.partition(b"@")[2]


def _username(value: bytes) -> bytes:
    return value.partition(b"@")[0]


# bytes.lower() and upper() know ASCII only, as Dovecot's t_str_lcase() and t_str_ucase() do.
_FILTERS: dict[bytes, Callable[[bytes], bytes]] = {
    b"username": _username,
    b"domain": _domain,
    b"lower": bytes.lower,
    b"upper": bytes.upper,
    b"reverse": lambda value: value[::-1],
    b"default": lambda value: value,
}
_DEFAULT = re.compile(rb"default\(\s*(?:'([^'\\]*)'|\"([^\"\\]*)\")\s*\)")
_SUBSTR = re.compile(rb"substr\(\s*(\d+)\s*(?:,\s*(\d+)\s*)?\)")


def _filter(value: bytes, text: bytes) -> bytes:
    """One filter of a 2.4 program. KeyError where it is not known, ValueError where it does not fit."""
    if match := _DEFAULT.fullmatch(text):
        return value or match[1] or match[2] or b""
    if match := _SUBSTR.fullmatch(text):
        start = int(match[1])
        end = start + int(match[2]) if match[2] else len(value)
        if start > len(value) or end > len(value):
            raise ValueError("out of bounds")
        return value[start:end]
    return _FILTERS[text](value)


def _hash_h(value: bytes) -> int:
    """str_hash() of src/lib/hash.c."""
    result = 0
    for byte in value:
        result = ((result << 4) + byte) & 0xFFFFFFFF
        high = result & 0xF0000000
        result ^= (high >> 24) ^ high
    return result


def _hash_n(value: bytes) -> int:
    return int.from_bytes(hashlib.md5(value, usedforsecurity=False).digest()[:8], "big")


_MODIFIERS: dict[int, Callable[[bytes], bytes]] = {
    ord("L"): bytes.lower,
    ord("U"): bytes.upper,
    ord("R"): lambda value: value[::-1],
    ord("T"): bytes.rstrip,
    ord("M"): lambda value: hashlib.md5(value, usedforsecurity=False).hexdigest().encode(),
}
# Of an offset and a width, in characters: more than any that make sense, too few to make much of little.
_SIZE_LIMIT = 8
_HASHES: dict[int, Callable[[bytes], int]] = {ord("H"): _hash_h, ord("N"): _hash_n}


def _modify(value: bytes, size: bytes, modifiers: bytes) -> bytes:
    """``[offset.]width`` and modifiers of 2.3. A hash takes the width as its modulus and the offset as
    the least number of digits. KeyError or ValueError where one of them is not known here."""
    before, _, after = size.rpartition(b".")
    if len(size) > _SIZE_LIMIT:
        raise ValueError("a number that Dovecot does not take")
    if b"-" in size or (after[:1] == b"0" and len(after) > 1):
        raise ValueError("counting from the end and padding with zeros")
    offset, width = int(before or 0), int(after or 0)
    for modifier in modifiers:
        if modifier in _HASHES:
            number = _HASHES[modifier](value)
            if width:
                number %= width
            value = b"%0*x" % (offset, number & 0xFFFFFFFF)
            offset = width = 0
        else:
            value = _MODIFIERS[modifier](value)
    value = value[offset:]
    return value[:width] if width else value


# ----------------------------------------------------------------------------------------- locations


@dataclass(frozen=True)
class Location:
    """Where mail lies, expanded except for ``~/``. ``driver`` "" means that Dovecot finds it by itself;
    ``layout`` "" is the driver's own; ``index`` "" is the root; ``inbox`` "" is within the root."""

    driver: str = ""
    root: str = ""
    index: str = ""
    inbox: str = ""
    layout: str = ""

    @property
    def list_layout(self) -> str:
        return self.layout or (MAILDIRPP if self.driver == "maildir" else "fs")


_DRIVER = re.compile(r"[A-Za-z0-9_+-]+(?=:)")


def parse_location(text: str) -> Location:
    """An expanded 2.3 ``mail_location``: ``:`` separates, ``::`` is a colon (split_next_arg())."""
    match = _DRIVER.match(text)
    driver = match[0].lower() if match else ""
    rest = text[match.end() + 1 :] if match else text
    fields = [field.replace("\0", ":") for field in rest.replace("::", "\0").split(":")]
    keys = dict(field.partition("=")[::2] for field in fields[1:])
    return Location(
        driver="" if driver == "auto" else driver,
        root=fields[0],
        index=keys.get("INDEX", ""),
        inbox=keys.get("INBOX", ""),
        layout=keys.get("LAYOUT", "").lower(),
    )


def index_root(location: Location, home: str) -> str:
    """The directory below which all index logs of the user are, and ``dovecot.mailbox.log`` in it
    (mailbox_list_default_get_root_path(): the index path, or else the mail path)."""
    if location.index == "MEMORY":
        raise UnusablePath("indexes in memory can't be replicated")
    path = location.index or location.root
    if not path:
        path = _DEFAULT_ROOT.get(location.driver, "")
    if not location.driver or not path:
        raise UnknownLocation("Dovecot decides by itself where the mail is")
    return absolute(path, home)


def inbox_directory(location: Location, home: str) -> str:
    """The directory of INBOX's index where it is outside of the index root, else ""."""
    if not location.inbox or location.index or not location.inbox.startswith(("/", "~")):
        return ""
    path, root = absolute(location.inbox, home), index_root(location, home)
    return "" if path == root or path.startswith(root + "/") else path


def absolute(path: str, home: str) -> str:
    """``path`` with ``~/`` expanded and without redundant slashes. UnusablePath where it is relative or
    could leave the place that its template names."""
    if path == "~" or path.startswith("~/"):
        if not home:
            raise UnusablePath(f"{path!r} needs a home directory")
        path = home + path[1:]
    if not path.startswith("/"):
        raise UnusablePath(f"path {path!r} is not absolute")
    if ".." in path.split("/") or not _CONTROL.isdisjoint(path):
        raise UnusablePath(f"path {path!r} has '..' or a control character in it")
    return posixpath.normpath("/" + path.lstrip("/"))


@dataclass(frozen=True)
class Place:
    """What Dovecot's answer for one mailbox says about the whole tree. ``driver`` is "" where the
    answer does not show it."""

    root: str
    layout: str
    driver: str = ""


_GUID_LEAF = re.compile(r"/mailboxes/[0-9a-f]{32}\Z")


def parse_index_path(path: str, mailbox: str) -> Place:
    """``doveadm mailbox path -t index`` of ``mailbox``, read backwards. ``mailbox`` is without prefix.

    A folder is ``<root>/.<mailbox>`` (maildir++), ``<root>/mailboxes/<mailbox>[/dbox-Mails]`` (dbox) or
    ``<root>/<mailbox>[/<DIRNAME>]`` (fs); ``<root>/mailboxes/<GUID>`` has the layout "index".
    """
    if not path:
        raise UnusablePath("indexes in memory can't be replicated")
    path = absolute(path, "")
    if match := _GUID_LEAF.search(path):
        return Place(path[: match.start()] or "/", "index", "dbox")
    parts = path.split("/")
    for index in range(len(parts) - 1, 0, -1):
        if parts[index] == "." + mailbox:
            return Place("/".join(parts[:index]) or "/", MAILDIRPP, "maildir")
        if parts[index] == mailbox:
            dbox = parts[index - 1] == _DBOX_MAILBOXES
            root = parts[: index - 1] if dbox else parts[:index]
            return Place("/".join(root) or "/", "fs", "dbox" if dbox else "")
    raise UnusablePath(f"Dovecot's answer {path!r} does not have {mailbox!r} in it")


# ---------------------------------------------------------------------------------------- directories


def descend(driver: str, layout: str, relative: bytes) -> bool:
    """Whether the directory ``relative`` (its path below the index root) can hold a mailbox's logs or
    have such directories below it. For a driver that is not known, all that any driver would enter."""
    *parents, name = relative.split(b"/")
    if name in (b"", b".", b"..") or name.startswith(b".."):
        return False
    if layout == MAILDIRPP:
        # Maildir++ has all folders side by side; everything else there belongs to mails.
        return not parents and name.startswith(b".")
    if driver in _DBOX:
        if not parents:
            return name not in (b"storage", b"sieve") and not name.startswith(b".")
        return parents[-1] != _DBOX_LEAF
    return name not in (b"cur", b"new", b"tmp") and _DBOX_LEAF not in parents


# -------------------------------------------------------------------------------------------- names

_CONTROL = frozenset(chr(code) for code in (*range(0x20), 0x7F))


def unsafe_name(name: str) -> Optional[str]:
    """Why a user name is refused, or None. Dovecot takes ``*`` and ``?`` in a name for a mask, a leading
    ``-`` could be taken for an option, and a slash or dots for another directory."""
    if not name:
        return "is empty"
    if not _CONTROL.isdisjoint(name):
        return "has a control character in it"
    if "*" in name or "?" in name:
        return "has a wildcard in it"
    if name.startswith("-"):
        return "begins with '-'"
    if "/" in name or any(part in (".", "..") for part in name.split("@")):
        return "has a directory in it"
    return None


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether ``name`` as a whole fits one of the globs (``*`` and ``?`` only; case does not matter)."""
    folded = name.casefold()
    return any(_glob(folded, pattern.casefold()) for pattern in patterns)


def _glob(name: str, pattern: str) -> bool:
    """Greedy with one step back, so that no pattern takes more than len(name) * len(pattern) steps."""
    at = here = 0
    star, resume = -1, 0
    while at < len(name):
        if here < len(pattern) and pattern[here] == "*":
            star, resume = here, at
            here += 1
        elif here < len(pattern) and pattern[here] in ("?", name[at]):
            at, here = at + 1, here + 1
        elif star >= 0:
            resume += 1
            at, here = resume, star + 1
        else:
            return False
    return all(char == "*" for char in pattern[here:])
