"""Trainings compared over seeds: what a method's ingredients do, and the controls beside it, from one dense teacher.

    python benchmarks/seeds.py spectral      # Fashion-MNIST 16x16; trains what is missing, resumable; --size 32
    python benchmarks/seeds.py sparse
    python benchmarks/seeds.py continuous    # beside it the PSNR of restored test pictures

Every student is trained `--seeds` times, seed by seed, from the same teacher in benchmarks/models.
Told: the held-out denoising loss, and Fréchet distances by two kinds of features under DDIM and under the best sampler
that is free; what an ingredient does is the difference of two rows, paired over seeds (Student's t: with three of them
an interval is wide). --train-only and --only let several processes share the trainings. --bank FOLDER writes the
students of the first seed and the teacher as one pipeline, among which a search chooses for every step:

    python benchmarks/seeds.py sparse --bank runs/seeds/bank     # and --only "dense widths, distilled" to .../widths
    halfstep search --model runs/seeds/bank --budget 0.1 --out runs/seeds/plan10 --recipe fashion16 --data idx:... \\
        --set eval.features=fashion --set search.arms=2 --set search.final_images=2048    # the widths': widths10
    halfstep compare runs/seeds/widths10 runs/seeds/plan10 --out runs/seeds/compared --recipe fashion16 \\
        --data idx:... --set eval.features=fashion --set eval.images=8192

Everything goes to runs/seeds/, the tables to benchmarks/seeds-<suite><size>.md (-1 of one seed).
"""

from __future__ import annotations

import halfstep.core.threads  # noqa: F401  # isort: skip (before torch)
import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from scipy import stats

from fashion import DATA, MODELS, file_name, held_out
from halfstep.app import verbs
from halfstep.app.measurement import judge_for
from halfstep.app.subject import open_model, open_subject
from halfstep.app.terminal import RichWatch
from halfstep.core import disk
from halfstep.core.process import Process
from halfstep.core.recipe import Recipe, SampleSpec
from halfstep.core.recipes import named
from halfstep.data.images import load_images
from halfstep.engine.bank import Bank
from halfstep.engine.entry import Own
from halfstep.engine.sampling import reference_plan
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.measure.features import extract
from halfstep.measure.judge import Judge
from halfstep.measure.restore import Denoiser, Tiles, compare_denoisers, restore_picture
from halfstep.nets.content import fingerprint
from halfstep.nets.denoiser import predictor
from halfstep.nets.models import load_denoiser
from halfstep.report.page import Table, markdown, rich_table

Effects = Mapping[str, tuple[str, str]]
"""What an ingredient is called -> the rows with it and without it."""


@dataclass(frozen=True)
class Student:
    """One training: the method, or "train" for a plain net from scratch, and its edits of the suite's recipe;
    `entries`: row -> entry of its bank."""

    method: str
    entries: Mapping[str, str]
    edits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suite:
    """Trainings under one recipe, from fashion<size>-<teacher>."""

    title: str
    teacher: str
    edits: tuple[str, ...]
    students: Mapping[str, Student]
    effects: Effects


def one(method: str, row: str, entry: str, *edits: str) -> dict[str, Student]:
    return {row: Student(method, {row: entry}, edits)}


PLAIN, TEACHERS = "spectral.wavelet=false", "spectral.start=teacher"
ALONE, DISTILLED = ("spectral.spatial=0", "spectral.freq=0"), ("spectral.freq=0",)
SMALLER = ("spectral.reduction=16", *ALONE)
SMALLER_PLAIN = ("spectral.reduction=15", *ALONE)  # 1/15.9, and of 16 times the next is 1/63
UNTAUGHT = "sparse.teacher=0"
ODE, ALONE_ODE = ("continuous.levels=2", "continuous.head_dim=16"), "continuous.teacher=0"
FIRST, SECOND = ("continuous.base=8", *ODE), ("continuous.base=12", "continuous.order=2", *ODE)
ONE_STEP = "continuous.steps=1"


def plain(row: str, channels: str, head_dim: int, groups: int) -> dict[str, Student]:
    """A plain U-Net from scratch, without attention but in the middle."""
    attention = ",".join("false" for _ in channels.split(","))
    shape = (f"model.channels={channels}", f"model.attention={attention}", f"model.head_dim={head_dim}")
    return one("train", row, "full", *shape, f"model.groups={groups}")


