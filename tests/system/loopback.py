"""Nodes that are instances of this machine's own Dovecot on 127.0.0.1."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from tests.system import dovecot_conf
from tests.system.dovecot_conf import MailStorage, Paths, Ports
from tests.system.node import CHECKOUT, CLEAN_ENVIRONMENT, Node, completed, connect
from tests.system.rundir import RunDirectory
from tests.system.waiting import wait_until

# All mail belongs to a uid without a name: nothing has to be added to the machine.
_OWNER = 5000
# Below the ephemeral ports, which outgoing connections take.
_PORT_RANGE = (20000, 32000)


class Instance(Node):
    address = "127.0.0.1"

    def __init__(self, name: str, run: RunDirectory, storage: MailStorage) -> None:
        super().__init__()
        self.name = name
        # "2.3.19.1 (9b53102964)", "2.4.1-4 (7d8c0e5759)"
        self.version = ".".join(self.run("dovecot", "--version").stdout.split(".")[:2])
        self.storage = storage
        self._run = run
        self._directory = run.path / name
        self._directory.mkdir(mode=0o755)
        self.base_dir = self._directory / "run"
        self.dovecot_config = self._directory / "dovecot.conf"
        self.daemon_state = self._directory / "state"
        self.daemon_config = self._directory / "dovesyncd.toml"
        self._mail, self._index = self._directory / "mail", self._directory / "index"
        self._users_file, self._log_file = self._directory / "users", self._directory / "dovecot.log"
        for path in (self._mail, self._index):
            path.mkdir(mode=0o755)
            os.chown(path, _OWNER, _OWNER)
        for name_below in ("state", "daemon-run", "dovecot-state", "run"):
            (self._directory / name_below).mkdir(mode=0o755)
        self._users_file.touch()
        self._dovecot: subprocess.Popen[bytes] | None = None
        self._daemon: _Daemon | None = None
        self.ports = _free_ports()
        self.start_dovecot()

    @property
    def _environment(self) -> dict[str, str]:
        return {
            **CLEAN_ENVIRONMENT,
            "DOVECOT_HOSTDOMAIN": f"{self.name}.test",
            "DOVECOT_HOSTNAME": self.name,
        }

    def run(
        self, *command: str, check: bool = True, stdin: str = "", timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        return completed(command, check=check, stdin=stdin, timeout=timeout, environment=self._environment)

    def doveadm(
        self, *arguments: str, check: bool = False, stdin: str = "", timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        config = str(self.dovecot_config)
        return self.run("doveadm", "-c", config, *arguments, check=check, stdin=stdin, timeout=timeout)

    def connect(self, port: int) -> socket.socket:
        return connect(self.address, port)

    def configure(self, storage: MailStorage) -> None:
        self.storage = storage
        self.stop_dovecot()
        self.start_dovecot()

    def start_dovecot(self) -> None:
        paths = Paths(mail=self._mail, index=self._index, users=self._users_file, log=self._log_file)
        own = (
            f"base_dir = {self.base_dir}\n"
            f"state_dir = {self._directory}/dovecot-state\n"
            f"instance_name = {self._run.id}-{self.name}\n"
            f"listen = {self.address}\n"
        )
        names = {"DOVECOT_HOSTDOMAIN": f"{self.name}.test", "DOVECOT_HOSTNAME": self.name}
        if self.version == "2.3":
            words = " ".join(f"{name}={value}" for name, value in names.items())
            own += f"import_environment = TZ {words}\n"
        else:
            lines = "\n".join(f"  {name} = {value}" for name, value in names.items())
            own += f"import_environment {{\n{lines}\n}}\n"
        # 2.4 wants the version of the configuration in its first line.
        text = dovecot_conf.render(self.version, paths, self.ports, self.storage, str(_OWNER)) + own
        self.dovecot_config.write_text(text)
        self._dovecot = subprocess.Popen(
            ["dovecot", "-F", "-c", str(self.dovecot_config)], env=self._environment, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._run.note_process(self._dovecot.pid)
        wait_until(self._is_up, 20, f"Dovecot {self.name} answers")

    def _is_up(self) -> bool:
        assert self._dovecot is not None
        assert self._dovecot.stderr is not None
        if self._dovecot.poll() is not None:
            raise RuntimeError(f"dovecot ended: {self._dovecot.stderr.read().decode()} {self.dovecot_log()}")
        try:
            for port in (self.ports.imap, self.ports.doveadm):
                self.connect(port).close()
        except ConnectionRefusedError:
            return False
        return True

    def stop_dovecot(self) -> None:
        if self._dovecot is not None:
            self._dovecot.terminate()
            self._dovecot.communicate(timeout=20)
            self._dovecot = None

    def start_daemon(
        self,
        config: str = "",
        *,
        ready: bool = True,
        timeout: float = 30,
        environment: dict[str, str] | None = None,
    ) -> None:
        assert self.daemon_pid() is None, "the daemon runs"
        self._forget_daemon()
        self.daemon_config.write_text(config)
        drop_ins = self.daemon_config.with_suffix(".toml.d")
        drop_ins.mkdir(exist_ok=True)
        (drop_ins / "00-instance.toml").write_text(f'[dovecot]\nconfig = "{self.dovecot_config}"\n')
        self.daemon_state.mkdir(exist_ok=True)
        directories = {
            "STATE_DIRECTORY": str(self.daemon_state),
            "RUNTIME_DIRECTORY": str(self._directory / "daemon-run"),
        }
        settings = {**self._environment, **directories, **(environment or {})}
        self._daemon = _Daemon(self._directory, self.daemon_config, settings)
        self._run.note_process(self._daemon.process.pid)
        if ready:
            self._daemon.wait_ready(timeout)

    def stop_daemon(self) -> None:
        if self._daemon is not None:
            self._daemon.end(kill=False)

    def kill_daemon(self) -> None:
        assert self._daemon is not None, "the daemon was not started"
        self._daemon.end(kill=True)

    def daemon_pid(self) -> int | None:
        if self._daemon is None or self._daemon.process.poll() is not None:
            return None
        return self._daemon.process.pid

    def daemon_log(self) -> list[str]:
        return self._daemon.log() if self._daemon is not None else []

    def _forget_daemon(self) -> None:
        if self._daemon is not None:
            self._daemon.close()
            self._daemon = None

    def reset(self) -> None:
        super().reset()
        self._forget_daemon()

    def close(self) -> None:
        self.stop_daemon()
        self._forget_daemon()
        self.stop_dovecot()


class _Daemon:
    """A dovesyncd as a child process, with a notification socket as systemd would give it."""

    def __init__(self, directory: Path, config: Path, environment: dict[str, str]) -> None:
        self._log_path = directory / "dovesyncd.log"
        notify_path = directory / "notify"
        notify_path.unlink(missing_ok=True)
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(notify_path))
        self._ready = threading.Event()
        with open(self._log_path, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dovesyncd.daemon", "--config", str(config)],
                env={
                    **environment,
                    "PYTHONPATH": str(CHECKOUT),
                    "PYTHONUNBUFFERED": "1",
                    "PYTHONDONTWRITEBYTECODE": "1",
                    "NOTIFY_SOCKET": str(notify_path),
                },
                cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        # Someone has to read: a full socket would block the daemon.
        self._reader = threading.Thread(target=self._read_notifications, daemon=True)
        self._reader.start()

    def _read_notifications(self) -> None:
        while True:
            datagram = self._notify.recv(65536)
            if not datagram:
                return
            if b"READY=1" in datagram.split(b"\n"):
                self._ready.set()

    def wait_ready(self, timeout: float) -> None:
        def ready_or_gone() -> bool:
            return self._ready.is_set() or self.process.poll() is not None

        try:
            wait_until(ready_or_gone, timeout, "READY=1 of dovesyncd")
        except AssertionError as error:
            raise RuntimeError("\n".join([str(error), *self.log()])) from error
        if not self._ready.is_set():
            raise RuntimeError("\n".join([f"dovesyncd ended with {self.process.returncode}", *self.log()]))

    def end(self, kill: bool) -> None:
        if self.process.poll() is None:
            if kill:
                self.process.kill()
            else:
                self.process.terminate()
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                # Its last words are where it hangs.
                self.process.send_signal(signal.SIGABRT)
                self.process.wait(timeout=30)
                raise AssertionError("\n".join(["dovesyncd did not stop:", *self.log()])) from None

    def log(self) -> list[str]:
        return self._log_path.read_text(errors="replace").splitlines()

    def close(self) -> None:
        self.end(kill=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as waker:
            waker.sendto(b"", self._notify.getsockname())
        self._reader.join()
        self._notify.close()


def _free_ports() -> Ports:
    """Five TCP ports that nobody listens on now."""
    found: list[int] = []
    while len(found) < 5:
        port = random.randrange(*_PORT_RANGE)
        with socket.socket() as probe:
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return Ports(*found)
