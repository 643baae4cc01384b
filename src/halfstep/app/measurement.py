"""What the verbs that measure share: a judge with its feature network, results written and told."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from halfstep.app.estimate import Drawing
from halfstep.app.subject import images_of, open_subject
from halfstep.core import disk
from halfstep.core.errors import DataError, HalfstepError, RunError
from halfstep.core.folder import open_run
from halfstep.core.lock import releasing
from halfstep.core.machine import alone
from halfstep.core.parts import Parts
from halfstep.core.plan import StepPlan
from halfstep.core.recipe import Recipe
from halfstep.core.results import About
from halfstep.core.seeds import Stage, own_random, stage_seed
from halfstep.core.watch import SILENT, Watch
from halfstep.data.arrays import cache_root, save_arrays
from halfstep.data.images import Images
from halfstep.engine.bank import Bank
from halfstep.engine.device import default_device
from halfstep.engine.layouts import settle_layouts
from halfstep.engine.profiling import TIMED_BATCH
from halfstep.engine.runtimes import settle_runtimes
from halfstep.engine.subject import Subject
from halfstep.measure.features import FeatureNet, extract, extractor_of, feature_net_for, train_features
from halfstep.measure.films import FILMED, Film, film, pictured, save_films
from halfstep.measure.judge import KEEP, Judge, Measured, extractor_for
from halfstep.measure.quality import NEIGHBOURS
from halfstep.report.story import tell

TIMED_TURNS = 6
"""Of a plan that is measured, against the clock: five that count and one to get warm."""


@releasing
@own_random
@alone
def features(data: str, out: Path, recipe: Recipe, *, watch: Watch = SILENT) -> Path:
    """Train the data's own feature classifier and save it in `out`; returns `out`.

    Raises RunError for a folder with other files, or with the network of other data.
    """
    return features_of(open_subject(None, data, recipe, watch=watch), out, watch)


@releasing
@own_random
def features_of(subject: Subject, out: Path, watch: Watch) -> Path:
    """The same for images that are open."""
    images, recipe, out = subject.images, subject.recipe, Path(out)
    there = (out / "features.json").is_file()
    if there and not (out / "recipe.json").exists():  # of before 2026-11-26, when no run folder was made for it
        _require_features_of(images, out)
        return out
    inputs, content = {"verb": "features", "data": subject.data}, {"data_content": images.fingerprint}
    open_run(out, recipe, inputs, content, watch, subject.read()[:1])
    if there:
        return out
    net = feature_net_for(images, seed=recipe.seed)
    steps = recipe.eval.feature_steps
    test = _test_split(subject, watch)
    with watch.stage("train features", steps) as told:
        for record in train_features(net, images, test=test, steps=steps, seed=recipe.seed):
            told(record.step, f"accuracy {record.accuracy:.1%}")
    share = net.record["accuracy"]
    watch.say(f"feature network: accuracy {share:.1%} on {'test' if test else 'training'} images")
    net.save(out)
    return out


def _test_split(subject: Subject, watch: Watch) -> Images | None:
    try:
        return images_of(subject.recipe, subject.data, watch, "test")
    except HalfstepError:
        watch.say("no test split: the accuracy is the training images'")
        return None


def _require_features_of(images: Images, out: Path) -> None:
    known = FeatureNet.load(out).record["fingerprint"]
    if known != images.fingerprint:
        raise RunError(
            got=f"the feature network of other data (fingerprint {known})",
            expected=f"one of {images.name} (fingerprint {images.fingerprint})",
            where=out,
            do="choose another --out, or delete that folder",
        )


def require_measurable(images: Images, recipe: Recipe) -> None:
    """Raise, before anything is trained, for what no measurement could end well with: features that cannot be had or do
    not take these images, too few images."""
    if recipe.eval.features == "own":
        extractor = extractor_of(feature_net_for(images).eval())
    else:
        extractor = extractor_for(recipe.eval.features, images, Path(), "cpu")
    extract(extractor, [images.batch(slice(0, 2))])
    least = NEIGHBOURS + 1  # an image needs as many others around it, for recall and coverage
    for count, where in ((len(images), images.name), (recipe.eval.images, "eval.images")):
        if count < least:
            raise DataError(
                got=f"{count} images", expected=f"at least {least}, to measure with", where=where, do="take more"
            )


def judge_for(
    bank: Bank, subject: Subject, out: Path, watch: Watch, *, helping: bool = False, settled: Path | None = None
) -> Judge:
    """A judge of a bank on a subject's images; trains the data's own feature network where the recipe wants one, unless
    it is `helping` a process that has it. `settled`: where layouts and runtimes are kept, of a run of several banks;
    default: out/state."""
    recipe, settled = subject.recipe, settled or out / "state"
    if recipe.eval.features == "own" and not helping:
        features_of(subject, out / "features", watch)
    bank.to(default_device())
    settle_layouts(bank, settled / "layouts.json", recipe.sample.layout)
    sizes, kept = (1, recipe.sample.batch, recipe.eval.images % recipe.sample.batch), settled / "runtimes.json"
    settle_runtimes(bank, kept, recipe.sample.runtime, recipe.sample.timed, filter(None, sizes), watch=watch)
    extractor = extractor_for(recipe.eval.features, subject.images, out / "features", str(bank.device))
    return Judge(
        bank,
        subject.images,
        extractor,
        cache=references_of(recipe.eval.features, out),
        batch=recipe.sample.batch,
        conditions=subject.conditions,
        watch=watch,
    )


def references_of(features: str, out: Path) -> Path:
    """Where the statistics of real pictures are kept: with the run, but those of a large network that is the same for
    every run (ten minutes of a core for 60,000 pictures) beside the decoded pictures, for all of them."""
    common = features.partition(":")[0] in ("imagenet", "inception", "dinov2")
    return cache_root() / "references" if common else out / "state"


def drawn_for(judge: Judge, plans: Iterable[StepPlan], recipe: Recipe, out: Path) -> Parts:
    """What a report on plans draws, in parts that several processes may do; the judge finds them then."""
    judge.kept = out / "state" / "drawn"
    return judge.parts(plans, recipe.eval.images, stage_seed(recipe.seed, Stage.REPORT), KEEP)


def drawings_of(plans: Iterable[StepPlan], recipe: Recipe) -> list[Drawing]:
    """What `measure_plans` draws of every plan: the images that are scored, and whole batches against the clock."""
    return [Drawing(images=recipe.eval.images + TIMED_TURNS * TIMED_BATCH, plan=plan) for plan in plans]


def write_costs(bank: Bank, out: Path) -> None:
    """What the entries cost where the bank is, in the layouts that it is in: after `judge_for`, as the plans are. An
    earlier call's figures stay."""
    if (out / "cost.json").is_file():
        return
    costs = bank.costs(batch=TIMED_BATCH, repeats=10)
    disk.write_json(out / "cost.json", {name: cost.to_json() for name, cost in costs.items()})


