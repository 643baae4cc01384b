"""One process at a time in a run folder: the second is told who holds it."""

from __future__ import annotations

import functools
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from filelock import FileLock, Timeout

from halfstep.core import disk
from halfstep.core.errors import RunError

P = ParamSpec("P")
T = TypeVar("T")
_HELD: dict[Path, FileLock] = {}
"""The locks of this process by folder: a verb that opens a folder of its own again waits for nobody."""


class HeldError(RunError):
    """A folder that another process works in."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who works in a run folder: process id, host, and since when by its own clock."""

    pid: int
    host: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


def hold(folder: Path) -> None:
    """Take a folder's lock until the verb around this call ends (see `releasing`), else until this process does.

    The system gives it back when the process is killed. Raises HeldError that names the other process.
    """
    folder = folder.resolve()
    if folder in _HELD:
        return
    lock = FileLock(folder / ".lock")
    try:
        with disk.plain_os_errors(folder):
            lock.acquire(timeout=0)
    except Timeout:
        raise HeldError(
            got=f"a folder that {_holder(folder)} works in",
            expected="one process at a time",
            where=folder,
            do="wait until it ends, or choose another --out",
        ) from None
    _HELD[folder] = lock
    disk.write_json(
        folder / ".holder.json",
        {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")},
    )


def holds(folder: Path) -> bool:
    """Whether this process holds a folder's lock."""
    return folder.resolve() in _HELD


def is_free(folder: Path) -> bool:
    """Whether no process holds a folder's lock."""
    lock = FileLock(folder / ".lock")
    try:
        with disk.plain_os_errors(folder):
            lock.acquire(timeout=0)
    except Timeout:
        return False
    lock.release()
    return True


def require_free(folder: Path) -> None:
    """Raise HeldError, with who it is, for a folder that another process works in. One without a lock, or that cannot
    be written and so not be held from here, is nobody's."""
    if (folder / ".lock").is_file() and os.access(folder, os.W_OK) and not is_free(folder):
        raise HeldError(
            got=f"a folder that {_holder(folder)} works in",
            expected="one that is finished",
            where=folder,
            do="wait until it ends",
        )


def _holder(folder: Path) -> str:
    try:
        return str(disk.read_record(folder / ".holder.json", Holder, what="the holder of a lock", do="wait"))
    except RunError:  # it is about to write it
        return "another process"


def _give_back(folder: Path) -> None:
    (folder / ".holder.json").unlink(missing_ok=True)
    _HELD.pop(folder).release()


def releasing(verb: Callable[P, T]) -> Callable[P, T]:
    """A verb that gives back, when it ends or fails, the locks that were taken in it: its own and its sub-runs'."""

    @functools.wraps(verb)
    def inner(*args: P.args, **kwargs: P.kwargs) -> T:
        before = set(_HELD)
        try:
            return verb(*args, **kwargs)
        finally:
            for folder in set(_HELD) - before:
                _give_back(folder)

    return inner
