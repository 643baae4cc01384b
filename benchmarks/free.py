"""The joint plan beside everything that a user gets for free, on Fashion-MNIST: one table, one noise, one timing.

    python benchmarks/free.py --size 16                     # search, quality, times, table; hours on 2 cores
    python benchmarks/free.py --size 16 --only search       # the plans: 10 to 15 minutes on 2 cores
    python benchmarks/free.py --size 16 --only quality --device cuda    # the distances: minutes on a GPU
    python benchmarks/free.py --size 16 --only table        # the times, in turns, and the table

Rows: stock DDIM in 50 and 20 steps; every stock sampler at some numbers of calls, 8,192 images each; the best free at
the quality of both; each ingredient alone (a narrow net, a correction, under DDIM); joint plans at parts of DDIM-50's
time and MACs; beside each a uniform and a random control in its own arm. All of it resumes. Work in runs/free<size>/,
the table in benchmarks/free<size>.md. Plans that the file has are not searched again.

The table at 32x32, 16 minutes of search, an hour of pictures and two minutes of timing on a crowded core each:

    python benchmarks/free.py --size 32 --only search --units time --parts 22,16,8 --set search.reuse=0 \\
        --set search.images=512 --set search.error_images=16 --set search.fit=16 --set search.genes=4 \\
        --set search.arms=1 --set search.race=8 --set search.final_images=1024 --set eval.bootstrap=100 \\
        --set sample.batch=64                          # and once more with --parts 30, and 25
    python benchmarks/free.py --size 32 --only quality --key --images 4096 --set search.reuse=0 --set sample.batch=64
    python benchmarks/free.py --size 32 --only table   --key --images 4096 --set search.reuse=0 --set sample.batch=64

The same by other features, without times, in benchmarks/free32-imagenet.md:

    python benchmarks/free.py --size 32 --only quality --key --features imagenet --images 1536 \\
        --set search.reuse=0 --set sample.batch=64 \\
        --rows "^DDIM, (50|20) steps$|best free|trailing, (8|10)|, (4|5) steps$|^joint|^uniform w0.75|^uniform.*led"

and a search that is led by them, whose plans that table has too (20 minutes of a crowded core):

    python benchmarks/free.py --size 32 --only search --units MACs --parts 7,12 --features imagenet \\
        --set search.reuse= --set search.images=384 --set search.error_images=16 --set search.fit=10 \\
        --set search.genes=4 --set search.arms=1 --set search.race=8 --set search.final_images=1536 \\
        --set eval.bootstrap=100 --set sample.batch=64
"""

from __future__ import annotations

import halfstep.core.threads  # noqa: F401  # isort: skip (before torch)
import argparse
import json
import os
import re
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from fashion import DATA, KeptDistances, markdown
from halfstep.app.searching import LADDER, Ground, place_of
from halfstep.app.subject import open_subject
from halfstep.app.terminal import RichWatch
from halfstep.core import disk
from halfstep.core.plan import NONE, StepPlan
from halfstep.core.recipe import Order, Recipe, SamplerName, SampleSpec, Spacing
from halfstep.core.recipes import named
from halfstep.core.results import Difference
from halfstep.core.seeds import Stage, stage_seed
from halfstep.engine.device import side_by_side, use_device
from halfstep.engine.samplers import FEW
from halfstep.measure.judge import Judge
from halfstep.measure.quality import Distances, Reference, difference, distances
from halfstep.report.page import Table, rich_table
from halfstep.report.words import change_cell
from halfstep.search.arms import Stock
from halfstep.search.joint import Question, search_joint

HERE = Path(os.path.relpath(Path(__file__).parent))
MODELS = {16: "fashion", 32: str(HERE / "models" / "fashion32-supernet")}
CALLS = {16: (5, 8, 10, 12, 15, 20, 30), 32: (5, 8, 10, 15, 20)}
SHARES = (4, 8, 12, 16, 24, 32)
BOOT = 300
FEWEST = {16: 7, 32: 4}
"""By size, network calls below which no stock sampler is near the quality of many: with --key they are left out."""


def recipe_of(size: int, edits: list[str]) -> Recipe:
    base = named(f"fashion{size}")
    features = ["eval.features=fashion"] if size == 16 else [f"eval.features=file:{HERE}/models/fashion32-features"]
    settings = ["sample.steps=50", "sample.scheduler=ddim", "sample.batch=128", "eval.images=8192", *features]
    return base.edit([*settings, *edits])


