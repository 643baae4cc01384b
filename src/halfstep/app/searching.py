"""What the verbs that search share: the references, the goal in the unit that it was asked in, the joint search."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from halfstep.app.estimate import Drawing, announce
from halfstep.app.measurement import judge_for
from halfstep.core import disk
from halfstep.core.budget import Budget
from halfstep.core.errors import ModelError, PlanError, RecipeError
from halfstep.core.plan import Price, StepPlan
from halfstep.core.recipe import Recipe, SampleSpec
from halfstep.core.results import FreeArm, FreeRecord
from halfstep.core.seeds import STAGES, Stage, stage_seed
from halfstep.core.watch import SILENT, Watch
from halfstep.data.arrays import save_arrays
from halfstep.data.pictures import to_uint8
from halfstep.engine.bank import Bank
from halfstep.engine.calibration import calibrated
from halfstep.engine.device import default_device, side_by_side
from halfstep.engine.entry import Backend, Reuse, Rounded
from halfstep.engine.pricing import PriceBook, timed_prices
from halfstep.engine.profiling import reused_macs
from halfstep.engine.runtime import PACKAGES, installed
from halfstep.engine.sampling import sample_images
from halfstep.engine.subject import Subject
from halfstep.measure.fidelity import Converged, converged_plan
from halfstep.nets.denoiser import class_count
from halfstep.nets.int8 import Span
from halfstep.nets.precision import precisions_for
from halfstep.nets.reuse import OUT, Place, cut_count, require_cut
from halfstep.search.arms import COUNTS, ROUNDS, Arm, Free, Stock, Track, best_free, raced_families
from halfstep.search.joint import Answer, Question, search_joint, too_small
from halfstep.search.scores import ScoreBook, open_scores

FREE = "best free"
"""What the second reference is called in a report."""
CONVERGED_DATA = "converged pictures"
"""What the data of a tuning is called that was given none."""
TOLERATED = 0.05
"""The loss that is tolerated where a verb is given no goal."""
Asked = Budget | float | str | None
"""A budget as callers say it: a number alone is a share of the MACs, a text is read (`Budget.parse`)."""
CONVERGED = 50
"""Steps of the fine solver that samplers are raced against: more than any raced one has."""
LADDER = (32, 22, 16, 11, 8, 5.6)
"""Parts of what is run today that a search for the cheapest plan tries as limits."""
CLEARLY = 0.7
"""The part of the shortest time, of a few calls, below which a budget is refused before prices are measured well."""


@dataclass(frozen=True)
class Goal:
    """What a search is for: the best plan within a budget, or the cheapest whose loss is tolerated."""

    budget: Budget | None = None
    max_loss: float | None = None

    @classmethod
    def of(cls, budget: Budget | float | str | None, max_loss: float | None) -> Goal:
        """Raises PlanError unless there is exactly one of them, and it is one."""
        if (budget is None) == (max_loss is None):
            raise PlanError(
                got="both" if budget is not None else "neither",
                expected="--budget or --max-loss",
                where="goal",
                do="give one",
            )
        if max_loss is not None and not max_loss >= 0:
            raise PlanError(got=max_loss, expected="a share of 0 or more", where="--max-loss", do="write e.g. 0.05")
        return cls(None if budget is None else Budget.of(budget), max_loss)

    def __str__(self) -> str:
        return f"budget {self.budget}" if self.budget is not None else f"max-loss {self.max_loss}"

    def question(self, today: StepPlan, batch: int) -> Question:
        """The limits per image. today: priced."""
        if self.budget is None:
            whole = today.whole.us
            assert whole is not None, "what is searched is priced in time"
            return Question("us", tuple(round(1000 * whole / part) for part in LADDER))
        unit, budget = self.budget.priced_in, self.budget
        reference = today.price if unit == "macs" else today.whole
        scale = 1 if unit == "macs" else 1000

        def say(price: int) -> str:
            cost = Price(price) if unit == "macs" else Price(0, price / 1000)
            return budget.told(cost, reference, batch)

        return Question(unit, (int(scale * budget.limit(reference, batch) + 0.5),), say, beside=False)


@dataclass
class Ground:
    """All that a search stands on: a judge of the bank, the scores of its run folder, the prices measured here, the
    stock samplers, and where arms are raced. Each is made when it is first asked for."""

    subject: Subject
    bank: Bank
    out: Path
    watch: Watch
    executor: Executor | None = None

    @property
    def recipe(self) -> Recipe:
        return self.subject.recipe

    @cached_property
    def book(self) -> ScoreBook:
        judge = judge_for(self.bank, self.subject, self.out, self.watch)
        return open_scores(judge, self.out, self.watch, self.executor)

    @cached_property
    def prices(self) -> PriceBook:
        """What every call costs here, at the batch that is timed, in the layouts that the judge settles."""
        bank = self.book.judge.bank
        return PriceBook(bank, self.recipe.sample.timed, self.out / "state" / "prices.json", watch=self.watch)

    def priced(self, plan: StepPlan) -> StepPlan:
        return self.prices.priced(plan)

    @property
    def us(self) -> dict[str, float]:
        """Microseconds of one call of every entry, per image."""
        return {name: price.us for name, price in self.prices.prices.items() if price.us is not None}

    @cached_property
    def today(self) -> StepPlan:
        """What the user runs today: the model's own sampler, in the steps of the recipe."""
        return self.priced(self.subject.reference(self.bank))

    @cached_property
    def stock(self) -> Stock:
        return Stock(self.bank, self.subject.process, self.priced)

    @cached_property
    def track(self) -> Track:
        judge, first = self.book.judge, self.recipe.search.race
        plan = converged_plan(self.bank, self.subject.process, CONVERGED, self.bank.prices())
        with self.watch.stage("converged pictures", 1) as told:
            converged = Converged(
                self.bank,
                plan,
                judge.extractor,
                count=first * ROUNDS,
                seed=stage_seed(self.recipe.seed, Stage.TABLE),
                batch=first,
                conditions=judge.conditions,
                cache=self.out / "state",
            )
            told(1, f"{first * ROUNDS} pictures by {plan.sampler.told}")
        return Track(converged, first, self.executor, self.watch)

    @cached_property
    def families(self) -> list[SampleSpec]:
        """The samplers that are worth racing at every number of steps."""
        return raced_families(self.track, self.stock, len(self.today.rows))

    @cached_property
    def free(self) -> Free:
        """The best that is free, kept in free.json."""
        judge, images = self.book.judge, self.recipe.search.images
        scores = self.book.on(images, stage_seed(self.recipe.seed, Stage.SEARCH))
        tolerated = lambda score: judge.tolerated(self.recipe.eval.tolerance, score, images)  # noqa: E731
        found = best_free(self.track, self.stock, self.families, self.today, scores, tolerated)
        self.write_free(found)
        return found

    def write_free(self, found: Free) -> None:
        """Write free.json."""
        images = self.recipe.search.images
        bias = self.book.judge.floor(images).raw

        def arm(plan: StepPlan, score: float) -> FreeArm:
            us = plan.whole.us
            ms = None if us is None else us / 1e3
            return FreeArm(what=plan.sampler.told, calls=len(plan.called), ms=ms, fd=max(0.0, score - bias))

        scores = {plan.digest: score for plan, score in found.frontier} | {self.today.digest: found.today}
        record = FreeRecord(
            today=arm(self.today, found.today),
            best=arm(found.plan, scores[found.plan.digest]),
            frontier=tuple(arm(*one) for one in found.frontier),
            images=images,
        )
        disk.write_json(self.out / "free.json", record.to_json())

    def reachable(self, goal: Goal) -> Question:
        """What is asked for, as far as the cheapest plan there is (the cheapest entry in every row of the fewest calls)
        allows: of a tolerated loss the limits that it meets, what is run today itself where it meets none.

        Raises PlanError for a budget below it, with what it costs in the budget's unit.
        """
        question = goal.question(self.today, self.recipe.sample.timed)
        fewest = min(COUNTS[0], len(self.today.rows))
        arms = [arm for _, arm in self.stock.at(fewest)] or [Arm(self.today)]
        names = self.bank.computed
        least = min(question.price(arm.base.uniform(name)) for arm in arms for name in names)
        limits = tuple(limit for limit in question.limits if limit >= least)
        if not limits and goal.budget is not None:
            raise too_small(question, arms, names)
        return replace(question, limits=limits or (question.price(self.today),))

    @contextmanager
    def side_by_side(self, workers: int | None = None) -> Iterator[None]:
        """Inside, plans are measured on all processors that torch may use, or so many; outside one alone, as it is
        timed."""
        bank = self.book.judge.bank
        with side_by_side(bank.device, workers if bank.eager else 1) as executor:
            self._run_on(executor)
            yield
        self._run_on(None)

    def _run_on(self, executor: Executor | None) -> None:
        """Tell all that draws, what is made already too: an executor ends with its context."""
        self.executor = self.book.executor = executor
        if "track" in self.__dict__:
            self.__dict__["track"] = replace(self.track, executor=executor)

    def search(self, goal: Goal, question: Question) -> Answer:
        """The plan for a goal, of what is `reachable` for it. Raises PlanError where no plan meets a budget."""
        answers = search_joint(self.track, self.book, self.stock, self.families, self.today, question, self.recipe)
        chosen = answers[-1] if goal.max_loss is None else cheapest_that_holds(answers, goal.max_loss)
        return replace(chosen, plan=chosen.plan.replacing(self.today))


