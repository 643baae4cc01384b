"""What runs each entry of a bank fastest here, and how much of the MACs that narrow entries save is saved in time.

    OMP_NUM_THREADS=1 python benchmarks/runtimes.py [--batch 1 --batch 64] [--repeats 15] [--cpu] [--model 32x32]
        [--entry full --entry w0.50] [--without compile] [--out FILE.md]

The bundled bank of 16x16 and the supernet of 32x32; every entry that computes itself, in float32 by every runtime that
is installed, in bfloat16 by PyTorch and torch.compile and in int8 by all (PyTorch simulates it: its errors are those of
two ways to round), all of one bank and batch in turns. With `--cpu` the seconds that this process had of a processor
are counted in place of those that passed: with one thread they are what passes on an idle machine, but for what a busy
neighbour takes of its caches.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from halfstep.core.errors import HalfstepError
from halfstep.core.machine import machine
from halfstep.core.recipe import SampleSpec
from halfstep.engine.bank import Bank
from halfstep.engine.calibration import calibrated
from halfstep.engine.entry import Backend
from halfstep.engine.layouts import fastest_layouts
from halfstep.engine.profiling import example_inputs, interleave
from halfstep.engine.runtime import backends_for, ready, strayed
from halfstep.engine.sampling import reference_plan
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.nets.denoiser import Memo
from halfstep.nets.precision import precisions_for
from halfstep.nets.reuse import Forwards

MODELS = {"16x16": "src/halfstep/assets/fashion_model", "32x32": "benchmarks/models/fashion32-supernet"}


@dataclass(frozen=True)
class Timed:
    """Milliseconds of a call of an entry by a runtime, median and quartiles, and how far its prediction is from the
    same entry's by PyTorch."""

    entry: str
    backend: Backend
    ms: float
    low: float
    high: float
    error: float


def bank_of(folder: str, names: Sequence[str] = ()) -> Bank:
    """Of computed entries alone (the reference and `names`, where given), in the faster layouts, each in the half
    precisions of this machine and in int8 too."""
    pipe = StepAwarePipeline.from_pretrained(folder)
    bank = pipe.bank.only({pipe.bank.reference, *(names or pipe.bank.computed)})
    spans = calibrated(bank, reference_plan(bank, pipe.scheduler.config, SampleSpec(scheduler="ddim")), seed=0)
    bank = bank.with_casts(precisions_for(bank.device)).with_int8(spans)
    bank.set_layouts(fastest_layouts(bank, 64))
    return bank


def timed(
    bank: Bank, batch: int, batches: tuple[int, ...], repeats: int, clock: Callable[[], float], without: Sequence[str]
) -> tuple[list[Timed], list[str]]:
    """Every entry by every runtime but those `without`, in turns, and what could not be run. `batches`: all that the
    bank is timed at, so that its graphs are made once."""
    calls: dict[tuple[str, Backend], tuple[Callable[[], torch.Tensor], float]] = {}
    failed = []
    for name in bank.computed:
        entry, inputs = bank.entries[name], example_inputs(bank[name], batch, dtype=bank.dtype)
        for backend in (one for one in backends_for(entry) if one not in without):
            try:
                run = ready(entry, replace(entry.runtime, backend=backend, batches=batches))
                error = strayed(run, Forwards.of(entry.model), inputs)
            except HalfstepError as refused:
                failed.append(f"{name} by {backend} at batch {batch}: {refused}")
                continue
            calls[name, backend] = partial(run.plain, *_given(inputs)), error
            print(f"{name} by {backend} at batch {batch} is ready", flush=True)
    with torch.inference_mode():
        turns: dict[Any, Any] = {key: call for key, (call, _) in calls.items()}
        times = interleave(turns, repeats=repeats, clock=clock)
    return [_one(*key, times[key], error) for key, (_, error) in calls.items()], failed  # type: ignore[index]


def _given(inputs: Any) -> tuple[Any, ...]:
    return inputs.sample, inputs.timestep[0], inputs.cond, Memo()


def _one(entry: str, backend: Backend, times: list[float], error: float) -> Timed:
    ordered = sorted(times)
    return Timed(entry, backend, median(ordered), ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4], error)


def lines_of(title: str, bank: Bank, batch: int, found: list[Timed]) -> Iterable[str]:
    """A table in Markdown. Its last column: what is saved of the time of the full entry by the same runtime and in the
    same precision, as a share of what is saved of its MACs."""
    macs = {name: price.macs for name, price in bank.prices().items()}
    full = bank.reference
    ms = {(one.entry, one.backend): one.ms for one in found}
    best = {name: min(one.ms for one in found if one.entry == name) for name in bank.computed}
    yield f"## {title}, batch {batch}\n"
    yield "| entry | MMACs | runtime | layout | ms (quartiles) | of eager | error | saved of MACs saved |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for one in found:
        wide = full + one.entry[at:] if (at := one.entry.find("@")) >= 0 else full
        saving = 1 - macs[one.entry] / macs[full]
        share = (1 - one.ms / ms[wide, one.backend]) / saving if saving > 0 and (wide, one.backend) in ms else None
        mark = "**" if one.ms == best[one.entry] else ""
        yield (
            f"| {one.entry} | {macs[one.entry] / 1e6:.1f} | {mark}{one.backend}{mark} | {bank.layouts()[one.entry]} "
            f"| {one.ms:.2f} ({one.low:.2f}–{one.high:.2f}) | {one.ms / ms[one.entry, 'eager']:.0%} | {one.error:.1g} "
            f"| {'–' if share is None else f'{share:.2f}'} |"
        )
    yield ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--model", action="append", choices=list(MODELS))
    parser.add_argument("--entry", action="append", default=[], help="one to be timed beside the reference")
    parser.add_argument(
        "--without", action="append", default=[], help="a runtime to leave out: compiling takes minutes"
    )
    parser.add_argument("--cpu", action="store_true", help="count the processor's seconds, for a busy machine")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/runtimes.md"))
    args = parser.parse_args()
    clock, what = (time.process_time, "processor ms") if args.cpu else (time.perf_counter, "ms")
    here = ", ".join(f"{key} {value}" for key, value in machine().items() if value is not None)
    lines = [
        "# Runtimes\n",
        f"By `benchmarks/runtimes.py`: {what}, each table in turns, {args.repeats} calls; {here}; ",
    ]
    lines[-1] += f"load {os.getloadavg()[0]:.1f}.\n"
    for title in args.model or MODELS:
        bank, batches = bank_of(MODELS[title], args.entry), tuple(args.batch or (1, 64))
        for batch in batches:
            found, failed = timed(bank, batch, batches, args.repeats, clock, args.without)
            lines += [*lines_of(title, bank, batch, found), *(f"Not run: {one}\n" for one in failed)]
            args.out.write_text("\n".join(lines))
    print(args.out.read_text())


if __name__ == "__main__":
    main()
