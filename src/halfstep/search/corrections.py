"""Training-free corrections of few-step sampling: scale and soft-threshold the predicted noise, row by row.

Coarse samplers leave images under-dispersed or over-sharp; shrinking the prediction offsets it, which is most of what
an l1-regularised training gains (see `methods/regularized.py` and its page in docs). It costs nothing at sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from halfstep.core.plan import NONE, Correction, StepPlan
from halfstep.core.recipe import ShrinkSpec
from halfstep.core.seeds import Stage, stage_seed
from halfstep.core.watch import SILENT, Watch
from halfstep.search.scores import ScoreBook, counted

Value = TypeVar("Value")


@dataclass(frozen=True)
class Shrunk:
    """What was found. `plans`: "none", "one scale" and "one threshold" (each at its own optimum) and "by stretch";
    `scores`: theirs, on the images of the search or on fresh ones."""

    plans: dict[str, StepPlan]
    scores: dict[str, float]

    @property
    def chosen(self) -> str:
        """The name of the best."""
        return min(self.scores, key=lambda name: self.scores[name])

    @property
    def plan(self) -> StepPlan:
        return self.plans[self.chosen]


def shrink_plan(book: ScoreBook, plan: StepPlan, spec: ShrinkSpec, *, seed: int = 0, watch: Watch = SILENT) -> Shrunk:
    """The best correction of every stretch of a plan's rows, for the judge's score.

    Finds the candidates as `corrected_plans` does. The last choice is made on fresh seeds, and may be to correct
    nothing.
    """
    found = corrected_plans(book, plan, spec, seed=seed, watch=watch)
    fresh = book.on(spec.final_images, stage_seed(seed, Stage.FINALS))
    with watch.stage("final round", len(found.plans)) as told:
        scores = fresh.many(list(found.plans.values()), "final corrections", seen=counted(told))
        told(len(scores), "")  # two names of one plan are measured once
    return replace(found, scores=dict(zip(found.plans, scores, strict=True)))


def corrected_plans(
    book: ScoreBook, plan: StepPlan, spec: ShrinkSpec, *, seed: int = 0, watch: Watch = SILENT
) -> Shrunk:
    """The best corrections of a plan, as the search saw them.

    First one scale for all rows, then one threshold, each by a walk along its grid; from the better of them, every
    stretch in turn tries its neighbours on both grids, `spec.rounds` times. Every measurement is kept in
    `book`, and known when resumed. A net that predicts v or the clean sample is corrected in its noise too.
    """
    parts = min(spec.parts, len(plan.rows))
    scales, thresholds = sorted({1.0, *spec.scales}), sorted({0.0, *spec.thresholds})
    total = 8 + 4 * parts * spec.rounds  # two walks of about four measurements
    if warning := book.judge.too_few(spec.images, "shrink.images"):
        watch.say(f"warning: {warning}")
    scores = book.on(spec.images, stage_seed(seed, Stage.SEARCH))
    with watch.stage("shrink", total) as told:
        seen = counted(told, total - 1)  # how many there will be is a guess

        def score(corrections: Sequence[Correction]) -> float:
            return scores(by_stretch(plan, corrections), "corrections", seen=seen)

        none = (NONE,) * parts
        score(none)
        scale = climb([(Correction(scale=s),) * parts for s in scales], none, score)
        threshold = climb([(Correction(threshold=t),) * parts for t in thresholds], none, score)
        best = min(scale, threshold, key=score)
        for _ in range(spec.rounds):
            before = best
            for part in range(parts):
                around = [(*best[:part], one, *best[part + 1 :]) for one in _around(best[part], scales, thresholds)]
                scores.many([by_stretch(plan, one) for one in around], "corrections", seen=seen)
                best = min([best, *around], key=score)
            if best == before:
                break
        told(total, "")
    found = {"none": none, "one scale": scale, "one threshold": threshold, "by stretch": best}
    return Shrunk(
        {name: by_stretch(plan, c) for name, c in found.items()}, {name: score(c) for name, c in found.items()}
    )


def by_stretch(plan: StepPlan, corrections: Sequence[Correction]) -> StepPlan:
    """The plan with one correction for each of as many stretches of rows, as equal in length as can be."""
    edges = np.linspace(0, len(plan.rows), len(corrections) + 1).round().astype(int)
    return plan.with_corrections([c for c, n in zip(corrections, np.diff(edges), strict=True) for _ in range(n)])


def climb(values: Sequence[Value], start: Value, score: Callable[[Value], float]) -> Value:
    """The value of the lowest score on a walk from `start`, one of the ordered `values`, to its better side, as long as
    the score falls. A few measurements where a whole grid is many; `score` is asked more than once for some values."""
    at = values.index(start)
    for way in (1, -1):
        while 0 <= at + way < len(values) and score(values[at + way]) < score(values[at]):
            at += way
        if values[at] != start:
            break
    return values[at]


def _around(one: Correction, scales: Sequence[float], thresholds: Sequence[float]) -> list[Correction]:
    """The neighbours of a correction on both grids."""
    scale, threshold = one
    i, j = scales.index(scale), thresholds.index(threshold)
    found = [Correction(scales[k], threshold) for k in (i - 1, i + 1) if 0 <= k < len(scales)]
    return found + [Correction(scale, thresholds[k]) for k in (j - 1, j + 1) if 0 <= k < len(thresholds)]
