"""Does reuse of features pay beside narrow nets at these sizes? The first experiments, as tables.

    python benchmarks/reuse.py --size 16                                # a quarter of an hour on one quiet core
    python benchmarks/reuse.py --size 16 --device cuda --images 4096
    python benchmarks/reuse.py --size 32 --only pairs ranks             # some of the tables

On the trained supernets in benchmarks/models/, under DDIM-20 and DPM-Solver++ 10: what a shallow pass costs (costs),
how wrong reuse is by row and age and what it does to the energy of a prediction (errors), plans of reuse beside plans
of narrow nets at equal MACs (pairs), and which cost of a plan ranks measured plans (ranks). Works in runs/reuse<size>/;
writes benchmarks/reuse<size>.md; tables of before that were not asked for stay there.
"""

from __future__ import annotations

import halfstep.core.threads  # noqa: F401  # isort: skip (before torch)

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.console import Console
from scipy.stats import spearmanr

from fashion import DATA, MODELS, markdown
from halfstep.app.measurement import judge_for
from halfstep.app.subject import open_subject
from halfstep.app.terminal import RichWatch
from halfstep.core.machine import machine
from halfstep.core.plan import StepPlan
from halfstep.core.process import Process
from halfstep.core.recipe import SampleSpec
from halfstep.core.recipes import named
from halfstep.core.seeds import Stage, stage_seed
from halfstep.engine.bank import Bank, calls_of
from halfstep.engine.device import use_device
from halfstep.engine.entry import Reuse
from halfstep.engine.profiling import TIMED_BATCH, interleave
from halfstep.engine.sampling import (
    fewer_steps,
    image_generators,
    reference_plan,
    sample_images,
    start_noise,
    trajectory,
)
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.measure.features import extract
from halfstep.measure.fidelity import Converged, converged_plan, mean_of, squared_errors
from halfstep.measure.judge import Judge
from halfstep.nets.denoiser import Memo, clean_and_noise, predictor
from halfstep.nets.reuse import OUT, cut_count, forecast, shallow, tapped
from halfstep.report.page import Table, rich_table

ARMS = {"DDIM-20": SampleSpec(scheduler="ddim", steps=20), "DPM++ 10": SampleSpec(scheduler="dpmsolver++", steps=10)}
AGES = (1, 2, 3)
ORDER = ("(i)", "(ii)", "(iii)", "(iv)", "(v)")
THIRDS = ("early", "middle", "late")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every table needs. `bank`: with all cuts of its entries and their whole outputs, orders 0 and 1; `ms`: of
    one call of each entry at `TIMED_BATCH` images, the median of `repeats`."""

    judge: Judge
    bank: Bank
    process: Process
    arms: dict[str, StepPlan]
    images: int
    batch: int
    ms: dict[str, float]
    repeats: int
    seed: int

    def macs(self, name: str) -> int:
        return self.bank.prices()[name].macs


def bench_of(args: argparse.Namespace, work: Path, watch: RichWatch) -> Bench:
    pipe = StepAwarePipeline.from_pretrained(MODELS / f"fashion{args.size}-supernet")
    bank, process = pipe.bank, pipe.process
    bank = bank.with_reuse([*range(cut_count(bank[bank.reference])), OUT], (0, 1), watch)
    recipe = named(f"fashion{args.size}").edit(["sample.layout=contiguous", *args.set])
    subject = open_subject(None, DATA, recipe, watch=watch)
    judge = judge_for(bank, subject, work, watch)
    judge.batch = args.batch
    prices = bank.prices()
    arms = {name: reference_plan(bank, process, sample, prices) for name, sample in ARMS.items() if name in args.arms}
    calls = {name: call for name, call in calls_of(bank, TIMED_BATCH).items() if not name.endswith("+")}
    times = {name: median(found) for name, found in interleave(calls, repeats=args.repeats).items()}
    times |= {name: times[name.rstrip("+")] for name in bank if name.endswith("+")}
    seed = stage_seed(recipe.seed, Stage.REPORT)
    return Bench(
        judge=judge, bank=bank, process=process, arms=arms, images=args.images, batch=args.batch, ms=times,
        repeats=args.repeats, seed=seed,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- (i) what it costs


def costs(bench: Bench) -> list[Table]:
    """MACs and milliseconds of every shallow pass, and as shares of its own net's call."""
    rows = []
    for name, entry in bench.bank.entries.items():
        link = entry.weights
        if name.endswith("+"):
            continue
        own = link.of if isinstance(link, Reuse) else name
        shares = (f"{bench.macs(name) / bench.macs(own):.1%}", f"{bench.ms[name] / bench.ms[own]:.1%}")
        of_full = f"{bench.ms[name] / bench.ms[bench.bank.reference]:.1%}"
        rows.append((name, f"{bench.macs(name) / 1e6:.2f}", shares[0], f"{bench.ms[name]:.2f}", shares[1], of_full))
    about = machine()
    note = (
        f"One call at {TIMED_BATCH} images on {bench.bank.device}, {torch.get_num_threads()} threads, the median of "
        f"{bench.repeats}, all in turns ({about.get('cpu', '')}). Cut c: down to the c-th skip and up from it."
    )
    columns = ("entry", "MMACs", "of its own net", "ms", "of its own net", "of full")
    return [Table(title="(i) What a shallow pass costs", columns=columns, rows=tuple(rows), note=note)]


