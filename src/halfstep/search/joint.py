"""The joint search: sampler, steps and spacing together with what runs in every row, and its correction.

Arms (`arms.py`) are raced with each stand-in in every row; those that are left get an error table of their own and one
error model in common, which is fitted to plans measured against the data; for every limit the best of them, corrected,
are measured once more on fresh noise, compared by paired intervals. Where those part nothing, fidelity chooses.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from halfstep.core.errors import PlanError
from halfstep.core.plan import BAR, NONE, Correction, StepPlan
from halfstep.core.recipe import Recipe, SampleSpec
from halfstep.core.results import Difference
from halfstep.core.seeds import Stage, stage_seed
from halfstep.core.watch import SILENT, Watch
from halfstep.engine.bank import Bank
from halfstep.engine.entry import Reuse
from halfstep.measure.quality import Distances, difference
from halfstep.search.arms import COUNTS, Arm, Stock, Track, Twins
from halfstep.search.corrections import climb
from halfstep.search.damage import ErrorTable, kept_tables
from halfstep.search.frontier import best_within, frontier
from halfstep.search.scores import ScoreBook, Scores, Seen, counted, unseen
from halfstep.search.space import Genes, Space, Unit, random_plans
from halfstep.search.space import counted as price_in
from halfstep.search.surrogate import Fitted, Plan, fit_arms

LOW_RANK = 0.5
"""A rank correlation below this says that the error model is not to be relied on."""
SCREENED = 3
"""How many arms pass the race by fidelity for each that is searched."""
WORST = 5.0
"""Scores above so many times the best one are told to the error model as that: it is to be right near the best."""


@dataclass(frozen=True)
class Searched:
    """An arm that is searched: its `space` in the unit of the search, what a trajectory costs beside its calls
    (`fixed`), its error table, how far its reference is from the converged pictures (`error`), and the scale of
    all its predictions."""

    arm: Arm
    space: Space
    fixed: int
    table: ErrorTable
    error: float
    scale: Correction = NONE

    def plan_of(self, genes: Genes) -> StepPlan:
        plan = self.arm.base.with_entries(self.space.expand(genes))
        return plan.with_corrections([self.scale] * len(plan.rows)) if self.scale != NONE else plan

    def price(self, genes: Genes) -> int:
        return self.space.cost(genes) + self.fixed


@dataclass(frozen=True)
class Question:
    """What is searched for: the best plan within each of `limits`, whole prices per image in `unit` (with the fixed
    part where it is time). `say`: tells a price in the unit that its user asked in. `beside`: whether what is run today
    is drawn in the final round too, so that answers say how they compare with it."""

    unit: Unit
    limits: tuple[int, ...]
    say: Callable[[int], str] | None = None
    beside: bool = True

    def told(self, price: int) -> str:
        """A price as its user thinks of it."""
        if self.say is not None:
            return self.say(price)
        return f"{price / 1e6:,.3g} {'ms' if self.unit == 'us' else 'MMACs'} per image"

    def fixed(self, plan: StepPlan) -> int:
        return price_in(plan.fixed, "us") if self.unit == "us" else 0

    def price(self, plan: StepPlan) -> int:
        """Of a plan as it is paid."""
        return price_in(plan.price, self.unit) + self.fixed(plan)


@dataclass(frozen=True)
class Answer:
    """The plan for one limit: `score` on the noise of the search, `fresh` on that of the final round, and its change
    from what is run today, paired, where that was drawn. `searched`: its arm. `controls`: the best uniform and a random
    plan of that arm, at most at its price."""

    limit: int
    plan: StepPlan
    score: float
    fresh: float
    change: Difference | None
    searched: Searched
    controls: Mapping[str, StepPlan]


@dataclass
class Joint:
    """One joint search: the arms that are searched, the scores on its noise, and what was measured so far, in order."""

    question: Question
    arms: list[Searched]
    scores: Scores
    recipe: Recipe
    watch: Watch = SILENT
    measured: dict[Plan, float] = field(default_factory=dict)
    foreseen: list[tuple[float, float]] = field(default_factory=list)

    # -------------------------------------------------------------------------------------------------- measuring

    def plan_of(self, one: Plan) -> StepPlan:
        return self.arms[one[0]].plan_of(one[1])

    def price(self, one: Plan) -> int:
        return self.arms[one[0]].price(one[1])

    def score_all(self, stage: str, every: Sequence[Plan], seen: Seen = unseen) -> list[float]:
        found = self.scores.many([self.plan_of(one) for one in every], stage, seen=seen)
        for one, score in zip(every, found, strict=True):
            self.measured[one] = score
        return found

    def uniforms(self, most: int) -> list[Plan]:
        """Of every arm the plans of one entry everywhere that cost at most `most`, the three dearest of each."""
        found: list[Plan] = []
        for a, arm in enumerate(self.arms):
            found += [(a, genes) for genes in arm.space.uniform_within(most - arm.fixed)[:3]]
        return found

    def within(self, limit: int) -> list[Plan]:
        """The measured plans of at most that price, the best first."""
        return sorted((one for one in self.measured if self.price(one) <= limit), key=self.measured.__getitem__)

    # ---------------------------------------------------------------------------------------------------- fitting

    def fitted(self, draw: np.random.Generator | None = None) -> Fitted:
        """The error model of what was measured; with `draw` one that is plausible for it."""
        every, scores = list(self.measured), np.array(list(self.measured.values()))
        known = np.minimum(scores, WORST * scores.min())
        return fit_arms(
            [arm.table.damage for arm in self.arms], every, list(known), [arm.error for arm in self.arms], draw
        )

    def best_of(self, model: Fitted, limit: int) -> Plan | None:
        """The model's best plan of at most that price; None where no arm has one."""
        found: list[tuple[float, Plan]] = []
        for a, arm in enumerate(self.arms):
            points = frontier(model.costs[a], arm.space.gene_prices, most=5000)
            if points[0].price <= limit - arm.fixed:
                point = best_within(points, limit - arm.fixed)
                found.append((float(model.offsets[a]) + point.error, (a, point.genes)))
        return min(found)[1] if found else None

    def begin(self) -> None:
        """Measure what tells the arms and the entries apart: one entry in every row, and some random plans."""
        plans = [*self.uniforms(max(self.question.limits)), *self._random(len(self.arms))]
        with self.watch.stage("uniform plans", len(plans)) as told:
            self.score_all("fit", list(dict.fromkeys(plans)), counted(told, len(plans)))

    def fit(self, side: int) -> None:
        """Measure `search.fit` more plans, and half as many again where the error model ranks them badly."""
        self.foreseen += self._fit(self.recipe.search.fit, side)
        if self.recipe.search.fit and self.rank is not None and self.rank < LOW_RANK:
            self.watch.say(f"the error model ranks plans by {self.rank:.2f} only: more are measured")
            self.foreseen += self._fit(self.recipe.search.fit // 2, side)

    @property
    def rank(self) -> float | None:
        """How well the error model ranked plans before they were measured: Spearman's correlation; None for few."""
        return spearman(*zip(*self.foreseen, strict=True)) if len(self.foreseen) >= 4 else None

    def _fit(self, count: int, side: int) -> list[tuple[float, float]]:
        """Measure so many plans: the best of error models that are plausible for those before (Thompson sampling),
        `side` at a time, for every limit in turn. Returns what the model said of each before, and its score."""
        draw = np.random.default_rng([self.recipe.seed, len(self.measured)])
        limits, foreseen = itertools.cycle(self.question.limits), list[tuple[float, float]]()
        with self.watch.stage("fit error model", count) as told:
            while (left := count - len(foreseen)) > 0:
                new: list[Plan] = []
                for _ in range(10 * side):
                    one = self.best_of(self.fitted(draw), next(limits))
                    if one is not None and one not in self.measured and one not in new:
                        new.append(one)
                    if len(new) == min(side, left):
                        break
                if not new:
                    break  # every plan that is plausible is known
                model = self.fitted()
                foreseen += zip([model.error(one) for one in new], self.score_all("fit", new), strict=True)
                told(len(foreseen), self._so_far())
            told(count, "")
        return foreseen

    def _random(self, count: int) -> list[Plan]:
        """Random plans near the limits, of every arm in turn."""
        found: list[Plan] = []
        for k in range(count):
            a, limit = k % len(self.arms), self.question.limits[k % len(self.question.limits)]
            arm = self.arms[a]
            found += [(a, genes) for genes in random_plans(arm.space, limit - arm.fixed, 1, seed=k, slack=0.3)]
        return found

    def _so_far(self) -> str:
        """The frontier so far, as a note: for every limit the best score."""
        best = [(limit, self.within(limit)) for limit in sorted(self.question.limits)]
        unit = 1e9 if self.question.unit == "us" else 1e6
        word = "s" if self.question.unit == "us" else "MMACs"
        return ", ".join(
            f"{self.measured[found[0]]:.3g} at {limit / unit:.3g} {word}" for limit, found in best if found
        )

    # ------------------------------------------------------------------------------------------------- correcting

    def correct(self) -> None:
        """Give every arm the scale of its predictions that is best for its best measured plan: few steps want a little
        less noise, or more, and that costs nothing."""
        scales = sorted({1.0, *self.recipe.shrink.scales})
        with self.watch.stage("correct arms", len(self.arms)) as told:
            for a, arm in enumerate(self.arms):
                best = min((one for one in self.measured if one[0] == a), key=self.measured.__getitem__, default=None)
                if best is not None:
                    base = arm.plan_of(best[1])

                    def score(correction: Correction, base: StepPlan = base) -> float:
                        return self.scores(base.with_corrections([correction] * len(base.rows)), "corrections")

                    found = climb([Correction(scale=s) for s in scales], NONE, score)
                    if found != NONE:
                        self.arms[a] = replace(arm, scale=found)
                        self._again(a)
                told(a + 1, f"{arm.arm.told}: scale {self.arms[a].scale.scale:g}")

    def _again(self, a: int) -> None:
        """Measure an arm's plans once more under its new scale: the error model is to know them so."""
        every = sorted((one for one in self.measured if one[0] == a), key=self.measured.__getitem__)
        for one in every[3:]:
            del self.measured[one]
        self.score_all("corrections", every[:3])

    # --------------------------------------------------------------------------------------------------- deciding

    def finalists(self, limit: int, model: Fitted) -> list[Plan]:
        """Who is measured once more for a limit: the best measured plans, the model's best, the dearest uniform one."""
        best = self.within(limit)[: self.recipe.search.finalists]
        uniform = [one for one in self.within(limit) if len(set(one[1])) == 1][:1]
        modelled = self.best_of(model, limit)
        return list(dict.fromkeys([*best, *uniform, *([] if modelled is None else [modelled])]))

    def answers(self, book: ScoreBook, track: Track, today: StepPlan) -> list[Answer]:
        """For every limit that a plan meets the choice among its finalists on fresh noise, see `Drawn.choose`."""
        model, seed = self.fitted(), stage_seed(self.recipe.seed, Stage.FINALS)
        images, tolerance = self.recipe.search.final_images, self.recipe.eval.tolerance
        candidates = {limit: self.finalists(limit, model) for limit in sorted(self.question.limits)}
        every = list(dict.fromkeys(itertools.chain(*candidates.values())))
        drawn, guided = Drawn(book, images, seed, self.recipe.eval.bootstrap, self.watch), is_guided(book)
        drawn.draw([*([today] if self.question.beside or guided else []), *map(self.plan_of, every)])
        errors = dict(zip(every, Twins(book, track).many([self.plan_of(one) for one in every], "final"), strict=True))
        choose = partial(drawn.nearest, today) if guided else drawn.choose
        found = []
        for limit, ones in candidates.items():
            if ones:
                prices = [self.price(one) for one in ones]
                chosen = choose([self.plan_of(one) for one in ones], prices, [errors[one] for one in ones], tolerance)
                found.append(self._answer(limit, ones[chosen], drawn, today))
        return found

    def _answer(self, limit: int, one: Plan, drawn: Drawn, today: StepPlan) -> Answer:
        plan, arm = self.plan_of(one), self.arms[one[0]]
        return Answer(
            limit=limit,
            plan=plan,
            score=self.measured.get(one, float("nan")),
            fresh=drawn.distances[plan.digest].raw,
            change=drawn.change(today, plan) if self.question.beside else None,
            searched=arm,
            controls=self._controls(one),
        )

    def _controls(self, one: Plan) -> dict[str, StepPlan]:
        """In the plan's own arm, at most at its price: the best uniform entry that was measured, and a random plan."""
        a, arm, price = one[0], self.arms[one[0]], self.price(one)
        uniform = [other for other in self.within(price) if other[0] == a and len(set(other[1])) == 1 and other != one]
        if not uniform:
            uniform = [(a, genes) for genes in arm.space.uniform_within(price - arm.fixed)[:1] if genes != one[1]]
        found = {f"uniform {arm.space.entries[other[1][0]]}": arm.plan_of(other[1]) for other in uniform[:1]}
        for genes in random_plans(arm.space, price - arm.fixed, 1, seed=11, slack=0.1):
            if genes != one[1]:
                found["random plan"] = arm.plan_of(genes)
        return found


@dataclass
class Drawn:
    """Distances of plans on `images` pictures of one noise, with resamples that are paired."""

    book: ScoreBook
    images: int
    seed: int
    bootstrap: int
    watch: Watch
    distances: dict[str, Distances] = field(default_factory=dict)

    def draw(self, plans: Sequence[StepPlan]) -> None:
        fresh = list({plan.digest: plan for plan in plans if plan.digest not in self.distances}.values())
        with self.watch.stage("final round", len(fresh)) as told:
            for done, plan in enumerate(fresh):  # its batches are drawn side by side
                features = self.book.features(plan, self.images, self.seed)
                found = self.book.judge.distances(features, self.seed, self.bootstrap)
                self.book.note(plan, "final", found.raw, self.images, self.seed)
                self.distances[plan.digest] = found
                told(done + 1, f"{found.value:.3g}: {plan.sampler.told}")

    def change(self, first: StepPlan, plan: StepPlan) -> Difference:
        """How much worse a plan is than another, paired."""
        judge = self.book.judge
        one, other = self.distances[first.digest], self.distances[plan.digest]
        return difference(one, other, judge.reference, judge.floor(self.images).high)

    def choose(
        self, plans: Sequence[StepPlan], prices: Sequence[int], errors: Sequence[float], tolerance: float
    ) -> int:
        """The index of the plan that is taken: of those that are not shown to be worse than the best distance (no
        paired interval lies beyond the tolerance) the one nearest to the converged pictures, `errors`; or a cheaper one
        whose whole interval of the change from that one lies within the tolerance.

        Few images part few plans; a distance then crowns a lucky one, whose pictures may be broken, and fidelity, which
        compares picture by picture, does not.
        """
        best = min(range(len(plans)), key=lambda k: self.distances[plans[k].digest].value)
        unparted = [k for k in range(len(plans)) if self.change(plans[best], plans[k]).verdict(tolerance) != "not held"]
        near = min({best, *unparted}, key=lambda k: errors[k])
        tied = [k for k, plan in enumerate(plans) if self.change(plans[near], plan).held(tolerance)]
        return min([*tied, near], key=lambda k: (prices[k], k != near))

    def nearest(
        self, today: StepPlan, plans: Sequence[StepPlan], prices: Sequence[int], errors: Sequence[float],
        tolerance: float,
    ) -> int:  # fmt: skip
        """As `choose`, for a guided model: of the plans whose distance to the data is not shown to be worse than that
        of today the nearest to the converged pictures; or a cheaper one that is as near within the tolerance."""
        kept = [k for k, one in enumerate(plans) if self.change(today, one).verdict(tolerance) != "not held"]
        able = kept or range(len(plans))
        least = min(errors[k] for k in able)
        return min((k for k in able if errors[k] <= (1 + tolerance) * least), key=lambda k: (prices[k], errors[k]))


def is_guided(book: ScoreBook) -> bool:
    """Whether the reference is guided: fidelity then leads the search, see `Twins`."""
    return book.judge.bank.guidance != 1


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """The rank correlation of paired values; ties take their mean rank; 0 where one of them does not vary."""
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (a, b)]
    if min(float(one.std()) for one in ranks) == 0:
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    below = (values[None] < values[:, None]).sum(axis=1)
    return below + ((values[None] == values[:, None]).sum(axis=1) - 1) / 2


