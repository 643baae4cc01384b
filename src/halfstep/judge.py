"""Judge: how good and how fast a plan of a bank is, against one set of real images and one feature network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from halfstep.bank import Bank
from halfstep.classes import spread
from halfstep.data import Images
from halfstep.denoiser import class_count
from halfstep.evaluate import Difference, Reference, compare, evaluate, extract, frechet_distance, reference_stats
from halfstep.features import Extractor, load_features, raw_pixels
from halfstep.fit import fit
from halfstep.plan import StepPlan
from halfstep.profiling import interleave, machine
from halfstep.recipe import Recipe
from halfstep.results import Quality
from halfstep.sampling import Labels, denoise, image_generators, labels_of, sample_images, start_noise, to_images
from halfstep.watch import SILENT, Watch


class Judge:
    """Scores plans of one bank. The same seed means the same noise for every plan (common random numbers).

    `class_of`: the class of generated image k, by k alone, in the data's mix of classes; None without classes.
    """

    def __init__(self, bank: Bank, images: Images, extractor: Extractor, *, cache: Path | None, batch: int):
        images = fit(bank.config, images, bank.vae, bank.classes).images
        self.bank, self.images, self.extractor, self.batch = bank, images, extractor, batch
        self.class_of: Labels | None = None
        if class_count(bank.config) and images.labels is not None:
            classes = spread(images.labels)
            self.class_of = lambda k: int(classes[k % len(classes)])
        self.reference: Reference = reference_stats(extractor, images, cache=cache)

    def features(self, plan: StepPlan, count: int, seed: int, keep: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Features [count, F] of a plan's images, and the first `keep` images as uint8 [keep, C, H, W]."""
        kept: list[torch.Tensor] = []

        def watched() -> Iterator[torch.Tensor]:
            for batch in sample_images(self.bank, plan, count, seed=seed, batch=self.batch, labels=self.class_of):
                if sum(len(k) for k in kept) < keep:
                    kept.append(batch.cpu())
                yield batch

        found = extract(self.extractor, watched())
        pictures = to_uint8(torch.cat(kept)[:keep]) if kept else np.zeros((0, 1, 1, 1), np.uint8)
        return found, pictures

    def fd(self, features: np.ndarray) -> float:
        """The Fréchet distance to the real images, without interval."""
        return frechet_distance(
            features.mean(axis=0), np.cov(features, rowvar=False), self.reference.mu, self.reference.cov
        )

    def score(self, plan: StepPlan, count: int, seed: int) -> float:
        """Fréchet distance of `count` images of a plan."""
        return self.fd(self.features(plan, count, seed)[0])

    def measure(self, samples: torch.Tensor) -> float:
        """Fréchet distance of what `denoise` gave, [N,C,H,W]."""
        return self.fd(extract(self.extractor, (to_images(self.bank, part) for part in samples.split(self.batch))))

    def quality(self, features: np.ndarray, seed: int, bootstrap: int) -> dict[str, Quality]:
        """Every metric, each with its interval."""
        return evaluate(features, self.reference, seed=seed, n_boot=bootstrap, features_name=self.extractor.name)

    def difference(self, ours: np.ndarray, theirs: np.ndarray, seed: int, bootstrap: int) -> Difference:
        """How much higher the Fréchet distance of the second features [n, F] is, paired by image."""
        name = self.extractor.name
        return compare(ours, theirs, self.reference, n_boot=bootstrap, seed=seed, features_name=name)

    def wall_ms(self, plans: Mapping[str, StepPlan], *, batch: int = 64, repeats: int = 5) -> dict[str, list[float]]:
        """Milliseconds of whole trajectories at `batch`, several times in turns."""
        calls = {name: self._trajectory(plan, batch) for name, plan in plans.items()}
        return interleave(calls, repeats=repeats, warmup=1)

    def _trajectory(self, plan: StepPlan, batch: int) -> Callable[[], torch.Tensor]:
        labels = labels_of(self.bank, 0, batch, self.class_of)

        def call() -> torch.Tensor:
            generators = image_generators(0, 0, batch)
            return to_images(
                self.bank, denoise(self.bank, plan, start_noise(self.bank, generators), generators, labels)
            )

        return call


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """[-1, 1] float [N,C,H,W] -> uint8."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()


def default_device() -> torch.device:
    """The device that accelerate takes here: a GPU where there is one."""
    return PartialState().device


def extractor_for(source: str, images: Images, own: Path, device: str) -> Extractor:
    """The features of a recipe; "own" is the network that `halfstep features` left in the folder `own`."""
    if source == "pixels":
        return raw_pixels(images)
    return load_features(f"file:{own}" if source == "own" else source, device=device)


@dataclass(frozen=True)
class Verdict:
    """Reference and plan side by side."""

    record: dict[str, Any]
    pictures: dict[str, Any]


def measure_plans(
    judge: Judge,
    plans: Mapping[str, StepPlan],
    recipe: Recipe,
    *,
    keep: int = 32,
    repeats: int = 5,
    batch: int = 64,
    watch: Watch = SILENT,
) -> Verdict:
    """Quality with intervals, paired difference to the first plan, MACs and wall-clock of several plans, same seeds."""
    seed, count = recipe.seed + 3, recipe.eval.images
    features, pictures, rows = {}, {}, {}
    with watch.stage("evaluate", len(plans) + 1) as told:
        for i, (name, plan) in enumerate(plans.items()):
            features[name], pictures[name] = judge.features(plan, count, seed, keep)
            told(i + 1, name)
        times = judge.wall_ms(plans, batch=batch, repeats=repeats)
        told(len(plans) + 1, "")
    first = next(iter(plans))
    for name, plan in plans.items():
        quality = judge.quality(features[name], seed, recipe.eval.bootstrap)
        difference = judge.difference(features[first], features[name], seed, recipe.eval.bootstrap)
        median = sorted(times[name])[len(times[name]) // 2]
        ratios = sorted(t / r for t, r in zip(times[name], times[first], strict=True))
        rows[name] = {
            "macs": plan.macs,
            "share": plan.macs / plans[first].macs,
            "calls": len(plan.rows),
            "wall_ms": median,
            "wall_share": ratios[len(ratios) // 2],
            "wall_share_low": ratios[0],
            "wall_share_high": ratios[-1],
            "quality": {key: value.to_json() for key, value in quality.items()},
            "difference": difference.to_json(),
            "held": difference.held(recipe.eval.tolerance),
        }
    about = {
        "reference": first,
        "batch": batch,
        "repeats": repeats,
        "seed": seed,
        "n": count,
        "tolerance": recipe.eval.tolerance,
        "data": judge.images.fingerprint,
        "machine": machine(),
        "device": str(judge.bank.device),
        "dtype": str(judge.bank.dtype).removeprefix("torch."),
        "layout": "each entry in its faster layout",
    }
    return Verdict({"about": about, "plans": rows}, pictures)
