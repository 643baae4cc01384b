"""Watch: who is told what a long piece of work does. Progress bars live with the face that overrides it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Told(Protocol):
    """How a stage is told what is done: units so far, and a short note."""

    def __call__(self, done: float, note: str = "") -> None: ...


class Watch:
    """Who is told what a verb does; this one is silent. A face overrides what it wants to show."""

    def say(self, text: str) -> None:
        """One line of news."""

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Told]:
        """A long piece of work of `total` units; the caller reports (done, note)."""

        def told(done: float, note: str = "") -> None:
            """Nobody listens."""

        yield told


SILENT = Watch()
