"""What each row of a plan calls, and which features it leaves in the trajectory's memo for later rows or takes from it.

A row whose entry reuses another's features takes those of the last rows before it that ran its source, as the row's own
call or as its guide. Which rows these are stands in the plan: they alone leave any. Where a bank has a null condition,
guides run under it, and what they leave is theirs: own calls and guides take none of one another's features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from halfstep.core.errors import PlanError
from halfstep.core.plan import Row, StepPlan
from halfstep.engine.bank import Bank
from halfstep.engine.entry import Reuse
from halfstep.nets.denoiser import Cond, Memo, Predict, cond_to, joined, repeated
from halfstep.nets.reuse import Forwards, Place, joined_kept, keep, leaving, parted_kept, taking

RowCall = Callable[[torch.Tensor, torch.Tensor, Cond, Memo], tuple[torch.Tensor, torch.Tensor | None]]
"""(sample [B,C,H,W], timestep, condition, memo) -> what the row's entry predicts and what its guide does, each of the
sample's shape; None without a guide."""

NULL = "null "
"""Before the name of a source in a memo: what it left under the null condition."""


@dataclass(frozen=True)
class Part:
    """What a row runs for itself or as its guide: the entry, its link where it reuses features, the cuts at which it
    leaves its own, the row's timestep, and a prefix of the names in the memo. `forwards` gives the net of an entry's
    name."""

    forwards: Callable[[str], Forwards]
    entry: str
    link: Reuse | None
    leaves: frozenset[Place]
    time: float
    prefix: str = ""

    @property
    def runs(self) -> str:
        """Whose net it calls, the whole of it or what is left of it."""
        return self.entry if self.link is None else self.link.of

    @property
    def source(self) -> str:
        """Whose features it takes or leaves, as the memo has it."""
        return self.prefix + self.runs

    def predict(self, leaves: frozenset[Place] | None = None) -> Predict:
        """Its call; `leaves`: other cuts than its own."""
        if self.link is not None:
            return taking(self.forwards(self.runs), self.source, self.link.cut, self.link.order, self.time)
        net, cuts = self.forwards(self.runs), self.leaves if leaves is None else leaves
        return leaving(net, self.source, cuts, self.time) if cuts else net.plain


def networks_of(bank: Bank, plan: StepPlan, start: int = 0) -> Sequence[RowCall]:
    """What the rows call, those from `start` on. Raises PlanError as `require_fed`."""
    null = None if bank.null is None else cond_to(bank.null, bank.device, bank.dtype)
    return [row_call(own, guide, null) for own, guide in row_parts(bank, plan, start)]


def row_parts(bank: Bank, plan: StepPlan, start: int = 0) -> list[tuple[Part, Part | None]]:
    """What each row runs for itself and as its guide, if it has one. Raises PlanError as `require_fed`."""
    links = reuses(bank, plan)
    own, guides = _wanted(bank, plan.rows, links, start)
    found: list[tuple[Part, Part | None]] = []
    for i, row in enumerate(plan.rows):
        part = partial(_part, bank, links, row.timestep)
        guide = None
        if row.guide is not None:
            guide = part(row.guide.entry, guides[i], "" if bank.null is None else NULL)
        found.append((part(row.entry, own[i]), guide))
    return found


def _part(
    bank: Bank, links: Mapping[str, Reuse], time: float, name: str, wanted: Mapping[str, set[Place]], prefix: str = ""
) -> Part:
    return Part(bank.forwards, name, links.get(name), frozenset(wanted.get(name, ())), time, prefix)


def row_call(own: Part, guide: Part | None, null: Cond | None) -> RowCall:
    """One row as a call. Both parts of a row are one call of twice the batch where they run one entry."""
    if guide is None:
        return alone(own.predict())
    if null is None:
        return partial(_one_after_other, own.predict(), guide.predict(), None)
    apart = partial(_one_after_other, own.predict(), guide.predict(), null)
    return partial(_together, own, guide, null, apart) if own.entry == guide.entry else apart


def alone(predict: Predict) -> RowCall:
    """A row that calls one network, without a guide."""
    return lambda sample, timestep, cond, memo: (predict(sample, timestep, cond, memo), None)


def _one_after_other(
    own: Predict,
    guide: Predict,
    null: Cond | None,
    sample: torch.Tensor,
    timestep: torch.Tensor,
    cond: Cond,
    memo: Memo,
) -> tuple[torch.Tensor, torch.Tensor]:
    other = cond if null is None else repeated(null, len(sample))
    return own(sample, timestep, cond, memo), guide(sample, timestep, other, memo)


