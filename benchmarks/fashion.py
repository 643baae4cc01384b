"""The claim of DDSM on Fashion-MNIST, beside every control, as one table.

    python benchmarks/fashion.py --size 16            # with the models in benchmarks/models/
    python benchmarks/fashion.py --size 16 --train  # trains them here first (resumable; 1.5 hours on 2 cores)

Rows: dense DDIM at 50 and 20 steps, uniform widths, random plans, fewer steps at equal MACs, a small model trained
alone for as long as the dense one, the searched plan; and the three searches (frontier alone, NSGA-II alone, both) at
the same number of generated images. Everything goes to runs/fashion<size>/, the table to
benchmarks/fashion<size>-<budget>.md.
"""

from __future__ import annotations

import halfstep.core.threads  # noqa: F401  # isort: skip (before torch)
import argparse
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from rich.console import Console

from halfstep.app import verbs
from halfstep.app.measurement import judge_for
from halfstep.app.subject import open_subject
from halfstep.app.terminal import RichWatch
from halfstep.core import disk
from halfstep.core.plan import StepPlan
from halfstep.core.recipe import Recipe
from halfstep.core.recipes import named
from halfstep.data.images import load_images
from halfstep.engine.bank import Bank
from halfstep.engine.sampling import fewer_steps, reference_plan
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.measure.judge import Judge, measure_plans
from halfstep.measure.quality import Distances
from halfstep.nets.denoiser import Memo, predictor
from halfstep.nets.models import load_denoiser
from halfstep.report import page as pages
from halfstep.report.charts import pareto, plan_chart
from halfstep.report.figures import Curve
from halfstep.report.page import Grid, Report, Table, rich_table, write_report
from halfstep.report.tables import plans_table
from halfstep.report.words import summary
from halfstep.search.driver import search_plan
from halfstep.search.scores import open_scores
from halfstep.search.space import random_plans

DATA = "idx:/usr/share/datasets/fashion-mnist"
MODELS = Path(os.path.relpath(Path(__file__).parent / "models"))
SMALL = {16: ((32, 32, 32), 8), 32: ((16, 32, 32), 8)}
"""Channels and groups of the small model: half the dense width, a quarter of the MACs."""


def trained(size: int, work: Path, watch: RichWatch, skip_small: bool) -> dict[str, Path]:
    """The three trained models, from `benchmarks/models` or trained here: dense, small, supernet."""
    dense_recipe, slim_recipe = named(f"fashion{size}-dense"), named(f"fashion{size}")
    channels, groups = SMALL[size]
    small_recipe = replace(dense_recipe, model=replace(dense_recipe.model, channels=channels, groups=groups))
    stored = {name: MODELS / f"fashion{size}-{name}" for name in ("dense", "small", "supernet")}
    found = {}
    for name, recipe in (("dense", dense_recipe), ("supernet", slim_recipe), ("small", small_recipe)):
        if stored[name].is_dir():
            found[name] = stored[name]
        elif name == "small" and skip_small:
            continue
        elif name == "supernet":
            verbs.make("slimmable", str(found["dense"]), DATA, work / name, recipe, watch=watch)
            found[name] = work / name / "pipeline"
        else:
            found[name] = verbs.train(DATA, work / name, recipe, watch=watch)
    return found


def export(size: int, work: Path) -> None:
    """Copy the models trained under `work` to `benchmarks/models` in fp16."""
    for name in ("dense", "supernet", "small") if size != 16 else ("small",):  # benchmarks/bundle.py writes the others
        source, target = work / name / "pipeline", MODELS / f"fashion{size}-{name}"
        if (source / "plan.json").is_file():
            pipe = StepAwarePipeline.from_pretrained(source)
            pipe.bank.half()
            pipe.save_pretrained(target)
        elif source.is_dir():
            pipeline = DDPMPipeline.from_pretrained(source, torch_dtype=torch.float16)
            disk.write_atomic(target, pipeline.save_pretrained)


