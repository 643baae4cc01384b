"""One call of a denoiser as a pipeline makes it, and the trajectories that such calls are of."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from halfstep.core.errors import PlanError
from halfstep.core.plan import Row
from halfstep.engine.entry import Reuse
from halfstep.engine.networks import Part, wanted_of
from halfstep.nets.denoiser import Cond, Memo, eager
from halfstep.nets.reuse import Forwards, joined_kept, parted_kept

ATTENTION = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
"""What attention processors are told beside, the scale of a LoRA among it: of all images at once."""


@dataclass(frozen=True)
class Call:
    """The arguments of one call by name, None left out, but for `return_dict`. `sample_key`: the name of the sample,
    [B, ...]."""

    given: Mapping[str, Any]
    sample_key: str

    @classmethod
    def of(cls, model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Call, bool]:
        """The call, and whether it asks for an output with names."""
        kind: Any = type(eager(model))
        signature = _signature(kind)
        given = signature.bind(*args, **kwargs).arguments
        named = bool(given.pop("return_dict", True))
        said = {name: value for name, value in given.items() if value is not None}
        return cls(said, next(iter(signature.parameters))), named

    @property
    def sample(self) -> torch.Tensor:
        return self.given[self.sample_key]

    @property
    def timestep(self) -> Any:
        return self.given["timestep"]

    @property
    def cond(self) -> Cond:
        return {name: value for name, value in self.given.items() if name not in (self.sample_key, "timestep")}

    def halves(self) -> tuple[Call, Call]:
        """The calls of both halves of the batch. Raises PlanError for what cannot be told to be of images or not."""
        first: dict[str, Any] = {}
        second: dict[str, Any] = {}
        for name, value in self.given.items():
            if name in ATTENTION:
                _require_of_all(name, value)
                first[name] = second[name] = value
            else:
                first[name], second[name] = _halved(name, value, len(self.sample))
        return replace(self, given=first), replace(self, given=second)


@functools.cache
def _signature(kind: Any) -> inspect.Signature:
    """Of the class's forward, without self."""
    signature = inspect.signature(kind.forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _halved(name: str, value: Any, batch: int) -> tuple[Any, Any]:
    """A value for either half of a batch: tensors [batch, ...] are halved, those in mappings and lists too, those of no
    axes or [1, ...] are of all images. Raises PlanError for others."""
    if isinstance(value, torch.Tensor):
        if value.ndim == 0 or len(value) == 1 < batch:
            return value, value
        if len(value) != batch:
            raise PlanError(
                got=f"{name} of {len(value)}",
                expected=f"{batch}, as the sample, or 1",
                where="the pipeline's call",
                do="give one for every image, or attach a plan without guides",
            )
        both = value.chunk(2)
        return both[0], both[1]
    if isinstance(value, Mapping):
        pairs = {key: _halved(f"{name}.{key}", one, batch) for key, one in value.items()}
        return {key: one[0] for key, one in pairs.items()}, {key: one[1] for key, one in pairs.items()}
    if isinstance(value, list | tuple):
        each = [_halved(name, one, batch) for one in value]
        return type(value)(one[0] for one in each), type(value)(one[1] for one in each)
    return value, value


def _require_of_all(name: str, said: Mapping[str, Any]) -> None:
    """Raise PlanError for attention arguments of which each image may have its own."""
    own = [key for key, value in said.items() if not isinstance(value, bool | int | float | str | None)]
    if own and own != ["ip_adapter_masks"]:
        raise PlanError(
            got=f"{name} with {', '.join(own)}",
            expected="a scale or ip_adapter_masks, where the plan has guides",
            where="the pipeline's call",
            do="attach a plan without guides",
        )


# --------------------------------------------------------------------------------------------------------- trajectories


def parts_of(
    rows: Mapping[int, Row], forwards: Callable[[str], Forwards], links: Mapping[str, Reuse]
) -> dict[int, Part]:
    """By row: what it runs, for a batch or a half of it, where these rows are all that is run.

    A row that reuses features which none of them left computes its source instead: a trajectory that begins inside a
    plan (img2img) begins in the middle of a phrase.
    """
    known: dict[str, int] = {}
    fed: dict[int, Row] = {}
    for i, row in rows.items():
        link = links.get(row.entry)
        unfed = link is not None and known.get(link.of, 0) < link.rows_before
        fed[i] = Row(row.timestep, link.of if link is not None and unfed else row.entry)
        known[fed[i].entry] = known.get(fed[i].entry, 0) + 1
    wanted = wanted_of(list(fed.values()), links, 0)
    found = zip(fed.items(), wanted, strict=True)
    return {
        i: Part(forwards, row.entry, links.get(row.entry), frozenset(cuts.get(row.entry, ())), row.timestep)
        for (i, row), cuts in found
    }


def guide_rows(rows: Mapping[int, Row]) -> dict[int, Row]:
    """What the unconditional half runs, where it runs: weight 1 is unguided."""
    found = {i: (row.timestep, row.guide) for i, row in rows.items()}
    return {i: Row(t, guide.entry) for i, (t, guide) in found.items() if guide is not None and guide.weight != 1}


def require_rows_fed(rows: Sequence[Row], links: Mapping[str, Reuse]) -> None:
    """Raise PlanError where either half of a pipeline's calls reuses features of an entry that too few of its rows have
    run before."""
    wanted_of([Row(row.timestep, row.entry) for row in rows], links)
    guides = guide_rows(dict(enumerate(rows)))
    wanted_of([guides.get(i) for i in range(len(rows))], links)


@dataclass
class Run:
    """One trajectory on its way: the `shape` of its sample, whether its batch is `doubled` by guidance, what its rows
    run for the own half (or all of the batch) and for the other one, the last row that was called, and what either
    half's calls left."""

    shape: torch.Size
    doubled: bool
    own: Mapping[int, Part]
    other: Mapping[int, Part]
    last: int = -1
    memo: Memo = field(default_factory=Memo)
    other_memo: Memo = field(default_factory=Memo)


def joined(one: Memo, other: Memo) -> Memo | None:
    """The memo of a doubled batch by those of its halves; None where they were left at different timesteps."""
    if one.keys() != other.keys():
        return None
    found = {key: joined_kept(kept, other[key]) for key, kept in one.items()}
    whole = {key: kept for key, kept in found.items() if kept is not None}
    return whole if len(whole) == len(found) else None


def parted(memo: Memo) -> tuple[Memo, Memo]:
    """The memos of the halves of a doubled batch."""
    halves = {key: parted_kept(kept) for key, kept in memo.items()}
    return {key: first for key, (first, _) in halves.items()}, {key: second for key, (_, second) in halves.items()}


def position(times: torch.Tensor, timestep: Any, passed: Sequence[float], expected: int) -> int | None:
    """Which of the scheduler's timesteps a call is at; None: at none of them.

    A view of the scheduler's own tensor, as most pipelines pass it, says so by its place there, and nothing is read.
    Else the call's first timestep is read, which waits for the device where it is not on the CPU. `passed`: the values
    as the pipeline passes them; `expected`: the row that comes first where several have one value.
    """
    if isinstance(timestep, torch.Tensor):
        if timestep.untyped_storage().data_ptr() == times.untyped_storage().data_ptr():
            return (timestep.storage_offset() - times.storage_offset()) // max(times.stride(0), 1)
        timestep = timestep.flatten()[0].item()  # of one number for all images
    found = [i for i, t in enumerate(passed) if abs(t - timestep) <= 1e-6 * max(1.0, abs(t))]
    return expected if expected in found else next(iter(found), None)
