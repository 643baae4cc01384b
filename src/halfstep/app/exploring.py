"""Exploring a run: its measured plans by price, edits of them, and pictures of the same noise by any of them.

All that the studio does, without a page: everything that a browser may send is checked here.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from halfstep.app.searching import needed, with_reuse
from halfstep.app.subject import open_subject
from halfstep.core import disk
from halfstep.core.bundled import ASSETS
from halfstep.core.errors import HalfstepError, ModelError, PlanError, RunError
from halfstep.core.plan import Row, StepPlan, call_of
from halfstep.core.recipe import Recipe, RunRecord
from halfstep.core.seeds import MAX_SEED
from halfstep.core.typed import shown
from halfstep.core.watch import SILENT, Watch
from halfstep.data.classes import numbers_of
from halfstep.data.pictures import to_uint8
from halfstep.engine.bank import Bank
from halfstep.engine.conditions import Conditions, cond_for
from halfstep.engine.device import default_device
from halfstep.engine.networks import require_fed
from halfstep.engine.pricing import PriceBook
from halfstep.engine.sampling import (
    fewer_steps,
    image_generators,
    sample_images,
    start_noise,
)
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.engine.subject import Subject
from halfstep.measure.films import moments
from halfstep.nets.denoiser import class_count
from halfstep.report.figures import frontier
from halfstep.search.arms import Stock
from halfstep.search.scores import FILE, Scored, digest_in, read_scores

GRID, MOST_PICTURES = 8, 32
"""Pictures of a grid: by default, and at most."""
MOST_FRAMES, FILMED = 60, 4
"""Of a film: frames at most, of a longer trajectory some are left out; pictures that it follows."""
MOST_LETTERS = 300
"""Of a prompt."""
MOST_SAVED = 100
"""Pipelines that a studio keeps: a page that is sent to save for ever does not fill the disk."""
LADDER = (5, 10, 20, 50)
"""Steps of the plans that are offered where none was measured."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
_KEPT = 24  # grids that are kept, so that the reference is not drawn for every plan


class Measured(NamedTuple):
    """A plan, priced here, and the distance to the data that was measured of `images` pictures; None: it was not."""

    plan: StepPlan
    score: float | None = None
    images: int = 0

    @property
    def ms(self) -> float:
        """Milliseconds per picture."""
        return ms_of(self.plan)


@dataclass(frozen=True)
class Asked:
    """What pictures: `count` of a `seed`, of a class by name or number (None: all in turn), or of a prompt."""

    count: int = GRID
    seed: int = 0
    label: str | None = None
    prompt: str = ""


class Frame(NamedTuple):
    """One moment of a film: pictures uint8 [N,C,H,W], in words what ran, and the row that ran (None: only noise)."""

    pictures: np.ndarray
    told: str
    row: int | None


def ms_of(plan: StepPlan) -> float:
    """Milliseconds per picture of a priced plan, all of its trajectory."""
    assert plan.whole.us is not None, "what is shown is priced in time"
    return plan.whole.us / 1e3