# ------------------------------------------------------------------------------------------------- (ii) how wrong it is


@dataclass(frozen=True)
class Fresh:
    """One row of the reference's own trajectory: what it was given, what it predicted, features by cut; and where it
    stands, by its timestep, by log-SNR / 2 and by its number."""

    sample: torch.Tensor
    prediction: torch.Tensor
    features: dict
    level: torch.Tensor
    places: dict[str, float]


@torch.inference_mode()
def traced(bench: Bench, plan: StepPlan, count: int) -> list[Fresh]:
    """Every row of `count` trajectories of the reference; neither sampler scales its sample."""
    bank, model = bench.bank, bench.bank[bench.bank.reference]
    generators = image_generators(bench.seed, 0, count)
    levels = bench.process.scheduler().alphas_cumprod.double()
    found = []
    for step in trajectory(bank, plan, start_noise(bank, generators), generators):
        time = plan.rows[step.row].timestep
        level = levels[int(time)]
        t = torch.tensor(time, device=bank.device).long()
        _, kept = tapped(model, step.sample, t, {}, [*range(cut_count(model))])
        half_snr = float(0.5 * torch.log(level / (1 - level)))
        places = {"timestep": time, "log-SNR": half_snr, "row": float(step.row)}
        found.append(Fresh(step.sample, step.prediction, kept, level, places))
    return found


def guesses(bench: Bench, rows: Sequence[Fresh], i: int, age: int) -> Iterator[tuple[str, torch.Tensor]]:
    """What row i would predict by (order 0) row i - age, or (order 1) that and the row `age` before it."""
    model, now = bench.bank[bench.bank.reference], rows[i]
    t = torch.tensor(now.places["timestep"], device=bench.bank.device).long()
    near, far = rows[i - age], rows[i - 2 * age] if i >= 2 * age else None

    def line(which: str, features) -> torch.Tensor:
        known = [(one.places[which], features(one)) for one in (far, near) if one is not None]
        return forecast(known, now.places[which], int(far is not None))

    def as_noise(clean: torch.Tensor) -> torch.Tensor:
        return clean_and_noise(clean, now.sample, now.level, "sample")[1]

    clean = lambda one: clean_and_noise(one.prediction, one.sample, one.level, "epsilon")[0]  # noqa: E731
    for cut in near.features:
        yield f"cut {cut}", shallow(model, now.sample, t, {}, cut, near.features[cut])
    yield "noise", near.prediction
    yield "picture", as_noise(clean(near))
    if far is None:
        return
    for which in now.places:
        features = line(which, lambda one: one.features[0])
        yield f"cut 0, line in {which}", shallow(model, now.sample, t, {}, 0, features)
    yield "noise, line in timestep", line("timestep", lambda one: one.prediction)
    yield "picture, line in timestep", as_noise(line("timestep", clean))


