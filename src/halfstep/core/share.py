"""Share: which images of a training step one process computes at a time, and what of the step's random numbers is
theirs. Every process draws the numbers of the whole step, so that image j of a step gets the same ones however many
processes there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from halfstep.core.errors import RecipeError


@dataclass(frozen=True)
class Share:
    """Images `first` … `first + count - 1` of the `whole` images of a step."""

    first: int
    count: int
    whole: int

    def of(self, drawn: Any) -> Any:
        """The share's rows of what was drawn for the whole step, [whole, ...] -> [count, ...]."""
        return drawn[self.first : self.first + self.count]


def shares_of(batch: int, parts: int = 1, processes: int = 1, process: int = 0) -> Sequence[Share | None]:
    """What a process computes of a step of `batch` images, in `parts` one after another; None is the whole step.

    Raises RecipeError where the images do not divide evenly: a mean of uneven shares would not be the step's.
    """
    pieces = parts * processes
    if batch % pieces:
        near = max(1, batch // pieces) * pieces
        raise RecipeError(
            got=f"{batch} images a step",
            expected=f"a multiple of {pieces}: {processes} processes with {parts} parts each",
            where="train.batch",
            do=f"take --set train.batch={near}, or other processes or train.accumulate",
        )
    if pieces == 1:
        return (None,)
    count = batch // pieces
    return [Share((process * parts + part) * count, count, batch) for part in range(parts)]
