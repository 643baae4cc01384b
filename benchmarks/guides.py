"""How well cheap guides rank plans: fidelity and small Fréchet distances against the Fréchet distance of many images.

    python benchmarks/guides.py --device cuda     # 30 plans, 8,192 images each: some minutes on a GPU
    python benchmarks/guides.py --plans 6 --truth 256 --near 32 --fine 0    # to see that it runs: five minutes

Plans: uniform and random rows of the bank under DPM-Solver++ 2M, UniPC and DDIM of 5 to 20 steps, each between 3 % and
30 % of the MACs of 50 dense DDIM steps. The truth is a plan's Fréchet distance on --truth images of one seed's noise.
The guides see another seed's: fidelity (distance to the converged picture of the same noise, in pixels, SSIM and
features) on 16 to 256 images, the Fréchet distance of the features from the converged ones', and the Fréchet distance
to the data on common noise on 256 to 2,048 images, each on disjoint stretches of the noise, so that a guide's own
chance is in the table. How far solvers converge stands in a table of its own.

Writes guides<size>.md and .json beside this file (--out). What was drawn is kept in runs/guides<size>/ (--work), a file
per plan, known by content: a call that was cut off, or one of more images, goes on.
"""

from __future__ import annotations

import halfstep.core.threads  # noqa: F401  # isort: skip (before torch)

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from fashion import DATA, MODELS, markdown
from halfstep.app.measurement import judge_for
from halfstep.app.subject import open_subject
from halfstep.app.terminal import RichWatch
from halfstep.core import disk
from halfstep.core.plan import StepPlan
from halfstep.core.process import Process
from halfstep.core.recipes import named
from halfstep.data.arrays import read_arrays, save_arrays
from halfstep.engine.bank import Bank
from halfstep.engine.device import default_device, use_device
from halfstep.engine.sampling import plan_for
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.measure.fidelity import FINE, Converged, converged_plan
from halfstep.measure.judge import Judge
from halfstep.measure.quality import frechet_distance
from halfstep.nets.content import fingerprint
from halfstep.report.page import Table

TRUTH, GUIDES, FLOW = 101, 102, 103
"""Seeds of the noise that the truth, the guides and the solvers' table are drawn from."""
ARMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "DPM-Solver++ 2M": (diffusers.DPMSolverMultistepScheduler, {}),
    "UniPC": (diffusers.UniPCMultistepScheduler, {}),
    "DDIM": (diffusers.DDIMScheduler, {}),
}
STEPS = (5, 20)
SHARES = (0.03, 0.30)
"""Of the MACs of 50 steps of the dense net."""
FEW = (16, 32, 64, 128, 256)
MANY = (256, 512, 1024, 2048)
REPEATS = 16
"""Disjoint stretches of noise on which a guide is tried, at most."""
UNPACKED = 1 << 30


# ---- plans ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tried:
    """One of the plans that are ranked. `share`: of the MACs of 50 dense steps."""

    arm: str
    rows: str
    plan: StepPlan
    share: float


def tried_plans(bank: Bank, process: Process, count: int) -> list[Tried]:
    """Different plans, the arms in turn, of each arm's plans every third uniform; the same for the same bank."""
    draw, prices, found = np.random.default_rng(0), bank.prices(), dict[str, Tried]()
    dense = 50 * prices[bank.reference].macs
    while len(found) < count:
        arm = list(ARMS)[len(found) % len(ARMS)]
        kind, options = ARMS[arm]
        steps = int(draw.integers(STEPS[0], STEPS[1] + 1))
        plan = plan_for(bank, kind.from_config(process.config() | options), steps, prices)
        stretches = 1 if len(found) // len(ARMS) % 3 == 0 else int(draw.integers(2, 6))
        plan = plan.with_entries(random_rows(list(bank), len(plan.rows), stretches, draw))
        share = plan.macs / dense
        if SHARES[0] <= share <= SHARES[1]:
            told = " ".join(f"{count}x{entry}" for entry, _, _, count in plan.runs())
            found.setdefault(plan.digest, Tried(arm, told, plan, share))
    return list(found.values())


