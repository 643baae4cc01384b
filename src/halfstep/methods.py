"""The `compress METHOD` commands as functions: train (see `compress.py`), measure beside the controls, report."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from halfstep import compress, disk
from halfstep.bank import Bank
from halfstep.compress import regular_name
from halfstep.corrections import corrected_plans
from halfstep.entry import Entry
from halfstep.fit import Fitted
from halfstep.folder import open_run
from halfstep.job import Source, images_of, opened, read_of
from halfstep.judge import measure_plans
from halfstep.lock import releasing
from halfstep.measured import (
    is_measured,
    judge_for,
    measured,
    open_pipeline,
    require_measurable,
    write_and_tell,
    write_costs,
)
from halfstep.models import load_denoiser
from halfstep.recipe import Recipe
from halfstep.rundir import contents_of, encoded
from halfstep.sampling import StepAwarePipeline, reference_plan
from halfstep.scores import counted, open_scores
from halfstep.seeds import Stage, own_random, stage_seed
from halfstep.sparse import STAGES
from halfstep.story import tell
from halfstep.watch import SILENT, Watch


def _ready(model: str | None, data: str, recipe: Recipe, watch: Watch) -> tuple[Source, Fitted]:
    """What a method starts from. Raises, before anything is written or trained, for what the report at the end could
    not be made of."""
    source, recipe = opened(model, recipe)
    fitted = images_of(source, data, recipe, watch)
    require_measurable(fitted.images, recipe)
    return source, fitted


@releasing
@own_random
def sparse(model: str, data: str, out: Path, recipe: Recipe, *, watch: Watch = SILENT) -> Path:
    """SparseDM from a dense denoiser to a report: fine-tune under masks, measure every pattern beside the reference
    and beside one-shot masking of the same weights. Returns report.html; resumes."""
    begun = time.time()
    _ready(model, data, recipe, watch)
    pipe = open_pipeline(str(compress.sparse(model, data, out, recipe, watch=watch)))
    one_shot = compress.sparse_net(load_denoiser(model)[0], replace(recipe.sparse, frozen=False))
    bank, patterns = pipe.bank, [str(pattern) for pattern in one_shot.patterns]
    for pattern in one_shot.patterns:
        entry = Entry(one_shot.bake(pattern), masking=bank.entries[str(pattern)].masking)
        bank = bank.with_entry(f"{pattern} one-shot", entry, bank.prediction_type)
    main = patterns[-1 if recipe.sparse.schedule in STAGES else 0]
    return measured(pipe, bank, main, data, out, recipe, begun, watch)


@releasing
@own_random
def spectral(model: str, data: str, out: Path, recipe: Recipe, *, watch: Watch = SILENT) -> Path:
    """Spectral Diffusion from a dense denoiser to a report: train the student, measure it beside the teacher.

    Returns report.html; resumes. The bank of `out` is what `search` mixes step by step.
    """
    begun = time.time()
    _ready(model, data, recipe, watch)
    pipe = open_pipeline(str(compress.spectral(model, data, out, recipe, watch=watch)))
    return measured(pipe, pipe.bank, "spectral", data, out, recipe, begun, watch)


@releasing
@own_random
def continuous(data: str, out: Path, recipe: Recipe, *, model: str | None = None, watch: Watch = SILENT) -> Path:
    """The Missing U from images to a report: train the continuous net, measure every number of solver steps beside the
    teacher, or where there is none beside the most steps. Returns report.html; resumes."""
    begun = time.time()
    _ready(model, data, recipe, watch)
    pipe = open_pipeline(str(compress.continuous(data, out, recipe, model=model, watch=watch)))
    main = f"continuous@{min(recipe.continuous.steps)}"
    return measured(pipe, pipe.bank, main, data, out, recipe, begun, watch)


@releasing
@own_random
def regularized(data: str, out: Path, recipe: Recipe, *, model: str | None = None, watch: Watch = SILENT) -> Path:
    """Regularised score matching to a report: one training for every weight of the penalty, the best one by the
    distance on validation seeds, and always beside it the plain training with its best scale and its best threshold,
    which cost no training. Returns report.html; resumes.

    `model`: train on from this denoiser, every weight for the same number of steps; None: from scratch.
    """
    begun = time.time()
    source, fitted = _ready(model, data, recipe, watch)
    images = fitted.images
    net = compress.regular_net(source.dense, encoded(images, source.vae, watch), recipe)
    inputs = {"verb": "compress regularized grid", "data": data, "model": model or ""}
    contents = contents_of(images, *source) if model else contents_of(images, source.vae)
    out = open_run(out, recipe, inputs, contents, watch, read_of(source, model, fitted, net))
    if is_measured(out):
        return tell(out)
    entries, pipe = {}, None
    for r in (0.0, *recipe.regular.grid):
        one = replace(recipe, regular=replace(recipe.regular, r=r))
        watch.say(f"{recipe.regular.penalty} with r = {r:g}")
        pipe = open_pipeline(str(compress.regularized(data, out / regular_name(r), one, model=model, watch=watch)))
        entries[regular_name(r)] = pipe.bank.entries[regular_name(r)]
    assert pipe is not None
    plain = regular_name(0.0)
    bank = Bank(entries, plain, pipe.bank.prediction_type, pipe.bank.vae, pipe.bank.classes)
    judge, recipe = judge_for(bank, data, recipe, out, watch)
    plan = reference_plan(bank, pipe.process, recipe.sample)
    book = open_scores(judge, out, watch)
    scores = book.on(recipe.shrink.images, stage_seed(recipe.seed, Stage.SEARCH))
    with watch.stage("choose r", len(bank)) as told:
        found = scores.many([plan.uniform(name) for name in bank], "penalty", seen=counted(told))
    curve = dict(zip(bank, found, strict=True))
    best = min(curve, key=lambda name: curve[name])
    shrunk = corrected_plans(book, plan, replace(recipe.shrink, rounds=0), seed=recipe.seed, watch=watch)
    controls = {f"{plain}, {name}": shrunk.plans[name] for name in ("one scale", "one threshold")}
    beside = {name: shrunk.scores[name] for name in ("one scale", "one threshold")}
    disk.write_json(out / "grid.json", {"images": recipe.shrink.images, "scores": curve, "controls": beside})
    others = {name: plan.uniform(name) for name in bank if name not in (plain, best)}
    plans = {"reference": plan, "plan": plan.uniform(best)} | controls | others
    verdict = measure_plans(judge, plans, recipe, watch=watch)
    both = {name: bank.entries[name] for name in (plain, best)}
    kept = Bank(both, plain, bank.prediction_type, bank.vae, bank.classes)
    if not (out / "cost.json").is_file():
        write_costs(kept, out)
    plans["plan"].save(out / "plan.json")
    chosen = reference_plan(kept, pipe.process, recipe.sample).uniform(best)
    StepAwarePipeline(kept, chosen).save_pretrained(out / "pipeline")
    return write_and_tell(judge, verdict, out, begun)
