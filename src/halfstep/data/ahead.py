"""Work done ahead by processes of its own, in order: `ahead(decode, pictures, workers)` is `map`, only sooner."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Generator
from torch.utils.data import DataLoader

from halfstep.core.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")
MOST_WORKERS = 16
AHEAD = 4  # items that every worker has begun or done before they are asked for: they bound the memory


def workers_here(asked: int | None) -> int:
    """How many processes read ahead: as asked, by default one for each core, 16 at most."""
    return min(MOST_WORKERS, os.cpu_count() or 1) if asked is None else asked


def ahead(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """The results of `work` of every item, in the items' order; by `workers` processes, 0: by this one.

    torch's DataLoader does it: `work`, items and results go through pipes, and only a few of them are under way at a
    time, however many there are. Raises what `work` raises, where its result would have come.
    """
    if not workers:
        yield from map(work, items)
        return
    loader: DataLoader[Any] = DataLoader(
        _Worked(work),  # type: ignore[arg-type]
        batch_size=None,
        sampler=items,  # type: ignore[arg-type]
        num_workers=workers,
        prefetch_factor=AHEAD,
        collate_fn=_as_it_is,
        generator=Generator(),  # it draws a seed for its workers: not from its caller's random numbers
    )
    for done in loader:
        if isinstance(done, _Refused):
            raise DataError(got=done.got, expected=done.expected, where=done.where, do=done.do)
        yield done


@dataclass(frozen=True)
class _Refused:
    """A DataError on its way: exceptions with keywords survive no pipe."""

    got: str
    expected: str
    where: str
    do: str


@dataclass(frozen=True)
class _Worked:
    """As a dataset of torch, whose item of an item is its work."""

    work: Callable[[Any], Any]

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.work(item)
        except DataError as error:
            return _Refused(str(error.got), str(error.expected), str(error.where), error.do)


def _as_it_is(result: Any) -> Any:
    return result
