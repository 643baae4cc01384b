"""Parts of a long piece of work, done by whoever comes: threads, processes, machines that share a folder.

A part is claimed by a lock file, which the system gives back when its holder dies; what it makes is a file that is
there whole or not at all, and the same whoever makes it. So a lock only saves work: where one is lost (a folder whose
locks do not reach other machines), a part is done twice and nothing else happens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from halfstep.core.disk import plain_os_errors

POLL = 0.2
"""Seconds between two looks at what others do."""


@dataclass(frozen=True)
class Parts:
    """What is to be done, by name, and how: `do` makes a part that others may make too; `done` says whether it is
    there. `place`: the folder of the locks."""

    names: Sequence[str]
    do: Callable[[str], None]
    done: Callable[[str], bool]
    place: Path

    def left(self) -> list[str]:
        return [name for name in self.names if not self.done(name)]

    def work(self, told: Callable[[int], object] = lambda done: None, alive: Callable[[], bool] = lambda: True) -> int:
        """Do what nobody does, until all is done by this caller or others; returns how many this one did.

        `told` hears after each look how many are done; `alive`: go on with another part.
        """
        mine = 0
        self.place.mkdir(parents=True, exist_ok=True)
        while (left := self.left()) and alive():
            before, known = mine, len(self.names) - len(left)
            for name in left:
                mine += alive() and self._claimed(name)
                known += self.done(name)  # by whomever
                told(known)
            if mine == before:  # others are at all of them
                time.sleep(POLL)
        told(len(self.names) - len(left))
        return mine

    def _claimed(self, name: str) -> bool:
        """Do a part unless somebody is at it or it is done; whether it was done here."""
        lock = FileLock(self.place / f"{name}.lock")
        try:
            with plain_os_errors(self.place):
                lock.acquire(timeout=0)
        except Timeout:
            return False
        try:
            if self.done(name):
                return False
            self.do(name)
            return True
        finally:
            lock.release()
