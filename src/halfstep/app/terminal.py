"""The terminal: what is printed there, and how a long stage tells its progress, as a bar or as lines of a log file."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from halfstep.core.typed import Leaf
from halfstep.core.watch import Told, Watch

# Nothing that is printed is markup: paths and names hold brackets and colons, which would vanish, colour or crash.
console = Console(markup=False, emoji=False, highlight=False)
notes = Console(stderr=True, markup=False, emoji=False, highlight=False)

EVERY = 10.0
"""Seconds between two lines of a long stage where there is no terminal for a bar."""

_SETTLED = 0.5
"""What a stage tells in its first so many seconds is no work of now: a resumed one tells what it found done."""


def line(text: str, *, to: Console = console, style: str = "") -> None:
    """Print text as it is; a long line stays one line, so that a path can be copied and found."""
    to.print(text, style=style, soft_wrap=True)


def accept_any_text() -> None:
    """What the outputs' encoding lacks (a name that is no UTF-8, a sign that ASCII has not) is printed escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class Pace:
    """How fast a stage of `total` units is, and how long it will take, from the work that is done now."""

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic):
        self.total, self.clock = total, clock
        self.begun = self._since = self._at = clock()
        self.done = self._before = 0.0

    def tell(self, done: float) -> None:
        """So many units are done."""
        self.done, self._at = done, self.clock()
        if self._at - self.begun < _SETTLED:
            self._since, self._before = self._at, done

    def __str__(self) -> str:
        """Rate and remaining time, the latter until it has passed; empty while there is nothing to tell them from."""
        work, seconds = self.done - self._before, self._at - self._since
        if work <= 0 or seconds <= 0:
            return ""
        left = (self.total - self.done) * seconds / work - (self.clock() - self._at)
        rate = (
            "" if self.total == 1 else f"{work / seconds:.1f}/s" if work > seconds else f"{seconds / work:.1f} s each"
        )
        known = self.done < self.total and left > 0  # a unit that takes longer than those before: who knows how long
        return ", ".join(part for part in (rate, f"{duration(left)} left" if known else "") if part)

    def progress(self) -> str:
        """What is done: units, or a share where the whole is one."""
        return f"{self.done:.0%}" if self.total == 1 else f"{self.done:g} of {self.total}"


def duration(seconds: float) -> str:
    """45 s, 3:20 min, 1:02:10 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"


def settings_table(sections: Mapping[str, tuple[str, list[Leaf]]], marked: Collection[str]) -> Group:
    """The fields of a recipe by their sections: name, value as `--set` takes it, meaning and in brackets the choices.

    `marked`: the names that get a star: they differ from the default recipe.
    """
    tables: list[RenderableType] = []
    for section, (about, leaves) in sections.items():
        table = Table(box=None, pad_edge=False, show_header=False, expand=True, title_justify="left")
        table.title = Text(f"\n{section}: {about}" if section else about, style="bold")
        table.add_column(no_wrap=True)
        table.add_column(ratio=1, overflow="fold")
        table.add_column(ratio=3, overflow="fold")
        for leaf in leaves:
            star, style = ("* ", "bold") if leaf.name in marked else ("  ", "")
            meaning = Text(leaf.meaning)
            if leaf.choices:
                meaning.append(f" [{leaf.choices}]", style="dim")
            table.add_row(f"{star}{leaf.name}", Text(as_typed(leaf.value), style=style), meaning)
        tables.append(table)
    return Group(*tables, *(["\n* differs from the default recipe"] if marked else []))


def as_typed(value: object) -> str:
    """A field's value as a user types it after `--set name=`."""
    if isinstance(value, tuple):
        return ",".join(map(as_typed, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


class RichWatch(Watch):
    """Progress on standard error: a bar on a terminal, else a line every ten seconds and one at the end. Under
    `--quiet` warnings alone."""

    quiet: ClassVar[bool] = False

    def say(self, text: str) -> None:
        if not self.quiet or text.startswith("warning"):
            line(text, to=notes, style="dim")

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Told]:
        if self.quiet:
            with super().stage(name, total) as told:
                yield told
            return
        pace = Pace(total)
        on_terminal = notes.file.isatty() and not notes.is_dumb_terminal
        with self._bar(name, pace) if on_terminal else self._lines(name, pace) as told:
            yield told

    @contextmanager
    def _bar(self, name: str, pace: Pace) -> Iterator[Told]:
        columns = (
            TextColumn("{task.description:<18}", markup=False),
            BarColumn(),
            MofNCompleteColumn() if pace.total > 1 else TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            _PaceColumn(pace),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Progress(*columns, console=notes) as progress:
            task = progress.add_task(name, total=pace.total, note="")

            def told(done: float, note: str = "") -> None:
                pace.tell(done)
                progress.update(task, completed=done, note=note)

            yield told

    @contextmanager
    def _lines(self, name: str, pace: Pace) -> Iterator[Told]:
        over, latest = threading.Event(), [""]

        def told(done: float, note: str = "") -> None:
            pace.tell(done)
            latest[0] = note

        def speak() -> None:  # of its own accord: one unit may take minutes
            while not over.wait(EVERY):
                parts = (pace.progress(), f"{duration(pace.clock() - pace.begun)} so far", str(pace), latest[0])
                self.say(f"{name}: {', '.join(part for part in parts if part)}")

        speaker = threading.Thread(target=speak, daemon=True)
        speaker.start()
        try:
            yield told
        finally:
            over.set()
            speaker.join()
        self.say(f"{name}: {pace.progress()} in {duration(pace.clock() - pace.begun)}")


class _PaceColumn(ProgressColumn):
    """Rate and remaining time, which goes down between two tellings."""

    def __init__(self, pace: Pace):
        self.pace = pace
        super().__init__()

    def render(self, task: Task) -> Text:
        return Text(str(self.pace))
