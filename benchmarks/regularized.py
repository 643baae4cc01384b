"""Regularised score matching on digits and Fashion-MNIST 16x16: fewer steps, beside the controls that keep it honest.

    python benchmarks/regularized.py                    # trains what is missing, resumable
    python benchmarks/regularized.py --data fashion16 --sampler ddpm      # a part; another process may do the rest

From one trained model every weight r of the penalty trains on for the same number of steps, three seeds each. Measured
at T = 10, 20, 50 and 200 calls (1000 for the plain net), DDIM and ancestral with either variance: the plain net, r, and
the plain net with its best scale and its best threshold, and up to 20 calls with its best correction by stretches of
steps (`halfstep shrink`), none of which is trained; they are chosen on other noise than they are measured on. Within a
cell all variants share their noise, so ratios of distances are paired. The specification's toy sets are in
`regularized_toys.py`.
Everything goes to runs/regularized-<data>/, with a report of all pictures; the tables, with what is measured so far, to
regularized-<data>.md here, and pictures of 20 calls to docs/regularized-<data>.png.
"""

from __future__ import annotations

import halfstep.core.threads  # noqa: F401  # isort: skip (before torch)
import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from rich.console import Console

from fashion import DATA, MODELS, markdown
from halfstep.app import verbs
from halfstep.app.measurement import judge_for
from halfstep.app.subject import open_subject
from halfstep.app.terminal import RichWatch
from halfstep.core import disk
from halfstep.core.plan import StepPlan
from halfstep.core.recipe import Recipe
from halfstep.core.recipes import named
from halfstep.core.seeds import Stage, stage_seed
from halfstep.data.arrays import save_arrays
from halfstep.data.pictures import picture_grid
from halfstep.engine.bank import Bank
from halfstep.engine.sampling import reference_plan
from halfstep.measure.judge import Judge
from halfstep.methods.regularized import name_of
from halfstep.nets.models import load_denoiser
from halfstep.report.figures import Curve
from halfstep.report.page import Grid, Part, Report, Table, rich_table, write_report
from halfstep.search.corrections import corrected_plans
from halfstep.search.scores import open_scores

CALLS, REFERENCE = (10, 20, 50, 200), 1000
ALL_NETS, BY_STRETCH = 50, 20
"""Above ALL_NETS calls only the largest r stands beside the plain net, and the controls for the first seed only; above
BY_STRETCH the controls are chosen on half as many images, and not by stretches of steps. All that is for the time."""
SAMPLERS = {"ddpm": "ancestral, posterior variance", "ddim": "DDIM", "beta": "ancestral, variance β"}
SOURCES = {
    "digits": ("digits", "digits", "digits", "pixels"),
    "fashion16": (DATA, "fashion16", str(MODELS / "fashion16-small"), "own"),
}
"""Images, recipe, trained model and features of each benchmark. On digits the pixels tell more than a classifier, whose
features are nearly of rank 9: on 256 images its distance hangs on the mix of classes (docs/LOG.md)."""
EDITS = (
    "train.steps=800",
    "train.lr=2e-4",
    "regular.grid=0.01,0.1",
    "shrink.scales=0.7,0.76,0.8,0.84,0.88,0.91,0.94,0.96,0.98,0.99,0.995,1.005,1.01,1.02,1.04,1.07",
    "shrink.thresholds=0.005,0.01,0.02,0.03,0.05,0.07,0.1,0.14,0.2,0.28",
    "shrink.images=256",
    "eval.images=512",
    "sample.batch=128",
)
PLAIN = name_of(0.0)
SCALED, SOFT, STRETCHED = "one scale", "one threshold", "by stretch"
SHOWN = 16
"""Pictures kept of each variant."""


def trained(name: str, seeds: int, recipe: Recipe, work: Path, watch: RichWatch) -> list[Bank]:
    """A bank for each seed: the plain net trained on, and one net for every r."""
    data, _, model, _ = SOURCES[name]
    banks = []
    for seed in range(seeds):
        entries = {}
        for r in (0.0, *recipe.regular.grid):
            one = replace(recipe, seed=seed, regular=replace(recipe.regular, r=r))
            pipe = verbs.make("regularized", model, data, work / f"{name_of(r)}-{seed}", one, watch=watch)
            entries[name_of(r)] = pipe.bank[name_of(r)]
        banks.append(Bank(entries, PLAIN, recipe.noise.prediction))
    return banks