@torch.inference_mode()
def errors_and_energy(bench: Bench, count: int) -> list[Table]:
    """Squared error of a reused prediction relative to the fresh one's square, and its energy, along the reference's
    own trajectory, by thirds of the rows; beside the narrower nets'."""
    tables = []
    for arm, plan in bench.arms.items():
        rows = traced(bench, plan, count)
        sums: dict[tuple[str, int, int], np.ndarray] = {}

        def add(name: str, age: int, i: int, guess: torch.Tensor, rows=rows, sums=sums) -> None:
            truth = rows[i].prediction
            parts = ((guess - truth).square(), truth.square(), guess.square(), guess * truth)
            key = name, age, 3 * i // len(rows)
            sums[key] = sums.get(key, np.zeros(4)) + np.array([float(part.sum()) for part in parts])

        for i, row in enumerate(rows):
            t = torch.tensor(row.places["timestep"], device=bench.bank.device).long()
            for name in bench.bank.computed[1:]:
                add(name, 0, i, predictor(bench.bank[name])(row.sample, t, {}, Memo()))
            for age in (age for age in AGES if age <= i):
                for name, guess in guesses(bench, rows, i, age):
                    add(name, age, i, guess)
        tables += [_errors_table(arm, sums, count), _energy_table(arm, sums, count)]
    return tables


def _kinds(sums: dict) -> list[tuple[str, int]]:
    return list(dict.fromkeys((name, age) for age in (0, *AGES) for name, found, _ in sums if found == age))


def _errors_table(arm: str, sums: dict, count: int) -> Table:
    rows = []
    for name, age in _kinds(sums):
        found = [sums.get((name, age, third)) for third in range(3)]
        cells = ["–" if one is None else f"{one[0] / one[1]:.3%}" for one in found]
        whole = sum(one for one in found if one is not None)
        rows.append((name, str(age) if age else "–", *cells, f"{whole[0] / whole[1]:.3%}"))
    note = (
        f"Open loop on {count} reference trajectories. A line goes through the rows `age` and twice `age` before. "
        "Rows by thirds, noisiest first; narrower nets, whose age is –, for comparison."
    )
    columns = ("reused", "age", *THIRDS, "all")
    title = f"(ii) {arm}: squared error of the predicted noise, of its square"
    return Table(title=title, columns=columns, rows=tuple(rows), note=note)


def _energy_table(arm: str, sums: dict, count: int) -> Table:
    rows = []
    for name, age in _kinds(sums):
        found = [sums.get((name, age, third)) for third in range(3)]
        energy = ["–" if one is None else f"{one[2] / one[1]:.4f}" for one in found]
        scale = ["–" if one is None else f"{one[3] / one[2]:.4f}" for one in found]
        rows.append((name, str(age) if age else "–", *energy, *scale))
    note = f"{count} reference trajectories. Scale: what the prediction would have to be multiplied by to err least."
    columns = ("reused", "age", *(f"energy, {t}" for t in THIRDS), *(f"scale, {t}" for t in THIRDS))
    title = f"(v) {arm}: energy of the reused prediction, of the fresh one's"
    return Table(title=title, columns=columns, rows=tuple(rows), note=note)


# --------------------------------------------------------------------------------------------- (iii) plans side by side

