"""Regularised score matching on vectors, beside its training-free controls: the specification's section 7 as one table.

    python benchmarks/regularized_toys.py             # three data sets, three seeds
    python benchmarks/regularized_toys.py --only digits --seeds 1 --steps 1000

Data: digits (8x8 pixels), sparse32 (4 active of 32 coordinates), plane3 (six blobs in a plane of three dimensions). A
residual MLP is trained plain and with r = 0.01 and 0.1; each is sampled in 10, 20, 50 and 200 steps, ancestral
(posterior variance) and DDIM. The plain model is also sampled with its prediction scaled, and soft-thresholded, each at
the value that is best for that sampler and number of steps (found on other noise). Finished parts are read back from
<out>/results.json; the table goes to benchmarks/regularized_toys.md.
"""

from __future__ import annotations

import halfstep.core.threads  # noqa: F401  # isort: skip (before torch)
import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from sklearn.datasets import load_digits
from torch import nn

from halfstep.core import disk
from halfstep.core.recipe import RegularSpec
from halfstep.measure.quality import frechet_distance, precision_recall
from halfstep.methods.regularized import regular_objective
from halfstep.nets.denoiser import corrected
from halfstep.search.corrections import climb
from halfstep.training.train import Batch

TRAINED = (0.0, 0.01, 0.1)
STEPS = (10, 20, 50, 200)
SAMPLERS = ("ancestral", "ddim")
LEVELS = 1000
SCALES = tuple(round(1.1 - 0.02 * i, 2) for i in range(31))  # 1.10 ... 0.50
THRESHOLDS = tuple(round(0.02 * i, 2) for i in range(31))  # 0 ... 0.6
TRIES, BATCH = 500, 256


# ------------------------------------------------------------------------------------------------------------ the data


@dataclass(frozen=True)
class Toy:
    """train, held: [n, d].  off: coordinates without data, and the value that they should have.  blobs: [6, 3] or None.
    count: vectors to generate."""

    name: str
    train: torch.Tensor
    held: torch.Tensor
    off: torch.Tensor
    off_value: torch.Tensor
    blobs: torch.Tensor | None
    count: int


def digits() -> Toy:
    """8x8 digits in [-1, 1], every other one held out; a pixel is off where all training images agree."""
    x = torch.from_numpy(load_digits().data).float() / 8 - 1
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    train, held = x[::2], x[1::2]
    off = (train == train[0]).all(0)
    return Toy("digits", train, held, off, train[0, off], None, 2000)


def sparse32() -> Toy:
    """Four active coordinates with five modes, 28 zeros."""
    g = torch.Generator().manual_seed(1)
    modes = 1.5 * torch.randn(5, 4, generator=g)
    x = torch.zeros(40000, 32)
    x[:, :4] = modes[torch.randint(5, (len(x),), generator=g)] + 0.2 * torch.randn(len(x), 4, generator=g)
    return Toy("sparse32", x[:20000], x[20000:], torch.arange(32) >= 4, torch.zeros(28), None, 4000)


def plane3() -> Toy:
    """Six blobs on a circle in the Y-Z plane; X is N(0, 0.02^2)."""
    g = torch.Generator().manual_seed(2)
    angle = torch.arange(6) * math.pi / 3
    blobs = torch.stack([torch.zeros(6), angle.cos(), angle.sin()], dim=1)
    x = blobs[torch.randint(6, (40000,), generator=g)]
    x = x + torch.tensor([0.02, 0.1, 0.1]) * torch.randn(len(x), 3, generator=g)
    return Toy("plane3", x[:20000], x[20000:], torch.tensor([True, False, False]), torch.zeros(1), blobs, 4000)


TOYS = {"digits": digits, "sparse32": sparse32, "plane3": plane3}


# ------------------------------------------------------------------------------------------------------------ training


def levels_at(t: torch.Tensor) -> torch.Tensor:
    """alphas_cumprod of the variance-preserving process with beta from 0.1 to 20, at times in (0, 1]."""
    return torch.exp(-(0.1 * t + (20 - 0.1) * t.square() / 2))


class ToyNet(nn.Module):
    """A residual MLP [B, d] -> [B, d] with the face of a diffusers model; timesteps 0 ... 999, fractions too."""

    frequencies: torch.Tensor

    def __init__(self, d: int, width: int = 256, blocks: int = 3):
        super().__init__()
        self.start, self.end = nn.Linear(d, width), nn.Linear(width, d)
        self.time = nn.ModuleList(nn.Linear(64, width) for _ in range(blocks))
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.register_buffer("frequencies", torch.logspace(0, 2.5, 32))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        phase = ((timestep.float() + 1) / LEVELS)[:, None] * self.frequencies
        waves = torch.cat([phase.sin(), phase.cos()], dim=1)
        h = self.start(sample)
        for time_in, block in zip(self.time, self.blocks, strict=True):
            h = h + block(nn.functional.silu(h + time_in(waves)))
        return (self.end(nn.functional.silu(h)),)