SUITES = {
    "spectral": Suite(
        "Students of the teacher's channels",
        "dense",
        ("train.steps=2000", "train.lr=1e-3", "spectral.reduction=7"),
        one("spectral", "plain, fresh", "spectral", PLAIN, *ALONE)
        | one("spectral", "gates, fresh", "spectral", *ALONE)
        | one("spectral", "plain, cut", "spectral", PLAIN, TEACHERS, *ALONE)
        | one("spectral", "gates, cut", "spectral", TEACHERS, *ALONE)
        | one("spectral", "plain, cut, distilled", "spectral", PLAIN, TEACHERS, *DISTILLED)
        | one("spectral", "gates, cut, distilled", "spectral", TEACHERS, *DISTILLED)
        | one("spectral", "gates, cut, by spectrum", "spectral", TEACHERS)
        | one("spectral", "plain, cut, 16 times", "spectral", PLAIN, TEACHERS, *SMALLER_PLAIN)
        | one("spectral", "gates, cut, 16 times", "spectral", TEACHERS, *SMALLER),
        {
            "the teacher's channels (plain)": ("plain, cut", "plain, fresh"),
            "the teacher's channels (gates)": ("gates, cut", "gates, fresh"),
            "gates (fresh)": ("gates, fresh", "plain, fresh"),
            "gates (cut)": ("gates, cut", "plain, cut"),
            "gates (cut, distilled)": ("gates, cut, distilled", "plain, cut, distilled"),
            "distillation (plain)": ("plain, cut, distilled", "plain, cut"),
            "distillation (gates)": ("gates, cut, distilled", "gates, cut"),
            "the spectrum's weights": ("gates, cut, by spectrum", "gates, cut, distilled"),
            "gates (16 times)": ("gates, cut, 16 times", "plain, cut, 16 times"),
        },
    ),
    "sparse": Suite(
        "Masks and smaller dense nets",
        "small",
        ("train.steps=1000", "train.lr=2e-4"),
        one("sparse", "2:4 SparseDM", "2:4")
        | one("sparse", "2:4 straight-through", "2:4", "sparse.decay=0", UNTAUGHT)
        | one("sparse", "2:4 frozen masks", "2:4", "sparse.frozen=true", UNTAUGHT)
        | {
            "dense widths, distilled": Student(
                "slimmable",
                {"dense, 0.75": "w0.75", "dense, 0.5": "w0.50"},
                ("slim.widths=0.75,0.5", "slim.shared_noise=true", "train.lr=1e-3"),
            )
        }
        | one("sparse", "1:4 SparseDM", "1:4", "sparse.pattern=1:4"),
        {
            "SparseDM for frozen masks": ("2:4 SparseDM", "2:4 frozen masks"),
            "SparseDM for plain straight-through": ("2:4 SparseDM", "2:4 straight-through"),
            "straight-through for frozen masks": ("2:4 straight-through", "2:4 frozen masks"),
            "2:4 for a dense net of 56 % of the MACs": ("2:4 SparseDM", "dense, 0.75"),
            "1:4 for a dense net of a quarter": ("1:4 SparseDM", "dense, 0.5"),
        },
    ),
    "continuous": Suite(
        "Continuous and plain U-Nets of two levels",
        "dense",
        ("train.steps=1500", "train.lr=1e-3"),
        one("continuous", "order 2", "continuous@1", *SECOND, ONE_STEP, ALONE_ODE)
        | one("continuous", "order 2, distilled", "continuous@1", *SECOND, ONE_STEP)
        | plain("plain, same parameters and MACs", "28,28", 28, 4)
        | plain("plain, three levels", "24,24,24", 24, 8)
        | one("continuous", "order 1", "continuous@1", *FIRST, ONE_STEP, ALONE_ODE)
        | {
            "order 2, one or two": Student(
                "continuous",
                {"order 2, one of 1 or 2 steps": "continuous@1", "order 2, two of 1 or 2 steps": "continuous@2"},
                (*SECOND, "continuous.steps=1,2", ALONE_ODE),
            )
        },
        {
            "order 2 for a plain net of the same parameters and MACs": ("order 2", "plain, same parameters and MACs"),
            "... distilled": ("order 2, distilled", "plain, same parameters and MACs"),
            "order 2 for a plain net of the same parameters": ("order 2", "plain, three levels"),
            "distillation": ("order 2, distilled", "order 2"),
            "order 2 for order 1": ("order 2", "order 1"),
            "training for one or two steps": ("order 2, one of 1 or 2 steps", "order 2"),
            "a second solver step": ("order 2, two of 1 or 2 steps", "order 2, one of 1 or 2 steps"),
        },
    ),
}
SAMPLERS = {
    16: {"DDIM, 20": SampleSpec(steps=20), "PNDM, 10": SampleSpec(scheduler="pndm", steps=10)},
    32: {"DDIM, 20": SampleSpec(steps=20), "UniPC, 6": SampleSpec(scheduler="unipc", steps=6, spacing="trailing")},
}
"""Today's, and the best free of `free.py`."""


