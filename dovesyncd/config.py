"""Reads the configuration files; what they may say is in ``core.options``."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from typing import Any

from dovesyncd.core.errors import ConfigError, Problem
from dovesyncd.core.options import Config, parse

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_PATH = "/etc/dovesyncd/dovesyncd.toml"
DEFAULT_STATE_DIRECTORY = "/var/lib/dovesyncd"


def load(path: str, environ: Mapping[str, str]) -> tuple[Config, tuple[Problem, ...]]:
    """The configuration of ``path`` and its drop-ins (``path``.d/*.toml), and warnings.

    Raises ConfigError with every problem of every file; the warnings follow them there, since an
    unknown key is often the reason why another one is missing.
    """
    documents = []
    unreadable: list[Problem] = []
    for file in _files(path, unreadable):
        try:
            documents.append((file, _read(file)))
        except OSError as error:
            unreadable.append(Problem(file, "", None, f"can't be read: {error.strerror}"))
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            byte = error.object[error.start]
            unreadable.append(Problem(file, "", None, f"not UTF-8: byte 0x{byte:02x} in line {line}"))
        except (ValueError, RecursionError) as error:
            # Not only TOMLDecodeError: an integer of too many digits is a plain ValueError.
            unreadable.append(Problem(file, "", None, f"not valid TOML: {error}"))
    config, problems, warnings = parse(documents)
    if unreadable:
        # What is missing may well be in a file that can't be read.
        problems = (*unreadable, *(problem for problem in problems if problem.value is not None))
    if config is None or problems:
        raise ConfigError(problems + warnings)
    return _with_state_directory(config, environ), warnings


def _files(path: str, problems: list[Problem]) -> list[str]:
    """The files to read, in order. The main file may be missing only where there are drop-ins."""
    directory = f"{path}.d"
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        names = []
    except OSError as error:
        problems.append(Problem(directory, "", None, f"can't be read: {error.strerror}"))
        names = []
    drop_ins = [
        os.path.join(directory, name) for name in names if name.endswith(".toml") and not name.startswith(".")
    ]
    return drop_ins if drop_ins and not os.path.lexists(path) else [path, *drop_ins]


def _read(file: str) -> dict[str, Any]:
    with open(file, "rb") as stream:
        data = stream.read()
    return dict(tomllib.loads(data.decode()))


def _with_state_directory(config: Config, environ: Mapping[str, str]) -> Config:
    if config.daemon.state_directory:
        return config
    # systemd.exec(5): several directories are separated by colons.
    directory = environ.get("STATE_DIRECTORY", "").split(":")[0] or DEFAULT_STATE_DIRECTORY
    if not directory.startswith("/"):
        raise ConfigError([Problem("environment", "STATE_DIRECTORY", directory, "an absolute path")])
    return dataclasses.replace(config, daemon=dataclasses.replace(config.daemon, state_directory=directory))