class Exploration:
    """One run, or one model, that is looked at: its bank, its plans by price, and what is drawn by them.

    `folder`: the run's; None of a model. `place`: where pipelines are saved. Draws from one thread at a time.
    """

    def __init__(self, subject: Subject, bank: Bank, scored: Sequence[Scored], folder: Path | None, place: Path):
        self.subject, self.bank, self.folder, self.place = subject, bank.to(default_device()), folder, place
        self._prices, self._pricing, self._lock = PriceBook(self.bank, GRID), threading.RLock(), threading.RLock()
        self._drawn: OrderedDict[tuple, np.ndarray] = OrderedDict()
        self.reference = self.priced(subject.reference(self.bank))
        self.take(scored)

    def take(self, scored: Sequence[Scored]) -> None:
        """Look at these scores from now on: those of plans that are known here make the frontier."""
        found, self.unknown = resolved(scored, self._bases, self.bank)
        self._scores = {one.plan.digest: one for one in found}
        with self._pricing:
            by_calls = [(one.plan.price.us or 0.0, one.score or 0.0) for one in map(self._by_calls, found)]
            near = [found[by_calls.index(point)] for point in frontier(by_calls)]  # its fixed part is measured
            exact = [one._replace(plan=self.priced(one.plan)) for one in near]
        best = [one for _, one in sorted(((one.ms, one) for one in exact), key=lambda pair: pair[0])]
        kept: list[Measured] = []
        for one in best:
            if not kept or (one.score or 0.0) < (kept[-1].score or 0.0):
                kept.append(one)
        self.plans = tuple(kept) or self._ladder()

    def measured(self, plan: StepPlan) -> Measured | None:
        """What was measured of a plan; None: nothing."""
        return self._scores.get(plan.digest)

    def _by_calls(self, one: Measured) -> Measured:
        return one._replace(plan=replace(one.plan, prices=self._prices.prices))

    def _ladder(self) -> tuple[Measured, ...]:
        """Where nothing was measured: the model's own plan and uniform ones, by price."""
        today, own = self.reference, self.subject.plan
        counts = [steps for steps in LADDER if steps < today.sampler.steps]
        plans = [today, *(fewer_steps(today, steps) for steps in counts)]
        made = [*plans, *(plan.uniform(name) for plan in plans for name in self.bank.computed)]
        every = {plan.digest: plan for plan in ([] if own is None else [own]) + made}
        return tuple(sorted((Measured(self.priced(plan)) for plan in every.values()), key=lambda one: one.ms))

    @cached_property
    def _stock(self) -> Stock:
        return Stock(self.bank, self.subject.process, lambda plan: plan)

    def _bases(self, calls: int, steps: int) -> Iterator[StepPlan]:
        """The plans of so many calls, the reference in all rows, under every sampler that a search may have taken; each
        is made when those before it were not the one."""
        own, today = self.subject.plan, self.reference
        yield from (plan for plan in (today, own) if plan is not None and len(plan.rows) == calls)
        for family in self._stock.families:
            if (arm := self._stock.arm(family, calls)) is not None:
                yield arm.base
        if steps <= self.subject.process.timesteps:
            with suppress(HalfstepError):  # this sampler has no such number
                fewer = fewer_steps(today, steps)
                yield from [fewer] if len(fewer.rows) == calls else []

    # -------------------------------------------------------------------------------------------------- plans

    def priced(self, plan: StepPlan) -> StepPlan:
        """A plan with what it costs here, also while another one is drawn."""
        with self._pricing:
            return self._prices.priced(plan)

    def at(self, ms: Any) -> Measured:
        """The best measured plan for so many milliseconds a picture; the cheapest where none is as cheap."""
        wanted = _number(ms, "milliseconds", 0, 1e12)
        able = [one for one in self.plans if one.ms <= wanted * (1 + 1e-9) + 1e-9]
        return able[-1] if able else self.plans[0]

    @property
    def calls(self) -> tuple[str, ...]:
        """What a row may run, by the names of calls (`call_of`)."""
        names = tuple(self.bank)
        return names if self.reference.guidance == 1 else (*names, *(f"{name}|" for name in names))

    def call_at(self, plan: StepPlan, row: int) -> str | None:
        """The name of what a row runs; None where it is guided in a way that has no name here."""
        one = plan.rows[self.row_of(plan, row)]
        same = [name for name in self.calls if call_of(name, self.reference.guidance) == (one.entry, one.guide)]
        return same[0] if same else None

    @staticmethod
    def row_of(plan: StepPlan, row: Any) -> int:
        """A row's index as it was sent. Raises PlanError for none of the plan's."""
        return int(_number(row, "row", 0, len(plan.rows) - 1, whole=True))

    def edited(self, plan: StepPlan, row: Any, call: Any) -> StepPlan:
        """The plan with another call in a row, uncorrected there: a correction belongs to its entry; priced.

        Raises PlanError for a row or a call that there is not, and for features reused before any are left.
        """
        at = self.row_of(plan, row)
        if not isinstance(call, str) or call not in self.calls:
            raise PlanError(
                got=shown(call), expected=f"one of {', '.join(self.calls)}", where=f"row {at + 1}", do="choose one"
            )
        entry, guide = call_of(call, self.reference.guidance)
        rows = list(plan.rows)
        rows[at] = Row(rows[at].timestep, entry, guide=guide)
        # shares are told of what the bank's reference costs, whatever the plan was found beside
        found = replace(plan, rows=tuple(rows), prices=self._prices.prices, baseline=None)
        require_fed(self.bank, found)
        return self.priced(found)

    # ----------------------------------------------------------------------------------------------- pictures

    @property
    def labels(self) -> tuple[str, ...]:
        """What the model's classes are called; () of a model without."""
        return self.bank.classes or tuple(map(str, range(class_count(self.bank.config))))

    @property
    def takes_prompts(self) -> bool:
        return self.subject.prompter is not None

    def conditions(self, asked: Asked) -> Conditions | None:
        """What pictures are drawn under. Raises PlanError for a class or a prompt that is none, DataError for a class
        that there is not."""
        count = class_count(self.bank.config)
        if count:
            return Conditions.of_classes(
                range(count) if asked.label is None else numbers_of([asked.label], count, self.bank.classes)
            )
        prompter = self.subject.prompter
        if prompter is None or not asked.prompt:
            return self.subject.conditions
        return Conditions(prompter.condition([asked.prompt]), (0,), (asked.prompt,))

    def drawn(self, plan: StepPlan, asked: Asked) -> np.ndarray:
        """Pictures of a plan, uint8 [N,C,H,W]: those that `halfstep sample` draws of the same seed.

        Raises PlanError for numbers out of bounds, ModelError for pictures that are not finite.
        """
        count = int(_number(asked.count, "pictures", 1, MOST_PICTURES, whole=True))
        seed = int(_number(asked.seed, "seed", 0, MAX_SEED, whole=True))
        key = plan.digest, count, seed, _text(asked.label or "", "class"), _text(asked.prompt, "prompt")
        with self._lock, torch.no_grad():
            if key not in self._drawn:
                how = {"seed": seed, "batch": min(count, self.subject.recipe.sample.batch)}
                found = sample_images(self.bank, plan, count, conditions=self.conditions(asked), **how)
                self._drawn[key] = np.concatenate([to_uint8(images) for images in found])
                while len(self._drawn) > _KEPT:
                    self._drawn.popitem(last=False)
            self._drawn.move_to_end(key)
            return self._drawn[key]

    def film(self, plan: StepPlan, asked: Asked) -> list[Frame]:
        """How pictures come about: the noise, then the sample after each row, the last one the finished pictures.

        Samples of more than unit variance, as some samplers hold them, are scaled down to it to be seen.
        """
        count = min(FILMED, int(_number(asked.count, "pictures", 1, MOST_PICTURES, whole=True)))
        seed = int(_number(asked.seed, "seed", 0, MAX_SEED, whole=True))
        _text(asked.label or "", "class"), _text(asked.prompt, "prompt")
        with self._lock, torch.no_grad():
            generators = image_generators(seed, 0, count)
            noise = start_noise(self.bank, generators)
            cond = cond_for(self.bank, 0, count, self.conditions(asked))
            return [
                Frame(pictures, "noise, before the first call", None)
                if row < 0
                else Frame(pictures, told_row(plan, row), row)
                for row, pictures in moments(self.bank, plan, noise, generators, cond, MOST_FRAMES)
            ]

    # -------------------------------------------------------------------------------------------------- saved

    def saved(self) -> list[str]:
        """The names of the pipelines that were saved here."""
        if not self.place.is_dir():
            return []
        names = sorted(path.name for path in self.place.iterdir() if (path / "plan.json").is_file())
        return [name for name in names if NAME.fullmatch(name)][:MOST_SAVED]

    def save(self, plan: StepPlan, name: Any) -> Path:
        """Save a plan with its networks as a pipeline; returns its folder. Raises RunError for a name that is none or
        is taken, and for a place that leads elsewhere."""
        folder = self._within(name)
        if folder.exists() or folder.is_symlink():
            raise RunError(got="a name that is taken", expected="a new one", where=name, do="choose another")
        if len(self.saved()) >= MOST_SAVED:
            got = f"{MOST_SAVED} pipelines"
            raise RunError(got=got, expected="fewer", where=self.place, do="delete some of them")
        with self._lock:
            StepAwarePipeline(needed(self.bank, plan), plan, self.subject.encoder).save_pretrained(folder)
        return folder

    def opened(self, name: Any) -> StepPlan:
        """The plan of a pipeline that was saved here, priced. Raises RunError or PlanError."""
        plan = StepPlan.load(self._within(name) / "plan.json")
        if lacking := [one for one in plan.nets if one not in self.bank]:
            got = f"entries {', '.join(lacking)}"
            raise PlanError(got=got, expected=f"of {', '.join(self.bank)}", where=name, do="open its own folder")
        return self.priced(plan)

    def _within(self, name: Any) -> Path:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            expected = "1 to 40 letters, digits, dots, dashes or underscores, the first a letter or a digit"
            raise RunError(got=shown(name), expected=expected, where="name", do="choose another")
        top, folder = self.folder or self.place, self.place / name
        if not folder.resolve().is_relative_to(top.resolve()):
            raise RunError(
                got="a link that leads elsewhere", expected=f"a place in {top}", where=folder, do="remove it"
            )
        return folder


