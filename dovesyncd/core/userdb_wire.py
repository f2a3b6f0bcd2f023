"""What doveadm's command ``user`` prints, without I/O.

doveadm-server prints JSON (src/doveadm/doveadm-auth-server.c): ``{"userList": [...]}`` for a mask, and
``{name: {field: value}}`` for names. The program ``doveadm`` prints text (src/doveadm/doveadm-auth.c).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from dovesyncd.core.errors import DovecotError
from dovesyncd.core.model import Reply

Fields = Mapping[str, str]


def words(reply: Reply) -> str:
    """What Dovecot said about a failure."""
    said = [line.text for line in reply.log if line.level in ("error", "fatal", "panic")]
    return "; ".join(said)[:1000] or reply.failure or f"exit code {reply.exit_code}"


def parse_list(reply: Reply) -> list[str]:
    """The listed names. DovecotError where the answer can't be understood."""
    answer = _json(reply)
    if answer is None:
        return [line for line in _text(reply).split("\n") if line]
    found = answer.get("userList")
    if not isinstance(found, list):
        raise DovecotError("Dovecot's list of users can't be understood")
    return [_bytes_only(name) for name in found if isinstance(name, str)]


def parse_lookup(reply: Reply, names: Sequence[str]) -> Optional[dict[str, Fields]]:
    """The fields of each of ``names``, the field ``error`` for one that was not found.

    None where the answer is a failure, or is text that can't be told apart: then fewer names have to
    be asked about at once.
    """
    answer = _json(reply)
    if answer is not None:
        return {
            _bytes_only(name): {
                _bytes_only(key): _bytes_only(str(value))
                for key, value in fields.items()
                if not isinstance(value, (dict, list))
            }
            for name, fields in answer.items()
            if isinstance(fields, dict)
        }
    lines = _text(reply).split("\n")
    missing = {name for name in names if f"userdb lookup: user {name} doesn't exist" in lines}
    found = [name for name in names if name not in missing]
    blocks = _blocks(lines)
    if len(blocks) != len(found):
        return None
    return {**dict(zip(found, blocks)), **{name: {"error": "user doesn't exist"} for name in missing}}


def _blocks(lines: Sequence[str]) -> list[Fields]:
    """The rows ``field TAB value`` in the order of the users that exist. A user begins with ``uid``, or
    with ``user`` where the canonical name is another. The blank lines that should part the users, and the
    users that do not exist, come at the end when stdout is a pipe."""
    blocks: list[dict[str, str]] = []
    name = None
    for line in lines:
        key, tab, value = line.partition("\t")
        if not tab or line == "field\tvalue":
            continue
        if key == "user" and (not blocks or "home" in blocks[-1]):
            name = value
        elif key == "uid":
            blocks.append({"uid": value} if name is None else {"user": name, "uid": value})
            name = None
        elif blocks:
            blocks[-1][key] = value
    return list(blocks)


# Those that no byte is decoded to. JSON can name them, and nothing could encode them again.
_SURROGATE = re.compile("[\ud800-\udc7f\udd00-\udfff]")


def _bytes_only(text: str) -> str:
    """``text`` with such code points as the bytes that the JSON would have had without an escape."""
    return _SURROGATE.sub(
        lambda found: found[0].encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape"), text
    )


def _text(reply: Reply) -> str:
    return "\n".join(reply.output)


def _json(reply: Reply) -> Optional[dict[str, Any]]:
    """The object that doveadm-server printed, or None for the text of the program."""
    text = _text(reply).strip()
    if not text.startswith("{"):
        return None
    try:
        # 2.3 does not escape every control character.
        answer = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None
