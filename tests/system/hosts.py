"""Nodes that are hosts of their own: systemd as PID 1 in a container, with a network between them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

from tests.system import dovecot_conf, network
from tests.system.dovecot_conf import MailStorage, Paths, Ports
from tests.system.network import Switch
from tests.system.node import CHECKOUT, CLEAN_ENVIRONMENT, Node, completed
from tests.system.roots import ensure_root
from tests.system.rundir import RunDirectory, cgroup_hierarchies, start_time
from tests.system.waiting import wait_until

DOVECOT_OF = {"bookworm": "2.3", "trixie": "2.4"}
_ADDRESSES = {"a": "10.99.24.1", "b": "10.99.24.2"}
# Of the user vmail in the roots.
_OWNER = 5000
_UNIT = "dovesyncd.service"
_PATHS = Paths(
    mail=Path("/var/vmail"),
    index=Path("/var/vmail-index"),
    users=Path("/etc/dovecot/users"),
    log=Path("/var/log/dovecot.log"),
)


class Host(Node):
    """``root`` is the host's root directory; what lies on its tmpfs mounts (/run, /tmp) is not in it."""

    ports = Ports()
    base_dir = Path("/run/dovecot")

    def __init__(
        self, name: str, suite: str, run: RunDirectory, switch: Switch, storage: MailStorage
    ) -> None:
        super().__init__()
        self.name = name
        self.version = DOVECOT_OF[suite]
        self.address = _ADDRESSES[name]
        self.storage = storage
        self._run = run
        self._switch = switch
        self._directory = run.path / name
        self.root = self._directory / "root"
        self._mail, self._index = self._directory / "mail", self._directory / "index"
        self._users_file, self._log_file = self.root / "etc/dovecot/users", self.root / "var/log/dovecot.log"
        self.daemon_state = self.root / "var/lib/dovesyncd"
        self.daemon_config = self.root / "etc/dovesyncd/dovesyncd.toml"
        self._invocation = ""
        self._mount(ensure_root(suite))
        self._write_files()
        self._namespace = switch.attach(name, self.address)
        self._container = self._boot()
        self._init_pid = 0

    def _mount(self, lower: Path) -> None:
        upper, work = self._directory / "upper", self._directory / "work"
        for path in (self._directory, upper, work, self.root, self._mail, self._index):
            path.mkdir(mode=0o755)
        for path in (self._mail, self._index):
            os.chown(path, _OWNER, _OWNER)
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(self.root)], check=True)

    def _write_files(self) -> None:
        etc = self.root / "etc"
        (etc / "hostname").write_text(f"{self.name}\n")
        lines = [
            "127.0.0.1 localhost",
            *(f"{address} {name}.test {name}" for name, address in _ADDRESSES.items()),
        ]
        (etc / "hosts").write_text("\n".join(lines) + "\n")
        self._users_file.touch()
        units = etc / "systemd/system"
        shutil.copy(Path(__file__).with_name(_UNIT), units / _UNIT)
        (units / "dovecot.service.d").mkdir()
        # Now and then a stop of Dovecot hangs: systemd ends it, but would wait for 90 s.
        (units / "dovecot.service.d/test.conf").write_text(
            "[Unit]\nStartLimitIntervalSec=0\n[Service]\nTimeoutStopSec=15\n"
        )
        self._write_dovecot_config()

    def _write_dovecot_config(self) -> None:
        text = dovecot_conf.render(self.version, _PATHS, self.ports, self.storage, "vmail")
        (self.root / "etc/dovecot/dovecot.conf").write_text(text)

    def _boot(self) -> subprocess.Popen[bytes]:
        """In cgroups of its own: two containers in one would both take its child "payload" as their root."""
        cgroups = [root / f"{self._run.id}-{self.name}" for root in cgroup_hierarchies()]
        for cgroup in cgroups:
            cgroup.mkdir()
        joining = " ".join(f"echo $$ >{cgroup}/cgroup.procs;" for cgroup in cgroups)
        command = [
            "systemd-nspawn", "--quiet", "--register=no", "--keep-unit",
            f"--machine={self._run.id}-{self.name}", f"--hostname={self.name}",
            f"--network-namespace-path={network.namespace_path(self._namespace)}",
            "--resolv-conf=off", "--timezone=off", "--link-journal=no",
            f"--bind={self._mail}:{_PATHS.mail}", f"--bind={self._index}:{_PATHS.index}",
            f"--bind-ro={CHECKOUT}:/opt/dovesyncd",
            "--capability=all", "--kill-signal=SIGRTMIN+3", f"--directory={self.root}", "--boot",
            # For the cgroups of a machine that still has v1 hierarchies.
            "SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1", "systemd.show_status=no",
        ]  # fmt: skip
        environment = {**CLEAN_ENVIRONMENT, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1", "SYSTEMD_SECCOMP": "0"}
        with open(self._directory / "console.log", "wb") as console:
            container = subprocess.Popen(
                ["sh", "-ec", f'{joining} exec "$@"', "sh", *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        self._run.note_process(container.pid)
        return container

    def wait_booted(self) -> None:
        """The constructor does not wait, so that hosts boot side by side."""
        self._init_pid = wait_until(self._find_init, 30, f"PID 1 of host {self.name}")
        self._run.note_process(self._init_pid)
        wait_until(self._is_running, 60, f"host {self.name} is up")
        self.run("systemctl", "is-active", "dovecot.service")

    def _find_init(self) -> int:
        if self._container.poll() is not None:
            raise RuntimeError((self._directory / "console.log").read_text(errors="replace"))
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            comm, _, rest = stat.partition("(")[2].rpartition(")")
            if comm == "systemd" and int(rest.split()[1]) == self._container.pid:
                return int(entry.name)
        return 0

    def _is_running(self) -> bool:
        state = self.run("systemctl", "is-system-running", check=False).stdout.strip()
        return state in ("running", "degraded")

    def run(
        self, *command: str, check: bool = True, stdin: str = "", timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        inside = ("nsenter", "--target", str(self._init_pid), "--all", *command)
        return completed(inside, check=check, stdin=stdin, timeout=timeout, environment=CLEAN_ENVIRONMENT)

    def doveadm(
        self, *arguments: str, check: bool = False, stdin: str = "", timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        return self.run("doveadm", *arguments, check=check, stdin=stdin, timeout=timeout)

    def connect(self, port: int) -> socket.socket:
        return network.connect(self._namespace, self.address, port)

    def configure(self, storage: MailStorage) -> None:
        self.storage = storage
        self._write_dovecot_config()
        self.run("systemctl", "restart", "dovecot.service")

    def stop_dovecot(self) -> None:
        self.run("systemctl", "stop", "dovecot.service")

    def start_dovecot(self) -> None:
        self.run("systemctl", "start", "dovecot.service")

    def cut(self, silent: bool = False) -> None:
        """Unplug this host's network cable. Clients that tests make still reach the host.

        Connects to the host fail with "No route to host" after 3 s; when ``silent``, they get no answer,
        and Dovecot gives up after 30 s (sync's -T does not shorten that, SIGTERM does not end it).
        """
        self._switch.set_link(self.name, up=False)
        if not silent:
            self._switch.forget_neighbours()

    def heal(self) -> None:
        self._switch.set_link(self.name, up=True)

    def start_daemon(
        self,
        config: str = "",
        *,
        ready: bool = True,
        timeout: float = 30,
        environment: dict[str, str] | None = None,
    ) -> None:
        assert self.daemon_pid() is None, "the daemon runs"
        self.daemon_config.write_text(config)
        lines = [f"TimeoutStartSec={timeout:g}"]
        lines += [f'Environment="{name}={value}"' for name, value in (environment or {}).items()]
        drop_in = self.root / "etc/systemd/system" / f"{_UNIT}.d" / "test.conf"
        drop_in.parent.mkdir(exist_ok=True)
        drop_in.write_text("[Service]\n" + "\n".join(lines) + "\n")
        self.run("systemctl", "daemon-reload")
        wait = [] if ready else ["--no-block"]
        done = self.run("systemctl", "start", *wait, _UNIT, check=False, timeout=timeout + 30)
        self._invocation = self._property("InvocationID")
        if done.returncode != 0:
            raise RuntimeError("\n".join([done.stderr, *self.daemon_log()]))

    def stop_daemon(self) -> None:
        self.run("systemctl", "stop", _UNIT)

    def kill_daemon(self) -> None:
        pid = self.daemon_pid()
        assert pid is not None, "the daemon does not run"
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: self._property("ActiveState") in ("failed", "inactive"), 30, "end of dovesyncd")

    def daemon_pid(self) -> int | None:
        inner = self._property("MainPID")
        if inner == "0":
            return None
        return self._outer_pid(inner)

    def _outer_pid(self, inner: str) -> int | None:
        """proc(5): NSpid has a process's number in each pid namespace, from ours to its own."""
        namespace = os.readlink(f"/proc/{self._init_pid}/ns/pid")
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(entry / "ns/pid") != namespace:
                    continue
                status = (entry / "status").read_text()
            except OSError:
                continue
            numbers = next(line.split()[1:] for line in status.splitlines() if line.startswith("NSpid:"))
            if numbers[-1] == inner:
                return int(numbers[0])
        return None

    def daemon_log(self) -> list[str]:
        if not self._invocation:
            return []
        self.run("journalctl", "--sync")
        query = ["--output=cat", "--no-pager", "--quiet", f"_SYSTEMD_INVOCATION_ID={self._invocation}"]
        return self.run("journalctl", *query, check=False).stdout.splitlines()

    def daemon_journal(self, since: float) -> list[tuple[float, str]]:
        """What every daemon of this host logged from ``since`` on, with its time (both Unix seconds)."""
        self.run("journalctl", "--sync")
        query = ["--output=short-unix", "--no-pager", "--quiet", f"--unit={_UNIT}", f"--since=@{since:.6f}"]
        found = []
        for line in self.run("journalctl", *query, check=False).stdout.splitlines():
            # "1700000000.123456 host python3[123]: text"; the further lines of a message are indented.
            head, _, text = line.partition("]: ")
            time, _, _ = head.partition(" ")
            if text and time.replace(".", "", 1).isdigit():
                found.append((float(time), text))
            elif found:
                found.append((found[-1][0], line.strip()))
        return found

    def _property(self, name: str) -> str:
        return self.run("systemctl", "show", "--property", name, "--value", _UNIT).stdout.strip()

    def reset(self) -> None:
        self.heal()
        super().reset()
        self.run("systemctl", "reset-failed", _UNIT, check=False)
        self._invocation = ""

    def close(self) -> None:
        if self._init_pid and start_time(self._init_pid) is not None:
            os.kill(self._init_pid, signal.SIGKILL)
        else:
            self._container.kill()
        self._container.wait(timeout=30)
