"""Which measure ranks single swaps at few images: the error table's own question, on the digits demo's bank.

    python benchmarks/error_table.py             # about 6 minutes on one core; trains the demo's supernet first

Every swap of the table is sampled once on --images trajectories. Of small disjoint parts of them, several measures are
taken, and their rank correlation (Spearman) with what the swaps do to the Fréchet distance on all images, and of their
sums with the distances of random plans on other noise. Writes benchmarks/error_table.md.
"""

from __future__ import annotations

import halfstep.core.threads  # noqa: F401  # isort: skip (before torch)

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from fashion import show_table
from halfstep.app import verbs
from halfstep.app.cli import RichWatch
from halfstep.app.measurement import judge_for
from halfstep.app.subject import open_subject
from halfstep.core.recipes import named
from halfstep.engine.sampling import reference_plan
from halfstep.measure.features import extract
from halfstep.measure.quality import frechet_distance
from halfstep.report.page import Table
from halfstep.search.damage import ErrorTable, error_table
from halfstep.search.space import Space, random_plans

SIZES = (16, 32, 64, 128, 256)
"""Images that a table may be made of; each size is tried on up to eight disjoint parts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--plans", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("runs/error_table"))
    args = parser.parse_args()
    watch, recipe = RichWatch(), named("digits")
    pipe = verbs.make("slimmable", "digits", "digits", args.out / "supernet", recipe, watch=watch)
    judge = judge_for(pipe.bank, open_subject(None, "digits", recipe, watch=watch), args.out, watch)
    plan = reference_plan(pipe.bank, pipe.scheduler.config, recipe.sample)
    space = Space.of(plan, pipe.bank.names, recipe.search.genes)
    finals: list[torch.Tensor] = []

    def keep(base: torch.Tensor, swapped: torch.Tensor) -> float:
        finals.extend([base, swapped] if not finals else [swapped])
        return 0.0

    with watch.stage("swaps", 1) as told:
        for done, total, table in error_table(judge.bank, plan, space, keep, images=args.images, seed=1):  # noqa: B007
            told(done / total, "")
    assert isinstance(table, ErrorTable)
    features = [extract(judge.extractor, images.split(256)) for images in finals]
    pixels = [images.flatten(1).double().cpu().numpy() for images in finals]
    truth = fd_damages(judge.fd, features)
    plans = random_plans(space, space.full_price, args.plans, seed=3, slack=1.0)
    with watch.stage("random plans", len(plans)) as told:
        scores = []
        for genes in plans:
            scores.append(judge.score(plan.with_entries(space.expand(genes)), args.images, seed=7))
            told(len(scores), "")
    local = table.costs("local", space.rows)
    swaps = [(k, e) for k in range(len(space.rows)) for e in range(len(space.entries)) if e != space.reference]
    measures: dict[str, Callable[[slice], np.ndarray]] = {
        "change of the Fréchet distance (before)": lambda part: fd_damages(judge.fd, [f[part] for f in features]),
        "moved features (chosen)": lambda part: moved([f[part] for f in features]),
        "moved pixels": lambda part: moved([p[part] for p in pixels]),
        "Fréchet distance of the two sets": lambda part: np.array(
            [between(features[0], f, part) for f in features[1:]]
        ),
    }
    rows = []
    for name, measure in measures.items():
        for size in SIZES:
            parts = [slice(i * size, (i + 1) * size) for i in range(min(8, args.images // size))]
            found = [correlations(measure(part), truth, swaps, plans, scores, space) for part in parts]
            rows.append((name, str(size), *map(spread, zip(*found, strict=True))))
    rows.append(("local errors, all images", str(args.images)))
    rows[-1] += tuple(
        f"{c:.2f}" for c in correlations(np.array([local[s] for s in swaps]), truth, swaps, plans, scores, space)
    )
    rows.append(("change of the Fréchet distance, all images", str(args.images)))
    rows[-1] += tuple(f"{c:.2f}" for c in correlations(truth, truth, swaps, plans, scores, space))
    note = (
        f"Digits demo: {len(swaps)} swaps ({len(space.rows)} genes), {len(plans)} random plans; Spearman's correlation "
        f"with the change of FD on {args.images} images and with the plans' FD on as many of other noise; mean (least) "
        f"of up to eight disjoint parts. "
        f"`python benchmarks/error_table.py --images {args.images} --plans {args.plans}`."
    )
    columns = ("measure of a swap", "images", "with changes of FD", "sums with plans' FD")
    title = "Which measure ranks single swaps at few images"
    show_table(Table(title=title, columns=columns, rows=tuple(rows), note=note), "error_table.md")


def fd_damages(fd: Callable[[np.ndarray], float], features: list[np.ndarray]) -> np.ndarray:
    """How much every swap raises the Fréchet distance; features[0] are the reference's."""
    base = fd(features[0])
    return np.array([fd(one) - base for one in features[1:]])


def moved(vectors: list[np.ndarray]) -> np.ndarray:
    """Mean squared distance of every swap's vectors from the reference's, paired."""
    return np.array([np.square(one - vectors[0]).sum(axis=1).mean() for one in vectors[1:]])


def between(base: np.ndarray, one: np.ndarray, part: slice) -> float:
    """The Fréchet distance of a swap's images from the reference's, not from the data."""
    first, second = base[part], one[part]
    cov = [np.cov(x, rowvar=False) for x in (first, second)]
    return frechet_distance(first.mean(0), cov[0], second.mean(0), cov[1])


def correlations(
    found: np.ndarray, truth: np.ndarray, swaps: list, plans: list, scores: list[float], space: Space
) -> tuple[float, float]:
    """Rank correlation of damages with the true ones, and of their sums over a plan with its measured score."""
    damage = np.zeros((len(space.rows), len(space.entries)))
    for swap, value in zip(swaps, found, strict=True):
        damage[swap] = value
    sums = [damage[np.arange(len(genes)), list(genes)].sum() for genes in plans]
    return float(spearmanr(found, truth)[0]), float(spearmanr(sums, scores)[0])


def spread(values: tuple[float, ...]) -> str:
    return f"{np.mean(values):.2f} ({min(values):.2f})"


if __name__ == "__main__":
    main()