def ground_of(size: int, recipe: Recipe, work: Path, watch: RichWatch) -> Ground:
    subject = open_subject(MODELS[size], DATA, recipe, watch=watch)
    cuts = [place_of(cut) for cut in recipe.search.reuse]
    return Ground(subject, subject.stand_ins.with_reuse(cuts), work, watch)


# ------------------------------------------------------------------------------------------------------------ the plans


def us_of(plan: StepPlan) -> float:
    """Microseconds of a plan that was priced here."""
    assert plan.whole.us is not None, "priced here"
    return plan.whole.us


def question_of(what: str, today: StepPlan, parts: tuple[float, ...]) -> Question:
    """Parts of what today's plan takes, or of its MACs."""
    if what == "time":
        return Question("us", tuple(round(1000 * us_of(today) / part) for part in parts))
    return Question("macs", tuple(int(today.macs / part) for part in parts))


def found_plans(ground: Ground, file: Path, units: str, parts: tuple[float, ...] = ()) -> dict[str, StepPlan]:
    """The plans of the search: the best free, and the joint plans with their controls, for parts of today's time and of
    its MACs. Kept in a file; searched are those that it lacks."""
    known = json.loads(file.read_text()) if file.is_file() else {}
    today = ground.today
    for what in units.split(","):
        wanted = parts or (LADDER if what == "time" else SHARES)
        asked = tuple(one for one in wanted if f"joint, {part_told(one, what)}" not in known.get(what, {}))
        if not asked:
            continue
        question = question_of(what, today, asked)
        with ground.side_by_side(os.cpu_count()):
            free, among = ground.free, ground.families
            answers = search_joint(ground.track, ground.book, ground.stock, among, today, question, ground.recipe)
        plans = {"best free": free.plan} | {f"free, {plan.sampler.told}": plan for plan, _ in free.frontier}
        for one in answers:
            part = asked[question.limits.index(one.limit)]
            told = part_told(part, what)
            plans[f"joint, {told}"] = one.plan
            plans |= {f"{name}, {told}": plan for name, plan in one.controls.items()}
        known[what] = known.get(what, {}) | {name: plan.to_json() for name, plan in plans.items()}
        disk.write_json(file, known)
    return known_plans(file)


def plans_file(size: int, features: str) -> Path:
    """Where the plans of a search that was led by these features are kept; "": those of the table."""
    return HERE / f"free{size}{features and '-'}{features}-plans.json"


def known_plans(file: Path) -> dict[str, StepPlan]:
    """Those of the file, which may not be there."""
    known = json.loads(file.read_text()) if file.is_file() else {}
    return {name: StepPlan.from_json(one) for plans in known.values() for name, one in plans.items()}


def part_told(part: float, what: str) -> str:
    return f"1/{part:g} of the {what}"


def stock_plans(stock: Stock, calls: tuple[int, ...]) -> dict[str, StepPlan]:
    """Every stock sampler with its own spacing, and with those that are its best at some number of calls."""
    found = {}
    for count in calls:
        for _, arm in stock.at(count):
            found[arm.told] = arm.base
    return found


CONTENDERS: dict[int, tuple[tuple[SamplerName, Spacing, Order, int], ...]] = {
    16: (
        ("pndm", "own", 0, 9),
        ("pndm", "trailing", 0, 11),
        ("pndm", "own", 0, 11),
        ("dpmsolver++", "lambdas", 3, 12),
    ),
    32: (("unipc", "trailing", 2, 8), ("pndm", "own", 0, 9), ("unipc", "trailing", 2, 10)),
}
"""Stock samplers, spacings, orders and calls beside what the race let through: at 16x16 those that came out best on
4,096 images, at 32x32 the winner's family and PNDM in more calls."""


def contenders(stock: Stock, size: int) -> dict[str, StepPlan]:
    """The reference is the best that is free: what was seen to be good stands in the table."""
    found = {}
    for name, spacing, order, calls in CONTENDERS[size]:
        arm = stock.arm(SampleSpec(scheduler=name, spacing=spacing, order=order, steps=FEW), calls)
        if arm is not None:
            found[f"free, {arm.told}"] = arm.base
    return found