# ----------------------------------------------------------------------------------------------------------- measuring


def plans_of(judge: Judge, plan: StepPlan, recipe: Recipe, folder: Path, seed: int, watch: RichWatch) -> dict:
    """The plans to measure at one sampler and number of calls, by name; `plan` is the plain net's."""
    if plan.sampler.steps >= REFERENCE:
        return {PLAIN: plan}
    nets = list(judge.bank) if plan.sampler.steps <= ALL_NETS else [PLAIN, list(judge.bank)[-1]]
    if plan.sampler.steps > ALL_NETS and seed > 0:
        return {name: plan.uniform(name) for name in nets}
    rounds = recipe.shrink.rounds if plan.sampler.steps <= BY_STRETCH else 0
    images = recipe.shrink.images if plan.sampler.steps <= BY_STRETCH else recipe.shrink.images // 2
    spec = replace(recipe.shrink, rounds=rounds, images=images)
    folder.mkdir(exist_ok=True)
    found = corrected_plans(open_scores(judge, folder), plan, spec, seed=seed, watch=watch).plans
    controls = (SCALED, SOFT, STRETCHED) if rounds else (SCALED, SOFT)
    return {name: plan.uniform(name) for name in nets} | {name: found[name] for name in controls}


def measure_cell(judge: Judge, plans: dict[str, StepPlan], count: int, seed: int, pictures: Path | None) -> dict:
    """Fréchet distance, precision, recall and correction of every plan, on the same noise; the first pictures."""
    rows, shown = {}, {}
    for name, plan in plans.items():
        features, shown[name] = judge.features(plan, count, stage_seed(seed, Stage.REPORT), SHOWN)
        fd = judge.distances(features, seed, 2)
        found = judge.quality(features, fd)
        rows[name] = {
            "fd": fd.raw,
            **{metric: found[metric].value for metric in ("precision", "recall")},
            "corrections": sorted(set(plan.corrections)),
        }
    if pictures is not None:
        disk.write_atomic(pictures, lambda file: save_arrays(file, shown))
    return rows


def measure(
    banks: Sequence[Bank],
    name: str,
    recipe: Recipe,
    cells: Sequence[tuple[str, int, int]],
    work: Path,
    watch: RichWatch,
) -> None:
    """Every cell (sampler, calls, seed) that is not measured yet, the page after each."""
    data, _, model, _ = SOURCES[name]
    noise, prices = load_denoiser(model)[1], [bank.prices() for bank in banks]
    for net in (bank[entry] for bank in banks for entry in bank):
        net.compile()  # a fifth of the time on a CPU
    for kind, calls, seed in cells:
        file = work / f"quality-{kind}-{calls}-{seed}.json"
        if file.is_file():
            continue
        subject = open_subject(None, data, recipe, watch=watch)
        judge, settings = judge_for(banks[seed], subject, work, watch), recipe
        sample = replace(settings.sample, steps=calls, scheduler="ddim" if kind == "ddim" else "ddpm")
        if kind == "beta":
            sample = replace(sample, variance="beta")
        plan = reference_plan(judge.bank, noise, sample, prices[seed])
        plans = plans_of(judge, plan, settings, work / f"shrink-{kind}-{calls}-{seed}", seed, watch)
        pictures = work / f"pictures-{kind}-{calls}.npz" if seed == 0 else None
        disk.write_json(file, measure_cell(judge, plans, settings.eval.images, seed, pictures))
        write_page(name, work, settings)


# ------------------------------------------------------------------------------------------------------------ the page


Results = dict[tuple[str, int], list[dict]]
"""(sampler, calls) -> for each seed the rows of a cell, by name"""


def results_of(work: Path) -> Results:
    """All that is measured so far."""
    found: Results = {}
    for file in sorted(work.glob("quality-*.json")):
        _, kind, calls, _ = file.stem.split("-")
        found.setdefault((kind, int(calls)), []).append(disk.read_json(file, what="qualities", do="delete it"))
    return found


def over_seeds(values: Sequence[float], places: int = 2) -> str:
    """Mean ± deviation."""
    return f"{mean(values):.{places}f}" + (f" ± {stdev(values):.{places}f}" if len(values) > 1 else "")


