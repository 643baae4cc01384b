"""SparseDM on Fashion-MNIST 32x32, beside every control, as one table.

    python benchmarks/sparse.py --net unet      # or --net uvit; trains what is missing, resumable

Every variant starts from the same dense model and gets the same fine-tuning steps. Rows: dense; dense with the same
extra steps; 2:4 one-shot (no training; also with channels permuted first), with masks frozen at the start (ASP), by
plain straight-through, by the full method (its pull coupled to Adam or decoupled); grown by stages; one set of weights
for several patterns; 1:4 one-shot and by the full method; and dense models of half and (for the U-Net) of a quarter of
the MACs, trained alone. With --search also a plan that chooses among dense, 2:4 and 1:4 at every step, at no more MACs
than 2:4 everywhere. --loss writes the held-out denoising loss of every row instead, which tells trainings apart where
distances do not.
Everything goes to runs/sparse-<net>/, the table to benchmarks/sparse-<net>.md.
"""

from __future__ import annotations

import halfstep.core.threads  # noqa: F401  # isort: skip (before torch)
import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from fashion import DATA, MODELS, file_name, loss_table, show_table
from halfstep.app import verbs
from halfstep.app.measurement import judge_for
from halfstep.app.subject import open_model, open_subject
from halfstep.app.terminal import RichWatch
from halfstep.core.recipe import Recipe, SparseSpec
from halfstep.core.recipes import named
from halfstep.engine.bank import Bank
from halfstep.engine.entry import Entry, Own
from halfstep.engine.sampling import reference_plan
from halfstep.measure.judge import Judge, measure_plans
from halfstep.methods.sparse import STAGES, sparse_net
from halfstep.nets.masks import Masking, keep_mask
from halfstep.nets.models import load_denoiser
from halfstep.report.charts import pareto
from halfstep.report.page import Grid, Report, Table, write_report
from halfstep.report.tables import plans_table
from halfstep.search.driver import search_plan
from halfstep.search.scores import open_scores

VARIANTS = {
    "2:4 frozen masks (ASP)": SparseSpec(frozen=True, teacher=0.0),
    "2:4 plain straight-through": SparseSpec(decay=0.0, teacher=0.0),
    "2:4 SparseDM": SparseSpec(),
    "2:4 grown by stages": SparseSpec(schedule="s31"),
    "one set of weights": SparseSpec(schedule="switch", also=("3:4", "dense")),
    "1:4 SparseDM": SparseSpec(pattern="1:4"),
    "2:4 SparseDM, decoupled": SparseSpec(decoupled=True),
    "1:4 SparseDM, decoupled": SparseSpec(pattern="1:4", decoupled=True),
}
SEARCHED = ("2:4 SparseDM", "1:4 SparseDM")


class Rows:
    """Which rows were asked for: those whose name contains one of `only` (if any) and none of `skip`."""

    def __init__(self, only: list[str], skip: list[str]):
        self.only, self.skip = only, skip

    def __contains__(self, name: str) -> bool:
        return any(part in name for part in self.only or [""]) and not any(part in name for part in self.skip)


def dense_model(net: str, work: Path, watch: RichWatch) -> Path:
    if net == "uvit":
        return verbs.train(DATA, work / "dense", named("fashion32-uvit-dense"), watch=watch)
    stored = MODELS / "fashion32-dense"
    return stored if stored.is_dir() else verbs.train(DATA, work / "dense", named("fashion32-dense"), watch=watch)


def smaller_model(net: str, work: Path, recipe: Recipe, watch: RichWatch) -> Path:
    """The control: a dense model of half the MACs, from scratch, for as long as dense training and fine-tuning."""
    dense = named("fashion32-uvit-dense" if net == "uvit" else "fashion32-dense")
    if net == "uvit":
        model = replace(dense.model, channels=(88,), head_dim=22)
    else:
        model = replace(dense.model, channels=(24, 44, 44), groups=4, head_dim=44)
    steps = dense.train.steps + recipe.train.steps
    smaller = replace(dense, model=model, train=replace(dense.train, steps=steps))
    return verbs.train(DATA, work / "smaller", smaller, watch=watch)


def with_variant(bank: Bank, name: str, spec: SparseSpec, folder: Path) -> Bank:
    """The bank with what one variant's training made."""
    made = open_model(folder).bank
    if spec.schedule == "switch":
        for entry in ("off", "2:4", "3:4"):
            title = f"one set of weights, {'mask off' if entry == 'off' else entry}"
            bank = bank.with_entry(title, alone(made, entry), made.prediction_type)
        return bank
    pattern = "2:4" if spec.schedule in STAGES else spec.pattern
    return bank.with_entry(name, alone(made, pattern), made.prediction_type)


def one_shot(bank: Bank, pattern: str, recipe: Recipe, permute: bool = False) -> Bank:
    net = sparse_net(bank["full"], replace(recipe.sparse, pattern=pattern, permute=permute))
    (chosen,) = net.patterns
    entry = Entry(net.bake(chosen), masking=Masking(chosen, net.names))
    return bank.with_entry(f"{pattern} one-shot{', permuted' * permute}", entry, bank.prediction_type)


def alone(bank: Bank, name: str) -> Entry:
    """An entry with weights of its own: what it shares them with stays behind."""
    return replace(bank.entries[name], weights=Own())


