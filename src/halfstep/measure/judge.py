"""Judge: how good and how fast a plan of a bank is, against one set of real images and one feature network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfstep.core.disk import write_atomic
from halfstep.core.machine import machine
from halfstep.core.parts import Parts
from halfstep.core.plan import StepPlan
from halfstep.core.recipe import Recipe
from halfstep.core.results import About, Comparison, Difference, Floor, PlanRow, Quality, Verdict
from halfstep.core.seeds import Stage, stage_seed
from halfstep.core.watch import SILENT, Watch
from halfstep.data.arrays import read_arrays, save_arrays
from halfstep.data.classes import in_turn
from halfstep.data.images import Images
from halfstep.engine.bank import Bank
from halfstep.engine.conditions import Conditions, cond_for, mix_of
from halfstep.engine.device import side_by_side
from halfstep.engine.profiling import TIMED_BATCH, interleave
from halfstep.engine.sampling import denoise, image_generators, start_noise, to_images
from halfstep.measure import sanity
from halfstep.measure.agreement import agreement, matching
from halfstep.measure.drawer import Drawer, Part, joined
from halfstep.measure.features import Extractor, raw_pixels
from halfstep.measure.pretrained import load_features
from halfstep.measure.quality import (
    Distances,
    Reference,
    difference,
    distances,
    evaluate,
    floor,
    frechet_distance,
    reference_stats,
)
from halfstep.nets.content import fingerprint
from halfstep.nets.fit import fit

KEEP = 32
"""First pictures of each plan that a report shows."""
MOST_KEPT = 1 << 30
"""Bytes of one batch of features, unpacked."""


class Judge:
    """Scores plans of one bank. The same seed means the same noise for every plan (common random numbers).

    `conditions`: of generated images, by default in the data's mix of classes. `watch`: is told how far the features of
    the real images are, where the folder `cache` has none of them.
    `drawer`: what a worker needs of it. `kept`: a folder of drawn batches, which are not drawn again (see `parts`).
    """

    def __init__(
        self,
        bank: Bank,
        images: Images,
        extractor: Extractor,
        *,
        cache: Path | None,
        batch: int,
        conditions: Conditions | None = None,
        watch: Watch = SILENT,
    ):
        images = fit(bank.config, images, bank.vae, bank.classes).images
        self.bank, self.images, self.extractor, self.batch = bank, images, extractor, batch
        self.conditions = mix_of(images.labels, bank.config) if conditions is None else conditions
        self.drawer = Drawer(bank, extractor, batch, self.conditions)
        self.reference: Reference = reference_stats(extractor, images, cache=cache, watch=watch)
        self.asked = self._classes_asked()
        self.kept: Path | None = None
        self._floors: dict[int, Floor] = {}

    def floor(self, count: int) -> Floor:
        """What `count` perfect draws would score by chance."""
        if count not in self._floors:
            self._floors[count] = floor(self.reference, count)
        return self._floors[count]

    def tolerated(self, share: float, score: float, count: int) -> float:
        """The highest score of `count` images that is within a loss of `share` of another's: a share of its distance
        without the bias that both have in common, or within the floor, of a hundredth of the data's spread."""
        least = self.floor(count)
        distance = score - least.raw
        return score + share * (distance if distance > least.high else self.reference.scale)

    def features(
        self, plan: StepPlan, count: int, seed: int, keep: int = 0, executor: Executor | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Features [count, F] of a plan's images, and the first `keep` images as uint8 [keep, C, H, W]. `executor`:
        where batches are drawn side by side."""
        if self.kept is None or not self._file(plan, count, seed, keep, 0).is_file():
            return joined(self.drawer.parts(plan, count, seed, keep, executor))
        return joined(self._part(plan, count, seed, keep, begin) for begin in range(0, count, self.batch))

    def _part(self, plan: StepPlan, count: int, seed: int, keep: int, begin: int) -> Part:
        """A batch as it is kept, else drawn."""
        file = self._file(plan, count, seed, keep, begin)
        if not file.is_file():
            return self.drawer.part(plan, count, seed, keep, begin)
        found = read_arrays(file, MOST_KEPT, what="a batch of features", do="delete it, to have it drawn again")
        return found["features"], found.get("pictures")

    def parts(self, plans: Iterable[StepPlan], count: int, seed: int, keep: int) -> Parts:
        """The batches of plans as parts, each a file in `kept`, that several processes with such a judge can draw."""
        kept = self.kept
        assert kept is not None
        wanted = {
            str(self._file(plan, count, seed, keep, begin).relative_to(kept)): (plan, begin)
            for plan in plans
            for begin in range(0, count, self.batch)
        }

        def draw(name: str) -> None:
            plan, begin = wanted[name]
            features, pictures = self._part(plan, count, seed, keep, begin)
            arrays = {"features": features} | ({} if pictures is None else {"pictures": pictures})
            write_atomic(kept / name, lambda path: save_arrays(path, arrays))

        return Parts(list(wanted), draw, lambda name: (kept / name).is_file(), kept)

    def _file(self, plan: StepPlan, count: int, seed: int, keep: int, begin: int) -> Path:
        """Where a batch is kept, by all that it hangs on beside the bank."""
        told = fingerprint(plan.to_content(), [seed, count, keep, self.batch, self.extractor.name])
        return (self.kept or Path()) / f"{told}-{begin:07d}.npz"

    def fd(self, features: np.ndarray) -> float:
        """The Fréchet distance to the real images as measured, without interval: for plans that are compared at equal
        n on common noise, where the bias is the same for all and its correction would only add noise."""
        return frechet_distance(
            features.mean(axis=0), np.cov(features, rowvar=False), self.reference.mu, self.reference.cov
        )

    def score(self, plan: StepPlan, count: int, seed: int, executor: Executor | None = None) -> float:
        """Fréchet distance of `count` images of a plan; `executor` as in `features`."""
        return self.ask(plan, count, seed, executor)()

    def ask(self, plan: StepPlan, count: int, seed: int, executor: Executor | None) -> Callable[[], float]:
        """What waits for a score, which an executor has begun to work on; without one it is worked on then."""
        parts = self.drawer.parts(plan, count, seed, executor=executor)
        return lambda: self.fd(joined(parts)[0])

    def too_few(self, count: int, what: str) -> str | None:
        """Why Fréchet distances of `count` images decide nothing; None where they may."""
        if count >= self.reference.least:
            return None
        return (
            f"{what}: {count} images for {len(self.reference.mu)} features make distances of noise; "
            f"take {self.reference.least} or more"
        )

    def broken(self, reference: StepPlan, features: np.ndarray, pictures: np.ndarray, seed: int) -> str | None:
        """Why nothing can be held beside a reference plan with these features [n, F] and first pictures; or None.

        A small control is drawn for it where its sampler is not DDIM.
        """
        real = np.asarray(self.images.subset(min(max(1, len(pictures)), len(self.images))).pixels)
        found = sanity.flat(pictures, real) if len(pictures) else None
        found = found or sanity.lost(self.fd(features) - self.floor(len(features)).raw, 100 * self.reference.scale)
        control = sanity.control_plan(self.bank, reference)
        if found or control is None:
            return found
        count = min(len(features), sanity.CONTROL)
        distance = self.score(control, count, seed)
        return sanity.far_from(distance, self.fd(features[:count]), self.reference.scale, len(reference.rows))

    def quality(self, features: np.ndarray, fd: Distances) -> dict[str, Quality]:
        """Every metric, each with its interval; where classes were asked for and the features are those of a classifier
        of these images, "agreement" too."""
        bootstrap, name = len(fd.resamples), self.extractor.name
        found = evaluate(features, self.reference, seed=fd.seed, n_boot=bootstrap, features_name=name, fd=fd)
        if not self.asked or self.extractor.classifier is None:
            return found
        asked = np.array([in_turn(self.asked, k) for k in range(len(features))])
        seen = agreement(self.extractor.classifier, matching(self.extractor.classifier, features, asked), asked)
        both: Any = {
            "n": seen.n,
            "n_reference": self.reference.n,
            "features": name,
            "reference": self.reference.fingerprint,
        }
        told = Quality(metric="agreement", value=seen.share, low=seen.low, high=seen.high, seed=fd.seed, **both)
        return found | {"agreement": told}

    def _classes_asked(self) -> tuple[int, ...]:
        """The class that each image is asked to be, image k that of k in turn; () where the classifier, which knows
        classes by number alone, was trained on other images than these."""
        net, asked = self.extractor.classifier, () if self.conditions is None else self.conditions.labels
        known = net is not None and net.record.get("fingerprint") == self.images.fingerprint
        return asked if known and net is not None and asked and max(asked) < net.config["n_classes"] else ()

    def distances(self, features: np.ndarray, seed: int, bootstrap: int) -> Distances:
        """The Fréchet distance to the real images, corrected for bias, with its resamples."""
        name = self.extractor.name
        return distances(features, self.reference, n_boot=bootstrap, seed=seed, features_name=name)

    def wall_ms(
        self, plans: Mapping[str, StepPlan], *, batch: int = TIMED_BATCH, repeats: int = 5
    ) -> dict[str, list[float]]:
        """Milliseconds of whole trajectories at `batch`, several times in turns."""
        return wall_ms({name: (self, plan) for name, plan in plans.items()}, batch=batch, repeats=repeats)

    def trajectory(self, plan: StepPlan, batch: int) -> Callable[[], torch.Tensor]:
        """What draws `batch` pictures of a plan from one noise each time that it is called."""
        cond = cond_for(self.bank, 0, batch, self.conditions)

        def call() -> torch.Tensor:
            generators = image_generators(0, 0, batch)
            return to_images(self.bank, denoise(self.bank, plan, start_noise(self.bank, generators), generators, cond))

        return call


Judged = tuple[Judge, StepPlan]
"""A plan, and the judge of its bank."""


def wall_ms(judged: Mapping[str, Judged], *, batch: int = TIMED_BATCH, repeats: int = 5) -> dict[str, list[float]]:
    """Milliseconds of whole trajectories at `batch`, each as its own judge draws it, several times in turns."""
    calls = {name: judge.trajectory(plan, batch) for name, (judge, plan) in judged.items()}
    return interleave(calls, repeats=repeats, warmup=1)


def extractor_for(source: str, images: Images, own: Path, device: str) -> Extractor:
    """The features of a recipe; "own" is the network that `halfstep features` left in the folder `own`."""
    if source == "pixels":
        return raw_pixels(images)
    return load_features(f"file:{own}" if source == "own" else source, device=device)


@dataclass(frozen=True)
class Measured:
    """Reference and plans side by side: the record for quality.json, and pictures uint8 by plan."""

    record: Comparison
    pictures: dict[str, np.ndarray]


def _layouts_told(layouts: Mapping[str, str], asked: str) -> str:
    """The memory layout of every entry, in words, and whose choice it was."""
    kinds = {kind: [name for name in layouts if layouts[name] == kind] for kind in dict.fromkeys(layouts.values())}
    told = "; ".join(kind if len(kinds) == 1 else f"{kind}: {', '.join(names)}" for kind, names in kinds.items())
    return f"memory layout {told} ({'chosen by a timing' if asked == 'auto' else 'as the recipe says'})"


def _runtimes_told(runtimes: Mapping[str, str]) -> str:
    """What runs entries that PyTorch as it is does not, in words."""
    others = dict.fromkeys(one for one in runtimes.values() if one != "eager")
    names = {one: [name for name in runtimes if runtimes[name] == one] for one in others}
    return "".join(f"; by {one}: {', '.join(run)}" for one, run in names.items())


def _run_as(judged: Mapping[str, Judged], asked: str) -> str:
    """How entries lie in memory and what runs them; of several banks each entry with the pipeline before its name."""
    layouts: dict[str, str] = {}
    runtimes: dict[str, str] = {}
    banks = dict.fromkeys(judge.bank for judge, _ in judged.values())
    for bank in banks:
        first = next(name for name, (judge, _) in judged.items() if judge.bank is bank)
        prefix = f"{first}: " if len(banks) > 1 else ""
        layouts |= {prefix + entry: layout for entry, layout in bank.layouts().items()}
        runtimes |= {prefix + entry: runtime for entry, runtime in bank.runtimes().items()}
    return _layouts_told(layouts, asked) + _runtimes_told(runtimes)


def measure_plans(
    judge: Judge,
    plans: Mapping[str, StepPlan],
    recipe: Recipe,
    *,
    free: str | None = None,
    keep: int = KEEP,
    repeats: int | None = None,
    batch: int | None = None,
    watch: Watch = SILENT,
) -> Measured:
    """Quality with intervals, paired change from the first plan with its verdict, MACs and wall-clock of several plans,
    same seeds; `free`: the one that all are held against besides. `batch`: images of a timed trajectory, and how often
    each is timed (`repeats`): the recipe's `sample.timed` and `eval.repeats` by default. Beside a broken first plan the
    verdict on all others is "broken reference"; what is wrong is said, and stands in the record as `warnings`."""
    judged = {name: (judge, plan) for name, plan in plans.items()}
    return measure_judged(judged, recipe, free=free, keep=keep, repeats=repeats, batch=batch, watch=watch)


def measure_judged(
    judged: Mapping[str, Judged],
    recipe: Recipe,
    *,
    free: str | None = None,
    keep: int = KEEP,
    repeats: int | None = None,
    batch: int | None = None,
    watch: Watch = SILENT,
) -> Measured:
    """`measure_plans` of plans that may be of several banks, each with its judge. The judges have the same images and
    features, and their banks' samples one shape: then the same number is the same noise in all of them."""
    seed, count, batch = stage_seed(recipe.seed, Stage.REPORT), recipe.eval.images, batch or recipe.sample.timed
    features, pictures, repeats = {}, {}, repeats or recipe.eval.repeats
    first = next(iter(judged))
    judge, reference = judged[first]
    with watch.stage("evaluate", len(judged) + 1) as told:
        for i, (name, (own, plan)) in enumerate(judged.items()):
            with side_by_side(own.bank.device, None if own.bank.eager else 1) as executor:
                features[name], pictures[name] = own.features(plan, count, seed, keep, executor)
            told(i + 1, name)
        broken = judge.broken(reference, features[first], pictures[first], seed)
        times = wall_ms(judged, batch=batch, repeats=repeats)
        alone = wall_ms(judged, batch=1, repeats=repeats) if batch > 1 else {}
        told(len(judged) + 1, "")
    warnings = [one for one in (broken, judge.too_few(count, "eval.images")) if one]
    for one in warnings:
        watch.say(f"warning: {one}")
    found = {name: judge.distances(one, seed, recipe.eval.bootstrap) for name, one in features.items()}
    qualities = {name: own.quality(features[name], found[name]) for name, (own, _) in judged.items()}
    beside = _Beside(judge, found, times, alone, recipe.eval.tolerance, broken=bool(broken))
    rows = {
        name: beside.row(name, plan, reference.macs, first, free, qualities[name], batch)
        for name, (_, plan) in judged.items()
    }
    about = _about(judged, recipe, free=free, batch=batch, repeats=repeats, warnings=warnings)
    return Measured(Comparison(about=about, plans=rows), pictures)


@dataclass(frozen=True)
class _Beside:
    """The distances and the times of several plans, those of one image alone too, from which any two are compared."""

    judge: Judge
    distances: Mapping[str, Distances]
    times: Mapping[str, Sequence[float]]
    alone: Mapping[str, Sequence[float]]
    tolerance: float
    broken: bool

    def change(self, name: str, base: str) -> tuple[Difference, Verdict]:
        """How much worse one plan is than another, and the verdict."""
        one, other = self.distances[base], self.distances[name]
        found = difference(one, other, self.judge.reference, self.judge.floor(other.n).high)
        return found, "broken reference" if self.broken else found.verdict(self.tolerance)

    def wall(self, name: str, base: str) -> list[float]:
        """The time of one plan as a share of another's in the same turn, sorted."""
        return sorted(t / r for t, r in zip(self.times[name], self.times[base], strict=True))

    def row(
        self,
        name: str,
        plan: StepPlan,
        macs: int,
        first: str,
        free: str | None,
        quality: dict[str, Quality],
        batch: int,
    ) -> PlanRow:
        (change, verdict), ratios = self.change(name, first), self.wall(name, first)
        found = PlanRow(
            macs=plan.macs,
            share=plan.macs / macs,
            calls=len(plan.called),
            wall_ms=_middle(sorted(self.times[name])),
            wall_share=_middle(ratios),
            wall_share_low=ratios[0],
            wall_share_high=ratios[-1],
            quality=quality,
            difference=change,
            held=verdict == "held",
            verdict=verdict,
            decided_by=change.decided_by(self.tolerance) if verdict == "not decided" else None,
            alone_ms=_middle(sorted(self.alone[name])) if name in self.alone else None,
            predicted_ms=None if plan.whole.us is None else plan.whole.us * batch / 1e3,
        )
        if free is None:
            return found
        change, verdict = self.change(name, free)
        return replace(found, free_difference=change, free_verdict=verdict, free_wall=_middle(self.wall(name, free)))


def _middle(ordered: Sequence[float]) -> float:
    return ordered[len(ordered) // 2]


def _about(
    judged: Mapping[str, Judged],
    recipe: Recipe,
    *,
    free: str | None,
    batch: int,
    repeats: int,
    warnings: Sequence[str],
) -> About:
    """How the plans were measured, the first being what the others are held against."""
    first = next(iter(judged))
    judge = judged[first][0]
    return About(
        reference=first,
        free=free,
        batch=batch,
        repeats=repeats,
        seed=stage_seed(recipe.seed, Stage.REPORT),
        n=recipe.eval.images,
        tolerance=recipe.eval.tolerance,
        floor=judge.floor(recipe.eval.images),
        scale=judge.reference.scale,
        warnings=tuple(warnings),
        data=judge.images.fingerprint,
        machine=machine(),
        device=str(judge.bank.device),
        dtype=str(judge.bank.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        layout=_run_as(judged, recipe.sample.layout),
    )
