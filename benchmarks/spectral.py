"""Spectral Diffusion on Fashion-MNIST 32x32, each of its ingredients beside its control, as one table.

    python benchmarks/spectral.py               # trains what is missing, resumable

Teacher: benchmarks/models/fashion32-dense. Every student has the same MACs (an eighth), the same training images and
steps: a plain small U-Net on the noise alone, with plain distillation, with wavelet gates, with the spectrum's weights;
and the plan that mixes the last one with the teacher step by step, beside fewer teacher steps at the same MACs.
--loss writes the held-out denoising loss of the students instead, which tells them apart where distances do not;
--weights that of four short trainings with weaker and weaker distillation.
Everything goes to runs/spectral/, the table to benchmarks/spectral.md.
"""

from __future__ import annotations

import halfstep.core.threads  # noqa: F401  # isort: skip (before torch)
import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from fashion import DATA, MODELS, file_name, loss_table, markdown, show_table
from halfstep.app import verbs
from halfstep.app.measurement import judge_for
from halfstep.app.subject import open_model, open_subject
from halfstep.app.terminal import RichWatch
from halfstep.core.recipe import SpectralSpec
from halfstep.core.recipes import named
from halfstep.engine.bank import Bank
from halfstep.engine.sampling import fewer_steps, reference_plan
from halfstep.measure.judge import measure_plans
from halfstep.measure.spectrum import power_spectrum, radial_mean
from halfstep.nets.models import load_denoiser
from halfstep.report.charts import pareto, plan_chart
from halfstep.report.page import Grid, Report, Table, rich_table, write_report
from halfstep.report.tables import plans_table
from halfstep.search.driver import search_plan
from halfstep.search.scores import open_scores

STUDENTS = {
    "plain": SpectralSpec(wavelet=False, spatial=0.0, freq=0.0),
    "plain, distilled": SpectralSpec(wavelet=False, freq=0.0),
    "wavelet, distilled": SpectralSpec(freq=0.0),
    "wavelet, by spectrum": SpectralSpec(),
}

WEIGHTS = {f"wavelet, weights {x:g}": SpectralSpec(spatial=x, freq=x) for x in (0.1, 0.01, 0.001, 0.0)}
"""How much the distillation should weigh, in short trainings; 0.1 is the paper's (of sums, here of means)."""


def spectrum_table(pictures: dict, real: torch.Tensor) -> Table:
    """How far the power of drawn images is from the data's: mean |log10 ratio| over low and over high frequencies."""
    rows, middle = [], 8  # of 16 rings up to 1/2 cycle per pixel
    wanted = radial_mean(power_spectrum(real), 16)[1].log10()
    for name, images in pictures.items():
        found = radial_mean(power_spectrum(torch.from_numpy(images).float() / 127.5 - 1), 16)[1].log10()
        off = (found - wanted).abs()
        rows.append((name, f"{off[:middle].mean():.3f}", f"{off[middle:].mean():.3f}"))
    count = len(next(iter(pictures.values())))
    note = f"{count} drawn against {len(real)} real images; low: below 1/4 cycle per pixel."
    columns = ("plan", "low frequencies", "high frequencies")
    return Table(title="Spectrum error |log10 power ratio|", columns=columns, rows=tuple(rows), note=note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=0.35, help="of the mixed plan, a share of the teacher's MACs")
    parser.add_argument("--reduction", type=float, default=8.0)
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--loss", action="store_true", help="only the held-out denoising loss of every student")
    parser.add_argument("--weights", action="store_true", help="the losses of short trainings by weight of the lesson")
    parser.add_argument("--set", action="append", default=[], help="edit the recipe, as halfstep's --set")
    parser.add_argument("--work", type=Path, default=Path("runs/spectral"))
    args = parser.parse_args()
    watch, work = RichWatch(), args.work
    work.mkdir(parents=True, exist_ok=True)
    short = ["train.steps=600"] if args.weights else []
    recipe = named("fashion32-spectral").edit([*short, *args.set])
    teacher = MODELS / "fashion32-dense"
    dense, noise = load_denoiser(teacher)
    bank = Bank({"full": dense}, "full", noise["prediction_type"])
    for name, spec in (WEIGHTS if args.weights else STUDENTS).items():
        out = work / file_name(name)
        spec = replace(spec, reduction=args.reduction)
        verbs.make("spectral", str(teacher), DATA, out, replace(recipe, spectral=spec), watch=watch)
        bank = bank.with_entry(name, open_model(out).bank["spectral"], bank.prediction_type)
    if args.train_only:
        return
    if args.loss or args.weights:
        show_table(loss_table(bank, noise), f"spectral-{'weights' if args.weights else 'loss'}.md")
        return
    judge = judge_for(bank, open_subject(None, DATA, recipe, watch=watch), work, watch)
    plan = reference_plan(bank, noise, recipe.sample)
    mixable = Bank({"full": bank["full"], "spectral": bank["wavelet, by spectrum"]}, "full", bank.prediction_type)
    judge.bank = mixable
    start = reference_plan(mixable, noise, recipe.sample)
    found = search_plan(open_scores(judge, work), start, recipe, work, budget=args.budget, watch=watch)
    judge.bank = bank
    names = {"full": "full", "spectral": "wavelet, by spectrum"}
    plans = {"reference": plan} | {name: plan.uniform(name) for name in STUDENTS}
    plans["teacher and student mixed"] = plan.with_entries([names[e] for e in found.plan.entries])
    for share in (found.plan.share, 1 / args.reduction):
        steps = max(1, round(plan.sampler.steps * share))
        plans[f"teacher, {steps} steps"] = fewer_steps(plan, steps)
    verdict = measure_plans(judge, plans, recipe, keep=512, repeats=3, watch=watch)
    (work / "quality.json").write_text(json.dumps(verdict.record.to_json(), indent=2))
    table = plans_table(verdict.record, "Spectral Diffusion, Fashion-MNIST 32x32")
    real = judge.images.subset(2048)
    spectra = spectrum_table(verdict.pictures, real.batch(slice(0, len(real))))
    report = Report(
        title=table.title,
        summary=f"Students: {recipe.train.steps} steps of {recipe.train.batch}, {args.reduction:g} times fewer MACs.",
        facts={key: str(value) for key, value in verdict.record.about.machine.items()},
        parts=(
            *(table, spectra),
            *(Grid(title=n, images=x[:32], columns=8) for n, x in verdict.pictures.items()),
            *(pareto(verdict.record, []), plan_chart(plans["teacher and student mixed"])),
        ),
    )
    write_report(report, work)
    text = [f"# {table.title}", report.summary, markdown(table), markdown(spectra)]
    text.append(f"```\n{plans['teacher and student mixed']}\n```")
    Path(__file__).with_suffix(".md").write_text("\n\n".join(text) + "\n")
    Console().print(rich_table(table))
    Console().print(rich_table(spectra))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