def trained(toy: Toy, spec: RegularSpec, steps: int, seed: int, told: Callable[[int], None]) -> tuple[ToyNet, float]:
    """The moving average of a network trained with the toolkit's objective, and the seconds that it took."""
    torch.manual_seed(seed)
    net = ToyNet(toy.train.shape[1])
    average = ToyNet(toy.train.shape[1])
    average.load_state_dict(net.state_dict())
    levels = levels_at(torch.arange(1, LEVELS + 1) / LEVELS)

    def draw(clean: torch.Tensor, g: torch.Generator, _: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        timestep, noise = torch.randint(LEVELS, (len(clean),), generator=g), torch.randn(clean.shape, generator=g)
        level = levels[timestep, None]
        return level.sqrt() * clean + (1 - level).sqrt() * noise, timestep, noise

    objective = regular_objective(net, draw, spec, levels, "epsilon")
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3, fused=True)
    mine: list[torch.Tensor] = list(net.parameters())
    theirs: list[torch.Tensor] = list(average.parameters())
    began = time.process_time()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 + math.cos(math.pi * step / steps))
        for loss in objective(Batch(toy.train[torch.randint(len(toy.train), (BATCH,))], {}, step)):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(theirs, mine, 1 - min(0.998, (step + 1) / (step + 10)))
        if step % 50 == 49:
            told(step + 1)
    return average.eval(), time.process_time() - began


# ------------------------------------------------------------------------------------------------------------ sampling