def choices_of(bank: Bank, guidance: float) -> list[str]:
    """What a row may run, by the names of calls (`core.plan.call_of`): every entry; where the reference is guided, each
    guided as it is, unguided or by a cheaper one, and the reference with half of its guidance."""
    names = list(bank.names)
    if guidance == 1:
        return names
    macs, half = {name: price.macs for name, price in bank.prices().items()}, (1 + guidance) / 2
    cheaper = [f"{a}{BAR}{b}" for a in bank.computed for b in bank.computed if macs[b] < macs[a]]
    return [*names, *(f"{name}{BAR}" for name in names), *cheaper, f"{bank.reference}{BAR}{bank.reference}*{half:g}"]


def sources_of(bank: Bank, choices: Sequence[str]) -> dict[str, tuple[str, int]]:
    """The choices that reuse another one's features: by name that one, and how many rows of it they need before."""
    found = {}
    for name in choices:
        entry, bar, guide = name.partition(BAR)
        link = bank.entries[entry].weights
        if isinstance(link, Reuse) and not guide:
            found[name] = f"{link.of}{bar}", link.rows_before
    return found


def screened(
    track: Track, scores: Scores, stock: Stock, among: Sequence[SampleSpec], today: StepPlan, question: Question,
    keep: int,
) -> list[Arm]:  # fmt: skip
    """The arms that are worth a table: for every limit the best `keep` of them, each with the dearest entry that the
    limit allows in every row; the sampler of `today` races too. Fidelity leaves `SCREENED` times as many, of which the
    distance to the data takes its choice. Raises PlanError where nothing meets any limit."""
    found: list[Arm] = []
    counts = [calls for calls in COUNTS if calls <= len(today.rows)]
    arms = [arm for calls in counts for _, arm in stock.at(calls, among)] + [Arm(today.uniform())]
    names = stock.bank.computed
    for limit in question.limits:
        able: list[tuple[Arm, StepPlan]] = []
        for arm in arms:
            fitting = [plan for name in names if question.price(plan := arm.base.uniform(name)) <= limit]
            if fitting:
                able.append((arm, max(fitting, key=question.price)))
        if able:
            plans = [plan for _, plan in able]
            near = track.best(plans, SCREENED * keep, f"race arms within {question.told(limit)}")
            values = scores.many([plans[k] for k in near], "arms")
            best = [near[int(i)] for i in np.argsort(values, kind="stable")[:keep]]
            found += [able[k][0] for k in best]
    if not found:
        raise too_small(question, arms, names)
    return list(dict.fromkeys(found))