def cheapest_that_holds(answers: list[Answer], tolerance: float) -> Answer:
    """The cheapest answer whose quality holds; where none is sure to, the cheapest whose loss as measured is within the
    tolerance; where none is, the best."""
    held = [one for one in answers if one.change is not None and one.change.held(tolerance)]
    if held:
        return held[0]
    near = [one for one in answers if within(one, tolerance)]
    return near[0] if near else min(answers, key=lambda one: one.fresh)


def within(answer: Answer, tolerance: float) -> bool:
    """Whether the change is within the tolerance as measured, whatever its interval."""
    if answer.change is None:
        return False
    value, _, _, limit = answer.change.against(tolerance)
    return value <= limit


@dataclass(frozen=True)
class Found:
    """What a search found, with what it stood on. `free`: the best that is free; what is run today where it was not
    looked for."""

    ground: Ground
    answer: Answer
    free: StepPlan


def searched(subject: Subject, bank: Bank, goal: Goal, out: Path, watch: Watch) -> Found:
    """The joint search over a bank in a run folder, on all processors that torch may use."""
    ground = Ground(subject, bank, out, watch)
    recipe = subject.recipe
    counts = {"search.images": recipe.search.images, "search.final_images": recipe.search.final_images}
    for warning in filter(None, (ground.book.judge.too_few(count, what) for what, count in counts.items())):
        watch.say(f"warning: {warning}")
    today = ground.today  # prices are measured as plans will run: before work is done side by side
    question = ground.reachable(goal)  # or refused, before anything is drawn
    work = work_of(question, today, recipe)
    announce(watch, ground.book.judge.bank, work, us=ground.us, batch=recipe.sample.timed)
    with ground.side_by_side():
        free = ground.free.plan if recipe.eval.free else today
        found = Found(ground, ground.search(goal, question), free)
    watch.say(f"today {told_price(today)}; best free {told_price(free)}; plan {told_price(found.answer.plan)}")
    return found


