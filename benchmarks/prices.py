"""A plan's predicted time beside its measured time: do the prices of its calls and its fixed part add up?

    OMP_NUM_THREADS=1 python benchmarks/prices.py [--model benchmarks/models/fashion16-supernet] [--batch 64] [--cpu]

Prices are measured as a run measures them (`halfstep.engine.pricing`), then whole trajectories in turns. On a machine
that is busy with something else, `--cpu` counts the seconds that this process had of a processor in place of those that
passed: with one thread they are what passes on an idle machine.
"""

from __future__ import annotations

import argparse
import os
import time
from functools import partial
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from halfstep.app.subject import open_subject
from halfstep.core.plan import Correction, Guide, StepPlan
from halfstep.core.recipe import Recipe, SampleSpec
from halfstep.engine.bank import Bank
from halfstep.engine.layouts import fastest_layouts
from halfstep.engine.pricing import PriceBook, drawing, predicted_ms
from halfstep.engine.profiling import interleave
from halfstep.engine.sampling import reference_plan
from halfstep.engine.subject import Subject


def plans_of(subject: Subject) -> dict[str, StepPlan]:
    """Plans of all kinds of rows and samplers over the bank."""
    bank = subject.stand_ins
    prices = bank.prices()

    def under(scheduler: str, steps: int, order: int = 0) -> StepPlan:
        spec = SampleSpec(scheduler=scheduler, steps=steps, order=order)  # type: ignore[arg-type]
        return reference_plan(bank, subject.process, spec, prices)

    ddim, few, third, pairs = (
        under("ddim", 20),
        under("dpmsolver++", 10),
        under("dpmsolver++", 15, 3),
        under("unipc", 8),
    )
    ways = ("full", "w0.75", "w0.50", "w0.25")
    return {
        "DDIM 20, full": ddim,
        "DPM-Solver++ 10, full": few,
        "DPM-Solver++ 10, w0.25": few.uniform("w0.25"),
        "DDIM 20, wide to narrow": ddim.with_entries([ways[row // 5] for row in range(20)]),
        "DPM-Solver++ 3 15, every row another": third.with_entries([ways[row * 3 % 4] for row in range(15)]),
        "UniPC 8, w0.50 guided by w0.25, corrected": pairs.uniform("w0.50")
        .with_guides([Guide("w0.25", 1.5)] * 8)
        .with_corrections([Correction(0.98, 0.01)] * 8),
        "Heun 5, w0.50": under("heun", 5).uniform("w0.50"),
    }


def rows_of(bank: Bank, plans: dict[str, StepPlan], book: PriceBook, repeats: int) -> list[tuple[str, ...]]:
    calls = {name: partial(drawing, bank, plan, book.batch) for name, plan in plans.items()}
    measured = interleave(calls, repeats=repeats, warmup=1, clock=book.clock)
    rows: list[tuple[str, ...]] = []
    for name, plan in plans.items():
        found, told, fixed = (
            median(measured[name]),
            predicted_ms(plan, book.batch),
            (plan.fixed.us or 0) * book.batch / 1e3,
        )
        rows.append((name, f"{fixed:.1f}", f"{told:.0f}", f"{found:.0f}", f"{told / found - 1:+.1%}"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="benchmarks/models/fashion16-supernet")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cpu", action="store_true", help="count the processor's seconds, for a busy machine")
    args = parser.parse_args()
    subject = open_subject(args.model, None, Recipe())
    bank = subject.stand_ins
    bank.set_layouts(fastest_layouts(bank, args.batch))
    clock = time.process_time if args.cpu else time.perf_counter
    book = PriceBook(bank, args.batch, clock=clock)
    plans = {name: book.priced(plan) for name, plan in plans_of(subject).items()}
    what = "processor ms" if args.cpu else "ms"
    table = Table(
        title=f"{what} of a batch of {args.batch}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
    )
    for heading in ("plan", "fixed", "predicted", "measured", "off by"):
        table.add_column(heading)
    for row in rows_of(bank, plans, book, args.repeats):
        table.add_row(*row)
    print({name: f"{price.us:.0f} us" for name, price in book.prices.items()}, bank.layouts())
    Console().print(table)


if __name__ == "__main__":
    main()
