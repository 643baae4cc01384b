"""The Missing U on Fashion-MNIST 32x32: the continuous U-Net beside plain U-Nets, claim by claim.

    python benchmarks/continuous.py               # trains what is missing, resumable

All nets see the same images for the same steps: the usual U-Net (benchmarks/models/fashion32-dense), one shrunk to the
continuous net's parameters, one to its MACs, the continuous net trained for 1, 2 and 4 solver steps at once, the same
for one step only, and one of fewer levels. Parts, whose rows are kept in a file and not measured again:

memory     peak and time of a training step by plain, checkpointed and adjoint backpropagation; needs no training
cost       parameters, MACs and latency, eager and compiled; needs no training
loss       the held-out loss; the net trained for one step at 2 and 4 steps too
quality    the Fréchet distance at 5, 10, 20 and 50 DDIM steps
perturbed  what too strong or too weak start noise does
variants   held-out losses after short trainings: order 1 and 2, fewer levels, two rates, the U-Net of equal MACs
denoise    PSNR and SSIM of restored test pictures beside classical denoisers

The report has the training losses by images seen too. All to runs/continuous/, the tables to benchmarks/continuous.md.
"""

from __future__ import annotations

import halfstep.core.threads  # noqa: F401  # isort: skip (before torch)
import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from fashion import DATA, MODELS, file_name, loss_table, markdown, paired
from halfstep.app import verbs
from halfstep.app.measurement import judge_for
from halfstep.app.subject import open_subject
from halfstep.app.terminal import RichWatch
from halfstep.core import disk
from halfstep.core.plan import StepPlan
from halfstep.core.recipe import ContinuousSpec, ModelSpec, Recipe
from halfstep.core.recipes import named
from halfstep.core.results import read_comparison
from halfstep.core.typed import build
from halfstep.data.images import load_images
from halfstep.data.pictures import picture_grid
from halfstep.engine.bank import Bank
from halfstep.engine.profiling import call_times, count_macs, interleave, peak_mib
from halfstep.engine.sampling import denoise, fewer_steps, image_generators, reference_plan, start_noise, to_images
from halfstep.measure.features import extract
from halfstep.measure.judge import Judge, measure_plans
from halfstep.measure.quality import compare
from halfstep.measure.restore import CLASSICAL, Denoiser, Tiles, compare_denoisers, restore_picture
from halfstep.methods.continuous import continuous_net
from halfstep.nets.continuous import with_solver
from halfstep.nets.denoiser import Memo, predictor
from halfstep.nets.fresh import new_model
from halfstep.nets.models import load_denoiser
from halfstep.report.figures import Curve
from halfstep.report.page import Report, Table, rich_table, write_report
from halfstep.report.words import change_cell, quality_cell

STEPS = (5, 10, 20, 50)
PARTS = ("memory", "cost", "loss", "quality", "perturbed", "variants", "denoise")
SMALL = ContinuousSpec(base=4, levels=3, head_dim=16, teacher=0.0)
ONE_STEP = replace(SMALL, steps=(1,))
TWO_LEVELS = replace(ONE_STEP, base=8, levels=2, attention=False)
Specs = Mapping[str, ContinuousSpec | ModelSpec]
NETS: Specs = {
    "continuous": SMALL,
    "continuous, one step only": ONE_STEP,
    "continuous, two levels": TWO_LEVELS,
    "U-Net, equal parameters": ModelSpec(channels=(16, 30, 30), attention=(False,) * 3, head_dim=30, groups=2),
    "U-Net, equal MACs": ModelSpec(channels=(12, 24, 24), attention=(False,) * 3, head_dim=24, groups=4),
}


SHORT = 600
VARIANTS: Specs = {
    "order 1": ONE_STEP,
    "order 2": replace(ONE_STEP, base=6, order=2),
    "two levels": TWO_LEVELS,
    "U-Net, equal MACs": NETS["U-Net, equal MACs"],
}


def compared(specs: Specs, net_of: Callable[[str, ContinuousSpec | ModelSpec], Any]) -> Bank:
    """Every net of a comparison as a bank, the continuous ones by solver steps; "U-Net" is the reference."""
    dense, noise = load_denoiser(MODELS / "fashion32-dense")
    nets = {"U-Net": dense}
    for name, spec in specs.items():
        net = net_of(name, spec).eval()
        nets |= (
            {name: net} if isinstance(spec, ModelSpec) else {f"{name} @{n}": with_solver(net, n) for n in spec.steps}
        )
    return Bank(nets, "U-Net", noise["prediction_type"])