def with_controls(bank: Bank, net: str, folder: Path, recipe: Recipe, work: Path, rows: Rows, watch: RichWatch) -> Bank:
    """The bank with masks that were never trained under, more training without masks, and smaller dense models."""
    for pattern, permuted in (("2:4", False), ("2:4", True), ("1:4", False)):
        if f"{pattern} one-shot{', permuted' * permuted}" in rows:
            bank = one_shot(bank, pattern, recipe, permuted)
    dense = replace(recipe, sparse=SparseSpec())
    controls = {
        "dense, same extra steps": lambda: verbs.train(
            DATA, work / "dense-more", dense, model=str(folder), watch=watch
        ),
        "dense model of half": lambda: smaller_model(net, work, recipe, watch),
    }
    if net == "unet":
        controls["dense model of a quarter"] = lambda: MODELS / "fashion32-small"
    for name, trained in controls.items():
        if name in rows:
            bank = bank.with_entry(name, load_denoiser(trained())[0], bank.prediction_type)
    return bank


def masked_loss_table(bank: Bank, noise: dict) -> Table:
    """The held-out losses, and how much of each mask training changed."""
    table = loss_table(bank, noise)
    masked = {name for name in bank if bank.entries[name].masking and "permuted" not in name}
    changed = [f"{flipped(bank, name):.2%}" if name in masked else "–" for name in bank]
    return replace(
        table,
        columns=(*table.columns, "mask changed"),
        rows=tuple((*row, share) for row, share in zip(table.rows, changed, strict=True)),
        note=f"{table.note} Mask changed: the share of entries that differ from the dense weights' own mask.",
    )


def flipped(bank: Bank, name: str) -> float:
    """The share of mask entries that differ from the dense weights' own mask."""
    masking = bank.entries[name].masking
    assert masking is not None, f"{name} has no mask"
    dense, ours = (dict(bank[entry].named_parameters()) for entry in ("full", name))
    changed = [(keep_mask(dense[k], masking.pattern) ^ (ours[k] != 0)).flatten() for k in masking.names]
    return torch.cat(changed).float().mean().item()


def searched(judge: Judge, noise: dict, recipe: Recipe, work: Path, watch: RichWatch) -> tuple[str, ...]:
    """What runs at each step of the best plan over dense, 2:4 and 1:4 that costs no more than 2:4 everywhere."""
    whole, names = judge.bank, ("full", *SEARCHED)
    judge.bank = Bank({name: whole.entries[name] for name in names}, "full", whole.prediction_type)
    plan = reference_plan(judge.bank, noise, recipe.sample, judge.bank.prices())
    share = plan.uniform("2:4 SparseDM").macs / plan.macs
    found = search_plan(open_scores(judge, work), plan, recipe, work, budget=share, watch=watch)
    judge.bank = whole
    return found.plan.entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=("unet", "uvit"), default="unet")
    parser.add_argument("--only", action="append", default=[], help="rows whose name contains this, on their own page")
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--skip", action="append", default=[], help="leave out rows whose name contains this")
    parser.add_argument("--search", action="store_true", help="also search a plan over the patterns")
    parser.add_argument("--loss", action="store_true", help="only the held-out denoising loss of every row")
    parser.add_argument("--set", action="append", default=[], help="edit the recipe, as halfstep's --set")
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    watch, work = RichWatch(), args.work or Path(f"runs/sparse-{args.net}")
    work.mkdir(parents=True, exist_ok=True)
    recipe = named("fashion32-sparse").edit(args.set)
    folder = dense_model(args.net, work, watch)
    dense, noise = load_denoiser(folder)
    bank = Bank({"full": dense}, "full", noise["prediction_type"])
    rows = Rows(args.only, args.skip)
    for name, spec in VARIANTS.items():
        if name in rows or (args.search and name in SEARCHED):
            out = work / file_name(name)
            verbs.make("sparse", str(folder), DATA, out, replace(recipe, sparse=spec), watch=watch)
            bank = with_variant(bank, name, spec, out)
    bank = with_controls(bank, args.net, folder, recipe, work, rows, watch)
    if args.train_only:
        return
    if args.loss:
        show_table(masked_loss_table(bank, noise), f"sparse-{args.net}-loss.md")
        return
    judge = judge_for(bank, open_subject(None, DATA, recipe, watch=watch), work, watch)
    plan = reference_plan(bank, noise, recipe.sample)
    shown = [name for name in bank if name != "full" and name in rows]
    plans = {"reference": plan} | {name: plan.uniform(name) for name in shown}
    if args.search:
        plans["plan of dense, 2:4 and 1:4"] = plan.with_entries(searched(judge, noise, recipe, work, watch))
    verdict = measure_plans(judge, plans, recipe, repeats=2, watch=watch)
    suffix = "".join(f"-{file_name(text)}" for text in args.only)
    (work / f"quality{suffix}.json").write_text(json.dumps(verdict.record.to_json(), indent=2))
    table = plans_table(verdict.record, f"SparseDM, {args.net}, Fashion-MNIST 32x32")
    grids = tuple(Grid(title=n, images=x, columns=8) for n, x in verdict.pictures.items())
    report = Report(
        title=table.title,
        summary=f"Fine-tuned for {recipe.train.steps} steps of {recipe.train.batch} from one dense model.",
        facts={key: str(value) for key, value in verdict.record.about.machine.items()},
        parts=(table, *grids, pareto(verdict.record, [])),
    )
    if not args.only:
        write_report(report, work)
    show_table(table, f"sparse-{args.net}{suffix}.md")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
