"""Arms: samplers with their spacing and steps. Which of them are worth a search, and which is the best that is free.

Solvers are raced by fidelity: how far the pictures of a few dozen noises end from the converged ones of the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

import numpy as np

from halfstep.core.errors import PlanError
from halfstep.core.plan import StepPlan
from halfstep.core.process import Process
from halfstep.core.recipe import SampleSpec
from halfstep.core.watch import SILENT, Watch
from halfstep.engine.bank import Bank
from halfstep.engine.samplers import at_calls, families, sampler_of
from halfstep.engine.sampling import plan_for
from halfstep.measure.fidelity import Converged, stochastic
from halfstep.search.race import race
from halfstep.search.scores import ScoreBook, Scored, Scores

COUNTS = (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 15, 20, 25, 30, 40)
"""Network calls of the arms that are raced."""
FIRST = (6, 11)
"""Numbers of calls at which families are told apart first."""
ROUNDS = 4
"""How many times as many images an arm has after the last round of a race as after the first."""
FAMILIES = 8
"""Families (a sampler with its order and spacing) that go on to every number of calls."""
HOPELESS = 4
"""A number of calls whose nearest arm is so many times as far from the data as is tolerated has no second one measured:
the second was never seen to be a quarter of the first."""


@dataclass(frozen=True)
class Arm:
    """A sampler of so many steps, and the reference in all its rows."""

    base: StepPlan

    @property
    def told(self) -> str:
        return self.base.sampler.told

    @property
    def calls(self) -> int:
        return len(self.base.rows)


Priced = Callable[[StepPlan], StepPlan]
"""Gives a plan the prices of its entries, and what its trajectory costs beside its calls."""


class Stock:
    """The stock samplers of a forward process over a bank, at any number of network calls, each made when it is first
    asked for. `priced`: gives every plan its prices."""

    def __init__(self, bank: Bank, process: Process, priced: Priced):
        self.bank, self.process, self.priced = bank, process, priced
        self.families: Sequence[SampleSpec] = families(process)
        self._made: dict[tuple[SampleSpec, int], Arm | None] = {}

    def arm(self, family: SampleSpec, calls: int) -> Arm | None:
        """None where the family has no arm of so many calls, or is not sound there."""
        key = family, calls
        if key not in self._made:
            self._made[key] = self._arm(at_calls(family, calls))
        return self._made[key]

    def _arm(self, spec: SampleSpec | None) -> Arm | None:
        if spec is None:
            return None
        try:
            scheduler = sampler_of(self.process, spec)
            return Arm(self.priced(plan_for(self.bank, scheduler, spec.steps, self.bank.prices())))
        except PlanError:  # not at these steps, which the race then does without
            return None

    def at(self, calls: int, among: Sequence[SampleSpec] | None = None) -> list[tuple[SampleSpec, Arm]]:
        """The arms of so many calls, of all families or of some."""
        made = [(family, self.arm(family, calls)) for family in (self.families if among is None else among)]
        return [(family, arm) for family, arm in made if arm is not None]


@dataclass(frozen=True)
class Track:
    """Where arms are raced: against the converged pictures, on all processors at hand; `first`: images of each in the
    first round."""

    converged: Converged
    first: int
    executor: Executor | None = None
    watch: Watch = SILENT

    def errors(self, plans: Sequence[StepPlan], first: int, last: int) -> list[np.ndarray]:
        """How far images first … last - 1 of each plan are from their converged twins, in features."""
        work = partial(self.converged.apart, first=first, last=last)
        return list(map(work, plans) if self.executor is None else self.executor.map(work, plans))

    def best(self, plans: Sequence[StepPlan], keep: int, what: str) -> list[int]:
        """The indices of at most `keep` plans, the nearest to the converged pictures first."""
        rounds = sorted({min(self.first, self.converged.count), min(self.first * ROUNDS, self.converged.count)})
        most = [max(keep, len(plans) // 3)] * (len(rounds) - 1) + [keep]
        with self.watch.stage(what, len(rounds)) as told:

            def losses(alive: Sequence[int], first: int, last: int) -> list[np.ndarray]:
                found = self.errors([plans[one] for one in alive], first, last)
                told(rounds.index(last) + 1, f"{len(alive)} plans, {last} images each")
                return found

            return race(range(len(plans)), losses, rounds, most)


class Twins(Scores):
    """Scores by fidelity: how far the pictures of a plan are from their converged twins, the mean distance in features.

    They lead the search of a guided model. A distance to the data knows no prompt: less guidance comes nearer to the
    data and shows less of what was asked for (`benchmarks/text.md`), which is not the model that the user runs. Not
    squared: a few pictures that fall to another side would be the score.
    """

    def __init__(self, book: ScoreBook, track: Track):
        super().__init__(book, track.converged.count, track.converged.seed)
        self.track = track

    def _measured(self, plans: dict[str, StepPlan], executor: Executor | None) -> Iterator[tuple[str, float]]:
        for digest, errors in zip(plans, self.track.errors(list(plans.values()), 0, self.images), strict=True):
            yield digest, float(np.sqrt(errors).mean())

    def scored(self, stage: str, digest: str, plan: StepPlan, score: float) -> Scored:
        return super().scored("fidelity", digest, plan, score)  # no distance to the data: told apart in scores.jsonl


def raced_families(track: Track, stock: Stock, most: int) -> list[SampleSpec]:
    """The families that go on: the nearest to the converged pictures at few and at middling numbers of calls, at most
    `most`, of those that draw no noise."""
    found: list[SampleSpec] = []
    for calls in dict.fromkeys(min(calls, most) for calls in FIRST):
        near = [(family, arm) for family, arm in stock.at(calls) if not stochastic(arm.base.sampler)]
        best = track.best([arm.base for _, arm in near], FAMILIES // len(FIRST), f"race samplers at {calls} calls")
        found += [near[k][0] for k in best]
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Free:
    """The best that costs nothing but a word: the dense net under a stock sampler.

    `plan`: the cheapest whose quality is no worse than what is run today. `frontier`: the best arm of every number of
    calls that was measured, with its score, the cheapest first. `today`: the score of what is run today.
    """

    plan: StepPlan
    frontier: tuple[tuple[StepPlan, float], ...]
    today: float


def best_free(
    track: Track,
    stock: Stock,
    among: Sequence[SampleSpec],
    today: StepPlan,
    scores: Scores,
    tolerated: Callable[[float], float],
) -> Free:
    """The cheapest stock sampler of the dense net whose score on common noise is no worse than that of `today`; `today`
    itself where none is.

    From few calls upwards the nearest family to the converged pictures is taken and its distance to the data measured,
    and the second one's too where the first is not `HOPELESS`: fidelity drops the hopeless and does not crown (PNDM in
    9 to 11 calls is never the nearest, and often the best). It ends where one is within what is `tolerated` of today's
    score.
    """
    found: list[tuple[StepPlan, float]] = []
    counts = [calls for calls in COUNTS if calls < len(today.called)]
    with track.watch.stage("best free sampler", 1 + len(counts)) as told:
        limit = tolerated(start := scores(today, "reference"))
        for done, calls in enumerate(counts):
            told(done + 1, f"today {start:.3g}: {today.sampler.told}")
            near = [arm.base for _, arm in stock.at(calls, among)]
            if not near:
                continue
            errors = track.errors(near, 0, min(track.first, track.converged.count))
            first, *second = [near[k] for k in np.argsort([float(one.mean()) for one in errors], kind="stable")[:2]]
            seen = [(first, scores(first, "free"))]
            if seen[0][1] <= HOPELESS * limit:
                seen += [(one, scores(one, "free")) for one in second]
            found.append(min(seen, key=lambda one: one[1]))
            best = found[-1][0]
            told(done + 2, f"{best.sampler.told}: {found[-1][1]:.3g} (today {start:.3g})")
            if found[-1][1] <= limit:
                break
        told(1 + len(counts), "")
    held = [plan for plan, score in found if score <= limit]
    return Free(held[0] if held else today, tuple(found), start)
