"""Spectral Diffusion's students from the teacher's channels, and from nothing: three trainings of each, on one table.

    python benchmarks/spectral_start.py                 # 16x16, trains what is missing, resumable; --size 32

Students of one set of channels, with wavelet gates and with the teacher's resampling convolutions, alone and distilled,
fresh and begun as the teacher's width. What an ingredient does is the difference of two rows, paired over the seeds of
the trainings (Student's t): with three of them an interval is wide.
Everything goes to runs/spectral-start/, the table to benchmarks/spectral_start<size>.md.
"""

from __future__ import annotations

import halfstep.core.threads  # noqa: F401  # isort: skip (before torch)
import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler
from rich.console import Console
from scipy import stats

from fashion import DATA, MODELS, file_name
from halfstep.app import verbs
from halfstep.app.measurement import judge_for
from halfstep.app.page import Table, markdown, rich_table
from halfstep.app.subject import open_model, open_subject
from halfstep.app.terminal import RichWatch
from halfstep.core.recipe import Recipe, SampleSpec, SpectralSpec
from halfstep.core.recipes import named
from halfstep.data.images import load_images
from halfstep.engine.bank import Bank
from halfstep.engine.sampling import reference_plan
from halfstep.nets.denoiser import Memo, predictor
from halfstep.nets.models import load_denoiser

ALONE, DISTILLED = {"spatial": 0.0, "freq": 0.0}, {"freq": 0.0}
STUDENTS = {
    "plain, fresh": SpectralSpec(wavelet=False, **ALONE),
    "gates, fresh": SpectralSpec(**ALONE),
    "plain, teacher's": SpectralSpec(wavelet=False, start="teacher", **ALONE),
    "gates, teacher's": SpectralSpec(start="teacher", **ALONE),
    "plain, teacher's, distilled": SpectralSpec(wavelet=False, start="teacher", **DISTILLED),
    "gates, teacher's, distilled": SpectralSpec(start="teacher", **DISTILLED),
    "gates, teacher's, by spectrum": SpectralSpec(start="teacher"),
}
EFFECTS = {
    "the teacher's channels (plain)": ("plain, teacher's", "plain, fresh"),
    "the teacher's channels (gates)": ("gates, teacher's", "gates, fresh"),
    "gates (fresh)": ("gates, fresh", "plain, fresh"),
    "gates (teacher's)": ("gates, teacher's", "plain, teacher's"),
    "distillation (plain)": ("plain, teacher's, distilled", "plain, teacher's"),
    "distillation (gates)": ("gates, teacher's, distilled", "gates, teacher's"),
    "the spectrum's weights": ("gates, teacher's, by spectrum", "gates, teacher's, distilled"),
}
SAMPLERS = {
    16: {"DDIM, 50": SampleSpec(steps=50), "PNDM, 10": SampleSpec(scheduler="pndm", steps=10)},
    32: {"DDIM, 50": SampleSpec(steps=50), "UniPC, 6": SampleSpec(scheduler="unipc", steps=6, spacing="trailing")},
}
"""Today's, and the best free of `free.py`."""


def trained(args: argparse.Namespace, recipe: Recipe, watch: RichWatch) -> dict[tuple[str, int], Path]:
    """Run folders by student and seed."""
    runs = {}
    for seed in range(args.seeds):
        for name in args.only or STUDENTS:
            spec = replace(STUDENTS[name], reduction=args.reduction)
            out = args.work / f"{args.size}" / f"{file_name(name).replace(chr(39), '')}-{seed}"
            teacher = MODELS / f"fashion{args.size}-dense"
            verbs.make("spectral", str(teacher), DATA, out, replace(recipe, spectral=spec, seed=seed), watch=watch)
            runs[name, seed] = out
    return runs


def held_out(bank: Bank, noise: Mapping, count: int = 2048) -> dict[str, float]:
    """Mean squared error of the predicted noise on test pictures, the same noise and timesteps for every net."""
    clean = load_images(DATA, size=bank.config["sample_size"], channels=1, split="test").batch(slice(0, count))
    torch.manual_seed(0)
    timestep, target = torch.randint(0, noise["num_train_timesteps"], (count,)), torch.randn_like(clean)
    noisy = DDPMScheduler.from_config(noise).add_noise(clean, target, timestep)
    losses = {}
    for name in bank:
        predict, pairs = predictor(bank[name]), zip(noisy.split(128), timestep.split(128), strict=True)
        found = torch.cat([predict(x, t, {}, Memo()) for x, t in pairs])
        losses[name] = float((found - target).square().mean())
    return losses


