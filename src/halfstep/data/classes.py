"""Which class is which: the names beside a model's weights, classes asked for, the data's mix of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from halfstep.core.disk import read_record, write_json
from halfstep.core.errors import ModelError, PlanError
from halfstep.core.typed import Bounds, nearest, shown

FILE = "classes.json"


@dataclass(frozen=True, kw_only=True)
class _Names:
    """What `FILE` holds."""

    classes: tuple[Annotated[str, Bounds(1, 1000)], ...]
    format: Literal[1] = 1


def write_classes(folder: Path, names: Sequence[str]) -> None:
    """Record in a pipeline's folder which class number is which, if there are names; `read_classes` reads it."""
    if names:
        write_json(folder / FILE, asdict(_Names(classes=tuple(names))))


def read_classes(folder: Path, count: int) -> tuple[str, ...]:
    """The names of a model's `count` classes by number; () where its folder records none. Raises ModelError."""
    file = folder / FILE
    if not file.is_file():
        return ()
    do = "mend it, or delete it, so that classes go by number"
    names = read_record(file, _Names, what="the names of classes", do=do, error=ModelError).classes
    if len(set(names)) != len(names) or len(names) != count:
        raise ModelError(
            got=f"{len(set(names))} different names",
            expected=f"{count}, as many as the model has classes",
            where=file,
            do=do,
        )
    return names


def numbers_of(asked: Iterable[str | int], count: int, names: Sequence[str] = ()) -> list[int]:
    """The numbers of classes asked for by name or by number, of a model with `count` classes.

    Raises PlanError for a model without classes, a name that it does not know, and a number that it does not have.
    """
    if not count:
        raise PlanError(
            got="a class", expected="none, as the model is unconditional", where="class", do="leave the class out"
        )
    known = {name: number for number, name in enumerate(names)}
    return [known[one] if one in known else _number(one, count, names) for one in asked]


def _number(asked: str | int, count: int, names: Sequence[str]) -> int:
    try:
        number = int(asked)
    except (TypeError, ValueError, OverflowError):
        number = -1
    if 0 <= number < count and not isinstance(asked, bool | float):
        return number
    close = f"did you mean {nearest(str(asked), names)!r}?" if names else "its folder does not name its classes"
    expected = f"{listed(names)}, or a number from 0 to {count - 1}" if names else f"a number from 0 to {count - 1}"
    raise PlanError(got=shown(asked), expected=expected, where="class", do=close)


def listed(names: Iterable[str], most: int = 8) -> str:
    """Names for a message: the first `most` of them, each cut at 40 letters, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name if len(name) <= 40 else f"{name[:39]}…" for name in islice(names, most)) + more


def in_turn(classes: Sequence[int] | np.ndarray, k: int) -> int:
    """The class of image k, where images have these classes one after another and then again from the first."""
    return int(classes[k % len(classes)])


def spread(labels: np.ndarray) -> np.ndarray:
    """The labels in the order in which every beginning holds the classes as the whole does, as nearly as can be.

    int64 [N] -> int64 [N]. The j-th image of a class with n stands at (j + 1/2) / n (Sainte-Laguë's apportionment); of
    equals the lower class comes first, so that classes of equal size come in turn. Generated image k has the class
    spread[k % N]: pictures that are compared with the data have the data's mix, at any count.
    """
    labels = np.asarray(labels, dtype=np.int64)
    order = np.argsort(labels, kind="stable")
    grouped = labels[order]
    _, starts, counts = np.unique(grouped, return_index=True, return_counts=True)
    rank = np.arange(len(grouped)) - np.repeat(starts, counts)
    return grouped[np.lexsort((grouped, (rank + 0.5) / np.repeat(counts, counts)))]
