"""Where a correction of the predicted noise helps, and why: DDIM, DPM-Solver++, UniPC and PNDM, 5 to 20 calls.

    python benchmarks/corrections.py          # Fashion-MNIST 16x16, benchmarks/models/fashion16-small; resumable
    python benchmarks/corrections.py --images 20000 --samplers "UniPC 2" PNDM --calls 8 10 --controls "one scale"

Nothing is trained. For every sampler and number of calls the best scale and the best threshold of all rows are chosen
on the noise of a search, and measured on other noise beside the same sampler uncorrected, paired. The figure follows
the variance of the sample: what a perfect sampler has at each call is alpha times the data's variance plus the noise's
(Var[x_t] = a_t Var[x_0] + 1 - a_t, over pictures, by pixel), of all of the picture and of its finest Haar bands.
Work in runs/corrections/, the table to benchmarks/corrections.md, the figures to docs/corrections-*.png; of a part (the
second command: more pictures of the rivals) there is the table alone, benchmarks/corrections-<images>.md.
"""

from __future__ import annotations

import halfstep.core.threads  # noqa: F401  # isort: skip (before torch)
import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from fashion import DATA, MODELS, KeptDistances
from halfstep.app.measurement import judge_for
from halfstep.app.subject import open_subject
from halfstep.app.terminal import RichWatch
from halfstep.core import disk
from halfstep.core.plan import StepPlan
from halfstep.core.process import Process
from halfstep.core.recipe import Recipe, SampleSpec
from halfstep.core.recipes import named
from halfstep.core.seeds import Stage, stage_seed
from halfstep.engine.bank import Bank
from halfstep.engine.sampling import (
    build_scheduler,
    image_generators,
    levels_of,
    reference_plan,
    start_noise,
    trajectory,
)
from halfstep.measure.judge import Judge
from halfstep.measure.quality import Distances, difference
from halfstep.nets.wavelet import haar
from halfstep.report.figures import Curve, colours_of, draw_png
from halfstep.report.page import Table, markdown, rich_table
from halfstep.report.words import change_cell
from halfstep.search.corrections import corrected_plans
from halfstep.search.scores import open_scores

SAMPLERS = {
    "DDIM": SampleSpec(scheduler="ddim"),
    "DPM-Solver++ 2": SampleSpec(scheduler="dpmsolver++"),
    "UniPC 2": SampleSpec(scheduler="unipc"),
    "PNDM": SampleSpec(scheduler="pndm"),
}
CALLS = (5, 8, 10, 15, 20)
SHOWN = 10
"""Calls of the figures."""
PLAIN, CONTROLS = "none", ("one scale", "one threshold")
EDITS = (
    "shrink.scales=0.94,0.96,0.97,0.98,0.985,0.99,0.995,1.005,1.01,1.02",
    "shrink.thresholds=0.005,0.01,0.02,0.03,0.05",
    "shrink.rounds=0",
    "shrink.images=512",
    "sample.batch=128",
)


def chosen_plans(judge: Judge, noise: Process, args: argparse.Namespace, recipe: Recipe, watch: RichWatch) -> dict:
    """(sampler, calls) -> uncorrected and corrected plans by name, chosen on the noise of the search."""
    prices, found = judge.bank.prices(), {}
    for name in args.samplers:
        spec = SAMPLERS[name]
        for calls in args.calls:
            plan = reference_plan(judge.bank, noise, replace(spec, steps=calls, batch=recipe.sample.batch), prices)
            folder = args.work / f"{spec.scheduler}-{calls}"
            folder.mkdir(parents=True, exist_ok=True)
            shrunk = corrected_plans(open_scores(judge, folder), plan, recipe.shrink, watch=watch)
            found[name, calls] = {one: shrunk.plans[one] for one in (PLAIN, *args.controls)}
    return found


def measured(judge: Judge, plans: dict, images: int, file: Path, watch: RichWatch) -> dict[str, Distances]:
    """Distances with paired resamples by the plan's digest, on the report's noise; kept line by line."""
    seed = stage_seed(0, Stage.REPORT)
    kept = KeptDistances(file, images, seed)
    known = kept.read()
    for (name, calls), cell in plans.items():
        for what, plan in cell.items():
            if plan.digest in known:
                continue
            one = known[plan.digest] = judge.distances(judge.features(plan, images, seed)[0], seed, 300)
            kept.keep(plan, one)
            watch.say(f"{name}, {calls} calls, {what}: {one.value:.2f}")
    return known


def correction_of(plan: StepPlan) -> str:
    scale, threshold = plan.corrections[0]
    return f"× {scale:g}" if scale != 1 else f"soft {threshold:g}" if threshold else "nothing"