@torch.no_grad()
def sample(
    net: ToyNet, d: int, count: int, steps: int, sampler: str, seed: int, scale: float = 1.0, threshold: float = 0.0
) -> torch.Tensor:
    """[count, d] by a uniform grid of times from 1 to 0.001; the noise depends on the seed and the shape alone."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, d, generator=g)
    times = torch.linspace(1, 1 / LEVELS, steps + 1)
    levels = levels_at(times)
    for i in range(steps):
        here, there = levels[i], levels[i + 1]
        now = times[i : i + 1] * LEVELS - 1
        found = torch.cat([net(part, now)[0] for part in x.split(500)])  # 500 rows stay in the cache
        noise = corrected(found, scale, threshold)
        if sampler == "ddim":
            clean = (x - (1 - here).sqrt() * noise) / here.sqrt()
            x = there.sqrt() * clean + (1 - there).sqrt() * noise
            continue
        alpha = here / there
        x = (x - (1 - alpha) / (1 - here).sqrt() * noise) / alpha.sqrt()
        if i < steps - 1:
            variance = (1 - alpha) * (1 - there) / (1 - here)
            x = x + variance.sqrt() * torch.randn(count, d, generator=g)
    return x


class Measure:
    """Fréchet distance on raw coordinates, precision and recall, what is off the support, and the rarest blob."""

    def __init__(self, toy: Toy):
        self.toy = toy
        self.real = toy.held.double().numpy()
        self.moments = self.real.mean(0), np.cov(self.real, rowvar=False)

    def fd(self, x: torch.Tensor) -> float:
        fake = x.double().numpy()
        return frechet_distance(fake.mean(0), np.cov(fake, rowvar=False), *self.moments)

    def all(self, x: torch.Tensor) -> dict[str, float]:
        precision, recall = precision_recall(self.real[:2000], x.double().numpy()[:2000])
        off = (x[:, self.toy.off] - self.toy.off_value).abs().mean().item()
        found = {"fd": self.fd(x), "precision": precision, "recall": recall, "off": off}
        if self.toy.blobs is not None:
            nearest = torch.cdist(x, self.toy.blobs).argmin(1)
            found["rarest"] = torch.bincount(nearest, minlength=6).min().item() / len(x)
        return found


def rows_of(net: ToyNet, toy: Toy, seed: int, controls: bool) -> Iterator[dict]:
    """One record for every sampler, number of steps and, for the plain model, each control at its own optimum."""
    measure, d = Measure(toy), toy.train.shape[1]
    for sampler in SAMPLERS:
        for steps in STEPS:
            final = partial(sample, net, d, toy.count, steps, sampler, 1000 + seed)
            about = {"sampler": sampler, "steps": steps}
            yield about | {"correction": "none", "value": None} | measure.all(final())
            if not controls:
                continue
            scan = partial(sample, net, d, TRIES, steps, sampler, 5000 + seed)
            best = climb(SCALES, 1.0, cache(lambda c, scan=scan: measure.fd(scan(scale=c))))
            yield about | {"correction": "scale", "value": best} | measure.all(final(scale=best))
            best = climb(THRESHOLDS, 0.0, cache(lambda c, scan=scan: measure.fd(scan(threshold=c))))
            yield about | {"correction": "soft", "value": best} | measure.all(final(threshold=best))


# ----------------------------------------------------------------------------------------------------------- the table


VARIANTS = (("plain", 0.0, "none"), ("r = 0.01", 0.01, "none"), ("r = 0.1", 0.1, "none"))
CONTROLS = (("plain, scaled", 0.0, "scale"), ("plain, soft", 0.0, "soft"))


def cells(parts: dict, data: str, r: float, correction: str, sampler: str, steps: int) -> list[dict]:
    """The records of one cell, one per seed."""
    found = [part["rows"] for part in parts.values() if (part["data"], part["r"]) == (data, r)]
    wanted = (correction, sampler, steps)
    return [x for rows in found for x in rows if (x["correction"], x["sampler"], x["steps"]) == wanted]


def mean_of(records: list[dict], what: str) -> tuple[float, float]:
    """Mean and deviation over the seeds; of one seed, no deviation (nan)."""
    values = [record[what] for record in records]
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def shown(value: float, spread: float) -> str:
    places = 3 if value > 0.2 else 4 if value > 0.01 else 5
    return f"{value:.{places}f}" + (f" ± {spread:.{places}f}" if math.isfinite(spread) else "")


def table(parts: dict, data: str, sampler: str) -> str:
    """Fréchet distances by variant and number of steps, and at 50 steps the rest; the controls with their values."""
    rest = ["precision", "recall", "off"] + (["rarest"] if data == "plane3" else [])
    titles = {"off": "off support", "rarest": "rarest blob"}
    lines = [
        f"**{data}, {sampler}**\n",
        "| | " + " | ".join([f"FD, T={t}" for t in STEPS] + [f"{titles.get(x, x)}, T=50" for x in rest]) + " |",
        "| --- |" + " --- |" * (len(STEPS) + len(rest)),
    ]
    for name, r, correction in (*VARIANTS, *CONTROLS):
        row = []
        for steps in STEPS:
            records = cells(parts, data, r, correction, sampler, steps)
            value = f" ({mean_of(records, 'value')[0]:.2f})" if correction != "none" else ""
            row.append(shown(*mean_of(records, "fd")) + value)
        at_50 = cells(parts, data, r, correction, sampler, 50)
        row += [f"{mean_of(at_50, what)[0]:.3f}" for what in rest]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def checks(parts: dict) -> list[str]:
    """The specification's directional checks, as lines; those whose data are missing are left out."""
    have = {part["data"] for part in parts.values()}

    def fd(data: str, r: float, steps: int, sampler: str = "ancestral", correction: str = "none") -> float:
        return mean_of(cells(parts, data, r, correction, sampler, steps), "fd")[0]

    def ratio(data: str, steps: int, sampler: str = "ancestral") -> float:
        return fd(data, 0.1, steps, sampler) / fd(data, 0.0, steps, sampler)

    def line(what: str, value: float, holds: bool) -> str:
        return f"- {'holds' if holds else 'FAILS'}: {what}: {value:.3f}"

    found = []
    if "digits" in have:
        at_20, at_50, at_200, ddim = *(ratio("digits", t) for t in (20, 50, 200)), ratio("digits", 50, "ddim")
        found += [
            line("12. digits, ancestral, T=50, FD(r=0.1) / FD(plain) <= 0.92", at_50, at_50 <= 0.92),
            line("13. the same at T=20 <= 0.9", at_20, at_20 <= 0.9),
            line(f"14. the gain at T=50 ({1 - at_50:.1%}) exceeds that at T=200", 1 - at_200, at_50 < at_200),
            line("15. DDIM, T=50: r=0.1 is worse, ratio > 1", ddim, ddim > 1),
        ]
    if "sparse32" in have:
        at_50 = ratio("sparse32", 50)
        found.append(line("12. sparse32, ancestral, T=50, ratio <= 0.9", at_50, at_50 <= 0.9))
    if "plane3" in have:
        rows = [x for p in parts.values() if p["data"] == "plane3" for x in p["rows"] if x["correction"] == "none"]
        rarest = min(x["rarest"] for x in rows)
        found.append(
            line("18. plane3: every blob keeps >= 5 % of the samples, at any T, r and seed", rarest, rarest >= 0.05)
        )
    for data in (name for name in TOYS if name in have):
        post_hoc = fd(data, 0.0, 50, correction="soft") / fd(data, 0.1, 50)
        found.append(f"- 7. {data}, ancestral, T=50: FD(plain, best threshold) / FD(r=0.1): {post_hoc:.3f}")
    found += [gate(parts, data, sampler) for data in TOYS if data in have for sampler in SAMPLERS]
    return found


