"""What eight bits cost in quality and save in time, on the 32x32 pixel model of Fashion-MNIST.

    OMP_NUM_THREADS=1 python benchmarks/int8.py [--images 1024] [--runtime onnx] [--by REGEX]

The best free sampler and a joint plan in float32, everywhere in int8, and in int8 but for the first and the last row:
drawn by one runtime on the noise of `benchmarks/free.py`, each change paired with the same plan in float32. Times are
the processor's seconds of a batch of 64 in turns. Calibrated ranges and distances are kept in runs/int8, the table in
runs/int8/RUNTIME.md; benchmarks/int8.md has it with that of `int8_ranges.py`.
"""

from __future__ import annotations

import halfstep.core.threads  # noqa: F401  # isort: skip (before torch)
import argparse
import re
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch

import free
from fashion import markdown
from halfstep.app.measurement import judge_for
from halfstep.app.searching import with_int8
from halfstep.app.subject import open_subject
from halfstep.app.terminal import RichWatch
from halfstep.core import disk
from halfstep.core.machine import cpu_name
from halfstep.core.plan import StepPlan
from halfstep.core.seeds import Stage, stage_seed
from halfstep.engine.bank import Bank
from halfstep.engine.pricing import drawing
from halfstep.engine.profiling import interleave
from halfstep.measure.judge import Judge
from halfstep.measure.quality import Distances, difference, distances
from halfstep.report.page import Table
from halfstep.report.words import change_cell

PLANS = {"best free": "best free", "joint plan, 1/16": "joint, 1/16 of the time"}
WORK, BATCH = Path("runs/int8"), 64


def rows_of(bank: Bank) -> dict[str, tuple[str, StepPlan]]:
    """By name: the plan that it is held against, and the plan."""
    known, found = free.known_plans(free.HERE / "free32-plans.json"), {}
    for name, key in PLANS.items():
        plan = replace(known[key], prices={**known[key].prices, **bank.prices()})
        ends = {0, len(plan.rows) - 1}
        eight = [replace(row, entry=f"{row.entry}@int8") for row in plan.rows]
        edges = [row if i in ends else eight[i] for i, row in enumerate(plan.rows)]
        found[name] = name, plan
        found[f"{name}, int8"] = name, replace(plan, rows=tuple(eight))
        found[f"{name}, int8 between"] = name, replace(plan, rows=tuple(edges))
    return found


def measured(judge: Judge, plan: StepPlan, images: int, seed: int, by: str) -> Distances:
    file = WORK / "distances.jsonl"
    for one in disk.read_records(file):
        if (one["plan"], one["n"], one["seed"], one["by"]) == (plan.digest, images, seed, by):
            return Distances(one["raw"], torch.tensor(one["resamples"]).double().numpy(), images, seed)
    features, _ = judge.features(plan, images, seed)
    found = distances(features, judge.reference, n_boot=free.BOOT, seed=seed, features_name=judge.extractor.name)
    record = {"plan": plan.digest, "raw": found.raw, "resamples": found.resamples.tolist()}
    disk.append_record(file, {**record, "n": images, "seed": seed, "by": by})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--runtime", default="onnx", choices=("onnx", "openvino"))
    parser.add_argument("--by", default="", help="only plans whose names have this (a regular expression)")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    edits = ["sample.batch=64", "sample.layout=contiguous", f"sample.runtime={args.runtime}", "search.precisions=int8"]
    subject = open_subject(free.MODELS[32], free.DATA, free.recipe_of(32, edits), watch=RichWatch())
    bank = with_int8(subject, subject.stand_ins, WORK, RichWatch())
    rows = {name: row for name, row in rows_of(bank).items() if re.search(args.by, row[0])}
    bank = bank.only({bank.reference, *(name for _, plan in rows.values() for name in plan.nets)})
    judge = judge_for(bank, subject, WORK, RichWatch())
    seed = stage_seed(subject.recipe.seed, Stage.REPORT)
    found = {}
    for name, (_, plan) in rows.items():
        found[name] = measured(judge, plan, args.images, seed, args.runtime)
        print(name, found[name].value, found[name].interval, flush=True)
    calls = {name: partial(drawing, bank, plan, BATCH) for name, (_, plan) in rows.items()}
    with torch.inference_mode():
        took = interleave(calls, repeats=args.repeats, warmup=1, clock=time.process_time)
    cells, least = [], judge.floor(args.images).high
    for name, (base, _) in rows.items():
        change, ms = difference(found[base], found[name], judge.reference, least), {n: median(took[n]) for n in rows}
        low, high = found[name].interval
        fd = f"{max(0, found[name].value):.2f} [{max(0, low):.2f}, {max(0, high):.2f}]"
        told = f"{change_cell(change)}, {change.verdict(0.05)}" if name != base else ""
        cells.append((name, f"{ms[name]:,.0f}", f"{ms[name] / ms[base]:.0%}", fd, told))
    note = (
        f"{cpu_name()}, one thread, by {args.runtime}: processor ms of {BATCH} images, median of {args.repeats} in "
        f"turns; FD corrected for bias on {args.images:,} images of one noise; changes paired, beside float32."
    )
    table = Table(title="Eight bits", columns=("", "ms", "of float32's", "FD", "change"), rows=tuple(cells), note=note)
    text = f"# {table.title}, by {args.runtime}\n\n{markdown(table)}\n"
    disk.write_text(WORK / f"{args.runtime}.md", text)
    print(text)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