def _together(
    own: Part, guide: Part, null: Cond, apart: RowCall,
    sample: torch.Tensor, timestep: torch.Tensor, cond: Cond, memo: Memo,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Both in one call of twice the batch; one after the other where features to be taken are of other timesteps."""
    both = Memo()
    if own.link is not None:
        key = str(own.link.cut)
        known = joined_kept(memo.get((own.source, key), ()), memo.get((guide.source, key), ()))
        if known is None:
            return apart(sample, timestep, cond, memo)
        both[own.source, key] = known
    predict = own.predict(own.leaves | guide.leaves)
    found = predict(torch.cat([sample, sample]), timestep, joined(cond, repeated(null, len(sample))), both)
    if own.link is None:
        for (_, cut), kept in both.items():
            for source, half in zip((own.source, guide.source), parted_kept(kept), strict=True):
                keep(memo, source, cut, own.time, half[-1][1])
    mine_now, theirs_now = found.chunk(2)
    return mine_now, theirs_now


# ------------------------------------------------------------------------------------------------ who leaves features

Wanted = Sequence[Mapping[str, set[Place]]]
"""By row: the entries that must leave features there, with the cuts."""


def require_fed(bank: Bank, plan: StepPlan, start: int = 0) -> None:
    """Raise PlanError where a row reuses features of an entry that fewer rows than it needs have run before it, from
    `start` on."""
    if links := reuses(bank, plan):
        _wanted(bank, plan.rows, links, start)


def reuses(bank: Bank, plan: StepPlan) -> dict[str, Reuse]:
    """The entries of the plan that reuse features, with whose and where."""
    found = ((name, bank.entries[name].weights) for name in plan.nets if name in bank)
    return {name: weights for name, weights in found if isinstance(weights, Reuse)}


def _wanted(bank: Bank, rows: Sequence[Row], links: Mapping[str, Reuse], start: int) -> tuple[Wanted, Wanted]:
    """What own calls must leave, and what guides must: one and the same where they share a condition."""
    if bank.null is None:
        found = wanted_of(rows, links, start)
        return found, found
    guides = [None if row.guide is None else Row(row.timestep, row.guide.entry) for row in rows]
    return wanted_of([replace(row, guide=None) for row in rows], links, start), wanted_of(guides, links, start)


def _called(row: Row | None) -> tuple[str, ...]:
    """What a row calls, in order."""
    if row is None:
        return ()
    return (row.entry,) if row.guide is None else (row.entry, row.guide.entry)


def wanted_of(rows: Sequence[Row | None], links: Mapping[str, Reuse], start: int = 0) -> Wanted:
    """What the rows from `start` on must leave; None stands for a row that calls nothing. Raises PlanError as
    `require_fed`."""
    wanted: list[dict[str, set[Place]]] = [{} for _ in rows]
    fresh: dict[str, dict[int, None]] = {}
    for i in range(start, len(rows)):
        for name in _called(rows[i]):
            if name not in links:
                fresh.setdefault(name, {})[i] = None
                continue
            link = links[name]
            known = list(fresh.get(link.of, {}))
            if len(known) < link.rows_before:
                raise _unfed(name, link, i, len(known))
            for k in _last_times(rows, known, link.rows_before):
                wanted[k].setdefault(link.of, set()).add(link.cut)
    return wanted


def _last_times(rows: Sequence[Row | None], known: Sequence[int], count: int) -> list[int]:
    """Of rows in order, the last of each of the last `count` different timesteps."""
    times: dict[float, int] = {}
    for k in reversed(known):
        if len(times) < count:
            row = rows[k]
            assert row is not None, "it called something"
            times.setdefault(row.timestep, k)
    return list(times.values())


def _unfed(name: str, link: Reuse, row: int, known: int) -> PlanError:
    rows = f"{link.rows_before} row{'s' * (link.rows_before > 1)}"
    return PlanError(
        got=f"entry {name!r} in row {row}, with {known or 'no'} row{'s' * (known != 1)} of {link.of!r} before it",
        expected=f"{rows} of {link.of!r} before it, whose features it takes",
        where="plan",
        do=f"begin with {', '.join([link.of] * link.rows_before)}, then {name}",
    )