def ratios(results: Results, ours: tuple[str, int, str], theirs: tuple[str, int, str]) -> list[float]:
    """Ratios of two variants' distances, seed by seed; a variant is (sampler, calls, name)."""
    (kind, calls, name), (other, most, base) = ours, theirs
    cells = zip(results.get((kind, calls), []), results.get((other, most), []), strict=False)
    return [a[name]["fd"] / b[base]["fd"] for a, b in cells if name in a and base in b]


def tables_of(kind: str, results: Results, recipe: Recipe) -> list[Table]:
    """Distances, and precision with recall, of every variant by number of calls."""
    columns = [calls for calls in (*CALLS, REFERENCE) if (kind, calls) in results]
    names = list(dict.fromkeys(name for calls in columns for cell in results[kind, calls] for name in cell))
    distances, shares = [], []
    for name in names:
        row, other = [], []
        for calls in columns:
            found = [cell[name] for cell in results[kind, calls] if name in cell]
            less = ratios(results, (kind, calls, name), (kind, calls, PLAIN))
            beside = f" (× {over_seeds(less)})" if found and name != PLAIN else ""
            row.append(over_seeds([one["fd"] for one in found]) + beside if found else "–")
            other.append(f"{means(found, 'precision')}, {means(found, 'recall')}" if found else "–")
        distances.append((name, *row))
        shares.append((name, *other))
    note = (
        f"Mean ± deviation over {len(results[kind, columns[0]])} seeds (without ±: one); in brackets the ratio to the "
        f"plain net of as many calls, paired. n = {recipe.eval.images}, features "
        f"{recipe.eval.features}."
    )
    head = ("", *(f"T = {calls}" for calls in columns))
    return [
        Table(title=f"{SAMPLERS[kind]}: Fréchet distance", columns=head, rows=tuple(distances), note=note),
        Table(title=f"{SAMPLERS[kind]}: precision, recall", columns=head, rows=tuple(shares), note="The same images."),
    ]


def curve_of(kind: str, results: Results) -> Curve:
    """Mean distances by number of calls."""
    lines: dict[str, tuple[tuple[float, float], ...]] = {}
    for calls in CALLS:
        cells = results.get((kind, calls), [])
        for name in dict.fromkeys(name for cell in cells for name in cell):
            value = mean(cell[name]["fd"] for cell in cells if name in cell)
            lines[name] = (*lines.get(name, ()), (calls, value))
    return Curve(title=SAMPLERS[kind], xlabel="calls", ylabel="Fréchet distance", lines=lines)


def means(found: Sequence[dict], what: str) -> str:
    return f"{mean(one[what] for one in found):.2f}"


def corrections_table(results: Results) -> Table:
    """What was chosen for each control, by seed."""
    rows = []
    for (kind, calls), cells in sorted(results.items(), key=lambda item: (item[0][1], item[0][0])):
        if calls < REFERENCE:
            chosen = [[cell[name]["corrections"] for cell in cells if name in cell] for name in (SCALED, SOFT)]
            scales, thresholds = ([f"{one[0][i]:g}" for one in found] for i, found in enumerate(chosen))
            rows.append((SAMPLERS[kind], f"{calls}", ", ".join(scales), ", ".join(thresholds)))
    return Table(
        title="The controls' values", columns=("", "T", "scale", "threshold"), rows=tuple(rows), note="One per seed."
    )


def claims(results: Results) -> list[str]:
    """What holds and what does not, by ratios of distances, paired by seed: a claim of "better" holds where the mean
    ratio is below 1 by more than two deviations over the seeds."""
    lines = []
    for kind, title in SAMPLERS.items():
        for calls in CALLS:
            cells = results.get((kind, calls), [])
            nets = [name for name in (cells[0] if cells else ()) if name.startswith("r=") and name != PLAIN]
            if len(cells) < 2 or not nets:
                continue
            best = min(nets, key=lambda n: mean(ratios(results, (kind, calls, n), (kind, calls, PLAIN))))
            rivals = [name for name in (PLAIN, SCALED, SOFT) if all(name in cell for cell in cells)]
            against = {rival: ratios(results, (kind, calls, best), (kind, calls, rival)) for rival in rivals}
            better = {rival: mean(found) + 2 * stdev(found) < 1 for rival, found in against.items()}
            said = f"better than plain {'held' if better[PLAIN] else 'not held'}"
            if len(rivals) == 3:
                said += f", than plain and both controls {'held' if all(better.values()) else 'not held'}"
            told = ", ".join(f"{over_seeds(found)} of {rival}'s" for rival, found in against.items())
            lines.append(f"- {title}, T = {calls}: {said}; {best} has {told}")
    lines += [aim(results, name) for name in (*dict.fromkeys(results.get(("ddpm", 20), [{}])[0]),)]
    return [line for line in lines if line]


