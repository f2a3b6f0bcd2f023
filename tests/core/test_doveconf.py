"""What is taken from Dovecot's configuration, and from what its userdb says."""

from __future__ import annotations

import pytest

from dovesyncd.core.doveconf import DovecotSettings, location_of, parse_doveconf, settings_from
from dovesyncd.core.errors import DovecotError
from dovesyncd.core.layout import Location, UnknownVariable
from dovesyncd.core.model import LogLine, Reply
from dovesyncd.core.userdb_wire import parse_list, parse_lookup, words

CONF_23 = """\
# 2.3.19.1 (9b53102964): /etc/dovecot/dovecot.conf
# Pigeonhole version 0.5.19 (4eae2f79)
# NOTE: Send doveconf -n output instead when asking for help.
base_dir = /run/dovecot/
default_process_limit = 100
first_valid_uid = 500
login_greeting = "a \\"quoted\\" word {"
mail_location = maildir:~/Maildir
namespace pub {
  inbox = no
  location = maildir:/srv/pub
  mailbox x {
    auto = no
  }
  prefix = Pub/
}
namespace mine {
  disabled = no
  inbox = yes
  location = "mdbox:~/ m"
  mailbox "Sent Mail" {
    auto = subscribe
    driver =
  }
  prefix = INBOX/
}
protocol imap {
  mail_location = maildir:/no
}
service doveadm {
  process_limit = 7
  unix_listener doveadm-server {
    mode = 0600
    process_limit = 9
  }
}
service imap {
  process_limit = 1024
}
"""
CONF_24 = """\
# 2.4.1-4 (7d8c0e5759): /etc/dovecot/dovecot.conf
dovecot_config_version = 2.4.1
base_dir = /run/dovecot
default_process_limit = 50
first_valid_uid = 1000
mail_driver = maildir
mail_index_path =
mail_path = ~/Maildir
mailbox_list_layout = fs
namespace inbox {
  mail_index_path = /idx/%{user | domain}/%{user | username}
  inbox = yes
}
"""


def test_settings_of_23() -> None:
    settings = settings_from(CONF_23)
    assert (settings.version, settings.series) == ("2.3.19.1", (2, 3))
    assert settings.doveadm_socket == "/run/dovecot/doveadm-server"
    assert (settings.first_valid_uid, settings.process_limit) == (500, 7)
    assert settings.mail_location == "maildir:~/Maildir"
    assert (settings.namespace, settings.namespace_prefix) == ("mine", "INBOX/")
    assert settings.namespace_location == "mdbox:~/ m"


def test_settings_of_24() -> None:
    settings = settings_from(CONF_24)
    assert (settings.version, settings.series) == ("2.4.1-4", (2, 4))
    assert (settings.first_valid_uid, settings.process_limit) == (1000, 50)
    # The general default of the layout says nothing: maildir has its own.
    assert settings.paths == {"mail_driver": "maildir", "mail_path": "~/Maildir"}
    assert settings.namespace_paths == {"mail_index_path": "/idx/%{user | domain}/%{user | username}"}


def test_quoted_values_and_nested_blocks() -> None:
    top = parse_doveconf(CONF_23)
    assert top.values["login_greeting"] == 'a "quoted" word {'
    mine = next(section for section in top.find("namespace") if section.name == "mine")
    assert [section.name for section in mine.sections] == ["Sent Mail"]
    assert mine.sections[0].values == {"auto": "subscribe", "driver": ""}


@pytest.mark.parametrize("text", ["", "hello", "}\n}\n"])
def test_output_of_something_else(text: str) -> None:
    with pytest.raises(DovecotError):
        settings_from(text)


def make_settings(series: tuple[int, int], **kwargs: object) -> DovecotSettings:
    return DovecotSettings("", series, "/run/dovecot", 500, 100, **kwargs)  # type: ignore[arg-type]