def gate(parts: dict, data: str, sampler: str) -> str:
    """Check 16: where the better of the trained ones beats both controls by more than two seed deviations.

    One seed has no deviation (nan, of which no comparison holds) and hence no claim.
    """
    claims = []
    for steps in STEPS:
        get = lambda r, c, steps=steps: mean_of(cells(parts, data, r, c, sampler, steps), "fd")  # noqa: E731
        best = min(get(r, "none") for r in TRAINED[1:])
        rivals = [get(0.0, correction) for correction in ("none", "scale", "soft")]
        if all(best[0] < rival[0] - 2 * np.maximum(best[1], rival[1]) for rival in rivals):
            claims.append(f"T={steps}")
    says = (
        f"beats plain and both controls by two deviations at {', '.join(claims)}"
        if claims
        else "has no gain of its own"
    )
    return f"- 16. {data}, {sampler}: the regularised model {says}"


def page(parts: dict, steps: int) -> str:
    """The whole page, of the data sets and seeds that are finished."""
    runs = {(part["data"], part["seed"]) for part in parts.values()}
    whole = {run for run in runs if sum((p["data"], p["seed"]) == run for p in parts.values()) == len(TRAINED)}
    parts = {name: part for name, part in parts.items() if (part["data"], part["seed"]) in whole}
    seeds = {data: sum(run[0] == data for run in whole) for data in TOYS if any(run[0] == data for run in whole)}
    seconds = {r: np.median([p["seconds"] for p in parts.values() if p["r"] == r]) for r in TRAINED}
    about = (
        f"Fréchet distance (FD) on raw coordinates against held-out data, mean ± deviation over seeds "
        f"({', '.join(f'{data}: {n}' for data, n in seeds.items())}); {steps:,} training steps. In brackets: the "
        "control's scale or threshold, the mean of what was best for each seed on other noise. Off support: mean "
        "magnitude on coordinates without data. Rarest blob: share of samples, 1/6 is even.\n\n"
        f"Processor seconds of a training, median: {', '.join(f'r = {r:g}: {s:.1f}' for r, s in seconds.items())}."
    )
    tables = [table(parts, data, sampler) for data in seeds for sampler in SAMPLERS]
    return "\n\n".join(["# Regularised score matching on vectors", about, *tables, "\n".join(checks(parts))]) + "\n"


# ---------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000, help="training steps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=TOYS, action="append", help="one data set; may be repeated")
    parser.add_argument("--out", type=Path, default=Path("runs/regularized-toys"))
    args = parser.parse_args()
    file = args.out / "results.json"
    args.out.mkdir(parents=True, exist_ok=True)
    parts = disk.read_json(file, what="the results", do="delete it to begin again") if file.is_file() else {}
    toys = [TOYS[name]() for name in args.only or TOYS]
    jobs = [(toy, r, seed) for seed in range(args.seeds) for toy in toys for r in TRAINED]
    done = {}
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns) as progress:
        whole = progress.add_task("parts", total=len(jobs))
        inner = progress.add_task("", total=args.steps)
        step = partial(progress.update, inner)
        for toy, r, seed in jobs:
            name = f"{toy.name} r={r:g} seed={seed} steps={args.steps}"
            if name not in parts:
                progress.update(inner, description=f"train {name}", completed=0)
                net, seconds = trained(toy, RegularSpec(r=r), args.steps, seed, lambda n: step(completed=n))
                progress.update(inner, description=f"sample {name}")
                rows = list(rows_of(net, toy, seed, controls=r == 0))
                parts[name] = {"data": toy.name, "r": r, "seed": seed, "seconds": seconds, "rows": rows}
                disk.write_json(file, parts)
                progress.console.print(f"{name}: {seconds:.0f} s of training")
            done[name] = parts[name]
            if r == TRAINED[-1]:  # one data set and seed is whole
                disk.write_text(Path(__file__).with_suffix(".md"), page(done, args.steps))
            progress.advance(whole)
    Console().print(page(done, args.steps), markup=False)


if __name__ == "__main__":
    main()
