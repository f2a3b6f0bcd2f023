"""Root file systems of Debian releases, built once and kept in a cache outside the checkout.

``python3 -m tests.system.roots trixie`` builds one by hand and prints its path.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SUITES = ("bookworm", "trixie")
BOOTSTRAP = ("systemd", "systemd-sysv", "dbus", "ca-certificates")
PACKAGES = (
    "dovecot-imapd",
    "dovecot-lmtpd",
    "dovecot-pop3d",
    "dovecot-sieve",
    "dovecot-managesieved",
    "python3",
    "python3-systemd",
    "python3-pyinotify",
    "python3-sdnotify",
    "python3-prometheus-client",
    "procps",
    "iproute2",
)
# Run in the finished root. The masked units only cost time in a test host.
FINISH = """
set -e
useradd --uid 5000 --user-group --home-dir /var/vmail --shell /usr/sbin/nologin vmail
mkdir -p /etc/dovesyncd /var/vmail /var/vmail-index /opt/dovesyncd
systemctl mask systemd-networkd.service systemd-resolved.service systemd-timesyncd.service \\
    apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer \\
    systemd-firstboot.service console-getty.service getty@.service
systemctl enable dovecot.service
rm -f /etc/machine-id /etc/hostname
touch /etc/machine-id
apt-get clean
rm -rf /var/lib/apt/lists/*
"""


def cache_directory() -> Path:
    """Where roots live: $DOVESYNCD_TEST_CACHE or /var/cache/dovesyncd-tests."""
    path = Path(os.environ.get("DOVESYNCD_TEST_CACHE", "/var/cache/dovesyncd-tests"))
    path.mkdir(mode=0o755, parents=True, exist_ok=True)
    return path


def version() -> str:
    """A name for this recipe: another package list gives another root."""
    recipe = "\n".join((*BOOTSTRAP, *PACKAGES, FINISH))
    return hashlib.sha256(recipe.encode()).hexdigest()[:10]


def root_path(suite: str) -> Path:
    return cache_directory() / f"{suite}-{version()}"


def mirror() -> str:
    """The URI of the first Debian archive that this machine's apt uses. RuntimeError if there is none."""
    for file in (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list")):
        if file.exists():
            found = re.search(
                r"^(?:URIs:|deb)\s+(?:\[[^]]*\]\s+)?(https?://\S+)", file.read_text(), re.MULTILINE
            )
            if found:
                return found.group(1)
    raise RuntimeError("apt's sources name no Debian archive to build a test host from")


def ensure_root(suite: str) -> Path:
    """The root of ``suite``, built now (a minute or two) when there is none.

    Raises RuntimeError with the end of the output when a step fails.
    """
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}")
    final = root_path(suite)
    if final.is_dir():
        return final
    with _lock(suite):
        if not final.is_dir():
            _remove_unfinished(suite)
            building = Path(tempfile.mkdtemp(prefix=f"{suite}.building.", dir=cache_directory()))
            _build(suite, building)
            building.chmod(0o755)
            building.rename(final)
            _remove_other_versions(suite)
    return final


@contextmanager
def _lock(suite: str) -> Iterator[None]:
    with open(cache_directory() / f"{suite}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(suite: str, root: Path) -> None:
    _run("debootstrap", "--variant=minbase", f"--include={','.join(BOOTSTRAP)}", suite, str(root), mirror())
    # Without this, packages would start their services in the chroot.
    policy = root / "usr/sbin/policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    _run("chroot", str(root), "apt-get", "install", "-y", "--no-install-recommends", *PACKAGES)
    policy.unlink()
    finish(root)


def finish(root: Path) -> None:
    _run("chroot", str(root), "sh", "-c", FINISH)


def _run(*command: str) -> None:
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "LC_ALL": "C.UTF-8",
        "DEBIAN_FRONTEND": "noninteractive",
        **{name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")},
    }
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}:\n{done.stdout[-3000:]}")


def _remove_unfinished(suite: str) -> None:
    """The lock is held: whoever built these is gone."""
    for path in cache_directory().glob(f"{suite}.building.*"):
        for inner in ("proc", "sys", "dev/pts"):
            if (path / inner).is_mount():
                _run("umount", str(path / inner))
        shutil.rmtree(path)


def _remove_other_versions(suite: str) -> None:
    """Only those that no overlay stands on at the moment."""
    mounts = Path("/proc/self/mounts").read_text()
    for path in cache_directory().glob(f"{suite}-*"):
        if path != root_path(suite) and str(path) not in mounts:
            shutil.rmtree(path)


if __name__ == "__main__":
    for name in sys.argv[1:] or SUITES:
        print(ensure_root(name))