def alone_plans(ground: Ground) -> dict[str, StepPlan]:
    """What each ingredient does alone: narrower nets and corrections under DDIM, in 50 and 20 steps."""
    found = {}
    for steps in (50, 20):
        base = ground.priced(replace_steps(ground, SampleSpec(scheduler="ddim", steps=steps)))
        for name in ground.subject.stand_ins:  # without those that take a step's features, which no plan begins with
            if name != base.reference:
                found[f"{name} alone, DDIM, {steps} steps"] = base.uniform(name)
        for scale in (0.99, 0.98):
            corrections = [NONE._replace(scale=scale)] * len(base.rows)
            found[f"scale {scale:g} alone, DDIM, {steps} steps"] = base.with_corrections(corrections)
    return found


def replace_steps(ground: Ground, spec: SampleSpec) -> StepPlan:
    subject = replace(ground.subject, recipe=replace(ground.recipe, sample=replace(spec, batch=128)))
    return subject.reference(ground.bank)


def all_plans(ground: Ground, size: int, only_key: bool, features: str) -> dict[str, StepPlan]:
    """Every row; those of the searches first: of the table's, and of one that was led by other `features`."""
    plans = {"DDIM, 50 steps": ground.today}
    plans["DDIM, 20 steps"] = ground.priced(replace_steps(ground, SampleSpec(scheduler="ddim", steps=20)))
    plans |= known_plans(plans_file(size, ""))
    if features:
        led = known_plans(plans_file(size, features))
        plans |= {f"{name}, led by {features}": plan for name, plan in led.items()}
    plans |= contenders(ground.stock, size)
    if only_key:
        plans = {name: plan for name, plan in plans.items() if not (is_free(plan) and len(plan.rows) < FEWEST[size])}
    else:
        plans |= alone_plans(ground)
        plans |= stock_plans(ground.stock, CALLS[size])
    seen: dict[str, str] = {}
    for name, plan in list(plans.items()):  # two names of one plan are one row
        if plan.digest in seen:
            del plans[name]
        seen.setdefault(plan.digest, name)
    return plans


# -------------------------------------------------------------------------------------------------------------- quality


