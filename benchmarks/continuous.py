"""The Missing U on Fashion-MNIST 32x32: the continuous U-Net beside plain U-Nets, claim by claim.

    python benchmarks/continuous.py               # trains what is missing, resumable

All nets see the same images for the same steps: the usual U-Net (benchmarks/models/fashion32-dense), one shrunk to the
continuous net's parameters, one to its MACs, the continuous net trained for 1, 2 and 4 solver steps at once, the same
for one step only, and one of second order. Tables: Fréchet distance at 5, 10, 20 and 50 DDIM steps; parameters, MACs
and latency, eager and compiled; training loss by images seen; what perturbed noise does; peak memory of a training step
by plain, checkpointed and adjoint backpropagation. All to runs/continuous/, the tables to benchmarks/continuous.md.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console

from fashion import DATA, MODELS, markdown
from halfstep import compress, disk, story
from halfstep.bank import Bank, load_denoiser
from halfstep.cli import RichWatch
from halfstep.continuous import with_solver
from halfstep.evaluate import extract
from halfstep.judge import Judge, measure_plans
from halfstep.measured import judge_for, open_pipeline
from halfstep.plan import StepPlan
from halfstep.profiling import call_times, count_macs, peak_mib
from halfstep.recipe import ContinuousSpec, ModelSpec, Recipe
from halfstep.recipes import named
from halfstep.report import Curve, Report, Table, rich_table, write_report
from halfstep.run import train
from halfstep.sampling import denoise, fewer_steps, image_generators, reference_plan, start_noise, to_images

STEPS = (5, 10, 20, 50)
SMALL = ContinuousSpec(base=4, levels=3, head_dim=16, teacher=0.0)
NETS = {
    "continuous": SMALL,
    "continuous, one step only": replace(SMALL, steps=(1,)),
    "continuous, order 2": replace(SMALL, base=6, order=2),
    "U-Net, equal parameters": ModelSpec(channels=(16, 30, 30), attention=(False,) * 3, head_dim=30, groups=2),
    "U-Net, equal MACs": ModelSpec(channels=(12, 24, 24), attention=(False,) * 3, head_dim=24, groups=4),
}


def trained(work: Path, recipe: Recipe, watch: RichWatch) -> Bank:
    """Every net of the comparison as a bank; "U-Net" is the reference."""
    dense, noise = load_denoiser(MODELS / "fashion32-dense")
    bank = Bank({"U-Net": dense}, "U-Net", noise["prediction_type"])
    for name, spec in NETS.items():
        out = work / name.replace(", ", "-").replace(" ", "-")
        if isinstance(spec, ModelSpec):
            made = {name: load_denoiser(train(DATA, out, replace(recipe, model=spec), watch=watch))[0]}
        else:
            pipe = open_pipeline(str(compress.continuous(DATA, out, replace(recipe, continuous=spec), watch=watch)))
            made = {f"{name} @{entry.split('@')[1]}": pipe.bank[entry] for entry in pipe.bank}
        for title, net in made.items():
            bank = bank.with_entry(title, net, bank.prediction_type)
    return bank


def cost_table(bank: Bank, repeats: int) -> Table:
    """Parameters, MACs and latency of one call at batch 64, eager and compiled, all in turns."""
    nets = {name: bank[name] for name in bank}
    eager = call_times(nets, batch=64, repeats=repeats)
    compiled = call_times({name: torch.compile(net) for name, net in nets.items()}, batch=64, repeats=repeats)
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
    """Fréchet distance by DDIM steps; each column is measured once and kept."""
    cells: dict[str, list[str]] = {name: [name] for name in judge.bank}
    for steps in STEPS:
        file = work / f"quality-{steps}.json"
        if not file.is_file():
            base = fewer_steps(plan, steps)
            plans = {"reference": base} | {name: base.uniform(name) for name in judge.bank if name != "U-Net"}
            disk.write_json(file, measure_plans(judge, plans, recipe, repeats=1, watch=watch).record)
        record = disk.read_json(file, what="qualities", do="delete it")
        for name, row in record["plans"].items():
            cells["U-Net" if name == "reference" else name].append(story.quality_cell(row["quality"]["fd"]))
    note = f"Fréchet distance with 95 % interval, n = {recipe.eval.images}, the same seeds, DDIM."
    rows = tuple(tuple(row) for row in cells.values())
    return Table(
        title="Quality by sampling steps", columns=("net", *(f"{s} steps" for s in STEPS)), rows=rows, note=note
    )


def perturbed_table(judge: Judge, plan: StepPlan, count: int) -> Table:
    """Fréchet distance when the start noise is 5 % too large or too small, 20 steps."""
    rows = []
    for name in judge.bank:
        scores = []
        for factor in (0.95, 1.0, 1.05):
            drawn = []
            for begin in range(0, count, 128):
                generators = image_generators(77, begin, 128)
                noise = factor * start_noise(judge.bank, generators)
                drawn.append(to_images(judge.bank, denoise(judge.bank, plan.uniform(name), noise, generators)))
            scores.append(judge.fd(extract(judge.extractor, iter(drawn))))
        rows.append((name, *(f"{score:.2f}" for score in scores)))
    columns = ("net", "noise x 0.95", "noise x 1", "noise x 1.05")
    note = f"Fréchet distance, n = {count}, 20 DDIM steps."
    return Table(title="Perturbed start noise", columns=columns, rows=tuple(rows), note=note)


def memory_table(bank: Bank) -> Table:
    """Peak memory of one training step at batch 64, by solver steps and by the way of backpropagation."""
    rows = []
    for steps in (1, 2, 4):
        cells = []
        for kind in ("plain", "checkpointed", "adjoint"):
            net = with_solver(bank["continuous @1"], steps, "adjoint" if kind == "adjoint" else "rk4")
            net = net.requires_grad_(True).train()
            if kind == "checkpointed":
                net.enable_gradient_checkpointing()

            def step(net: torch.nn.Module = net) -> None:
                F.mse_loss(net(torch.randn(64, 1, 32, 32), torch.full((64,), 500)).sample, torch.zeros(1)).backward()
                net.zero_grad(set_to_none=True)

            cells.append(f"{peak_mib(step):,.0f}")
        rows.append((f"{steps}", *cells))
    columns = ("solver steps", "plain", "checkpointed", "adjoint")
    return Table(title="Peak MiB of a training step, batch 64", columns=columns, rows=tuple(rows), note="float32, CPU.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--set", action="append", default=[], help="edit the recipe, as halfstep's --set")
    parser.add_argument("--work", type=Path, default=Path("runs/continuous"))
    args = parser.parse_args()
    watch, work = RichWatch(), args.work
    work.mkdir(parents=True, exist_ok=True)
    recipe = named("fashion32-dense").edit(args.set)
    bank = trained(work, recipe, watch)
    if args.train_only:
        return
    recipe = replace(recipe, sample=replace(recipe.sample, steps=20, batch=128), eval=replace(recipe.eval, images=1024))
    recipe = recipe.edit(args.set)
    judge, recipe = judge_for(bank, DATA, recipe, work, watch)
    noise = load_denoiser(MODELS / "fashion32-dense")[1]
    plan = reference_plan(bank, noise, recipe.sample, bank.macs())
    tables = [quality_table(judge, plan, recipe, work, watch), perturbed_table(judge, plan, 512)]
    tables += [cost_table(bank, args.repeats), memory_table(bank)]
    lines = {}
    for log in sorted(work.glob("*/log.jsonl")):
        batch = recipe.train.batch
        lines[log.parent.name] = tuple((r["step"] * batch, r["loss"]) for r in disk.read_records(log))
    curve = Curve(title="Training loss by images seen", xlabel="images", ylabel="loss", lines=lines)
    summary = f"Every net: {recipe.train.steps} steps of {recipe.train.batch} on the same images."
    write_report(Report(title="The Missing U", summary=summary, facts={}, tables=tuple(tables), figures=(curve,)), work)
    text = ["# The Missing U, Fashion-MNIST 32x32", summary, *map(markdown, tables)]
    Path(__file__).with_suffix(".md").write_text("\n\n".join(text) + "\n")
    (work / "tables.json").write_text(json.dumps([table.rows for table in tables], indent=2))
    for table in tables:
        Console().print(rich_table(table))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
