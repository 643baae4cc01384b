"""The errors that a user can meet: one line that says got, expected, where and what to do."""

from __future__ import annotations

from functools import partial
from typing import Any


def printable(value: object, most: int = 400) -> str:
    """As a message shows it: no line breaks, nothing that a terminal would obey, long ones without their middle."""
    try:
        text = " ".join(str(value).split())
    except ValueError:  # Python writes no integer of more than some thousand digits
        return "a number of thousands of digits"
    text = text if len(text) <= most else f"{text[: most * 2 // 3]} … {text[-most // 3 :]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class HalfstepError(ValueError):
    """Something a user gave does not fit.

    The message is one printable line of bounded length, whatever it quotes. Subclasses name the door at which it was
    noticed; the command line prints the message without a traceback and exits with code 2.
    """

    def __init__(self, *, got: object, expected: object, where: object, do: str):
        self.got, self.expected, self.where, self.do = got, expected, where, do
        where, got, expected, do = map(printable, (where, got, expected, do))
        super().__init__(f"{where}: got {got}, expected {expected}; {do}")

    def __reduce__(self) -> tuple[Any, ...]:
        """It comes out of another process as it went in."""
        return partial(type(self), got=self.got, expected=self.expected, where=self.where, do=self.do), ()


class RecipeError(HalfstepError):
    """A recipe, a `--set` edit, or a run folder that belongs to another recipe."""


class DataError(HalfstepError):
    """Images that cannot be read, do not fit together, or do not fit the model."""


class ModelError(HalfstepError):
    """A folder that holds no usable denoiser, or a denoiser that a method cannot take."""


class PlanError(HalfstepError):
    """A plan that names what does not exist, or a budget that no plan can meet."""


class RunError(HalfstepError):
    """A run folder that cannot be read or written."""


class DivergedError(HalfstepError):
    """A training whose loss or gradient is no longer a finite number."""