def told_row(plan: StepPlan, row: int) -> str:
    """What a row runs, in words."""
    one, price = plan.rows[row], plan.prices
    us = sum(price[name].us or 0.0 for name in (one.entry, *([one.guide.entry] if one.guide else [])))
    guide = f", guided by {one.guide.entry} with weight {one.guide.weight:g}" if one.guide else ""
    corrected = ", corrected" if one.corrected else ""
    where = f"row {row + 1} of {len(plan.rows)}: timestep {one.timestep:.4g}"
    return f"{where}, {one.entry}{guide}{corrected}, {us / 1e3:.3g} ms"


def difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How far two uint8 pictures are apart, pixel by pixel: black where they are equal."""
    return np.abs(one.astype(np.int16) - other.astype(np.int16)).astype(np.uint8)


def _number(value: Any, where: str, least: float, most: float, *, whole: bool = False) -> float:
    """A number that a browser sent. Raises PlanError for one out of bounds, and for what is none."""
    is_one = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
    if not is_one or (whole and value != int(value)):
        expected = f"a {'whole ' if whole else ''}number from {least:g} to {most:g}"
        raise PlanError(got=shown(value), expected=expected, where=where, do="choose one")
    return value


def _text(value: Any, where: str) -> str:
    """A class or a prompt that a browser sent. Raises PlanError for a long one, and for what is none."""
    if not isinstance(value, str) or len(value) > MOST_LETTERS:
        expected = f"at most {MOST_LETTERS} letters"
        raise PlanError(got=shown(value), expected=expected, where=where, do="write or choose another")
    return value


# ------------------------------------------------------------------------------------------------------------- opened


Bases = Callable[[int, int], Iterable[StepPlan]]
"""Plans of so many calls and of so many steps."""


def resolved(scored: Sequence[Scored], bases: Bases, bank: Bank) -> tuple[list[Measured], int]:
    """The plans of scores on common noise, the most numerous ones, and how many of them are of plans unknown here.

    A score tells rows in stretches, and of the whole plan a digest: a plan is known whose sampler has the same one.
    `bases`: plans to try.
    """
    groups: dict[tuple, dict[str, Scored]] = {}
    for one in scored:
        if one.plan:
            groups.setdefault((one.stage != "fidelity", one.images, one.seed), {}).setdefault(one.digest, one)
    chosen = max(groups.items(), key=lambda item: (item[0][0], len(item[1])), default=((), {}))[1]
    found, unknown = [], 0
    for one in chosen.values():
        plan = _plan_of(one, bases(sum(stretch.rows for stretch in one.plan), one.steps), bank)
        if plan is None:
            unknown += 1
        else:
            found.append(Measured(plan, one.score, one.images))
    return found, unknown


def _plan_of(one: Scored, bases: Iterable[StepPlan], bank: Bank) -> StepPlan | None:
    if not all(name in bank for s in one.plan for name in (s.entry, *([s.guide.entry] if s.guide else []))):
        return None
    kinds = [stretch for stretch in one.plan for _ in range(stretch.rows)]
    for base in bases:
        pairs = zip(base.rows, kinds, strict=True)
        rows = tuple(Row(row.timestep, kind.entry, kind.correction, kind.guide) for row, kind in pairs)
        plan = replace(base, rows=rows, prices=bank.prices(), baseline=None)
        if digest_in(bank, plan) == one.digest:
            return plan
    return None


def explore(source: str, recipe: Recipe, place: Path | None = None, watch: Watch = SILENT) -> Exploration:
    """Open a run folder, finished or being written, or a model as `open_subject` takes it.

    `place`: where pipelines are saved; by default the folder studio of the run's, or runs/studio. Raises as
    `open_subject`, and RunError for a run that tells no model.
    """
    folder = Path(source) if (Path(source) / "recipe.json").is_file() else None
    model, bank_recipe = source, recipe
    if folder is not None:
        record = RunRecord.load(folder)
        bank_recipe = _recipe_of(record, recipe)
        if not (folder / "pipeline" / "model_index.json").is_file():
            model = _model_of(folder, record)
    subject = open_subject(model, None, bank_recipe, watch=watch)
    scored = read_scores(folder or ASSETS / f"{source}_scores") if folder or source == "fashion" else []
    bank = _with_named(subject.stand_ins, scored, bank_recipe, watch)
    default = folder / "studio" if folder else Path("runs") / "studio"
    return Exploration(subject, bank, scored, folder, place or default)


def _recipe_of(record: RunRecord, asked: Recipe) -> Recipe:
    """The run's own recipe, with the prompts that were asked for here, if any."""
    own = record.recipe or asked
    prompts = asked.data.prompts or own.data.prompts
    return replace(own, data=replace(own.data, prompts=prompts), sample=replace(own.sample, runtime="eager"))