def random_rows(entries: list[str], rows: int, stretches: int, draw: np.random.Generator) -> list[str]:
    """So many stretches of random entries, parted at random rows."""
    parted = np.sort(draw.choice(np.arange(1, rows), size=min(stretches, rows) - 1, replace=False))
    names = [entries[int(i)] for i in draw.integers(len(entries), size=len(parted) + 1)]
    return [names[int(np.searchsorted(parted, row, side="right"))] for row in range(rows)]


# ---- what is drawn of a plan, once -----------------------------------------------------------------------------------


class Drawn:
    """What was drawn of plans, in a folder: a file for each plan, seed and number of images, known by content."""

    def __init__(self, judge: Judge, folder: Path, target: Converged):
        self.judge, self.folder, self.target = judge, folder, target

    def features(self, plan: StepPlan, count: int, seed: int) -> np.ndarray:
        """Features [count, F] of images of a seed."""
        return self._kept(plan, f"features-{seed}-{count}", lambda: {"x": self.judge.features(plan, count, seed)[0]})[
            "x"
        ]

    def fidelities(self, plan: StepPlan) -> dict[str, np.ndarray]:
        """Per image of the target, by metric: smaller is nearer."""

        def draw() -> dict[str, np.ndarray]:
            found = self.target.fidelities(plan)
            return {"pixels": found.mse, "SSIM": 1 - found.ssim, "features": found.of("features")}

        return self._kept(plan, f"fidelity-{self.target.target}-{self.target.count}", draw)

    def _kept(self, plan: StepPlan, name: str, draw: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        bank, judge = self.judge.bank, self.judge
        weights = [bank.fingerprint(entry) for entry in sorted(plan.nets)]
        file = self.folder / f"{fingerprint(plan.digest, weights, judge.extractor.name)}-{name}.npz"
        if not file.is_file():
            arrays = {key: np.asarray(value, np.float32) for key, value in draw().items()}
            disk.write_atomic(file, lambda path: save_arrays(path, arrays))
        arrays = read_arrays(file, UNPACKED, what="what was drawn of a plan", do="delete it")
        return {key: value.astype(np.float64) for key, value in arrays.items()}


# ---- guides ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Guide:
    """A cheap number for every plan, on several disjoint stretches of noise: `values` [repeats, plans]."""

    name: str
    images: int
    values: np.ndarray
    extra: float = 0.0
    """What it draws beside its images of every plan, in images of the mean plan."""

    @property
    def spent(self) -> float:
        return self.images * self.values.shape[1] + self.extra


def guides_of(drawn: Drawn, tried: list[Tried], pool: int, watch: RichWatch) -> list[Guide]:
    """All guides on the noise of `GUIDES`."""
    near, features = [], []
    with watch.stage("guides", len(tried)) as told:
        for i, one in enumerate(tried):
            near.append(drawn.fidelities(one.plan))
            features.append(drawn.features(one.plan, pool, GUIDES))
            told(i + 1, one.arm)
    mean_macs = float(np.mean([one.plan.macs for one in tried]))
    target, found = drawn.target, []
    for metric in ("pixels", "SSIM", "features"):
        for n in (n for n in FEW if n <= target.count):
            values = np.array([[one[metric][rows].mean() for one in near] for rows in stretches_of(n, target.count)])
            extra = n * target.plan.macs / mean_macs
            found.append(Guide(f"fidelity, {metric}", n, values, extra))
    twins = target.features
    assert twins is not None, "the target has an extractor"
    for n in (n for n in dict.fromkeys((*FEW, *MANY)) if n <= target.count):
        parts = list(stretches_of(n, target.count))
        values = np.array([[apart(one[rows], twins[rows]) for one in features] for rows in parts])
        found.append(Guide("Fréchet distance from the converged twins", n, values, n * target.plan.macs / mean_macs))
    for n in dict.fromkeys((*MANY, pool)):  # of the whole pool: how well the truth agrees with itself
        values = np.array([[drawn.judge.fd(one[rows]) for one in features] for rows in stretches_of(n, pool)])
        if len(values) and n >= drawn.judge.reference.least:
            found.append(Guide("Fréchet distance", n, values))
    return found


def apart(found: np.ndarray, twins: np.ndarray) -> float:
    """The Fréchet distance of features [n, F] from their twins' of the same noise: what the set has moved, whichever
    picture took another's place; of few images too, since both sets share what is chance in them."""
    return frechet_distance(found.mean(0), np.cov(found.T), twins.mean(0), np.cov(twins.T))


def stretches_of(n: int, pool: int) -> Iterator[slice]:
    return (slice(i * n, (i + 1) * n) for i in range(min(REPEATS, pool // n)))


def ranks(values: np.ndarray) -> np.ndarray:
    return values.argsort().argsort().astype(float)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of values without ties."""
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def within_arms(a: np.ndarray, b: np.ndarray, arms: list[str]) -> float:
    """The mean of each arm's own rank correlation."""
    members = [[i for i, arm in enumerate(arms) if arm == name] for name in dict.fromkeys(arms)]
    return float(np.mean([spearman(a[rows], b[rows]) for rows in members if len(rows) > 2] or [np.nan]))


def resampled(values: list[float]) -> str:
    """The mean over repeats with its 95 % bootstrap interval; of one repeat alone, that; none of nothing."""
    found = np.asarray(values)
    if np.isnan(found).any():
        return "–"
    if len(found) < 2:
        return f"{found.mean():.2f}"
    draws = np.random.default_rng(0).integers(len(found), size=(2000, len(found)))
    low, high = np.quantile(found[draws].mean(1), (0.025, 0.975))
    return f"{found.mean():.2f} [{low:.2f}, {high:.2f}]"


def guides_table(guides: list[Guide], tried: list[Tried], truth: np.ndarray, note: str) -> Table:
    rows, arms = [], [one.arm for one in tried]
    best = truth.min()
    for guide in guides:
        repeats = list(guide.values)
        regrets = [float(truth[values.argmin()] - best) for values in repeats]
        rows.append(
            (
                guide.name,
                f"{guide.images:,}",
                f"{guide.spent:,.0f}",
                f"{len(repeats)}",
                resampled([spearman(values, truth) for values in repeats]),
                resampled([within_arms(values, truth, arms) for values in repeats]),
                f"{np.mean(regrets):.3f}",
                f"{np.max(regrets):.3f}",
            )
        )
    columns = ("guide", "n", "images spent", "repeats", "rank correlation", "within an arm", "regret", "worst regret")
    return Table(title="Guides", columns=columns, rows=tuple(rows), note=note)


# ---- the truth -------------------------------------------------------------------------------------------------------


def truths(drawn: Drawn, tried: list[Tried], count: int, bootstrap: int, watch: RichWatch) -> list[dict[str, float]]:
    """Every plan's Fréchet distance, corrected for bias, with its interval, and as measured."""
    found = []
    with watch.stage("truth", len(tried)) as told:
        for i, one in enumerate(tried):
            features = drawn.features(one.plan, count, TRUTH)
            fd = drawn.judge.distances(features, TRUTH, bootstrap)
            found.append({"fd": fd.value, "low": fd.interval[0], "high": fd.interval[1], "raw": fd.raw})
            told(i + 1, f"{one.arm}: {fd.value:.3g}")
    return found


def plans_table(tried: list[Tried], truth: list[dict[str, float]], guides: list[Guide], count: int) -> Table:
    """The plans, best first."""
    near = {g.name.removeprefix("fidelity, "): g for g in guides if g.name.startswith("fidelity")}  # the largest n
    rows = []
    for i in sorted(range(len(tried)), key=lambda i: truth[i]["fd"]):
        one, fd = tried[i], truth[i]
        pixels, ssim, features = (float(near[name].values.mean(0)[i]) for name in ("pixels", "SSIM", "features"))
        rows.append(
            (
                *(one.arm, f"{one.plan.sampler.steps}", one.rows, f"{one.share:.1%}"),
                f"{fd['fd']:.2f} [{fd['low']:.2f}, {fd['high']:.2f}]",
                *(f"{10 * np.log10(4 / pixels):.1f}", f"{1 - ssim:.3f}", f"{features:.2f}"),
            )
        )
    columns = ("arm", "steps", "rows", "MACs", "Fréchet distance", "PSNR, dB", "SSIM", "in features")
    note = f"MACs as a share of 50 dense steps; distance on {count:,} images, corrected, with its 95 % interval."
    return Table(title="The plans, best first", columns=columns, rows=tuple(rows), note=note)


# ---- solvers and where they lead -------------------------------------------------------------------------------------


def solvers(bank: Bank, process: Process) -> Iterator[tuple[str, str, StepPlan]]:
    """(sampler, spacing, plan) of the dense net, coarse and fine."""
    prices = bank.prices()
    grids: tuple[tuple[str, Any, dict[str, bool], tuple[str, ...], tuple[int, ...]], ...] = (
        (
            "DPM-Solver++ 2M",
            diffusers.DPMSolverMultistepScheduler,
            {},
            ("linspace", "trailing", "leading"),
            (20, 50, 100, 200),
        ),
        (
            "DPM-Solver++ 2M Karras",
            diffusers.DPMSolverMultistepScheduler,
            {"use_karras_sigmas": True},
            ("linspace",),
            (20, 50, 100),
        ),
        ("UniPC", diffusers.UniPCMultistepScheduler, {}, ("linspace",), (20, 50, 100)),
        ("DDIM, as stock", diffusers.DDIMScheduler, {}, ("leading", "trailing"), (20, 50, 100, 250, 500)),
        (
            "DDIM, not clipped",
            diffusers.DDIMScheduler,
            {"clip_sample": False},
            ("leading", "trailing"),
            (20, 50, 100, 250, 500),
        ),
    )
    for name, kind, options, spacings, counts in grids:
        for spacing in spacings:
            for steps in counts:
                config = process.config() | options | {"timestep_spacing": spacing}
                yield name, spacing, plan_for(bank, kind.from_config(config), steps, prices)


def solvers_table(drawn: Drawn, process: Process, count: int, bootstrap: int, watch: RichWatch) -> Table:
    """How far solvers' pictures are from the flow's end: from DPM-Solver++ at twice the converged plan's steps."""
    judge, rows = drawn.judge, []
    finest = Converged(
        judge.bank, converged_plan(judge.bank, process, 2 * FINE), judge.extractor, count=count, seed=FLOW,
        batch=judge.batch, conditions=judge.conditions, cache=drawn.folder,
    )  # fmt: skip
    found = list(solvers(judge.bank, process))
    with watch.stage("solvers", len(found)) as told:
        for i, (name, spacing, plan) in enumerate(found):
            off = Drawn(judge, drawn.folder, finest).fidelities(plan)
            mse, ssim, moved = (off[metric].mean() for metric in ("pixels", "SSIM", "features"))
            fd = "–"
            if count >= judge.reference.least:
                one = judge.distances(drawn.features(plan, count, FLOW), FLOW, bootstrap)
                fd = f"{one.value:.2f} [{one.interval[0]:.2f}, {one.interval[1]:.2f}]"
            psnr = "∞" if mse == 0 else f"{10 * np.log10(4 / mse):.1f}"
            rows.append((name, spacing, f"{plan.sampler.steps}", psnr, f"{1 - ssim:.4f}", f"{moved:.3g}", fd))
            told(i + 1, f"{name}, {plan.sampler.steps}: {psnr} dB")
    columns = ("sampler", "spacing", "steps", "PSNR, dB", "SSIM", "in features", "Fréchet distance")
    note = (
        f"{count:,} images of one seed's noise, against DPM-Solver++ 2M of {2 * FINE} trailing steps; the converged "
        f"plan of `measure/fidelity.py` takes {FINE}."
    )
    return Table(title="Where solvers of the dense net lead", columns=columns, rows=tuple(rows), note=note)


# ---- the page --------------------------------------------------------------------------------------------------------


def record_of(tried: list[Tried], truth: list[dict[str, float]], guides: list[Guide]) -> list[dict]:
    """A record of every plan; of a guide's repeats the mean and the standard deviation."""
    return [
        {
            "arm": one.arm, "steps": one.plan.sampler.steps, "rows": one.rows, "share": round(one.share, 5),
            "macs": one.plan.macs, "digest": one.plan.digest, **{key: round(v, 4) for key, v in truth[i].items()},
            "guides": {
                f"{g.name}, {g.images}": [float(f"{g.values[:, i].mean():.5g}"), float(f"{g.values[:, i].std():.3g}")]
                for g in guides
            },
        }
        for i, one in enumerate(tried)
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, choices=(16, 32), default=16)
    parser.add_argument("--device", help="as torch names it, e.g. cuda; default: accelerate's choice")
    parser.add_argument("--truth", type=int, default=8192, help="images of the truth, and of the guides' pool")
    parser.add_argument("--plans", type=int, default=30)
    parser.add_argument("--near", type=int, default=REPEATS * FEW[-1], help="images whose converged twins are drawn")
    parser.add_argument("--fine", type=int, default=512, help="images of the solvers' table; 0: without it")
    parser.add_argument("--batch", type=int, help="images a call; default 1,024 on a GPU, 128 else")
    parser.add_argument("--data", default=DATA)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the page and the JSON")
    parser.add_argument("--set", action="append", default=[], help="edit the recipe, as halfstep's --set")
    parser.add_argument("--work", type=Path, help="folder of what was drawn; default runs/guides<size>")
    args = parser.parse_args()
    if args.device:
        use_device(args.device)
    torch.backends.cudnn.allow_tf32 = False  # its rounding shows at 60 dB, where fine solvers differ
    batch = args.batch or (128 if default_device().type == "cpu" else 1024)
    watch, work = RichWatch(), args.work or Path(f"runs/guides{args.size}")
    recipe = named(f"fashion{args.size}").edit([f"sample.batch={batch}", *args.set])
    pipe = StepAwarePipeline.from_pretrained(MODELS / f"fashion{args.size}-supernet")
    bank, process = pipe.bank, pipe.process
    judge = judge_for(bank, open_subject(None, args.data, recipe, watch=watch), work, watch)
    tried = tried_plans(bank, process, args.plans)
    target = Converged(
        bank, converged_plan(bank, process), judge.extractor, count=min(args.near, args.truth), seed=GUIDES,
        batch=batch, conditions=judge.conditions, cache=work,
    )  # fmt: skip
    drawn, bootstrap = Drawn(judge, work, target), recipe.eval.bootstrap
    truth = truths(drawn, tried, args.truth, bootstrap, watch)
    guides = guides_of(drawn, tried, args.truth, watch)
    found = np.array([one["fd"] for one in truth])
    note = (
        f"{len(tried)} plans, distances between {found.min():.2f} and {found.max():.2f}, against {judge.reference.n:,} "
        f"real images, features {judge.extractor.name}. Images spent: n of every plan, and of fidelity the converged "
        f"pictures, by their MACs in images of the mean plan. Rank correlation: Spearman's with the distance on "
        f"{args.truth:,} images of other noise, the mean over repeats on disjoint noise with its 95 % bootstrap "
        "interval; within an arm: the mean of the arms' own. Regret: how much higher the true distance of the plan "
        "with the best guide is than the best plan's, in the mean and at worst."
    )
    tables = [guides_table(guides, tried, found, note), plans_table(tried, truth, guides, args.truth)]
    if args.fine:
        tables.append(solvers_table(drawn, process, args.fine, bootstrap, watch))
    device = torch.cuda.get_device_name() if bank.device.type == "cuda" else str(bank.device)
    command = (
        f"python benchmarks/guides.py --size {args.size} --truth {args.truth} --plans {args.plans} --fine {args.fine}"
    )
    page = [f"# Which cheap guide ranks plans, Fashion-MNIST {args.size}x{args.size}", f"`{command}`, on {device}."]
    args.out.mkdir(parents=True, exist_ok=True)
    disk.write_text(args.out / f"guides{args.size}.md", "\n\n".join(page + [markdown(t) for t in tables]) + "\n")
    disk.write_json(
        args.out / f"guides{args.size}.json", {"command": command, "plans": record_of(tried, truth, guides)}
    )
    print("\n\n".join(markdown(table) for table in tables))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