def measured(
    ground: Ground, plans: dict[str, StepPlan], images: int, file: Path, seconds: float
) -> dict[str, Distances]:
    """The distance of every plan on the noise of the report, with resamples that are paired; kept line by line. After
    so many `seconds` no more are begun."""
    begun = time.monotonic()
    judge, seed = ground.book.judge, stage_seed(ground.recipe.seed, Stage.REPORT)
    kept = KeptDistances(file, images, seed)
    known = kept.read()
    fresh = {name: plan for name, plan in plans.items() if plan.digest not in known}
    fresh = dict(sorted(fresh.items(), key=lambda one: one[1].macs))  # what is cut off late is the dearest
    extractor = judge.extractor
    pool = ProcessPoolExecutor(max(1, (os.cpu_count() or 2) // 2), mp_context=get_context("spawn"))
    side = side_by_side(judge.bank.device, os.cpu_count() if judge.bank.eager else 1)
    with ground.watch.stage("quality", len(fresh)) as told, pool, side as executor:
        waiting: list = []

        def keep(plan: StepPlan, future: Future) -> None:
            known[plan.digest] = future.result()
            kept.keep(plan, known[plan.digest])

        light = partial(_distances, judge.reference, extractor.name)
        for done, plan in enumerate(fresh.values()):
            if time.monotonic() - begun > seconds:
                break
            features, _ = judge.features(plan, images, seed, executor=executor)
            waiting.append((plan, pool.submit(light, features, seed)))
            told(done + 1, plan.sampler.told)
            while waiting and (waiting[0][1].done() or len(waiting) > 8):  # what was drawn is kept as it is drawn
                keep(*waiting.pop(0))
        for one in waiting:
            keep(*one)
    return {name: known[plan.digest] for name, plan in plans.items() if plan.digest in known}


def _distances(reference: Reference, name: str, features: np.ndarray, seed: int) -> Distances:
    torch.set_num_threads(1)
    return distances(features, reference, n_boot=BOOT, seed=seed, features_name=name)


# ---------------------------------------------------------------------------------------------------------------- table


def changes(judge: Judge, found: dict[str, Distances], base: str) -> dict[str, Difference]:
    least = judge.floor(found[base].n).high
    return {name: difference(found[base], one, judge.reference, least) for name, one in found.items()}


def key_rows(plans: dict[str, StepPlan], found: dict[str, Distances], ground: Ground) -> dict[str, str]:
    """The rows that are timed: the references, the free frontier, the joint plans and their controls; by name, why."""
    rows = {"DDIM, 50 steps": "what is run today", "DDIM, 20 steps": "today, in fewer steps"}
    rows = {name: why for name, why in rows.items() if name in found}
    judge = ground.book.judge
    for goal in tuple(rows):
        change = changes(judge, found, goal)
        held = [name for name in plans if is_free(plans[name]) and change[name].held(0.05) and name not in rows]
        near = [name for name in plans if is_free(plans[name]) and within(change[name]) and name not in rows]
        for names, told in ((held, "held"), (near, "within 5 % as measured")):
            if names:
                best = min(names, key=lambda name: us_of(plans[name]))
                rows.setdefault(best, f"the best free at the quality of {goal} ({told})")
    least = np.inf
    for name in sorted((n for n in plans if is_free(plans[n])), key=lambda n: us_of(plans[n])):
        if found[name].value < least:
            least = found[name].value
            rows.setdefault(name, "free frontier")
    for name in plans:
        if name.startswith("joint"):
            rows[name] = "joint plan"
        elif name.startswith(("uniform", "random")):
            rows[name] = "control in the same arm"
        elif " alone" in name:
            rows[name] = "one ingredient"
    return rows


def is_free(plan: StepPlan) -> bool:
    return plan.nets == (plan.reference,) and not plan.corrected


def within(change: Difference) -> bool:
    value, _, _, limit = change.against(0.05)
    return value <= limit


def table_of(size: int, ground: Ground, plans, found, times, rows) -> Table:
    judge = ground.book.judge
    today, free = (
        changes(judge, found, "DDIM, 50 steps"),
        next(n for n, w in rows.items() if "quality of DDIM, 50" in w),
    )
    beside = changes(judge, found, free)
    base, best = np.median(times["DDIM, 50 steps"]), np.median(times[free])
    cells = []
    for name, why in sorted(rows.items(), key=lambda row: -np.median(times[row[0]])):
        plan, ms = plans[name], float(np.median(times[name]))
        low, high = found[name].interval
        cells.append(
            (
                name,
                f"{len(plan.called)}",
                f"{plan.macs / 1e6:,.0f}",
                f"1/{plans['DDIM, 50 steps'].macs / plan.macs:.1f}",
                f"{ms:,.0f}",
                f"1/{base / ms:.1f}",
                f"1/{best / ms:.2f}",
                f"{max(0, found[name].value):.2f} [{max(0, low):.2f}, {max(0, high):.2f}]",
                f"{change_cell(today[name])}, {today[name].verdict(0.05)}",
                f"{change_cell(beside[name])}, {beside[name].verdict(0.05)}",
                why,
            )
        )
    n, threads = found[free].n, torch.get_num_threads()
    note = (
        f"MMACs per image; ms of a batch of {ground.recipe.sample.timed}, {threads} threads, in turns in "
        f"one run, median of {len(times[free])}. FD corrected for bias on {n:,} images of one noise against "
        f"{judge.reference.n:,} real ones, features {judge.extractor.name}; 95 % intervals, changes paired; held: no "
        f"more than 5 % worse by the whole interval. Best free: {free}."
    )
    columns = (
        "",
        "calls",
        "MMACs",
        "of DDIM-50's",
        "ms",
        "of DDIM-50's time",
        "of the best free's",
        "FD",
        "beside DDIM-50",
        "beside the best free",
        "what",
    )
    return Table(
        title=f"Fashion-MNIST {size}x{size}: the joint plan beside what is free",
        columns=columns,
        rows=tuple(cells),
        note=note,
    )


def distances_table(size: int, judge: Judge, plans: dict[str, StepPlan], found: dict[str, Distances]) -> Table:
    """Distances alone, beside DDIM-50, and beside the best free of each search."""
    today = plans["DDIM, 50 steps"]
    bases = ["DDIM, 50 steps", *(name for name in plans if name.startswith("best free"))]
    beside = [changes(judge, found, base) for base in bases]
    rows = []
    for name, plan in sorted(plans.items(), key=lambda row: -row[1].macs):
        low, high = found[name].interval
        told = (f"{change_cell(one[name])}, {one[name].verdict(0.05)}" for one in beside)
        share = f"1/{today.macs / plan.macs:.1f}"
        rows.append((name, f"{len(plan.called)}", share, f"{found[name].value:.1f} [{low:.1f}, {high:.1f}]", *told))
    n = found[bases[0]].n
    note = (
        f"FD corrected for bias on {n:,} images of one noise against {judge.reference.n:,} real ones, features "
        f"{judge.extractor.name}, floor {judge.floor(n).high:.1f}; 95 % intervals, changes paired; held: no more than "
        "5 % worse by the whole interval."
    )
    columns = ("", "calls", "of DDIM-50's MACs", "FD", *(f"beside {base}" for base in bases))
    return Table(title=f"Fashion-MNIST {size}x{size} by other features", columns=columns, rows=tuple(rows), note=note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, choices=(16, 32), default=16)
    parser.add_argument("--only", choices=("search", "quality", "table"), help="one part; the others' files are there")
    parser.add_argument("--units", default="time,MACs", help="what budgets are searched in")
    parser.add_argument("--parts", default="", help="of today's cost, e.g. 22,11; default: those of the table")
    parser.add_argument("--images", type=int, default=8192)
    parser.add_argument("--key", action="store_true", help="without the stock samplers that the search did not name")
    parser.add_argument("--rows", default="", help="only those whose names have this (a regular expression)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of torch, where something is timed")
    parser.add_argument("--device", default="")
    parser.add_argument("--seconds", type=float, default=1e9, help="draw for so long, and keep what was drawn")
    parser.add_argument("--data", default="", help="where Fashion-MNIST lies, as --data of halfstep")
    parser.add_argument("--set", action="append", default=[], help="edit the recipe, as halfstep's --set")
    parser.add_argument("--features", default="", help="others than the table's, as eval.features")
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    if args.features:
        args.set.append(f"eval.features={args.features}")
    if args.device:
        use_device(args.device)
    if args.data:
        global DATA
        DATA = args.data
    torch.set_num_threads(args.threads)
    watch, work = RichWatch(), args.work or Path(f"runs/free{args.size}{args.features}")
    work.mkdir(parents=True, exist_ok=True)
    ground = ground_of(args.size, recipe_of(args.size, args.set), work, watch)
    if args.only == "quality":
        ground.prices.priced = lambda plan: plan  # type: ignore[method-assign]  # no time is asked for
    parts = tuple(float(one) for one in args.parts.split(",") if one)
    if args.only in (None, "search"):
        file = plans_file(args.size, args.features)
        for name, plan in found_plans(ground, file, args.units, parts).items():
            print(f"{name}: {plan}\n")
    if args.only == "search":
        return
    plans = all_plans(ground, args.size, args.key, args.features)
    plans = {name: plan for name, plan in plans.items() if re.search(args.rows, name)}
    found = measured(ground, plans, args.images, work / "distances.jsonl", args.seconds)
    plans = {name: plan for name, plan in plans.items() if name in found}
    if args.only == "quality":
        if args.features:
            table = distances_table(args.size, ground.book.judge, plans, found)
            (HERE / f"free{args.size}-{args.features}.md").write_text(f"# {table.title}\n\n{markdown(table)}\n")
        return
    rows = key_rows(plans, found, ground)
    times = ground.book.judge.wall_ms(
        {name: plans[name] for name in rows}, batch=ground.recipe.sample.timed, repeats=args.repeats
    )
    disk.write_json(work / "times.json", times)
    table = table_of(args.size, ground, plans, found, times, rows)
    every = Table(
        title="Every stock sampler of the dense net",
        columns=("", "calls", "FD"),
        rows=tuple(
            (name, f"{len(plans[name].called)}", f"{found[name].value:.2f}")
            for name in sorted(plans, key=lambda name: (len(plans[name].called), found[name].value))
            if is_free(plans[name])
        ),
        note="The same images and noise.",
    )
    told = [f"```\n{plans[name]}\n```" for name in rows if name.startswith("joint")]
    text = "\n\n".join([f"# {table.title}", markdown(table), *told, markdown(every)])
    (HERE / f"free{args.size}.md").write_text(text + "\n")
    Console(width=220).print(rich_table(table))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
