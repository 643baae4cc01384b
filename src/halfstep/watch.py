"""Watch: who is told what a long piece of work does. Progress bars live with the face that overrides it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Watch:
    """Who is told what a verb does; this one is silent. A face overrides what it wants to show."""

    def say(self, text: str) -> None:
        """One line of news."""

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """A long piece of work of `total` units; the caller reports (done, note)."""
        yield lambda done, note="": None


SILENT = Watch()
