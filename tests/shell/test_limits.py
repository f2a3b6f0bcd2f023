"""Where inotify fails, changes are still seen: by comparison."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dovesyncd import watch
from tests.shell.site import Site, site
from tests.shell.test_intake import MAIL, Box
from tests.shell.waiting import until


def compare_often(it: Site) -> None:
    text = it.config.read_text()
    section = f'[daemon]\nstate_directory = "{it.base}/state"\n'
    assert section in text
    it.config.write_text(text.replace(section, section + 'compare_interval = "1s"\n'))


@pytest.mark.parametrize(
    ("limit", "value", "words"),
    [
        ("max_inotify_watches", 12, "fs.inotify.max_user_watches"),
        ("max_inotify_instances", 0, "fs.inotify.max_user_instances"),
    ],
)
async def test_a_limit_of_the_kernel(state: Path, limit: str, value: int, words: str) -> None:
    """Set for the daemon alone, in a user namespace of its own, and reached half-way through the start."""
    users = [f"user{number}" for number in range(10)]
    async with site(state, *users) as it:
        compare_often(it)
        for user in users:
            Box(state / "vmail" / user / "Maildir" / ".Folder").create()
        script = f'echo {value} >/proc/sys/user/{limit} && exec "$@"'
        it.wrapper = ["unshare", "--user", "--map-root-user", "sh", "-c", script, "sh"]
        await it.start()
        await it.at_rest()
        assert sorted(it.synced) == sorted(users)
        await it.until_told("users compared, not watched")
        for user in users:
            it.inbox[user].user_does(MAIL)
        await until(lambda: all(it.synced.count(user) > 1 for user in users), "every change was seen")
        await it.at_rest()
        status, log = await it.stop()
    assert status == 0
    assert {user for user in users if re.search(f"{user} -> b: .*new mail: ", log)} == set(users)
    (line,) = [line for line in log.splitlines() if "can't be watched" in line]
    assert words in line
    assert "they are compared every 1 s" in line
    if value:
        # Ten roots, ten folders and the directory above the homes; what came first got the twelve.
        assert int(line.split("at least ")[1].split(" ")[0]) >= 21
    assert "Traceback" not in log


async def test_the_limit_is_raised(state: Path) -> None:
    async with site(state, "ann", "bob", "cid") as it:
        compare_often(it)
        raised = state / "raised"
        script = (
            "limit=/proc/sys/user/max_inotify_watches; echo 1 >$limit; "
            f"(while [ ! -e {raised} ]; do sleep 0.05; done; echo 1000 >$limit) & "
            'exec "$@"'
        )
        it.wrapper = ["unshare", "--user", "--map-root-user", "sh", "-c", script, "sh"]
        await it.start()
        await it.until_told("3 users compared, not watched")
        raised.touch()
        await until(
            lambda: (
                it.told("STATUS=")
                and [line for line in it.said if "STATUS" in line][-1].endswith("0 running")
            ),
            "all are watched",
        )
        # The confirmations of a new database.
        await until(lambda: len(it.synced) == 6, "two syncs each")
        it.inbox["cid"].user_does(MAIL)
        await until(lambda: it.synced.count("cid") == 3, "cid's mail")
        await it.at_rest()
        assert len(it.synced) == 7, "being watched is no news"
        status, log = await it.stop()
    assert status == 0
    assert log.count("Every directory can be watched again") == 1


@pytest.fixture
def shared(state: Path) -> Iterator[Path]:
    """A directory that is seen by way of another one, as on a client of a file server: what is written behind
    it makes no event."""
    behind, mounted = state / "behind", state / "mounted"
    behind.mkdir()
    mounted.mkdir()
    subprocess.run(["bindfs", str(behind), str(mounted)], check=True)
    try:
        yield state
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


async def test_a_file_system_of_other_hosts(state: Path, shared: Path) -> None:
    async with site(state, "ann") as it:
        compare_often(it)
        vmail = state / "vmail"
        vmail.rename(shared / "behind" / "vmail")
        it.mail = shared / "mounted" / "vmail"
        box = Box(shared / "behind" / "vmail" / "ann" / "Maildir")
        await it.start()
        await it.at_rest()
        box.user_does(MAIL)
        await until(lambda: it.synced == ["ann", "ann"], "what another host wrote")
        assert it.told("1 users compared, not watched")
        status, log = await it.stop()
    assert status == 0
    assert log.count("1 users have mail on a file system of type fuse") == 1


MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:27 / /run rw - tmpfs tmpfs rw
40 22 0:50 / /srv/a\\040b rw,relatime shared:2 master:3 - nfs4 server:/vmail rw,vers=4.2
41 22 0:51 /x /srv/c rw - fuse.sshfs host: rw
42 22 0:52 / /srv/d rw - fuseblk /dev/sdb1 rw
nonsense
"""


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        ((8, 1), None),
        ((0, 27), None),
        ((0, 50), "nfs4"),
        ((0, 51), "fuse.sshfs"),
        ((0, 52), None),
        ((9, 9), None),
    ],
)
def test_which_file_systems_are_of_other_hosts(tmp_path: Path, device: tuple[int, int], kind: str) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert watch.remote_filesystem(os.makedev(*device), str(mounts)) == kind
    assert watch.remote_filesystem(os.makedev(*device), str(tmp_path / "missing")) is None


def test_the_limits_can_be_read() -> None:
    for name in (watch.MAX_USER_WATCHES, watch.MAX_USER_INSTANCES):
        assert (watch.limit(name) or 0) > 0
    assert watch.limit("fs.inotify.no_such_thing") is None