def too_small(question: Question, arms: Sequence[Arm], names: Sequence[str]) -> PlanError:
    """A budget that nothing meets: what the cheapest plan of all costs, in the unit that was asked in."""
    least = min(question.price(arm.base.uniform(name)) for arm in arms for name in names)
    return PlanError(
        got=f"a budget of {question.told(max(question.limits))}",
        expected=f"at least {question.told(least)}, the cheapest entry in every row of the fewest steps",
        where="--budget",
        do="raise the budget, or add cheaper stand-ins",
    )


def prepared(track: Track, book: ScoreBook, arms: Sequence[Arm], question: Question, recipe: Recipe) -> list[Searched]:
    """Each arm with its space and its error table, measured side by side."""
    bank, spec, watch = book.judge.bank, recipe.search, track.watch
    choices = choices_of(bank, bank.guidance)
    sources = sources_of(bank, choices)
    spaces = [Space.of(arm.base, choices, spec.genes, unit=question.unit, sources=sources) for arm in arms]
    with watch.stage("error tables", len(arms)) as told:
        seed, bases = stage_seed(recipe.seed, Stage.TABLE), [arm.base for arm in arms]
        tables = []
        for table in kept_tables(book, bases, spaces, spec.error_images, seed):
            tables.append(table)
            told(len(tables), arms[len(tables) - 1].told)
    errors = track.errors(bases, 0, track.converged.count)
    return [
        Searched(arm, space, question.fixed(arm.base), table, float(np.mean(error)))
        for arm, space, table, error in zip(arms, spaces, tables, errors, strict=True)
    ]


def search_joint(
    track: Track,
    book: ScoreBook,
    stock: Stock,
    among: Sequence[SampleSpec],
    today: StepPlan,
    question: Question,
    recipe: Recipe,
) -> list[Answer]:
    """The best plan for every limit that one meets, over families of samplers and the entries of the judge's bank.

    today: what is run today, with which every choice is compared.  Raises PlanError where no plan meets any limit.
    """
    watch, spec = track.watch, recipe.search
    scores = Twins(book, track) if is_guided(book) else book.on(spec.images, stage_seed(recipe.seed, Stage.SEARCH))
    kept = screened(track, scores, stock, among, today, question, spec.arms)
    watch.say("searched under " + "; ".join(arm.told for arm in kept))
    joint = Joint(question, prepared(track, book, kept, question, recipe), scores, recipe, watch)
    joint.begin()
    joint.correct()
    joint.fit(side=2)
    if joint.rank is not None:
        watch.say(f"the error model ranked {len(joint.foreseen)} plans, before they were measured, by {joint.rank:.2f}")
    return joint.answers(book, track, today)