def recipe_of(suite: Suite, size: int, edits: list[str]) -> Recipe:
    usual = ["train.batch=64", "train.warmup=100", "train.save_every=250", "train.sample_every=0", "sample.batch=128"]
    return named("default").edit([f"data.size={size}", "data.channels=1", *usual, *suite.edits, *edits])


def trained(args: argparse.Namespace, suite: Suite, recipe: Recipe, watch: RichWatch) -> dict[tuple[str, int], Path]:
    """Run folders by training and seed, seed by seed."""
    runs, teacher = {}, str(MODELS / f"fashion{args.size}-{suite.teacher}")
    process = Process.of(open_model(teacher).scheduler)
    for seed in range(args.seeds):
        for name in args.only or suite.students:
            student = suite.students[name]
            out = args.work / f"{args.suite}{args.size}" / f"{file_name(name)}-{seed}"
            edited = replace(recipe.edit(student.edits), seed=seed)
            if student.method == "train":
                verbs.train(DATA, out, replace(edited, noise=process), watch=watch)
            else:
                verbs.make(student.method, teacher, DATA, out, edited, watch=watch)
            runs[name, seed] = out
    return runs


def gathered(args: argparse.Namespace, suite: Suite, runs: Mapping[tuple[str, int], Path]) -> tuple[Bank, Mapping]:
    """Every trained row and the teacher in one bank, which a judge measures on the same noise; the noise process."""
    dense, noise = load_denoiser(MODELS / f"fashion{args.size}-{suite.teacher}")
    bank = Bank({"full": dense}, "full", noise["prediction_type"])
    for (name, seed), out in runs.items():
        made = open_model(out).bank
        for row, entry in suite.students[name].entries.items():
            alone = replace(made.entries[entry], weights=Own())  # what it shares them with stays behind
            bank = bank.with_entry(f"{row} {seed}", alone, bank.prediction_type)
    return bank, noise


def distances(
    bank: Bank, noise: Mapping, recipe: Recipe, args: argparse.Namespace, watch: RichWatch
) -> dict[str, dict[str, float]]:
    """Fréchet distances, corrected for bias, by column (features and sampler) and entry. A row's pictures are drawn
    once; what is measured is kept by the contents of its net."""
    judges = {
        kind: judge_for(bank, open_subject(None, DATA, edited, watch=watch), args.work / kind, watch)
        for kind in args.features
        for edited in [replace(recipe, eval=replace(recipe.eval, features=kind))]
    }
    first, kept = next(iter(judges.values())), args.work / "distances.json"
    known = disk.read_json(kept, what="distances", do="delete it") if kept.is_file() else {}
    found: dict[str, dict[str, float]] = {}
    for label, spec in SAMPLERS[args.size].items():
        plan = reference_plan(bank, noise, replace(spec, batch=recipe.sample.batch))
        for name in bank:
            key = f"{fingerprint(bank[name])} {plan.sampler.told} {args.images}"
            if set(judges) - set(known.get(key, {})):
                _, pictures = first.features(plan.uniform(name), args.images, 0, args.images)
                known[key] = {kind: distance(judge, pictures) for kind, judge in judges.items()}
                disk.write_json(kept, known)
                watch.say(f"{name}, {label}: " + ", ".join(f"{kind} {fd:.3f}" for kind, fd in known[key].items()))
            for kind in judges:
                found.setdefault(f"FD, {kind}, {label}", {})[name] = known[key][kind]
    return found


def distance(judge: Judge, pictures: np.ndarray) -> float:
    """Of uint8 [N, C, H, W]."""
    batches = (part.float().div(127.5).sub(1) for part in torch.from_numpy(pictures).split(256))
    return float(judge.distances(extract(judge.extractor, batches), 0, 100).value)


