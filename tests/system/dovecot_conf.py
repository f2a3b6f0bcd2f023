"""Configuration of a Dovecot for tests, in the syntax of 2.3 and of 2.4."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PASSWORD = "secret"


@dataclass(frozen=True)
class Ports:
    imap: int = 143
    pop3: int = 110
    lmtp: int = 24
    sieve: int = 4190
    doveadm: int = 12345


@dataclass(frozen=True)
class MailStorage:
    """How mail is stored. ``layout`` is "" for the driver's default or a LAYOUT= value such as "fs";
    ``separate_index`` puts the index logs below another directory; ``extra`` is appended verbatim."""

    driver: str = "maildir"
    layout: str = ""
    separate_index: bool = False
    extra: str = ""

    @property
    def directory(self) -> str:
        """The mail root, relative to a user's home."""
        return {"maildir": "Maildir"}.get(self.driver, self.driver)

    @property
    def inbox(self) -> str:
        """A directory that exists if and only if INBOX does, relative to the mail root."""
        return "cur" if self.driver == "maildir" else "mailboxes/INBOX/dbox-Mails"


@dataclass(frozen=True)
class Paths:
    """Where things are, as Dovecot sees them."""

    mail: Path
    index: Path
    users: Path
    log: Path


_SHARED = """
protocols = imap lmtp pop3 sieve
ssl = no
log_path = {paths.log}
postmaster_address = postmaster@example.org
mail_max_userip_connections = 1000
doveadm_password = {password}
doveadm_port = {ports.doveadm}
auth_failure_delay = 0
namespace inbox {{
  inbox = yes
  separator = /
}}
service imap-login {{
  process_min_avail = 1
  inet_listener imap {{
    port = {ports.imap}
  }}
  inet_listener imaps {{
    port = 0
  }}
}}
service pop3-login {{
  inet_listener pop3 {{
    port = {ports.pop3}
  }}
  inet_listener pop3s {{
    port = 0
  }}
}}
service lmtp {{
  inet_listener lmtp {{
    port = {ports.lmtp}
  }}
}}
service managesieve-login {{
  inet_listener sieve {{
    port = {ports.sieve}
  }}
}}
service doveadm {{
  inet_listener {doveadm_listener} {{
    port = {ports.doveadm}
  }}
}}
"""

_ONLY_23 = """
disable_plaintext_auth = no
mail_location = {location}
mail_home = {paths.mail}/%d/%n
mail_uid = {owner}
mail_gid = {owner}
first_valid_uid = 1
mail_attribute_dict = file:%h/dovecot-attributes
mail_plugins = acl
passdb {{
  driver = passwd-file
  args = username_format=%u {paths.users}
}}
userdb {{
  driver = passwd-file
  args = username_format=%u {paths.users}
}}
protocol imap {{
  mail_plugins = $mail_plugins imap_acl
  imap_metadata = yes
}}
protocol lmtp {{
  mail_plugins = $mail_plugins sieve
}}
plugin {{
  acl = vfile
  sieve = file:~/sieve;active=~/.dovecot.sieve
}}
"""

# Must be the first settings of the file.
_HEAD_24 = """dovecot_config_version = 2.4.1
dovecot_storage_version = 2.4.0
"""

_ONLY_24 = """
auth_allow_cleartext = yes
mail_driver = {storage.driver}
mail_path = ~/{storage.directory}
mail_home = {paths.mail}/%{{user | domain}}/%{{user | username}}
mail_uid = {owner}
mail_gid = {owner}
first_valid_uid = 1
mail_attribute {{
  dict file {{
    path = %{{home}}/dovecot-attributes
  }}
}}
mail_plugins {{
  acl = yes
}}
acl_driver = vfile
passdb passwd-file {{
  passwd_file_path = {paths.users}
}}
userdb passwd-file {{
  passwd_file_path = {paths.users}
}}
protocol imap {{
  mail_plugins {{
    imap_acl = yes
  }}
  imap_metadata = yes
}}
protocol lmtp {{
  mail_plugins {{
    sieve = yes
  }}
}}
sieve_script personal {{
  driver = file
  path = ~/sieve
  active_path = ~/.dovecot.sieve
}}
"""


def render(version: str, paths: Paths, ports: Ports, storage: MailStorage, owner: str) -> str:
    """A whole dovecot.conf. ``version`` is "2.3" or "2.4"; ``owner`` is the user and group, by name or id,
    that all mail belongs to."""
    values = {
        "paths": paths,
        "ports": ports,
        "storage": storage,
        "owner": owner,
        "password": PASSWORD,
        "location": _location(paths, storage),
        "doveadm_listener": "" if version == "2.3" else "doveadm",
    }
    if version == "2.3":
        return (_SHARED + _ONLY_23).format(**values) + storage.extra + "\n"
    return (
        (_HEAD_24 + _SHARED + _ONLY_24).format(**values) + _layout_24(paths, storage) + storage.extra + "\n"
    )


def _location(paths: Paths, storage: MailStorage) -> str:
    location = f"{storage.driver}:~/{storage.directory}"
    if storage.layout:
        location += f":LAYOUT={storage.layout}"
    if storage.separate_index:
        location += f":INDEX={paths.index}/%u"
    return location


def _layout_24(paths: Paths, storage: MailStorage) -> str:
    lines = []
    if storage.layout:
        lines.append(f"mailbox_list_layout = {storage.layout}\n")
    if storage.separate_index:
        lines.append(f"mail_index_path = {paths.index}/%{{user}}\n")
    return "".join(lines)