def with_small(bank: Bank, folder: Path) -> Bank:
    """The bank with the small model as one more entry, so that one judge measures it on the same noise."""
    return bank.with_entry("small", load_denoiser(folder)[0].to(bank.device), bank.prediction_type)


def searches(
    judge: Judge, plan: StepPlan, recipe: Recipe, work: Path, budget: float, watch: RichWatch, all_three: bool
) -> dict:
    """Frontier alone, NSGA-II alone, and both, for the same number of generated images (the table's trajectories
    counted by the share of rows that they run)."""
    spec = recipe.search
    genes, entries = min(spec.genes, len(plan.rows)), len(judge.bank) - 1
    trajectories = (
        entries * (genes + 1) / 2 + entries + 1
    )  # a swap runs the rows from its gene on; local errors run all
    table = round(trajectories * spec.error_images / spec.images)  # in plans
    total = table + spec.fit + spec.population * spec.generations
    generations = -(-total // spec.population)
    methods = {
        "frontier + NSGA-II": replace(spec, method="both"),
        "frontier alone": replace(spec, method="frontier", fit=total - table - 1),
        "NSGA-II alone": replace(spec, method="nsga2", init="uniform", generations=generations),
    }
    if not all_three:
        methods = {"frontier + NSGA-II": spec}
    found = {}
    for name, search in methods.items():
        folder = work / "search" / f"{name.replace(' ', '_').replace('+', 'and')}-{budget * 100:.0f}"
        folder.mkdir(parents=True, exist_ok=True)
        errors = work / "search" / "errors.json"
        if errors.is_file():
            shutil.copy(errors, folder / "errors.json")  # one table serves all three
        book, edited = open_scores(judge, folder), replace(recipe, search=search)
        found[name] = search_plan(book, plan, edited, folder, budget=budget, watch=watch)
        shutil.copy(folder / "errors.json", errors)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, choices=(16, 32), default=16)
    parser.add_argument("--budget", type=float, default=0.5, help="share of the dense MACs; a page for each")
    parser.add_argument("--train", action="store_true", help="ignore the stored models and train here")
    parser.add_argument("--export", action="store_true", help="only copy the trained models to benchmarks/models, fp16")
    parser.add_argument("--skip-small", action="store_true", help="leave out the small model trained alone")
    parser.add_argument("--one-search", action="store_true", help="leave out frontier alone and NSGA-II alone")
    parser.add_argument("--repeats", type=int, default=5, help="timed trajectories of each plan")
    parser.add_argument("--confirm", type=int, metavar="N", help="only measure the found plan again, on N images")
    parser.add_argument("--set", action="append", default=[], help="edit the recipe, as halfstep's --set")
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    if args.train:
        global MODELS
        MODELS = Path("/nonexistent")
    watch, work = RichWatch(), args.work or Path(f"runs/fashion{args.size}")
    work.mkdir(parents=True, exist_ok=True)
    if args.export:
        return export(args.size, work)
    if args.confirm:
        return confirm(args.size, args.budget, args.confirm, work, named(f"fashion{args.size}").edit(args.set), watch)
    folders = trained(args.size, work, watch, args.skip_small)
    pipe = StepAwarePipeline.from_pretrained(folders["supernet"])
    recipe = named(f"fashion{args.size}").edit(args.set)
    judge = judge_for(pipe.bank, open_subject(None, DATA, recipe, watch=watch), work, watch)
    plan = reference_plan(pipe.bank, pipe.process, recipe.sample)
    found = searches(judge, plan, recipe, work, args.budget, watch, not args.one_search)
    if "small" in folders:
        judge.bank = with_small(pipe.bank, folders["small"])
        plan = replace(plan, prices=judge.bank.prices())
    best = found["frontier + NSGA-II"]  # the default method; the others are its controls
    space = best.space
    plans = {"reference": plan, "plan": plan.with_entries(best.plan.entries)}
    plans["plan"].save(work / f"plan-{args.budget * 100:.0f}.json")
    if len(found) > 1:
        others = {f"plan, {name}": one for name, one in found.items() if one is not best}
        plans |= {name: plan.with_entries(one.plan.entries) for name, one in others.items()}
    plans |= {f"uniform {name}": plan.uniform(name) for name in plan.prices if name not in ("full", "small")}
    for i, genes in enumerate(random_plans(space, best.plan.macs, 3, seed=11)):
        plans[f"random plan {i + 1}"] = plan.with_entries(space.expand(genes))
    fewer = max(1, int(plan.sampler.steps * best.plan.share))
    plans[f"dense, {fewer} steps"] = fewer_steps(plan, fewer)
    if "small" in folders:
        plans["small model alone"] = plan.uniform("small")
    plans["dense, 50 steps"] = fewer_steps(plan, 50)
    verdict = measure_plans(judge, plans, recipe, repeats=args.repeats, batch=64, watch=watch)
    (work / "quality.json").write_text(json.dumps(verdict.record.to_json(), indent=2))
    table = plans_table(verdict.record, f"Fashion-MNIST {args.size}x{args.size}, budget {args.budget:.0%}")
    spent = searches_table(found, recipe, args.budget)
    report = Report(
        title=table.title,
        summary=summary(verdict.record, plans["plan"]),
        facts={key: str(value) for key, value in verdict.record.about.machine.items()},
        parts=(
            *(table, spent),
            *(Grid(title=n, images=x, columns=8) for n, x in verdict.pictures.items()),
            *(pareto(verdict.record, []), plan_chart(plans["plan"])),
            progress_curve(found, recipe.search.images),
        ),
    )
    write_report(report, work)
    text = "\n\n".join(
        [f"# {table.title}", report.summary, markdown(table), markdown(spent), f"```\n{plans['plan']}\n```"]
    )
    page_of(args.size, args.budget).write_text(text + "\n")
    Console().print(rich_table(table))
    Console().print(rich_table(spent))
    print(plans["plan"])
    print(report.summary)
    return None


