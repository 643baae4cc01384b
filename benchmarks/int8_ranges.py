"""By which ranges eight bits do least harm: the error of a prediction in each third of the timesteps.

    OMP_NUM_THREADS=1 python benchmarks/int8_ranges.py [--pictures 32] [--out FILE.md]

The full entry of the 32x32 model along its own trajectory (DDIM, 21 rows), calibrated on the pictures of one seed and
measured on those of another: the norm of what eight bits change in its prediction, as a share of that one's norm, the
mean over pictures and rows of a third. Ranges are the least and largest number that was seen, or leave out a
thousandth at each end; they are those of all timesteps, or each third has its own.
"""

from __future__ import annotations

import halfstep.core.threads  # noqa: F401  # isort: skip (before torch)
import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from fashion import markdown
from halfstep.core import disk
from halfstep.core.machine import cpu_name
from halfstep.core.process import Process
from halfstep.core.recipe import SampleSpec
from halfstep.engine.bank import Bank
from halfstep.engine.conditions import cond_for
from halfstep.engine.sampling import image_generators, reference_plan, start_noise, trajectory
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.nets.denoiser import Cond, Memo, predictor
from halfstep.nets.int8 import Spans, quantised, watched
from halfstep.report.page import Table

MODEL, ROWS, THIRDS = "benchmarks/models/fashion32-supernet", 21, 3
KEPT = 4096
"""Numbers of a tensor that quantiles are taken of, for each call: evenly spaced ones."""


class Call(NamedTuple):
    """What a row gives the net, and its prediction [B,C,H,W] in float32."""

    sample: torch.Tensor
    timestep: torch.Tensor
    cond: Cond
    prediction: torch.Tensor


def calls_of(bank: Bank, pictures: int, seed: int) -> list[Call]:
    """Those of a trajectory, noisiest first. DDIM gives the net its sample as it is."""
    plan = reference_plan(bank, Process(), SampleSpec(scheduler="ddim", steps=ROWS))
    generators = image_generators(seed, 0, pictures)
    cond = cond_for(bank, 0, pictures)
    steps = trajectory(bank, plan, start_noise(bank, generators), generators, cond)
    return [Call(one.sample, torch.tensor(plan.rows[one.row].timestep), cond, one.prediction) for one in steps]


def run(model: nn.Module, call: Call) -> torch.Tensor:
    return predictor(model)(call.sample, call.timestep, call.cond, Memo())


def outermost(model: nn.Module, calls: Sequence[Call]) -> Spans:
    with watched(model) as spans:
        for call in calls:
            run(model, call)
    return spans


def within(model: nn.Module, calls: Sequence[Call], share: float = 0.999) -> Spans:
    """Of the same layers, but for what lies beyond this share at each end."""
    spans = outermost(model, calls)
    seen: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = {name: ([], []) for name in spans}

    def look(name: str):
        def keep(_: nn.Module, given: tuple[torch.Tensor], found: torch.Tensor) -> None:
            for kept, value in zip(seen[name], (given[0], found), strict=True):
                kept.append(value.flatten()[:: max(1, value.numel() // KEPT)].clone())

        return keep

    hooks = [model.get_submodule(name).register_forward_hook(look(name)) for name in spans]
    for call in calls:
        run(model, call)
    for hook in hooks:
        hook.remove()
    return {name: (*ends(given, share), *ends(found, share)) for name, (given, found) in seen.items()}


def ends(kept: list[torch.Tensor], share: float) -> tuple[float, float]:
    values = torch.cat(kept)
    low, high = (float(values.quantile(at)) for at in (1 - share, share))
    return min(low, 0.0), max(high, 1e-6)


def harm(model: nn.Module, calls: Sequence[Call]) -> float:
    shares = []
    for call in calls:
        apart = (run(model, call) - call.prediction).flatten(1).norm(dim=1)
        shares.append(float((apart / call.prediction.flatten(1).norm(dim=1)).mean()))
    return sum(shares) / len(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("runs/int8/ranges.md"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    bank = StepAwarePipeline.from_pretrained(MODEL).bank
    model = bank[bank.reference]
    with torch.inference_mode():
        seen, fresh = (calls_of(bank, args.pictures, seed) for seed in (0, 1))
        part = ROWS // THIRDS
        thirds = [slice(i * part, (i + 1) * part) for i in range(THIRDS)]
        cells = []
        for told, spans_of in (("least and largest", outermost), ("99.9 % at each end", within)):
            whole = quantised(model, spans_of(model, seen))
            cells.append((f"{told}, all timesteps", *(f"{harm(whole, fresh[one]):.2%}" for one in thirds)))
            own = [quantised(model, spans_of(model, seen[one])) for one in thirds]
            found = [f"{harm(net, fresh[one]):.2%}" for net, one in zip(own, thirds, strict=True)]
            cells.append((f"{told}, each third its own", *found))
            print(cells[-2:], flush=True)
    told = f"{args.pictures} pictures a seed, {ROWS} rows; {cpu_name()}, one thread, simulated by"
    note = f"{told} torch {torch.__version__}."
    columns = ("ranges", "first third (noisiest)", "second", "last")
    table = Table(title="Ranges of eight bits", columns=columns, rows=tuple(cells), note=note)
    disk.write_text(args.out, markdown(table) + "\n")
    print(markdown(table))


if __name__ == "__main__":
    main()