def restored(bank: Bank, noise: Mapping, sigma: float = 0.1, count: int = 64, steps: int = 4) -> dict[str, float]:
    """Mean PSNR in dB of test pictures with noise `sigma` (of [0, 1]), restored in `steps` calls."""
    size, channels = bank.config["sample_size"], bank.config["in_channels"]
    clean = load_images(DATA, size=size, channels=channels, split="test").batch(slice(0, count))
    tiles = Tiles(size=size, channels=channels)
    nets: dict[str, Denoiser] = {
        name: partial(restore_picture, predictor(bank[name]), process=noise, tiles=tiles, steps=steps) for name in bank
    }
    records = compare_denoisers(nets, list((clean / 2 + 0.5).unbind(0)), sigma, 0)
    return {one.name: one.psnr_db for one in records}


def paired(more: np.ndarray) -> str:
    """The mean of differences over seeds and its 95 % interval by Student's t; one difference has none."""
    if len(more) < 2:
        return f"{more.mean():+.3g}"
    half = stats.t.ppf(0.975, len(more) - 1) * more.std(ddof=1) / len(more) ** 0.5
    return f"{more.mean():+.3g} [{more.mean() - half:+.3g}, {more.mean() + half:+.3g}]"


def tables(columns: Mapping[str, Mapping[str, float]], bank: Bank, suite: Suite, args: argparse.Namespace) -> Iterator:
    """Every row's mean over seeds and its ratio to the teacher; what each ingredient does, paired over seeds."""
    seeds = range(args.seeds)
    rows = [row for name in args.only or suite.students for row in suite.students[name].entries]
    by = {c: {row: np.array([col[f"{row} {s}"] for s in seeds]) for row in rows} for c, col in columns.items()}
    prices = bank.prices()
    lines = [("the teacher", "1", *(f"{columns[c]['full']:.4g}" for c in columns))]
    for row in rows:
        cells = (_spread(by[c][row], columns[c]["full"]) for c in by)
        lines.append((row, f"1/{prices['full'].macs / prices[f'{row} 0'].macs:.2g}", *cells))
    told = f"Means of {len(seeds)} trainings ± their spread" if len(seeds) > 1 else "One training each"
    note = f"{told}, in brackets of the teacher's; {args.images} pictures."
    yield Table(title="Students", columns=("", "MACs", *columns), rows=tuple(lines), note=note)
    effects = [
        (what, *(paired(by[c][ours] - by[c][other]) for c in by))
        for what, (ours, other) in suite.effects.items()
        if ours in rows and other in rows
    ]
    note = "Below zero: better (but for the PSNR)." + " Paired over the seeds, 95 % by Student's t." * (len(seeds) > 1)
    yield Table(title="What each ingredient does", columns=("", *columns), rows=tuple(effects), note=note)


def _spread(values: np.ndarray, of: float) -> str:
    spread = f" ± {values.std(ddof=1):.2g}" if len(values) > 1 else ""
    return f"{values.mean():.4g}{spread} ({values.mean() / of:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=tuple(SUITES))
    parser.add_argument("--size", type=int, choices=(16, 32), default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--features", nargs="*", default=["fashion", "imagenet"])
    parser.add_argument("--only", nargs="*", help="these trainings alone")
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--bank", type=Path, help="write this pipeline and measure nothing")
    parser.add_argument("--set", action="append", default=[], help="edit the recipe, as halfstep's --set")
    parser.add_argument("--work", type=Path, default=Path("runs/seeds"))
    args = parser.parse_args()
    watch, suite = RichWatch(), SUITES[args.suite]
    recipe = recipe_of(suite, args.size, args.set)
    args.seeds = 1 if args.bank else args.seeds
    runs = trained(args, suite, recipe, watch)
    if args.train_only:
        return
    bank, noise = gathered(args, suite, runs)
    if args.bank:
        StepAwarePipeline(bank, reference_plan(bank, noise, recipe.sample)).save_pretrained(args.bank)
        return
    losses = {name: float(found.mean()) for name, found in held_out(bank, noise, 2048).items()}
    columns = {"loss": losses, **distances(bank, noise, recipe, args, watch)}
    if args.suite == "continuous":
        columns["PSNR, dB"] = restored(bank, noise)
    text = [f"# {suite.title}", f"{recipe.train.steps} steps of {recipe.train.batch} each."]
    for table in tables(columns, bank, suite, args):
        text.append(f"## {table.title}\n\n{markdown(table)}")
        Console().print(rich_table(table))
    few = f"-{args.seeds}" if args.seeds != parser.get_default("seeds") else ""
    Path(__file__).with_name(f"seeds-{args.suite}{args.size}{few}.md").write_text("\n\n".join(text) + "\n")


if __name__ == "__main__":
    main()