def test_precedence_in_23() -> None:
    general = make_settings((2, 3), mail_location="maildir:/m/%d/%n")
    fields = {"home": "/h", "mail": "maildir:/m/%d/%n"}
    assert location_of("a@x", fields, general) == Location("maildir", "/m/x/a")
    # The userdb's own is not expanded.
    fields["mail"] = "maildir:/m/%d"
    assert location_of("a@x", fields, general) == Location("maildir", "/m/%d")
    namespace = make_settings((2, 3), mail_location="maildir:/m", namespace_location="sdbox:/n/%n")
    assert location_of("a@x", fields, namespace) == Location("sdbox", "/n/a")
    fields["namespace/inbox/location"] = "mdbox:/%n"
    assert location_of("a@x", fields, namespace) == Location("mdbox", "/%n")


def test_precedence_in_24() -> None:
    general = make_settings((2, 4), paths={"mail_driver": "maildir", "mail_index_path": "/i/%{user}"})
    fields = {"home": "/h", "mail_path": "/h/Maildir"}
    assert location_of("a", fields, general) == Location("maildir", "/h/Maildir", index="/i/a")
    fields["mail_index_path"] = "~/%{x}"
    assert location_of("a", fields, general).index == "~/%{x}"
    paths = {"mail_index_path": "/ns/%{user}", "mail_path": "~/ns"}
    namespace = make_settings((2, 4), paths=general.paths, namespace_paths=paths)
    assert location_of("a", fields, namespace) == Location("maildir", "~/ns", index="/ns/a")
    fields["namespace/inbox/mail_index_path"] = "~/own"
    assert location_of("a", fields, namespace).index == "~/own"


def test_a_variable_that_only_dovecot_knows() -> None:
    with pytest.raises(UnknownVariable, match="pid"):
        location_of("a", {"home": "/h"}, make_settings((2, 4), paths={"mail_index_path": "/%{process:pid}"}))


def test_lists() -> None:
    assert parse_list(Reply(0, ('{"userList":["a@x","b\\tc","{"]}',))) == ["a@x", "b\tc", "{"]
    assert parse_list(Reply(0, ('{"userList":[]}',))) == []
    assert parse_list(Reply(0, ("a@x", "b@x", ""))) == ["a@x", "b@x"]
    assert parse_list(Reply(0)) == []
    with pytest.raises(DovecotError):
        parse_list(Reply(0, ('{"other":1}',)))


# As it comes through a pipe: what parts the users, and who is not known, at the end.
TEXT = (
    "field\tvalue\nuid\t2000\ngid\t2000\nhome\t/m/a\nmail\tmaildir:~/Maildir\n\t\n"
    "user\ta@x\nuid\t2000\ngid\t2000\nhome\t/m/a\nnoreplicate\t\n\n\n"
    "userdb lookup: user zz@x doesn't exist\n"
)


def test_text_of_the_program() -> None:
    found = parse_lookup(Reply(67, tuple(TEXT.split("\n"))), ["a@x", "zz@x", "A@X"])
    assert found is not None
    assert found["a@x"]["mail"] == "maildir:~/Maildir"
    assert found["A@X"] == {"user": "a@x", "uid": "2000", "gid": "2000", "home": "/m/a", "noreplicate": ""}
    assert "error" in found["zz@x"]
    # One of three left no trace: nobody knows whose the blocks are.
    assert parse_lookup(Reply(75, tuple(TEXT.split("\n"))), ["a@x", "zz@x", "A@X", "b@x"]) is None


@pytest.mark.parametrize("text", ['{"a":{"home"', "[]", '{"a":1'])
def test_an_answer_that_is_cut_off(text: str) -> None:
    assert parse_lookup(Reply(None, (text,), failure="disconnected"), ["a"]) is None


def test_words() -> None:
    log = (LogLine("info", "x"), LogLine("error", "user listing failed"), LogLine("fatal", "y"))
    assert words(Reply(65, (), log)) == "user listing failed; y"
    assert words(Reply(None, failure="timeout")) == "timeout"
    assert words(Reply(75)) == "exit code 75"