def page_of(size: int, budget: float) -> Path:
    return Path(__file__).with_name(f"fashion{size}-{budget * 100:.0f}.md")


def confirm(size: int, budget: float, count: int, work: Path, recipe: Recipe, watch: RichWatch) -> None:
    """The plan of a finished run and the reference once more, on `count` images: a narrower interval of the change."""
    stored = MODELS / f"fashion{size}-supernet"
    pipe = StepAwarePipeline.from_pretrained(stored if stored.is_dir() else work / "supernet" / "pipeline")
    recipe = replace(recipe, seed=recipe.seed + 100, eval=replace(recipe.eval, images=count))
    judge = judge_for(pipe.bank, open_subject(None, DATA, recipe, watch=watch), work, watch)
    plan = StepPlan.load(work / f"plan-{budget * 100:.0f}.json")
    plans = {"reference": plan.uniform(plan.reference), "plan": plan}
    plans |= {f"uniform {name}": plan.uniform(name) for name in ("w0.75", "w0.50")}
    verdict = measure_plans(judge, plans, recipe, repeats=5, batch=64, watch=watch)
    (work / "confirmed.json").write_text(json.dumps(verdict.record.to_json(), indent=2))
    table = plans_table(verdict.record, f"The same plan on {count:,} images of other seeds")
    page = page_of(size, budget)
    kept = page.read_text().split("**The same plan on")[0].rstrip()
    page.write_text(f"{kept}\n\n{markdown(table)}\n")
    Console().print(rich_table(table))


def searches_table(found: dict, recipe: Recipe, budget: float) -> Table:
    rows = []
    for name, one in found.items():
        share = one.space.share
        best = min((g for g in one.measured if share(g) <= budget + 1e-9), key=one.measured.__getitem__)
        numbers = (f"{one.measured[best]:.3f}", f"{share(best):.1%}", f"{one.reference_score:.3f}")
        rows.append((name, f"{len(one.measured)}", *numbers))
    note = (
        f"Scores on {recipe.search.images} images of the search's own seed (common random numbers). The error table is "
        "counted as plans in the total that each search may spend."
    )
    columns = ("search", "plans measured", "best score", "share of MACs", "reference's score")
    return Table(
        title="The three searches at the same number of generated images", columns=columns, rows=tuple(rows), note=note
    )