def trained(work: Path, recipe: Recipe, watch: RichWatch, specs: Specs = NETS) -> Bank:
    """The nets after their trainings, which resume."""

    def net_of(name: str, spec: ContinuousSpec | ModelSpec) -> Any:
        out = work / file_name(name)
        if isinstance(spec, ModelSpec):
            return load_denoiser(verbs.train(DATA, out, replace(recipe, model=spec), watch=watch))[0]
        pipe = verbs.make("continuous", None, DATA, out, replace(recipe, continuous=spec), watch=watch)
        return pipe.bank[f"continuous@{min(spec.steps)}"]

    return compared(specs, net_of)


def untrained(recipe: Recipe) -> Bank:
    """The nets before any training: for what they cost."""
    images = load_images(DATA, size=recipe.data.size, channels=recipe.data.channels, split="test")

    def net_of(_name: str, spec: ContinuousSpec | ModelSpec) -> Any:
        if isinstance(spec, ModelSpec):
            return new_model(spec, images, recipe.noise.timesteps)
        return continuous_net(replace(recipe, continuous=spec), images)

    return compared(NETS, net_of)


def some(bank: Bank, names: Sequence[str]) -> Bank:
    """These entries beside the reference."""
    wanted = dict.fromkeys(("U-Net", *names))
    return Bank({name: bank[name] for name in wanted}, "U-Net", bank.prediction_type)


