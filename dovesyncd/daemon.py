"""The program: builds the parts, starts them, says READY, waits, and stops them in reverse."""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Optional

from dovesyncd import __version__, journal, userdb
from dovesyncd.brain import Brain
from dovesyncd.config import DEFAULT_PATH, load
from dovesyncd.core import health
from dovesyncd.core.errors import ConfigError, DovesyncError
from dovesyncd.core.model import User
from dovesyncd.core.options import Config, render
from dovesyncd.doveadm import Doveadm
from dovesyncd.intake import Intake
from dovesyncd.notify import Notify, watchdog_interval
from dovesyncd.store import Store
from dovesyncd.userdb import Accounts
from dovesyncd.users import Users
from dovesyncd.waiting import end

log = logging.getLogger(__name__)

# Seconds that running syncs get at a stop.
STOP_GRACE = 20.0
# Seconds between what happens and what STATUS= says.
STATUS_DELAY = 1.0


class Daemon:
    """To be built inside the event loop. Raises StoreError where it can't work at all. ``reload`` brings the
    configuration as it is now, or raises ConfigError."""

    def __init__(self, config: Config, reload: Callable[[], Config]) -> None:
        dovecot = config.dovecot
        self._config = config
        self._load = reload
        self._notify = Notify()
        self._stop = asyncio.Event()
        self._broken: Optional[BaseException] = None
        self._process_limit = 0
        self._reporting: Optional[asyncio.TimerHandle] = None
        self._doveadm = Doveadm(dovecot.socket, dovecot.doveadm, dovecot.config)
        self._store = Store(config.daemon.state_directory)
        contents = self._store.load()
        self._users = Users(self._ask, self._tell, config.users.refresh)
        self._brain = Brain(
            config, self._store, contents.jobs, self._doveadm, drain=self._drain, progress=self._report_soon
        )
        self._intake = Intake(
            self._store,
            contents.cursors,
            on_change=self._brain.changed,
            on_arrival=self._users.hint,
            on_contest=self._brain.contested,
            compare_interval=config.daemon.compare_interval,
            progress=self._report_soon,
        )

    async def _ask(self) -> Accounts:
        """Everything is asked anew each time: Dovecot may have been upgraded or moved in between."""
        dovecot, users = self._config.dovecot, self._config.users
        settings = await userdb.settings(dovecot.doveconf, dovecot.config or None)
        self._doveadm.socket_path = dovecot.socket or settings.doveadm_socket
        workers = sum(peer.workers for peer in self._config.peers)
        if workers > settings.process_limit != self._process_limit:
            log.warning(
                "%d workers, but Dovecot runs at most %d doveadm processes: raise process_limit of its "
                "service doveadm, or lower peer.workers",
                workers,
                settings.process_limit,
            )
        self._process_limit = settings.process_limit
        return await userdb.accounts(
            self._doveadm,
            settings,
            names=users.list,
            include=users.include,
            exclude=users.exclude,
            index_root=dovecot.index_root,
        )

    def _tell(self, accounts: Accounts) -> None:
        new = self._brain.follow(accounts.accounts, accounts.skipped)
        self._intake.follow(accounts.accounts.values(), new)
        self._report()
        # The scans that this began will have made progress by then.
        self._report_soon()

    def _drain(self, user: User) -> None:
        self._intake.catch_up(user)

    async def run(self) -> None:
        """Until SIGTERM or SIGINT. An error in any task or callback ends the daemon, and is raised."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_error)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        tasks = [
            loop.create_task(self._guarded(work), name=name)
            for name, work in (
                ("users", self._users.run()),
                ("intake", self._intake.run()),
                ("brain", self._brain.run()),
                ("store", self._store.run()),
                ("watchdog", self._watchdog()),
                ("stop", self._stop.wait()),
            )
        ]
        self._notify.ready()
        self._report()
        log.info("dovesyncd %s started", __version__)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await self._shut_down(tasks)
        for task in tasks:
            error = None if task.cancelled() else task.exception()
            if isinstance(error, DovesyncError):
                raise error
            if error is not None:
                raise DovesyncError(f"task {task.get_name()} failed") from error
        if self._broken is not None:
            raise DovesyncError("a callback failed") from self._broken

    def _reload(self) -> None:
        """A new configuration takes effect at once; one with a mistake in it is refused as a whole."""
        self._notify.reloading(time.monotonic())
        try:
            config = self._load()
        except ConfigError as error:
            for problem in error.problems:
                log.error("%s", problem)
            log.error("The configuration was not reloaded: the one from before stays in effect")
        else:
            if config.daemon.state_directory != self._config.daemon.state_directory:
                log.warning("daemon.state_directory takes effect at the next start")
            self._config = config
            dovecot = config.dovecot
            logging.getLogger().setLevel(config.daemon.log_level.upper())
            self._doveadm.program, self._doveadm.config = dovecot.doveadm, dovecot.config
            self._doveadm.socket_path = dovecot.socket or self._doveadm.socket_path
            self._intake.compare_interval = config.daemon.compare_interval
            self._brain.configure(config)
            self._users.refresh = config.users.refresh
            self._users.hint()
            log.info("The configuration was reloaded")
        self._notify.ready()
        self._report()

    async def _guarded(self, work: Coroutine[Any, Any, object]) -> None:
        try:
            await work
        except asyncio.CancelledError:
            raise
        except BaseException:
            self._store.abandon()
            raise

    def _on_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A callback that failed left its work half done: better to start again from what is on disk."""
        if isinstance(context.get("exception"), Exception):
            self._store.abandon()
            self._broken = context["exception"]
            self._stop.set()
        else:
            loop.default_exception_handler(context)

    async def _shut_down(self, tasks: Sequence[asyncio.Task[object]]) -> None:
        if self._reporting is not None:
            self._reporting.cancel()
        self._notify.stopping()
        await self._brain.stop(STOP_GRACE)
        await end(tasks)
        self._intake.watch.close()
        await self._store.close()
        log.info("stopped")

    async def _watchdog(self) -> None:
        interval = watchdog_interval(os.environ, os.getpid())
        while interval is not None:
            works = (self._brain.work, self._intake.work, self._store.work, self._users.work)
            stuck = health.stuck(works, time.monotonic())
            if stuck:
                log.error("no progress: %s; the watchdog gets no sign of life", ", ".join(stuck))
            else:
                self._notify.alive()
            self._report()
            await asyncio.sleep(interval)
        await self._stop.wait()

    def _report_soon(self) -> None:
        """STATUS= follows what happens, but no faster than people read."""
        if self._reporting is None:
            self._reporting = asyncio.get_running_loop().call_later(STATUS_DELAY, self._report)

    def _report(self) -> None:
        if self._reporting is not None:
            self._reporting.cancel()
            self._reporting = None
        brain = self._brain
        # Of users who are listed and peers that are configured.
        peers = {name: peer for name, peer in brain.schedule.peers.items() if peer.workers}
        jobs = [job for key, job in brain.jobs.items() if key.user in brain.users and key.peer in peers]
        pending = sum(job.pending for job in jobs)
        failing = len({job.key.user for job in jobs if job.attempts})
        parts = [f"{len(brain.users)} users", f"{pending} pending", f"{len(brain.schedule.running)} running"]
        if failing:
            parts.append(f"{failing} users failing")
        if self._intake.catching_up:
            parts.append(f"catching up with {self._intake.catching_up}")
        if self._intake.unwatched.users:
            parts.append(f"{len(self._intake.unwatched.users)} users compared, not watched")
        if brain.orphans:
            parts.append(f"{len(brain.orphans)} users unknown to Dovecot")
        if self._users.failing:
            parts.append("Dovecot's users can't be listed")
        if self._store.failing_since is not None:
            parts.append(f"the database can't be written ({self._store.last_error})")
        parts += [f"peer {name} is down" for name, peer in peers.items() if peer.down_since]
        self._notify.status(", ".join(parts))


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The exit status: 0, 1 for an error, 6 for a configuration that can't be used."""
    options = _arguments().parse_args(argv)
    journal.set_up("info", os.environ)
    # systemd's watchdog sends SIGABRT: the journal then has where the daemon was.
    faulthandler.enable()
    try:
        if options.check_config or options.show_config:
            config, warnings = load(options.config, os.environ)
            if options.check_config and warnings:
                raise ConfigError(warnings)
            if options.show_config:
                sys.stdout.write(render(config))
            return 0
        # Until it is handled: a reload that comes too early is none.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        config = _load(options.config)
        logging.getLogger().setLevel(config.daemon.log_level.upper())
        asyncio.run(_serve(config, options.config))
    except ConfigError as error:
        for problem in error.problems:
            log.error("%s", problem)
        return error.exit_code
    except DovesyncError as error:
        log.error("%s", error, exc_info=error.__cause__ if type(error) is DovesyncError else None)
        return error.exit_code
    return 0


def _load(path: str) -> Config:
    config, warnings = load(path, os.environ)
    for warning in warnings:
        log.warning("%s", warning)
    return config


async def _serve(config: Config, path: str) -> None:
    await Daemon(config, lambda: _load(path)).run()


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("dovesyncd", description="Replicates Dovecot's mailboxes to its peers.")
    parser.add_argument("--config", default=DEFAULT_PATH, metavar="FILE", help="default: %(default)s")
    parser.add_argument(
        "--check-config", action="store_true", help="say what is wrong with the configuration, and exit"
    )
    parser.add_argument(
        "--show-config", action="store_true", help="print the configuration that is in effect, and exit"
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
