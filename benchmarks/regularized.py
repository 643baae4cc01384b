"""Regularised score matching on digits and Fashion-MNIST 16x16: fewer steps, beside the controls that keep it honest.

    python benchmarks/regularized.py                    # trains what is missing, resumable
    python benchmarks/regularized.py --data digits

From one trained model every weight r of the penalty trains on for the same number of steps, three seeds each. Measured
at T = 10, 20, 50 and 200 calls (1000 for the plain net), ancestral and DDIM: the plain net, r, and the plain net with
its best scale and its best threshold (`halfstep shrink`; up to 50 calls), and with its best correction by stretches of
steps (up to 20), none of which is trained. Spread over seeds; Fréchet distance, precision, recall. The toy sets of the
specification are in `regularized_toys.py`.
Everything goes to runs/regularized-<data>/, the tables, with what is measured so far, to regularized-<data>.md here.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import torch
from rich.console import Console

from fashion import DATA, MODELS, markdown
from halfstep import compress, disk
from halfstep.bank import Bank, load_denoiser
from halfstep.cli import RichWatch
from halfstep.compress import regular_name
from halfstep.judge import Judge
from halfstep.measured import judge_for, open_pipeline
from halfstep.plan import StepPlan
from halfstep.recipe import Recipe
from halfstep.recipes import named
from halfstep.report import Table, rich_table
from halfstep.sampling import reference_plan
from halfstep.shrink import shrink_plan

CALLS = (10, 20, 50, 200)
CORRECTED, BY_STRETCH = 50, 20
"""The most calls of the controls: what they cost to find grows with the calls, what they bring shrinks."""
SOURCES = {"digits": ("digits", "digits", "digits"), "fashion16": (DATA, "fashion16", str(MODELS / "fashion16-small"))}
"""Images, recipe and trained model of each benchmark."""


def trained(name: str, grid: tuple[float, ...], seeds: int, recipe: Recipe, work: Path, watch: RichWatch) -> list[Bank]:
    """A bank for each seed: the plain net trained on, and one net for every r."""
    data, _, model = SOURCES[name]
    banks = []
    for seed in range(seeds):
        entries = {}
        for r in (0.0, *grid):
            one = replace(recipe, seed=seed, regular=replace(recipe.regular, r=r))
            folder = compress.regularized(data, work / f"{regular_name(r)}-{seed}", one, model=model, watch=watch)
            entries[regular_name(r)] = open_pipeline(str(folder)).bank[regular_name(r)]
        banks.append(Bank(entries, regular_name(0.0), recipe.noise.prediction))
    return banks


def measured(judge: Judge, plan: StepPlan, count: int, seed: int) -> tuple[float, float, float]:
    """Fréchet distance, precision and recall of a plan."""
    found = judge.quality(judge.features(plan, count, seed)[0], seed, 2)
    return found["fd"].value, found["precision"].value, found["recall"].value


def rows_of(
    judge: Judge, noise: dict, kind: str, calls: int, recipe: Recipe, work: Path, seed: int, watch: RichWatch
) -> dict[str, tuple[float, float, float]]:
    """Every variant at one sampler and number of calls, for one seed; of 1000 calls the plain net alone."""
    sample = replace(recipe.sample, scheduler=kind, steps=calls)
    plan = reference_plan(judge.bank, noise, sample, judge.bank.macs())
    plans = {name: plan.uniform(name) for name in judge.bank if calls < 1000 or name == judge.bank.reference}
    if calls <= CORRECTED:
        rounds = recipe.shrink.rounds if calls <= BY_STRETCH else 0
        spec = replace(recipe.shrink, final_images=recipe.shrink.images, rounds=rounds)
        folder = work / f"shrink-{kind}-{calls}-{seed}"
        folder.mkdir(exist_ok=True)
        found = shrink_plan(judge, plan, spec, folder, seed=seed, watch=watch)
        left_out = ("none",) if spec.rounds else ("none", "by stretch")
        plans |= {f"r=0, {name}": one for name, one in found.plans.items() if name not in left_out}
    return {name: measured(judge, one, recipe.eval.images, seed + 3) for name, one in plans.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=tuple(SOURCES), default="digits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], help="edit the recipe, as halfstep's --set")
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    watch, work = RichWatch(), args.work or Path(f"runs/regularized-{args.data}")
    work.mkdir(parents=True, exist_ok=True)
    data, base, model = SOURCES[args.data]
    edits = [
        "train.steps=800",
        "train.lr=2e-4",
        "regular.grid=0.01,0.03,0.1",
        "shrink.images=512",
        "eval.images=1024",
    ]
    recipe = named(base).edit([*edits, *args.set])
    banks = trained(args.data, recipe.regular.grid, args.seeds, recipe, work, watch)
    noise = load_denoiser(model)[1]
    cells = [(kind, calls, seed) for kind in ("ddpm", "ddim") for calls in CALLS for seed in range(args.seeds)]
    for kind, calls, seed in [*cells, ("ddpm", 1000, 0)]:
        file = work / f"quality-{kind}-{calls}-{seed}.json"
        if not file.is_file():
            judge, settings = judge_for(banks[seed], data, recipe, work, watch)
            disk.write_json(file, rows_of(judge, noise, kind, calls, settings, work, seed, watch))
            write_page(args.data, work, recipe)
    for table in write_page(args.data, work, recipe):
        Console().print(rich_table(table))


def write_page(name: str, work: Path, recipe: Recipe) -> list[Table]:
    """The tables of all that is measured so far."""
    results: dict[tuple[str, int], dict[str, list]] = {}
    for file in sorted(work.glob("quality-*.json")):
        _, kind, calls, _ = file.stem.split("-")
        for row, values in disk.read_json(file, what="qualities", do="delete it").items():
            results.setdefault((kind, int(calls)), {}).setdefault(row, []).append(values)
    tables = [table_of(kind, results, recipe) for kind in ("ddpm", "ddim") if (kind, CALLS[0]) in results]
    page = [f"# Regularised score matching, {name}", *map(markdown, tables)]
    Path(__file__).with_name(f"regularized-{name}.md").write_text("\n\n".join(page) + "\n")
    return tables


def table_of(kind: str, results: dict, recipe: Recipe) -> Table:
    """Fréchet distance (spread over seeds), precision and recall of every variant by number of calls."""
    rows, columns = [], [calls for calls in (*CALLS, 1000) if (kind, calls) in results]
    for name in results[kind, CALLS[0]]:
        found = (results[kind, calls].get(name) for calls in columns)
        rows.append((name, *("–" if one is None else cell_of(one) for one in found)))
    seeds = max(len(found["r=0"]) for found in results.values())
    note = f"Fréchet distance ± deviation over seeds, up to {seeds} (precision, recall); n = {recipe.eval.images}."
    sampler = "ancestral, posterior variance" if kind == "ddpm" else "DDIM"
    return Table(title=sampler, columns=("", *(f"T = {calls}" for calls in columns)), rows=tuple(rows), note=note)


def cell_of(found: list) -> str:
    """What the seeds found, each (distance, precision, recall)."""
    distances, precisions, recalls = zip(*found, strict=True)
    spread = f" ± {stdev(distances):.3f}" if len(found) > 1 else ""
    return f"{mean(distances):.3f}{spread} ({mean(precisions):.2f}, {mean(recalls):.2f})"


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