def cost_table(bank: Bank, repeats: int) -> Table:
    """Parameters, MACs and latency of one call at batch 64, eager and compiled, all in turns."""
    nets = {name: bank[name] for name in bank}
    eager = call_times(nets, batch=64, repeats=repeats)
    faster = {name: cast(torch.nn.Module, torch.compile(net)) for name, net in nets.items()}
    compiled = call_times(faster, batch=64, repeats=repeats)
    first, rows = nets["U-Net"], []
    for name, net in nets.items():
        times = [sorted(found[name])[len(found[name]) // 2] for found in (eager, compiled)]
        size, macs = net.num_parameters(), count_macs(net)
        rows.append(
            (
                name,
                f"{size / 1e3:,.0f} k",
                f"{size / first.num_parameters():.0%}",
                f"{macs / 1e6:,.1f}",
                f"{macs / count_macs(first):.0%}",
                *(f"{t:.0f}" for t in times),
            )
        )
    columns = ("net", "parameters", "share", "MMACs", "share", "ms eager", "ms compiled")
    note = f"One call at batch 64, median of {repeats} in turns, {torch.get_num_threads()} threads, float32."
    return Table(title="What one call costs", columns=columns, rows=tuple(rows), note=note)


def quality_table(judge: Judge, plan: StepPlan, recipe: Recipe, work: Path, watch: RichWatch) -> Table:
    """Fréchet distance by DDIM steps, every cell measured once and kept; pictures-N.png has a row for every net."""
    cells: dict[str, list[str]] = {name: [name] for name in judge.bank}
    plan_of = {name: "reference" if name == "U-Net" else name for name in judge.bank}
    for steps in STEPS:
        file = work / f"quality-{steps}.json"
        rows_of = read_comparison(file, "delete it", rows=()).plans if file.is_file() else {}
        missing = [name for name in judge.bank if name not in ("U-Net", *rows_of)]
        if missing:
            base = fewer_steps(plan, steps)
            plans = {"reference": base} | {name: base.uniform(name) for name in missing}
            verdict = measure_plans(judge, plans, recipe, repeats=1, watch=watch)
            for name, drawn in verdict.pictures.items():
                disk.write_png(row_of_pictures(work, name, steps), picture_grid(drawn[:16], columns=16))
            rows_of = rows_of | verdict.record.plans
            disk.write_json(file, replace(verdict.record, plans=rows_of).to_json())
        rows = [np.asarray(Image.open(row_of_pictures(work, name, steps))) for name in plan_of.values()]
        disk.write_png(work / f"pictures-{steps}.png", Image.fromarray(np.concatenate(rows)))
        for name in judge.bank:
            row = rows_of[plan_of[name]]
            change = "" if name == "U-Net" else f", {change_cell(row.difference)}"
            cells[name].append(quality_cell(row.quality["fd"]) + change)
    note = f"Fréchet distance with 95 % interval, change to the U-Net of as many steps, n = {recipe.eval.images}, DDIM."
    columns = ("net", *(f"{steps} steps" for steps in STEPS))
    return Table(title="Quality by sampling steps", columns=columns, rows=tuple(map(tuple, cells.values())), note=note)


def row_of_pictures(work: Path, name: str, steps: int) -> Path:
    """The file with a net's pictures."""
    return work / "pictures" / f"{file_name(name)}-{steps}.png"


def denoise_table(bank: Bank, noise: dict, sigma: float = 0.1, count: int = 64, steps: int = 4) -> Table:
    """How well noisy test pictures are restored: the nets, and classical methods."""
    images = load_images(DATA, size=bank.config["sample_size"], channels=bank.config["in_channels"], split="test")
    pictures = list((images.batch(slice(0, count)) / 2 + 0.5).unbind(0))
    tiles = Tiles(size=images.size, channels=images.channels)
    methods: dict[str, Denoiser] = {
        name: partial(restore_picture, predictor(bank[name]), process=noise, tiles=tiles, steps=steps) for name in bank
    }
    records = compare_denoisers(methods | CLASSICAL, pictures, sigma, 0)
    first = torch.tensor(records[0].psnrs_db)
    rows = []
    for record in records:
        more = paired(torch.tensor(record.psnrs_db) - first, 2)
        rows.append((record.name, f"{record.psnr_db:.2f}", more, f"{record.ssim:.3f}", f"{record.ms:.0f}"))
    note = f"{count} test pictures with noise {sigma:g} ({records[0].noisy_psnr_db:.1f} dB), {steps} steps; paired."
    columns = ("method", "PSNR dB", "more than U-Net", "SSIM", "ms per picture")
    return Table(title="Denoising", columns=columns, rows=tuple(rows), note=note)


def perturbed_table(judge: Judge, plan: StepPlan, names: Sequence[str], count: int, bootstrap: int) -> Table:
    """How the Fréchet distance changes when the start noise is 5 % too large or too small, 20 steps."""
    rows = []
    for name in names:
        features = {}
        for factor in (1.0, 0.95, 1.05):
            drawn = []
            for begin in range(0, count, 128):
                generators = image_generators(77, begin, min(128, count - begin))
                noise = factor * start_noise(judge.bank, generators)
                drawn.append(to_images(judge.bank, denoise(judge.bank, plan.uniform(name), noise, generators)))
            features[factor] = extract(judge.extractor, iter(drawn))
        changes = (compare(features[1.0], features[f], judge.reference, n_boot=bootstrap) for f in (0.95, 1.05))
        rows.append((name, f"{judge.fd(features[1.0]):.2f}", *map(change_cell, changes)))
    columns = ("net", "as it is", "noise x 0.95", "noise x 1.05")
    note = f"Fréchet distance, n = {count}, 20 DDIM steps; the changes are paired, 95 % intervals."
    return Table(title="Perturbed start noise", columns=columns, rows=tuple(rows), note=note)


def variants_table(recipe: Recipe, work: Path, watch: RichWatch) -> Table:
    """Held-out losses after short trainings: order 1 and 2, fewer levels, two rates, and the U-Net of equal MACs."""
    short = replace(recipe, train=replace(recipe.train, steps=SHORT))
    bank = trained(work / "variants", short, watch, VARIANTS)
    slower = replace(short, train=replace(short.train, lr=recipe.train.lr / 3))
    slow = trained(work / "variants-slower", slower, watch, {"order 1": ONE_STEP})
    bank = bank.with_entry("order 1 @1, a third of the rate", slow["order 1 @1"], bank.prediction_type)
    table = loss_table(bank, load_denoiser(MODELS / "fashion32-dense")[1])
    cost = {
        name: (f"{bank[name].num_parameters() / 1e3:,.0f} k", f"{count_macs(bank[name]) / 1e6:,.1f}") for name in bank
    }
    rows = tuple((row[0], *cost[row[0]], *row[1:]) for row in table.rows)
    columns = (table.columns[0], "parameters", "MMACs", *table.columns[1:])
    return replace(table, title=f"Held-out loss after {SHORT} steps (U-Net: 4,500)", columns=columns, rows=rows)


def memory_table(bank: Bank, repeats: int) -> Table:
    """Peak memory and time of one training step at batch 64, by solver steps and by the way of backpropagation."""
    rows = []
    for steps in (1, 2, 4):
        calls = {}
        for kind in ("plain", "checkpointed", "adjoint"):
            net = with_solver(bank["continuous @1"], steps, "adjoint" if kind == "adjoint" else "rk4")
            net = net.requires_grad_(True).train()
            if kind == "checkpointed":
                net.enable_gradient_checkpointing()

            def step(net: torch.nn.Module = net) -> None:
                noise, at = torch.randn(64, 1, 32, 32), torch.full((64,), 500)
                predictor(net)(noise, at, {}, Memo()).square().mean().backward()
                net.zero_grad(set_to_none=True)

            calls[kind] = step
        times = interleave(calls, repeats=repeats, warmup=1)
        cells = (f"{peak_mib(call):,.0f} MiB, {median(times[kind]):,.0f} ms" for kind, call in calls.items())
        rows.append((f"{steps}", *cells))
    columns = ("solver steps", "plain", "checkpointed", "adjoint")
    note = f"Peak memory, and the median time of {repeats} in turns. {torch.get_num_threads()} threads, float32, CPU."
    return Table(title="One training step, batch 64", columns=columns, rows=tuple(rows), note=note)


def kept(work: Path, part: str) -> Table | None:
    """A part's table as far as it was measured."""
    file = work / f"{part}.json"
    return build(Table, disk.read_json(file, what="a table", do="delete it"), "", file) if file.is_file() else None


def grow(work: Path, part: str, names: Iterable[str], make: Callable[[list[str]], Table]) -> None:
    """Measure the rows of these names that a part's table lacks."""
    old = kept(work, part)
    rows = {row[0]: row for row in old.rows} if old else {}
    missing = [name for name in names if name not in rows]
    if missing:
        new = make(missing)
        rows = {row[0]: row for row in new.rows} | rows
        disk.write_json(work / f"{part}.json", asdict(replace(new, rows=tuple(rows.values()))))


def measure_costs(part: str, recipe: Recipe, work: Path, repeats: int) -> None:
    """Memory or cost, as far as it is not there yet: of untrained nets."""
    bank = untrained(recipe)
    if part == "memory":
        grow(work, part, ("1", "2", "4"), lambda _: memory_table(bank, repeats))
    else:
        grow(work, part, bank, lambda names: cost_table(some(bank, names), repeats))


def measure_quality(part: str, judge: Judge, noise: dict, recipe: Recipe, work: Path, watch: RichWatch) -> None:
    """What trained nets are judged by, as far as it is not there yet."""
    bank, name = judge.bank, "continuous, one step only"
    plan = reference_plan(bank, noise, recipe.sample)
    if part == "quality":
        disk.write_json(work / "quality.json", asdict(quality_table(judge, plan, recipe, work, watch)))
    elif part == "perturbed":
        images, bootstrap = recipe.eval.images // 2, recipe.eval.bootstrap
        grow(work, part, bank, lambda names: perturbed_table(judge, plan, names, images, bootstrap))
    elif part == "denoise":
        grow(work, part, bank, lambda names: denoise_table(some(bank, names), noise))
    else:
        more = {f"{name} @{n}": with_solver(bank[f"{name} @1"], n) for n in (2, 4)}
        wide = Bank({n: bank[n] for n in bank} | more, "U-Net", bank.prediction_type)
        grow(work, part, wide, lambda names: loss_table(some(wide, names), noise))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be repeated")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--set", action="append", default=[], help="edit the recipe, as halfstep's --set")
    parser.add_argument("--work", type=Path, default=Path("runs/continuous"))
    args = parser.parse_args()
    watch, work = RichWatch(), args.work
    work.mkdir(parents=True, exist_ok=True)
    settings = ("sample.steps=20", "sample.batch=128", "eval.images=1024")
    recipe = named("fashion32-dense").edit([*settings, *args.set])
    if args.train_only:
        trained(work, recipe, watch)
        return
    parts = args.part or PARTS
    for part in ("memory", "cost"):
        if part in parts:
            measure_costs(part, recipe, work, args.repeats)
    if "variants" in parts:
        grow(work, "variants", ("U-Net",), lambda _: variants_table(recipe, work, watch))
    trainings = [part for part in parts if part not in ("memory", "cost", "variants")]
    if trainings:
        subject = open_subject(None, DATA, recipe, watch=watch)
        judge = judge_for(trained(work, recipe, watch), subject, work, watch)
        for part in trainings:
            measure_quality(part, judge, load_denoiser(MODELS / "fashion32-dense")[1], recipe, work, watch)
    tables = tuple(table for table in (kept(work, part) for part in PARTS) if table)
    lines = {}
    for log in sorted(work.glob("*/log.jsonl")):
        batch = recipe.train.batch
        lines[log.parent.name] = tuple((r["step"] * batch, r["loss"]) for r in disk.read_records(log))
    curve = Curve(title="Training loss by images seen", xlabel="images", ylabel="loss", lines=lines)
    summary = f"Where nets were trained: each {recipe.train.steps} steps of {recipe.train.batch} on the same images."
    figures = (curve,) if lines else ()
    write_report(Report(title="The Missing U", summary=summary, facts={}, parts=(*tables, *figures)), work)
    text = ["# The Missing U, Fashion-MNIST 32x32", summary, *map(markdown, tables)]
    Path(__file__).with_suffix(".md").write_text("\n\n".join(text) + "\n")
    for table in tables:
        Console().print(rich_table(table))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
