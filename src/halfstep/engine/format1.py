"""Entries of banks of format 1, from before there was entry.json: slices.json and mask.json say what it says now."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from halfstep.core.disk import read_record
from halfstep.core.errors import ModelError
from halfstep.engine.entry import Cut, Mask, Own, Stored, StoredSlices, Twin, Weights, masking_of

_DO = "save the bank again"


@dataclass(frozen=True)
class _Link:
    """What slices.json said, of what has no weights of its own."""

    of: str
    slices: StoredSlices | None


def read_entry_of_before(folder: Path) -> Stored:
    """What an entry's folder says: slices.json is of a cut (of a twin, where there are no slices), mask.json of a mask;
    without them weights are its own and dense. Raises ModelError."""
    of, over = folder / "slices.json", folder / "mask.json"
    weights: Weights = Own()
    mask = None
    if of.exists():
        link = read_record(of, _Link, what="slices", do=_DO, error=ModelError)
        weights = Twin(link.of) if link.slices is None else Cut(link.of, link.slices)
    if over.exists():
        mask = read_record(over, Mask, what="a mask", do=_DO, error=ModelError)
    return Stored(folder, weights, masking_of(mask, over), of, over)