def progress_curve(found: dict, images: int) -> Curve:
    """Best score within the budget against images generated."""
    lines = {}
    for name, one in found.items():
        points, best = [], float("inf")
        for i, (genes, score) in enumerate(one.measured.items()):
            if i and one.space.share(genes) <= one.plan.share + 0.02:  # the first is the reference
                best = min(best, score)
                points.append((float((i + 1) * images), best))
        lines[name] = tuple(points)
    return Curve(title="Search progress", xlabel="generated images", ylabel="best score within the budget", lines=lines)


@dataclass(frozen=True)
class KeptDistances:
    """Distances of plans by `images` pictures on the noise of `seed`, kept line by line, so that a run that is cut goes
    on; a file holds those of other numbers of pictures too."""

    file: Path
    images: int
    seed: int

    def read(self) -> dict[str, Distances]:
        """By the plan's digest."""
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        records = [one for one in map(json.loads, lines) if (one["n"], one["seed"]) == (self.images, self.seed)]
        return {
            one["plan"]: Distances(one["raw"], np.array(one["resamples"]), self.images, self.seed) for one in records
        }

    def keep(self, plan: StepPlan, found: Distances) -> None:
        told = {"plan": plan.digest, "n": found.n, "seed": found.seed, "raw": found.raw}
        disk.append_record(self.file, told | {"resamples": found.resamples.tolist()})


@torch.no_grad()
def held_out(bank: Bank, noise: Mapping, count: int) -> dict[str, torch.Tensor]:
    """Squared errors [count] of the predicted noise on test images, the same noise and timesteps for every net."""
    size, channels = bank.config["sample_size"], bank.config["in_channels"]
    clean = load_images(DATA, size=size, channels=channels, split="test").batch(slice(0, count))
    torch.manual_seed(0)
    timestep, target = torch.randint(0, noise["num_train_timesteps"], (count,)), torch.randn_like(clean)
    noisy = DDPMScheduler.from_config(noise).add_noise(clean, target, timestep)
    losses = {}
    for name in bank:
        predict = predictor(bank[name])
        found = [predict(x, t, {}, Memo()) for x, t in zip(noisy.split(128), timestep.split(128), strict=True)]
        losses[name] = (torch.cat(found) - target).square().mean((1, 2, 3))
    return losses


def loss_table(bank: Bank, noise: dict, count: int = 1024) -> Table:
    """Mean squared error of the predicted noise on test images, paired with the dense net.

    It tells trainings apart where distances of generated images do not: there is no sampling in it.
    """
    losses = held_out(bank, noise, count)
    rows = []
    for name, loss in losses.items():
        rows.append((name, f"{loss.mean():.5f}", paired(loss - losses[bank.reference], 5)))
    note = f"{count} test images, paired with the dense net, 95 % interval over images."
    columns = ("", "loss", "more than dense")
    return Table(title="Held-out denoising loss", columns=columns, rows=tuple(rows), note=note)


def paired(more: torch.Tensor, places: int) -> str:
    """The mean of paired differences [n], with the half width of its 95 % interval."""
    return f"{more.mean():+.{places}f} ± {1.96 * more.std() / len(more) ** 0.5:.{places}f}"


def show_table(table: Table, page: str) -> None:
    """One table as a page beside the benchmarks, and on the screen."""
    Path(__file__).with_name(page).write_text(f"# {table.title}\n\n{markdown(table)}\n")
    Console().print(rich_table(table))


def file_name(text: str) -> str:
    """What the files of a row are called: "2:4 SparseDM" -> 2of4-SparseDM."""
    return text.replace(" ", "-").replace(":", "of").replace(",", "")


def markdown(table: Table) -> str:
    return f"**{table.title}**\n\n{pages.markdown(table)}"


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