def dense_control(found: Found) -> dict[str, StepPlan]:
    """The dense net under the best stock sampler of as much time as the plan takes, of those that were measured."""
    ground, plan = found.ground, found.answer.plan
    if not ground.recipe.eval.free:
        return {}
    able = [one for one, _ in ground.free.frontier if (one.whole.us or 0) <= (plan.whole.us or 0)]
    return {f"dense, {one.sampler.told}": one for one in able[-1:] if one.rows != plan.rows}


def told_price(plan: StepPlan) -> str:
    """A plan's sampler and what it costs, in a few words."""
    time = "" if plan.whole.us is None else f", {plan.whole.us / 1e3:,.3g} ms"
    return f"({plan.sampler.told}: {plan.macs / 1e6:,.0f} MMACs{time} an image)"


def with_free(ground: Ground, plans: Mapping[str, StepPlan]) -> tuple[dict[str, StepPlan], str | None]:
    """Plans to be measured, the first of which is what is run today, with the best stock sampler second; and which of
    them that is: the first one where no other is as good for less, None where it is not looked for."""
    first, *others = plans.items()
    if not ground.recipe.eval.free:
        return dict(plans), None
    with ground.side_by_side():
        free = ground.free.plan
    return named_free(first, free, dict(others))


def named_free(
    first: tuple[str, StepPlan], free: StepPlan, others: Mapping[str, StepPlan]
) -> tuple[dict[str, StepPlan], str]:
    """What is run today, the best free where that is another one, and the others."""
    name, today = first
    if free.rows == today.rows and free.sampler == today.sampler:
        return {name: today, **others}, name
    return {name: today, FREE: free, **others}, FREE