PAIRS = (
    ("w0.75",), ("w0.50",), ("w0.25",),
    ("full", "full~0"), ("full", "w0.50"),
    ("full", "full~0+"), ("full", "full~1"), ("full", "full~3"), ("full", "full~out"), ("full", "full~out+"),
    ("full", "full~0", "full~0"), ("full", "w0.50", "w0.50"),
    ("full", "full~0", "full~0", "full~0"), ("full", "w0.50", "w0.50", "w0.50"), ("full", *["full~out"] * 3),
    ("w0.50", "w0.50~0"), ("w0.50", "w0.25"), ("w0.50", "w0.50~0", "w0.50~0", "w0.50~0"), ("w0.50", *["w0.25"] * 3),
    ("w0.25", "w0.25~0"), ("w0.25", "w0.25~out"),
)  # fmt: skip
"""Entries in turns. At 16x16 the first cut of a net costs what half its width costs, so that neighbours here are pairs
of equal MACs; at 32x32 it costs half of that, and the pairs' MACs stand beside them."""


def cycled(bank: Bank, plan: StepPlan, pattern: Sequence[str]) -> StepPlan:
    """The entries in turns; one whose source has not run often enough yet is run by its source."""
    rows: list[str] = []
    for name in itertools.islice(itertools.cycle(pattern), len(plan.rows)):
        link = bank.entries[name].weights
        rows.append(link.of if isinstance(link, Reuse) and rows.count(link.of) < link.rows_before else name)
    return plan.with_entries(rows)


@dataclass(frozen=True)
class Found:
    """A plan's distance to the data with its interval, squared errors to the converged pictures [n], MACs and ms."""

    distance: float
    low: float
    high: float
    apart: np.ndarray
    macs: int
    ms: float


def measured(bench: Bench, plan: StepPlan, converged: Converged) -> Found:
    pictures, apart, at = [], [], 0
    for batch in sample_images(bench.bank, plan, bench.images, seed=bench.seed, batch=bench.batch):
        twins = torch.from_numpy(np.array(converged.pictures[at : at + len(batch)])).to(batch.device)
        apart.append(squared_errors(batch, twins).cpu().numpy())
        pictures.append(batch)
        at += len(batch)
    fd = bench.judge.distances(extract(bench.judge.extractor, pictures), bench.seed, 200)
    ms = sum(bench.ms[name] for name in plan.called)
    return Found(fd.value, *fd.interval, np.concatenate(apart).astype(float), plan.macs, ms)


def converged_of(bench: Bench, work: Path) -> Converged:
    plan = converged_plan(bench.bank, bench.process, 50, bench.bank.prices())
    return Converged(
        bench.bank, plan, count=bench.images, seed=bench.seed, batch=bench.batch, cache=work / "state" / "converged"
    )


