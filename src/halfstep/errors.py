"""The errors that a user can meet: one line that says got, expected, where and what to do."""

from __future__ import annotations


class HalfstepError(ValueError):
    """Something a user gave does not fit.

    The message is one line. Subclasses name the door at which it was noticed; the command line prints the message
    without a traceback and exits with code 2.
    """

    def __init__(self, *, got: object, expected: object, where: object, do: str):
        self.got, self.expected, self.where, self.do = got, expected, where, do
        text = f"{where}: got {got}, expected {expected}; {do}"
        super().__init__(" ".join(text.split()))


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
