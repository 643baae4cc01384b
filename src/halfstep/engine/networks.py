"""What each row of a plan calls, and which features it leaves in the trajectory's memo for later rows or takes from it.

A row whose entry reuses another's features takes those of the last rows before it that ran its source, as the row's own
call or as its guide. Which rows these are stands in the plan: they alone leave any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from halfstep.core.errors import PlanError
from halfstep.core.plan import Row, StepPlan
from halfstep.engine.bank import Bank
from halfstep.engine.entry import Reuse
from halfstep.nets.denoiser import Predict, predictor
from halfstep.nets.reuse import Place, leaving, taking

Networks = Sequence[Mapping[str, Predict]]
"""By row, by entry: what the row calls."""


def networks_of(bank: Bank, plan: StepPlan, start: int = 0) -> Networks:
    """What the rows from `start` on call. Raises PlanError as `require_fed`."""
    links = reuses(bank, plan)
    plain = {name: predictor(bank[name]) for name in plan.nets if name not in links}
    if not links:
        return [plain] * len(plan.rows)
    wanted = _wanted(plan.rows, links, start)
    rows: list[Mapping[str, Predict]] = []
    for i, row in enumerate(plan.rows):
        special = {name: leaving(bank[name], name, cuts, row.timestep) for name, cuts in wanted[i].items()}
        for name in set(_called(row)) & set(links):
            link = links[name]
            special[name] = taking(bank[link.of], link.of, link.cut, link.order, row.timestep)
        rows.append({**plain, **special} if special else plain)
    return rows


def require_fed(bank: Bank, plan: StepPlan, start: int = 0) -> None:
    """Raise PlanError where a row reuses features of an entry that fewer rows than it needs have run before it, from
    `start` on."""
    if links := reuses(bank, plan):
        _wanted(plan.rows, links, start)


def reuses(bank: Bank, plan: StepPlan) -> dict[str, Reuse]:
    """The entries of the plan that reuse features, with whose and where."""
    found = ((name, bank.entries[name].weights) for name in plan.nets if name in bank)
    return {name: weights for name, weights in found if isinstance(weights, Reuse)}


def _called(row: Row) -> tuple[str, ...]:
    """What a row calls, in order."""
    return (row.entry,) if row.guide is None else (row.entry, row.guide.entry)


def _wanted(rows: Sequence[Row], links: Mapping[str, Reuse], start: int) -> list[dict[str, set[Place]]]:
    """By row: the entries that must leave features there, with the cuts."""
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


def _last_times(rows: Sequence[Row], known: Sequence[int], count: int) -> list[int]:
    """Of rows in order, the last of each of the last `count` different timesteps."""
    times: dict[float, int] = {}
    for k in reversed(known):
        if len(times) < count:
            times.setdefault(rows[k].timestep, k)
    return list(times.values())


def _unfed(name: str, link: Reuse, row: int, known: int) -> PlanError:
    rows = f"{link.rows_before} row{'s' * (link.rows_before > 1)}"
    return PlanError(
        got=f"entry {name!r} in row {row}, with {known or 'no'} row{'s' * (known != 1)} of {link.of!r} before it",
        expected=f"{rows} of {link.of!r} before it, whose features it takes",
        where="plan",
        do=f"begin with {', '.join([link.of] * link.rows_before)}, then {name}",
    )