def is_measured(out: Path) -> bool:
    """Whether an earlier call finished the run: its last file is there, and `open_run` found the same recipe."""
    return (out / "quality.json").is_file()


def write_and_tell(judge: Judge, verdict: Measured, plans: Mapping[str, StepPlan], out: Path, begun: float) -> Path:
    """Write what was measured of these plans, with its pictures and films, and the report on it, whose path is
    returned."""
    pictures = verdict.pictures | {"real images": np.asarray(judge.images.subset(min(32, len(judge.images))).pixels)}
    disk.write_atomic(out / "pictures.npz", lambda path: save_arrays(path, pictures))
    disk.write_atomic(out / "films.npz", lambda path: save_films(path, *_filmed(judge, plans, verdict.record.about)))
    record = replace(verdict.record, seconds=round(time.time() - begun, 1))
    disk.write_json(out / "quality.json", record.to_json())
    return tell(out)


def _filmed(judge: Judge, plans: Mapping[str, StepPlan], about: About) -> tuple[dict[str, Film], tuple[str, ...]]:
    """How the first pictures come about under what is run today, the best free and the plan; what they are of."""
    names = {"reference": about.reference, "free": about.free or about.reference, "plan": "plan"}
    kept = {role: name for role, name in names.items() if role == "reference" or name != about.reference}
    how: Any = {"seed": about.seed, "conditions": judge.conditions}
    films = {role: film(judge.bank, plans[name], **how) for role, name in kept.items()}
    return films, pictured(judge.bank, judge.conditions, FILMED)