def _model_of(folder: Path, record: RunRecord) -> str:
    """What a run that has no pipeline yet works on."""
    supernet = folder / "supernet"
    if (supernet / "pipeline" / "model_index.json").is_file():
        return str(supernet)
    if not (model := record.inputs.get("model")):
        raise ModelError(
            got="a run without a model yet", expected="a pipeline", where=folder, do="wait until it has written one"
        )
    return model


def _with_named(bank: Bank, scored: Sequence[Scored], recipe: Recipe, watch: Watch) -> Bank:
    """The bank with the entries that scores name and that are made of its own: reused features, half precision."""
    names = {stretch.entry for one in scored for stretch in one.plan} - set(bank)
    if any("@" in name for name in names):
        bank = bank.with_casts([one for one in recipe.search.precisions if one != "int8"])
    return with_reuse(bank, recipe.search.reuse, watch) if any("~" in name for name in names) else bank


# ----------------------------------------------------------------------------------------------------------- progress


class Progress(NamedTuple):
    """How a run stands: in words; what was measured at each stage, of how many pictures: (stage, pictures, plans, best
    score); whether it is done."""

    told: str
    stages: tuple[tuple[str, int, int, float], ...]
    done: bool


def progress(folder: Path) -> Progress:
    """How a run stands, from what it has written so far. Raises RunError for files that are damaged."""
    folder = Path(folder)
    scored = read_scores(folder)
    log = disk.read_records(folder / "log.jsonl")[-1:]
    stages: dict[tuple[str, int], list[float]] = {}
    for one in scored:
        stages.setdefault((one.stage, one.images), []).append(one.score)
    best = tuple((*key, len(scores), min(scores)) for key, scores in stages.items())
    done = (folder / "quality.json").is_file()
    parts = ["finished" if done else "not finished", f"{len(scored)} plans measured"]
    if log and (step := log[0].get("step")) is not None:
        loss = log[0].get("loss")
        parts.append(f"trained to step {step}" + (f", loss {loss:.4g}" if isinstance(loss, int | float) else ""))
    times = [file.stat().st_mtime for name in (FILE, "log.jsonl") if (file := folder / name).is_file()]
    if times and not done:
        parts.append(f"last record {max(0.0, time.time() - max(times)):.0f} s ago")
    return Progress("; ".join(parts), best, done)