def distances(
    bank: Bank, noise: Mapping, recipe: Recipe, args: argparse.Namespace, watch: RichWatch
) -> dict[str, dict[str, float]]:
    """Fréchet distances, corrected for bias, by column (features and sampler) and entry."""
    found: dict[str, dict[str, float]] = {}
    for features in args.features:
        this = replace(recipe, eval=replace(recipe.eval, features=features))
        judge = judge_for(bank, open_subject(None, DATA, this, watch=watch), args.work / features, watch)
        for label, spec in SAMPLERS[args.size].items():
            plan = reference_plan(bank, noise, spec)
            column = found[f"FD, {features}, {label}"] = {}
            for name in bank:
                drawn, _ = judge.features(plan.uniform(name), args.images, 0, 0)
                column[name] = float(judge.distances(drawn, 0, 100).value)
                watch.say(f"{name}, {features}, {label}: {column[name]:.3f}")
    return found


def paired(more: np.ndarray) -> str:
    """The mean of differences over seeds and its 95 % interval by Student's t."""
    half = stats.t.ppf(0.975, len(more) - 1) * more.std(ddof=1) / len(more) ** 0.5 if len(more) > 1 else float("nan")
    return f"{more.mean():+.3g} [{more.mean() - half:+.3g}, {more.mean() + half:+.3g}]"


def tables(columns: Mapping[str, Mapping[str, float]], bank: Bank, args: argparse.Namespace) -> Iterator[Table]:
    """Every student's mean over seeds and its ratio to the teacher; what each ingredient does, paired over seeds."""
    seeds, names = range(args.seeds), list(args.only or STUDENTS)
    by = {c: {n: np.array([col[f"{n} {s}"] for s in seeds]) for n in names} for c, col in columns.items()}
    whole = bank.prices()
    macs = {n: whole["full"].macs / whole[f"{n} 0"].macs for n in names}
    rows = [("the teacher", "1", *(f"{columns[c]['full']:.4g}" for c in columns))]
    for n in names:
        cells = (_spread(by[c][n], columns[c]["full"]) for c in by)
        rows.append((n, f"1/{macs[n]:.1f}", *cells))
    note = f"Means of {len(seeds)} trainings ± their spread, in brackets of the teacher's; {args.images} pictures."
    yield Table(title="Students", columns=("", "MACs", *columns), rows=tuple(rows), note=note)
    effects = [
        (what, *(paired(by[c][one] - by[c][other]) for c in by))
        for what, (one, other) in EFFECTS.items()
        if one in names and other in names
    ]
    note = "Below zero: better. Paired over the seeds, 95 % by Student's t."
    yield Table(title="What each ingredient does", columns=("", *columns), rows=tuple(effects), note=note)


def _spread(values: np.ndarray, of: float) -> str:
    spread = f" ± {values.std(ddof=1):.2g}" if len(values) > 1 else ""
    return f"{values.mean():.4g}{spread} ({values.mean() / of:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, choices=(16, 32), default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--reduction", type=float, default=7.0)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--features", nargs="*", default=["fashion", "imagenet"])
    parser.add_argument("--only", nargs="*", help="these students alone")
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--set", action="append", default=[], help="edit the recipe, as halfstep's --set")
    parser.add_argument("--work", type=Path, default=Path("runs/spectral-start"))
    args = parser.parse_args()
    watch = RichWatch()
    recipe = named("fashion32-spectral").edit([f"data.size={args.size}", "train.steps=2000", *args.set])
    runs = trained(args, recipe, watch)
    if args.train_only:
        return
    dense, noise = load_denoiser(MODELS / f"fashion{args.size}-dense")
    bank = Bank({"full": dense}, "full", noise["prediction_type"])
    for (name, seed), out in runs.items():
        bank = bank.with_entry(f"{name} {seed}", open_model(out).bank["spectral"], bank.prediction_type)
    columns = {"loss": held_out(bank, noise), **distances(bank, noise, recipe, args, watch)}
    text = ["# Students of the teacher's channels", f"{recipe.train.steps} steps of {recipe.train.batch} each."]
    for table in tables(columns, bank, args):
        text.append(f"## {table.title}\n\n{markdown(table)}")
        Console().print(rich_table(table))
    Path(__file__).with_name(f"spectral_start{args.size}.md").write_text("\n\n".join(text) + "\n")


if __name__ == "__main__":
    main()