def work_of(question: Question, today: StepPlan, recipe: Recipe) -> list[Drawing]:
    """About what a search is to draw: the references, the races, the tables, the measured plans, the finals."""
    spec, dense = recipe.search, today.prices[today.reference].macs
    limit = sorted(question.limits)[len(question.limits) // 2]
    share = min(1.0, limit / question.price(today))
    plan, arms = round(share * today.macs), spec.arms * len(question.limits)
    races = (60 + 30 * len(question.limits)) * spec.race + CONVERGED * spec.race * ROUNDS // 10
    return [
        Drawing(images=spec.images if recipe.eval.free else 0, plan=today),
        Drawing(images=4 * spec.images if recipe.eval.free else 0, macs=8 * dense),
        Drawing(images=races, macs=10 * dense),
        Drawing(images=arms * spec.genes * len(today.prices) * spec.error_images // 2, macs=8 * dense),
        Drawing(images=(spec.fit + 5 * arms) * spec.images, macs=plan),
        Drawing(images=(spec.finalists + 1) * len(question.limits) * spec.final_images, macs=plan),
        Drawing(images=question.beside * spec.final_images + recipe.eval.images, plan=today),
        Drawing(images=4 * recipe.eval.images, macs=plan),
    ]


def require_reachable(goal: Goal, today: StepPlan, bank: Bank, batch: int) -> None:
    """Raise PlanError, before anything is trained or drawn, for a budget below the cheapest plan of all: the cheapest
    entry in every one of the fewest calls. A time is measured in a few calls of `batch` images, and refused where it is
    clearly too short; the search measures again."""
    if goal.budget is None:
        return
    macs, sure, unit = {name: today.prices[name].macs for name in bank.computed}, 1 - 1e-9, goal.budget.priced_in
    able = [name for name in macs if macs[name] == min(macs.values())]  # several, where precisions differ
    cheapest = able[0]
    if unit == "us":
        timed = timed_prices(bank.only([bank.reference, *able]), batch, repeats=3, warmup=1)
        cheapest = min(able, key=lambda name: timed[name].us or 0)
        today, sure = replace(today, prices={**today.prices, **timed}, fixed=Price(0, 0)), CLEARLY
    shortest = replace(today, rows=today.rows[: COUNTS[0]]).uniform(cheapest)
    of, least = (today.price, shortest.price) if unit == "macs" else (today.whole, shortest.whole)
    if goal.budget.limit(of, batch) < getattr(least, unit) * sure:
        raise PlanError(
            got=goal.budget,
            expected=f"at least {goal.budget.told(least, of, batch)}, the cheapest plan there is",
            where="--budget",
            do="raise the budget, or add cheaper stand-ins",
        )


def needed(bank: Bank, plan: StepPlan) -> Bank:
    """A bank without the entries that a plan does not run and that cost nothing to add again: those that reuse
    features, those in fewer bits."""
    entries = bank.entries.items()
    return bank.only(
        [name for name, one in entries if name in plan.nets or not isinstance(one.weights, Reuse | Rounded)]
    )


def with_precisions(bank: Bank, recipe: Recipe, goal: Goal, watch: Watch = SILENT) -> Bank:
    """A bank whose entries are there in the half precisions that a recipe asks for, too. Raises RecipeError for one
    that the device does not compute in."""
    device = default_device()
    able = precisions_for(device)
    halves = [one for one in recipe.search.precisions if one != "int8"]
    for one in halves:
        if one not in able:
            raise RecipeError(
                got=one,
                expected=f"one of {', '.join(able)}" if able else f"none: this {device.type} computes in none",
                where="search.precisions",
                do="leave it out",
            )
    if recipe.search.precisions and goal.budget is not None and goal.budget.priced_in == "macs":
        watch.say("fewer bits save time and no MACs: a budget in MACs will hardly choose them; give one in time")
    return bank.with_casts(halves)


@dataclass(frozen=True)
class _Calibration:
    """state/int8.json: by entry, the spans of its layers."""

    entries: dict[str, dict[str, Span]]


def with_int8(subject: Subject, bank: Bank, out: Path, watch: Watch = SILENT) -> Bank:
    """A bank whose entries are there in eight bits too, where the recipe asks for it: calibrated along their own
    trajectories, once for a run folder. Where nothing that runs here would be faster by it, `watch` is told why it is
    left out: PyTorch only simulates it."""
    recipe = subject.recipe
    if "int8" not in recipe.search.precisions:
        return bank
    runtime, ways = recipe.sample.runtime, [one for one in PACKAGES if installed(one)]
    able: list[Backend] = [one for one in ways if runtime in ("auto", one) and default_device().type == "cpu"]
    if not able:
        here = f"sample.runtime={runtime} on {default_device().type}" if ways else "none of its runtimes is installed"
        do = "sample.runtime=auto, onnx or openvino on a CPU" if ways else f"halfstep[{next(iter(PACKAGES))}]"
        watch.say(f"int8 is left out: {here} is not faster by it; take {do}")
        return bank
    file = out / "state" / "int8.json"
    if file.is_file():
        found = disk.read_record(file, _Calibration, what="ranges of int8", do="delete it to calibrate anew").entries
    else:
        seed = stage_seed(recipe.seed, Stage.TABLE)
        spans = calibrated(bank, subject.reference(bank), seed=seed, conditions=subject.conditions, watch=watch)
        found = {name: dict(one) for name, one in spans.items()}
        disk.write_json(file, {"entries": found})
    return bank.with_int8(found)


def with_reuse(bank: Bank, asked: Sequence[str], watch: Watch) -> Bank:
    """A bank whose entries can be reused at the cuts that a recipe asks for; without any, where there is no other
    stand-in, at those of `reuse_of`. Raises ModelError for a cut that the reference does not have."""
    for cut in asked:
        require_cut(bank[bank.reference], place_of(cut), "search.reuse")
    cuts = asked or (reuse_of(bank) if len(bank.uncast) == 1 else ())
    return bank.with_reuse([place_of(cut) for cut in cuts], watch=watch)


def place_of(cut: str) -> Place:
    """A cut as a recipe writes it: its number, or "out". Raises RecipeError."""
    if cut == OUT:
        return OUT
    if cut.isdigit():
        return int(cut)
    raise RecipeError(got=cut, expected=f"the number of a cut, or {OUT!r}", where="search.reuse", do="write e.g. 1,2")


def reuse_of(bank: Bank) -> list[str]:
    """The cuts of the reference that a tuning tries: those whose rows cost nearest to a third and to two thirds of a
    call; of a net without cuts the whole output."""
    model = bank[bank.reference]
    try:
        count = cut_count(model)
    except ModelError:
        return [OUT]
    full = bank.prices()[bank.reference].macs
    shares = [reused_macs(model, cut, tokens=bank.tokens) / full for cut in range(count)]
    cuts = {min(range(count), key=lambda cut: abs(shares[cut] - wanted)) for wanted in (1 / 3, 2 / 3)}
    return [str(cut) for cut in sorted(cuts)]


def converged_data(subject: Subject, out: Path, watch: Watch) -> str:
    """Draw the reference's converged pictures as data, where a user brings none: OUT/converged/images.npz, with the
    classes that they were drawn for. Returns how the data is named."""
    folder = Path(out) / "converged"
    file = folder / "images.npz"
    if not file.is_file():
        bank = subject.stand_ins.to(default_device())
        plan = converged_plan(bank, subject.process, steps=30, prices=bank.prices())
        count, seed = subject.recipe.search.converged, stage_seed(subject.recipe.seed, Stage.TABLE) + STAGES // 2
        parts = []
        with watch.stage("converged pictures", count) as told:
            for images in sample_images(
                bank, plan, count, seed=seed, batch=subject.recipe.sample.batch, conditions=subject.conditions
            ):
                parts.append(to_uint8(images))
                told(sum(map(len, parts)))
        arrays = {"images": np.concatenate(parts).transpose(0, 2, 3, 1)}
        if classes := class_count(bank.config):
            arrays["labels"] = np.arange(count) % classes  # as they are drawn: in turn
        disk.write_atomic(file, lambda path: save_arrays(path, arrays))
    return f"npz:{file}"