def table_of(judge: Judge, plans: dict, known: dict[str, Distances], images: int) -> Table:
    """Each correction beside its own sampler uncorrected; the scale also beside the best uncorrected of as many."""
    rows, least = [], judge.floor(images).high
    controls = [what for what in next(iter(plans.values())) if what != PLAIN]
    for (name, calls), cell in plans.items():
        plain = known[cell[PLAIN].digest]
        low, high = plain.interval
        cells = []
        for what in controls:
            change = difference(plain, known[cell[what].digest], judge.reference, least)
            cells.append(f"{change_cell(change)} ({correction_of(cell[what])})")
        rivals = {one: known[plans[one, calls][PLAIN].digest] for one, of in plans if of == calls}
        best = min(rivals, key=lambda one: rivals[one].value)
        beside = difference(rivals[best], known[cell[controls[0]].digest], judge.reference, least)
        cells.append(f"{change_cell(beside)} ({best})")
        rows.append((name, f"{calls}", f"{plain.value:.2f} [{low:.2f}, {high:.2f}]", *cells))
    note = (
        f"{images} pictures, corrected for bias, 95 % intervals over pictures, changes paired; floor {least:.2f}. "
        "In brackets what was chosen, on other noise, and in the last column which sampler is the best uncorrected."
    )
    columns = ("sampler", "calls", "FD, uncorrected", *controls, f"{controls[0]}, beside the best uncorrected")
    return Table(title="Corrections by sampler and calls", columns=columns, rows=tuple(rows), note=note)


# ------------------------------------------------------------------------------------------------------------ variance


def variance(pictures: torch.Tensor) -> np.ndarray:
    """Of [N, C, H, W] over pictures: mean over pixels, and over those of the three finest Haar bands (orthonormal, so
    that unit noise has 1 in both)."""
    fine = haar(pictures)[:, 1:]  # all but LL
    return np.array([float(part.double().var(dim=0).mean()) for part in (pictures, fine)])


def ratios(bank: Bank, plan: StepPlan, data: np.ndarray, count: int) -> tuple[list[float], np.ndarray]:
    """Timesteps [rows + 1], and the variance of the sample there over that of noised data, [rows + 1, 2]; the last is
    the picture's own."""
    generators = image_generators(stage_seed(0, Stage.REPORT), 0, count)
    scheduler = build_scheduler(plan)
    levels = [*levels_of(scheduler).tolist(), 1.0]
    steps = list(trajectory(bank, plan, start_noise(bank, generators), generators))
    samples = [step.sample for step in steps] + [steps[-1].after]
    times = [*map(float, scheduler.timesteps), 0.0]
    wanted = [level * data + 1 - level for level in levels]
    return times, np.array([variance(x) / of for x, of in zip(samples, wanted, strict=True)])


def curves(bank: Bank, plans: dict, clean: torch.Tensor, count: int) -> list[Curve]:
    """Of each sampler in SHOWN calls, one figure: uncorrected and scaled, all of the picture and its finest bands."""
    found, data = [], variance(clean)
    for name in SAMPLERS:
        lines: dict[str, tuple[tuple[float, float], ...]] = {}
        for what, told in ((PLAIN, ""), (CONTROLS[0], ", scaled")):
            times, shares = ratios(bank, plans[name, SHOWN][what], data, count)
            for band, values in zip(("picture", "finest bands"), shares.T, strict=True):
                lines[f"{band}{told}"] = tuple(zip(times, values.tolist(), strict=True))
        scale = correction_of(plans[name, SHOWN][CONTROLS[0]])
        title = f"{name}, {SHOWN} calls: variance kept ({scale})"
        found.append(Curve(title=title, xlabel="timestep", ylabel="variance / that of noised data", lines=lines))
    return found


def ends(figures: Sequence[Curve]) -> Table:
    """Where the lines end: the variance of the pictures over the data's."""
    names = list(figures[0].lines)
    rows = tuple((one.title.split(",")[0], *(f"{one.lines[name][-1][1]:.3f}" for name in names)) for one in figures)
    note = "1: as much variance as the data has."
    return Table(
        title=f"The pictures' variance over the data's, {SHOWN} calls", columns=("", *names), rows=rows, note=note
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODELS / "fashion16-small"))
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--samplers", nargs="*", choices=list(SAMPLERS), default=list(SAMPLERS))
    parser.add_argument("--calls", nargs="*", type=int, choices=CALLS, default=CALLS)
    parser.add_argument("--controls", nargs="*", choices=CONTROLS, default=CONTROLS)
    parser.add_argument("--set", action="append", default=[], help="edit the recipe, as halfstep's --set")
    parser.add_argument("--work", type=Path, default=Path("runs/corrections"))
    args = parser.parse_args()
    watch = RichWatch()
    recipe = named("fashion16").edit([*EDITS, "eval.features=fashion", *args.set])
    subject = open_subject(args.model, DATA, recipe, watch=watch)
    judge = judge_for(subject.stand_ins, subject, args.work, watch)
    plans = chosen_plans(judge, subject.process, args, recipe, watch)
    known = measured(judge, plans, args.images, args.work / "measured.jsonl", watch)
    tables, part = [table_of(judge, plans, known, args.images)], ""
    if len(plans) == len(SAMPLERS) * len(CALLS):
        figures = curves(judge.bank, plans, judge.images.batch(slice(0, 10_000)), 1024)
        tables.append(ends(figures))
        for one, spec in zip(figures, SAMPLERS.values(), strict=True):
            png = draw_png(one, colours_of([one]))
            target = Path(__file__).parents[1] / "docs" / f"corrections-{spec.scheduler.strip('+')}.png"
            disk.write_bytes(target, png)
    else:
        part = f"-{args.images}"
    text = [f"# Corrections of few-step sampling\n\n{args.model}, {DATA}"]
    for table in tables:
        text.append(f"## {table.title}\n\n{markdown(table)}")
        Console().print(rich_table(table))
    Path(__file__).with_name(f"corrections{part}.md").write_text("\n\n".join(text) + "\n")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
