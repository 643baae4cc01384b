"""Samplers on a process that ends in pure noise: as they come, and as `samplers.sampler_of` puts them on it.

    python benchmarks/samplers.py             # about 5 minutes on one core; trains a small net under cosine betas first

The bundled digits, 300 training steps under squaredcos_cap_v2, 20 sampler steps. For each sampler of a recipe the
distance to the real images with its interval, and the share of pixels at black or white. Writes benchmarks/samplers.md.
"""

from __future__ import annotations

import halfstep.core.threads  # noqa: F401  # isort: skip (before torch)

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from fashion import show_table
from halfstep.app import verbs
from halfstep.app.cli import RichWatch
from halfstep.app.measurement import judge_for
from halfstep.app.subject import open_subject
from halfstep.core.plan import StepPlan
from halfstep.core.process import Process
from halfstep.core.recipe import SamplerName, SampleSpec
from halfstep.core.recipes import named
from halfstep.core.seeds import Stage, stage_seed
from halfstep.engine.bank import Bank
from halfstep.engine.samplers import SCHEDULERS
from halfstep.engine.sampling import plan_for, reference_plan
from halfstep.measure.quality import distances
from halfstep.measure.sanity import at_limits
from halfstep.nets.models import load_denoiser
from halfstep.report.page import Table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/samplers"))
    args = parser.parse_args()
    watch = RichWatch()
    edits = ["train.steps=300", "train.batch=64", "train.sample_every=0", "noise.beta_schedule=squaredcos_cap_v2"]
    dense = verbs.train("digits", args.out / "cosine", named("digits-dense").edit(edits), watch=watch)
    net, noise = load_denoiser(dense)
    process = Process.of(noise)
    bank = Bank({"full": net}, "full", process.prediction)
    recipe = named("digits")
    judge = judge_for(bank, open_subject(None, "digits", recipe, watch=watch), args.out, watch)
    rows: list[tuple[str, ...]] = []
    with watch.stage("samplers", 2 * len(SCHEDULERS)) as told:
        for name in SCHEDULERS:
            cells = []
            for plan in (as_it_comes(bank, process, name, args.steps), as_put(bank, process, name, args.steps)):
                seed = stage_seed(recipe.seed, Stage.REPORT)
                features, pictures = judge.features(plan, args.images, seed, keep=args.images)
                found = distances(features, judge.reference, n_boot=recipe.eval.bootstrap, seed=0)
                low, high = (max(0.0, end) for end in found.interval)
                cells += [f"{max(0.0, found.value):.2f} [{low:.2f}, {high:.2f}]", f"{at_limits(pictures):.0%}"]
                told(len(rows) * 2 + len(cells) // 2, f"{name}: {found.value:.3g}")
            rows.append((name, *cells))
    real = at_limits(np.asarray(judge.images.pixels))
    note = (
        f"Fréchet distance, corrected for bias, with its 95 % interval, on {args.images} images against "
        f"{judge.reference.n:,} real ones, features {judge.extractor.name}, floor {judge.floor(args.images).raw:.2f} "
        f"before the correction; {args.steps} steps; pixels at black or white, of the real images {real:.0%}. "
        "`python benchmarks/samplers.py`."
    )
    table = Table(
        title="Samplers on digits under cosine betas",
        columns=("", "as it comes", "black or white", "as halfstep puts it", "black or white"),
        rows=tuple(rows),
        note=note,
    )
    show_table(table, "samplers.md")


def as_it_comes(bank: Bank, process: Process, name: SamplerName, steps: int) -> StepPlan:
    """The sampler with the betas of the process and its own defaults for the rest."""
    cls, options = SCHEDULERS[name]
    return plan_for(bank, cls.from_config(process.config() | options), steps)


def as_put(bank: Bank, process: Process, name: SamplerName, steps: int) -> StepPlan:
    return reference_plan(bank, process.config(), replace(SampleSpec(), scheduler=name, steps=steps))


if __name__ == "__main__":
    main()