def aim(results: Results, name: str) -> str:
    """20 ancestral calls of a variant against 200 plain ones."""
    found = ratios(results, ("ddpm", 20, name), ("ddpm", 200, PLAIN))
    if not found:
        return ""
    reached = "reached" if mean(found) <= 1.1 else "not reached"
    return f"- aim, 20 ancestral calls within 10 % of 200 plain ones, {name}: {reached}: {over_seeds(found)}"


def write_page(name: str, work: Path, recipe: Recipe) -> list[Table]:
    """The tables, claims and pictures of all that is measured so far."""
    results = results_of(work)
    tables = [table for kind in SAMPLERS if (kind, CALLS[0]) in results for table in tables_of(kind, results, recipe)]
    tables.append(corrections_table(results))
    said = claims(results)
    page = [f"# Regularised score matching, {name}", *map(markdown, tables), "\n".join(said)]
    disk.write_text(Path(__file__).with_name(f"regularized-{name}.md"), "\n\n".join(page).rstrip() + "\n")
    grids = []
    for (kind, calls), file in sorted(pictures_of(work).items(), key=lambda item: (item[0][1], item[0][0])):
        with np.load(file, allow_pickle=False) as arrays:
            grids += [Grid(title=f"{SAMPLERS[kind]}, T = {calls}: {n}", images=arrays[n]) for n in arrays.files]
    summary = " ".join(line.removeprefix("- ") + "." for line in said)
    facts = {"calls": ", ".join(map(str, CALLS)), "images": f"{recipe.eval.images}"}
    figures = tuple(curve_of(kind, results) for kind in SAMPLERS if (kind, CALLS[0]) in results)
    parts: tuple[Part, ...] = (*tables, *grids, *figures)
    write_report(Report(title=page[0][2:], summary=summary, facts=facts, parts=parts), work)
    draw_twenty(name, work)
    return tables


def pictures_of(work: Path) -> dict[tuple[str, int], Path]:
    found = {}
    for file in work.glob("pictures-*.npz"):
        _, kind, calls = file.stem.split("-")
        found[kind, int(calls)] = file
    return found


def draw_twenty(name: str, work: Path) -> None:
    """Rows of pictures from the same noise: ancestral, 20 calls, every variant in the order of the table; last 200."""
    files, rows = pictures_of(work), []
    for calls, only in ((20, None), (200, PLAIN)):
        if ("ddpm", calls) in files:
            with np.load(files["ddpm", calls], allow_pickle=False) as arrays:
                rows += [arrays[one] for one in arrays.files if only in (None, one)]
    if rows:
        target = Path(__file__).parents[1] / "docs" / f"regularized-{name}.png"
        disk.write_png(target, picture_grid(np.concatenate(rows), columns=SHOWN))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=tuple(SOURCES), default="digits")
    parser.add_argument("--sampler", choices=tuple(SAMPLERS), action="append", help="only these")
    parser.add_argument("--calls", type=int, choices=(*CALLS, REFERENCE), action="append", help="only these")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], help="edit the recipe, as halfstep's --set")
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    watch, work = RichWatch(), args.work or Path(f"runs/regularized-{args.data}")
    work.mkdir(parents=True, exist_ok=True)
    _, base, _, features = SOURCES[args.data]
    recipe = named(base).edit([*EDITS, f"eval.features={features}", *args.set])
    banks = trained(args.data, args.seeds, recipe, work, watch)
    cells = [
        (kind, calls, seed)
        for calls in args.calls or (*CALLS, REFERENCE)
        for kind in args.sampler or SAMPLERS
        for seed in range(args.seeds if calls < REFERENCE else 1)
    ]
    measure(banks, args.data, recipe, cells, work, watch)
    for table in write_page(args.data, work, recipe):
        Console().print(rich_table(table))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