def pairs(bench: Bench, work: Path, watch: RichWatch) -> list[Table]:
    """Every pattern beside its neighbour of equal MACs, and fewer steps; DDIM-50 once."""
    converged, tables = converged_of(bench, work), []
    for arm, plan in bench.arms.items():
        plans = {"full": plan}
        for count in sorted({len(plan.rows) // k for k in (2, 3, 4)}, reverse=True):
            plans[f"full, {count} steps"] = fewer_steps(plan, count)
        plans |= {" ".join(pattern): cycled(bench.bank, plan, pattern) for pattern in PAIRS}
        with watch.stage(f"pairs {arm}", len(plans)) as told:
            found = {}
            for i, (name, one) in enumerate(plans.items()):
                found[name] = measured(bench, one, converged)
                told(i + 1, f"{name}: {found[name].distance:.2f}")
        tables += [_plans_table(bench, arm, found), _pairs_table(bench, arm, found)]
    return tables


def _plans_table(bench: Bench, arm: str, found: dict[str, Found]) -> Table:
    rows = []
    for name, one in sorted(found.items(), key=lambda item: -item[1].macs):
        apart = mean_of(one.apart)
        rows.append(
            (
                name,
                f"{one.macs / 1e6:,.0f}",
                f"{one.macs / found['full'].macs:.1%}",
                f"{one.ms / found['full'].ms:.1%}",
                f"{one.distance:.2f} [{one.low:.2f}, {one.high:.2f}]",
                f"{1e3 * apart.value:.2f} ± {1e3 * (apart.high - apart.value):.2f}",
            )
        )
    note = (
        f"{bench.images} images, features {bench.judge.extractor.name}, floor "
        f"{bench.judge.floor(bench.images).raw:.2f} before the correction. Time: the calls' own, of (i), added up. "
        "Converged: 50 steps of DPM-Solver++ on the dense net from the same noise."
    )
    columns = ("rows in turns", "MMACs", "MACs", "time", "distance to the data", "10³ × squared distance to converged")
    return Table(title=f"(iii) {arm}: plans by MACs", columns=columns, rows=tuple(rows), note=note)


TWINS = [
    (a, b) for a, b in itertools.pairwise(PAIRS) if "~0" in " ".join(a) and len(a) == len(b) and "~" not in "".join(b)
]


def _pairs_table(bench: Bench, arm: str, found: dict[str, Found]) -> Table:
    """The differences between neighbours, paired by image."""
    rows = []
    for a, b in TWINS:
        one, other = found[" ".join(a)], found[" ".join(b)]
        gap = mean_of(1e3 * (one.apart - other.apart))
        rows.append(
            (
                " ".join(a),
                " ".join(b),
                f"{one.macs / other.macs:.1%}",
                f"{one.ms / other.ms:.1%}",
                f"{one.distance:.2f} / {other.distance:.2f}",
                f"{gap.value:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]",
            )
        )
    note = (
        f"{bench.images} images. The last column is paired by image, with its 95 % interval: above 0 narrow nets win."
    )
    columns = ("reuse", "narrow", "MACs", "time", "distances to the data", "10³ × more squared distance to converged")
    return Table(
        title=f"(iii) {arm}: reuse against a narrow net in the same rows", columns=columns, rows=tuple(rows), note=note
    )


# ------------------------------------------------------------------------------------------ (iv) which cost ranks plans


def ranks(bench: Bench, work: Path, watch: RichWatch, count: int, plans: int = 30) -> list[Table]:
    """Rank correlation of three costs of a plan with what it measures, on random plans of `full` and `full~0`."""
    converged, tables = converged_of(bench, work), []
    for arm, plan in bench.arms.items():
        length, most = len(plan.rows), max(AGES)
        one_row, chain, closed = stretch_costs(bench, plan, count, most)
        draw = np.random.default_rng(0)
        drawn: list[tuple[int, ...]] = []
        while len(drawn) < plans:
            fresh = (0, *sorted(draw.choice(np.arange(1, length), draw.integers(1, length - 1), replace=False)))
            ends = (*fresh[1:], length)
            if fresh not in drawn and max(b - a for a, b in zip(fresh, ends, strict=True)) <= most + 1:
                drawn.append(fresh)
        costs_, distances, apart = [], [], []
        with watch.stage(f"ranks {arm}", plans) as told:
            for i, fresh in enumerate(drawn):
                spans = list(zip(fresh, (*fresh[1:], length), strict=True))
                stretches = [(a, b - a - 1) for a, b in spans if b - a > 1]
                additive = sum(one_row[r] for a, b in spans for r in range(a + 1, b))
                costs_.append(
                    (additive, sum(chain[s] for s in stretches), sum(closed[s] for s in stretches), -len(fresh))
                )
                entries = ["full" if r in fresh else "full~0" for r in range(length)]
                found = measured(bench, plan.with_entries(entries), converged)
                distances.append(found.distance)
                apart.append(found.apart.mean())
                told(i + 1, f"{found.distance:.2f}")
        kinds = ("a row alone, added", "age of every row, open loop", "stretch, closed loop", "number of reused rows")
        rows = tuple(
            (kind, f"{spearman(costs_of, distances):.2f}", f"{spearman(costs_of, apart):.2f}")
            for kind, costs_of in zip(kinds, np.array(costs_).T, strict=True)
        )
        note = (
            f"{plans} random plans of at most {most} reused rows in a stretch, {bench.images} images each; the costs "
            f"on {count} images of another seed. Distance and squared distance rank each other at "
            f"{spearman(distances, apart):.2f}."
        )
        columns = ("cost of a plan", "with the distance to the data", "with the squared distance to converged")
        tables.append(Table(title=f"(iv) {arm}: rank correlations", columns=columns, rows=rows, note=note))
    return tables


@torch.inference_mode()
def stretch_costs(bench: Bench, plan: StepPlan, count: int, most: int) -> tuple[dict, dict, dict]:
    """Three costs: of row r reused at age 1 alone; of (anchor, length) stretches, the rows' open-loop errors by age,
    each weighed by what an error of its row does to the end; and of the same stretches run whole, which drift."""
    bank, length = bench.bank, len(plan.rows)
    generators = image_generators(bench.seed + 1, 0, count)
    noise = start_noise(bank, generators)

    def end(entries: Sequence[str]) -> torch.Tensor:
        for step in trajectory(bank, plan.with_entries(entries), noise, generators):
            last = step.after
        return last

    base = end(["full"] * length)
    closed = {}
    for anchor, reused in itertools.product(range(length), range(1, most + 1)):
        if anchor + reused < length:
            entries = ["full~0" if anchor < r <= anchor + reused else "full" for r in range(length)]
            closed[anchor, reused] = float((end(entries) - base).square().mean())
    rows, model = traced(bench, plan, count), bank["full"]
    error = {}
    for i, age in itertools.product(range(1, length), range(1, most + 1)):
        if age <= i:
            t = torch.tensor(rows[i].places["timestep"], device=bank.device).long()
            guess = shallow(model, rows[i].sample, t, {}, 0, rows[i - age].features[0])
            error[i, age] = float((guess - rows[i].prediction).square().mean())
    one_row = {r: closed[r - 1, 1] for r in range(1, length)}
    weight = {r: one_row[r] / error[r, 1] for r in one_row}
    chain = {(a, n): sum(weight[a + k] * error[a + k, k] for k in range(1, n + 1)) for a, n in closed}
    return one_row, chain, closed


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    return float(spearmanr(a, b).statistic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, choices=(16, 32), default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=256, help="measured of each plan")
    parser.add_argument("--table-images", type=int, default=32, help="of the open-loop and stretch tables")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=10, help="timed calls of each entry")
    parser.add_argument("--only", nargs="*", choices=("costs", "errors", "pairs", "ranks"))
    parser.add_argument("--arms", nargs="*", choices=tuple(ARMS), default=tuple(ARMS))
    parser.add_argument("--set", action="append", default=[], help="edit the recipe, as halfstep's --set")
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    use_device(args.device)
    watch, work = RichWatch(), args.work or Path(f"runs/reuse{args.size}")
    bench = bench_of(args, work, watch)
    made = {
        "costs": lambda: costs(bench),
        "errors": lambda: errors_and_energy(bench, args.table_images),
        "pairs": lambda: pairs(bench, work, watch),
        "ranks": lambda: ranks(bench, work, watch, args.table_images),
    }
    for name in args.only or made:
        for table in made[name]():
            Console().print(rich_table(table))
            written(Path(__file__).with_name(f"reuse{args.size}.md"), args.size, table)


def written(page: Path, size: int, table: Table) -> None:
    """The table on its page, in the place of the one of its title, all of them by title."""
    known = page.read_text().split("\n\n**")[1:] if page.exists() else []
    tables = {part.partition("**")[0]: f"**{part}".strip() for part in known} | {table.title: markdown(table)}
    order = sorted(tables, key=lambda title: (ORDER.index(title.partition(" ")[0]), title))
    title = f"# Reuse of features beside narrow nets, Fashion-MNIST {size}x{size}"
    page.write_text("\n\n".join([title, *(tables[name] for name in order)]) + "\n")


if __name__ == "__main__":
    main()
