"""The verbs as functions: train, compress, optimize, search, shrink, sample, evaluate, profile, report.

Each takes plain values, writes a run folder and can be called again to resume. What is going on is told to a `Watch`.
All of them take the same models and data (see `open_subject`). `denoise` and `spectrum` stand in `inspection.py`,
`features` in `measurement.py`, `compare` in `comparison.py`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, LDMPipeline

from halfstep.app.drawing import Pictures
from halfstep.app.estimate import Drawing, Training, announce
from halfstep.app.measurement import (
    drawings_of,
    drawn_for,
    is_measured,
    judge_for,
    require_measurable,
    write_and_tell,
    write_costs,
)
from halfstep.app.searching import (
    CONVERGED_DATA,
    TOLERATED,
    Asked,
    Goal,
    Ground,
    converged_data,
    dense_control,
    named_free,
    needed,
    require_reachable,
    searched,
    with_free,
    with_int8,
    with_precisions,
    with_reuse,
)
from halfstep.app.subject import open_model, open_subject
from halfstep.app.workers import by_itself, finished_by_first, help_with, helpers, lead, ready, wait_until_ready
from halfstep.core import disk
from halfstep.core.errors import ModelError, PlanError, RunError
from halfstep.core.folder import open_or_join, open_run
from halfstep.core.lock import releasing
from halfstep.core.machine import alone, go_on_alone, this_process, together
from halfstep.core.plan import StepPlan
from halfstep.core.process import Process
from halfstep.core.recipe import Recipe, RunRecord, RuntimeName, SampleSpec
from halfstep.core.results import Comparison, Cost, read_comparison
from halfstep.core.seeds import Stage, own_random, seeded, stage_seed
from halfstep.core.sums import write_sums
from halfstep.core.watch import SILENT, Watch
from halfstep.data.classes import listed, numbers_of, write_classes
from halfstep.data.pictures import picture_grid
from halfstep.engine.bank import Bank
from halfstep.engine.conditions import Conditions
from halfstep.engine.device import default_device
from halfstep.engine.reading import about_bank
from halfstep.engine.runtimes import settle_runtimes
from halfstep.engine.samplers import sampler_of
from halfstep.engine.sampling import fewer_steps
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.engine.subject import Subject
from halfstep.measure.judge import measure_plans
from halfstep.methods import continuous, regularized, slimmable, sparse, spectral
from halfstep.nets.denoiser import class_count, copy_of
from halfstep.nets.fit import fit
from halfstep.nets.fresh import new_model
from halfstep.report.compared import tell_compared
from halfstep.report.story import tell, tell_spectra
from halfstep.search.corrections import corrected_plans, shrink_plan
from halfstep.search.scores import ScoreBook, counted, open_scores
from halfstep.training.draft import Draft, trained
from halfstep.training.loop import preview_of, run_loop
from halfstep.training.train import Diffusion, TrainState, dense_objective, my_shares, require_trainable

# ---------------------------------------------------------------------------------------------------------- training


@releasing
@own_random
@together
def train(data: str, out: Path, recipe: Recipe, *, model: str | None = None, watch: Watch = SILENT) -> Path:
    """Train a dense denoiser on `data` (from the recipe's model spec, or on from `model`).

    Returns the folder of a stock `DDPMPipeline` (with `model.vae` a `LDMPipeline`), out/pipeline. Resumes when called
    again.
    """
    out = Path(out)
    my_shares(recipe.train)
    with this_process().local_main_process_first():  # the others find what it put into the cache
        subject = open_subject(model, data, recipe, watch=watch)
        recipe, seen = subject.recipe, subject.lessons(watch)
    net = subject.dense
    if net is None:
        with seeded(recipe.seed):
            net = new_model(recipe.model, subject.encoded(), recipe.noise.timesteps)
        fit(net.config, subject.images, subject.vae, subject.images.classes)
    require_trainable(net, recipe.train)
    inputs = {"verb": "train", "data": data, "model": subject.source}
    open_run(out, recipe, inputs, subject.content, watch, subject.read(net))
    done = out / "pipeline"
    if (done / "model_index.json").is_file():
        watch.say(f"{done} is there already")
        return done

    def preview(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        twin = copy_of(net)
        twin.load_state_dict(weights)
        bank = subject.bank_of({"full": twin}, "full")
        return preview_of(bank.to(twin.device), recipe.noise, recipe, subject.conditions)

    _announce_training(subject.bank_of({"full": copy_of(net)}, "full"), recipe, watch)
    state, objective = TrainState.new(net, recipe.train), dense_objective(net, Diffusion(recipe.noise))
    run_loop(out, state, seen, recipe, objective, "dense", watch, preview)
    net.load_state_dict(state.average())
    if go_on_alone():
        disk.write_atomic(done, lambda folder: _write_stock(folder, subject, net.cpu(), recipe.noise))
    return done


def _announce_training(
    bank: Bank, recipe: Recipe, watch: Watch, *, times: int = 1, more: Sequence[Drawing] = ()
) -> None:
    """Say what a training, `times` over, and a measurement after it take: every entry but the reference is trained with
    that as a teacher, or it alone. Of several processes the first says it, of its share of the steps."""
    if not this_process().is_main_process:
        return
    others = tuple(name for name in bank.computed if name != bank.reference)
    nets, teachers = (others, (bank.reference,)) if others else ((bank.reference,), ())
    spec = recipe.train
    batch = max(1, spec.batch // this_process().num_processes)
    work = Training(steps=times * spec.steps, batch=batch, trained=nets, teachers=teachers)
    announce(watch, bank.to(default_device()), [work, *more], batch=batch)


def _write_stock(folder: Path, subject: Subject, net: Any, process: Process) -> None:
    """A dense denoiser as a pipeline of diffusers' own, with the names of its classes and the digests of its files;
    under flow matching with a sampler that the pipeline's loop runs."""
    spec = SampleSpec(scheduler="euler" if subject.vae is None else "dpmsolver++")
    scheduler = sampler_of(process, spec) if process.is_flow else process.scheduler()
    pipeline: Any = DDPMPipeline(net, scheduler)
    if subject.vae is not None:
        pipeline = LDMPipeline(subject.vae.cpu(), net, scheduler)
    pipeline.save_pretrained(folder)
    write_classes(folder, subject.classes_of(net.config))
    write_sums(folder)


METHODS: dict[str, Callable[[Subject, Recipe], Draft]] = {
    "slimmable": slimmable.draft,
    "sparse": sparse.draft,
    "spectral": spectral.draft,
    "continuous": continuous.draft,
    "regularized": regularized.draft,
}
"""What `compress` makes stand-ins with, by name: the paper's file turns a subject into a net to train and its bank."""
ALONE = ("continuous", "regularized")
"""The methods that can do without a model."""


@releasing
@own_random
@together
def make(
    method: str, model: str | None, data: str, out: Path, recipe: Recipe, *, watch: Watch = SILENT
) -> StepAwarePipeline:
    """From a dense denoiser (or for some methods images alone) to a bank of stand-ins, in out/pipeline; not measured.

    `regularized` trains the one weight `regular.r`. Resumes when called again."""
    subject = _to_compress(method, model, data, recipe, watch)
    return trained(METHODS[method](subject, subject.recipe), subject, subject.recipe, Path(out), watch)


@releasing
@own_random
@together
def compress(method: str, model: str | None, data: str, out: Path, recipe: Recipe, *, watch: Watch = SILENT) -> Path:
    """As `make`, and a report on each stand-in used alone, beside the reference and the method's own controls.

    `regularized` trains every weight of `regular.grid` and keeps the best. Returns report.html; resumes. Raises, before
    anything is written or trained, for what the report at the end could not be made of.
    """
    begun, out = time.time(), Path(out)
    subject = _to_compress(method, model, data, recipe, watch)
    require_measurable(subject.images, subject.recipe)
    if method == "regularized":
        return _regularized(subject, out, begun, watch)
    draft = METHODS[method](subject, subject.recipe)
    if not (out / "pipeline" / "model_index.json").is_file():
        bank = draft.bank()
        plans = [subject.reference(bank).uniform(name) for name in bank]
        _announce_training(bank, subject.recipe, watch, more=drawings_of(plans, subject.recipe))
    pipe = trained(draft, subject, subject.recipe, out, watch)
    if not go_on_alone():
        return out / "report.html"
    if is_measured(out):
        return tell(out)
    bank = pipe.bank
    for name, entry in draft.beside(bank).items():
        bank = bank.with_entry(name, entry, bank.prediction_type)
    ground = Ground(subject, bank, out, watch)
    judge, reference = ground.book.judge, ground.today
    write_costs(pipe.bank, out)
    others = {name: reference.uniform(name) for name in bank if name not in (bank.reference, draft.main)}
    plan = subject.reference(pipe.bank).uniform(draft.main)
    beside, free = with_free(ground, {"reference": reference, "plan": plan} | others)
    verdict = measure_plans(judge, beside, subject.recipe, free=free, watch=watch)
    plan.save(out / "plan.json")
    return write_and_tell(judge, verdict, beside, out, begun)


def _to_compress(method: str, model: str | None, data: str, recipe: Recipe, watch: Watch) -> Subject:
    if method not in METHODS:
        raise PlanError(
            got=f"method {method!r}", expected=f"one of {', '.join(METHODS)}", where="compress", do="name one"
        )
    if not model and method not in ALONE:
        raise ModelError(got="no model", expected="the dense denoiser", where="--model", do="name a folder, or fashion")
    my_shares(recipe.train)
    with this_process().local_main_process_first():
        subject = open_subject(model, data, recipe, watch=watch)
        subject.encoded(watch)  # once, with its progress: the draft and the training find it in the cache
    return subject


def _regularized(subject: Subject, out: Path, begun: float, watch: Watch) -> Path:
    """One training for every weight of the penalty, the best one by the distance on validation seeds, and always beside
    it the plain training with its best scale and its best threshold, which cost no training."""
    recipe = subject.recipe
    inputs = {"verb": "compress regularized grid", "data": subject.data, "model": subject.source}
    net = regularized.net_of(subject, recipe)
    open_run(out, recipe, inputs, subject.content, watch, subject.read(net))
    if is_measured(out):
        return tell(out) if go_on_alone() else out / "report.html"
    _announce_training(subject.bank_of({"r": copy_of(net)}, "r"), recipe, watch, times=1 + len(recipe.regular.grid))
    entries = {}
    for r in (0.0, *recipe.regular.grid):
        one, name = replace(recipe, regular=replace(recipe.regular, r=r)), regularized.name_of(r)
        watch.say(f"{recipe.regular.penalty} with r = {r:g}")
        entries[name] = trained(regularized.draft(subject, one), subject, one, out / name, watch).bank.entries[name]
    if not go_on_alone():
        return out / "report.html"
    plain = regularized.name_of(0.0)
    bank = subject.bank_of(entries, plain)
    judge, plan = judge_for(bank, subject, out, watch), subject.reference(bank)
    book = open_scores(judge, out, watch)
    curve = _curve(book, bank, plan, recipe, watch)
    best = min(curve, key=lambda name: curve[name])
    found = corrected_plans(book, plan, replace(recipe.shrink, rounds=0), seed=recipe.seed, watch=watch)
    controls = {f"{plain}, {name}": found.plans[name] for name in ("one scale", "one threshold")}
    scores = {name: found.scores[name] for name in ("one scale", "one threshold")}
    disk.write_json(out / "grid.json", {"images": recipe.shrink.images, "scores": curve, "controls": scores})
    others = {name: plan.uniform(name) for name in bank if name not in (plain, best)}
    plans = {"reference": plan, "plan": plan.uniform(best)} | controls | others
    verdict = measure_plans(judge, plans, recipe, watch=watch)
    kept = subject.bank_of({name: bank.entries[name] for name in (plain, best)}, plain)
    write_costs(kept, out)
    plans["plan"].save(out / "plan.json")
    told = subject.reference(kept).uniform(best)
    StepAwarePipeline(kept, told, subject.encoder).save_pretrained(out / "pipeline")
    return write_and_tell(judge, verdict, plans, out, begun)


def _curve(book: ScoreBook, bank: Bank, plan: StepPlan, recipe: Recipe, watch: Watch) -> dict[str, float]:
    """The score of every entry of a bank, used alone, on validation seeds."""
    scores = book.on(recipe.shrink.images, stage_seed(recipe.seed, Stage.SEARCH))
    with watch.stage("choose r", len(bank)) as told:
        found = scores.many([plan.uniform(name) for name in bank], "penalty", seen=counted(told))
    return dict(zip(bank, found, strict=True))


# ---------------------------------------------------------------------------------------- searching, and the main job


@releasing
@own_random
@together
def optimize(
    model: str,
    data: str,
    out: Path,
    recipe: Recipe,
    *,
    budget: Asked = None,
    max_loss: float | None = None,
    watch: Watch = SILENT,
) -> Path:
    """The main job: a denoiser and images in, a cheaper pipeline, its plan and a report out. Returns report.html.

    `tune` with trained stand-ins. Stages that an earlier call finished are not done again.
    """
    goal, out = Goal.of(budget, max_loss), Path(out)
    subject = _to_compress("slimmable", model, data, recipe, watch)
    recipe = subject.recipe
    require_measurable(subject.images, recipe)
    draft = slimmable.draft(subject, recipe)
    if this_process().is_main_process:  # by times of its own, where the goal is one
        bank = with_precisions(draft.bank(), recipe, goal)
        require_reachable(goal, subject.reference(bank), bank, recipe.sample.timed)
    inputs = {"verb": "optimize", "model": subject.source, "data": data, "goal": str(goal)}
    open_run(out, recipe, inputs, subject.content, watch, subject.read())
    if is_measured(out):
        return tell(out) if go_on_alone() else out / "report.html"
    begun, pipe = time.time(), trained(draft, subject, recipe, out / "supernet", watch)
    if not go_on_alone():
        return out / "report.html"
    bank = with_precisions(pipe.bank, recipe, goal, watch)
    return _planned(subject, with_int8(subject, bank, out, watch), goal, out, begun, watch)


@releasing
@own_random
@alone
def tune(
    model: str,
    data: str | None,
    out: Path,
    recipe: Recipe,
    *,
    budget: Asked = None,
    max_loss: float | None = None,
    watch: Watch = SILENT,
) -> Path:
    """The best plan without training: sampler, steps and spacing, features reused, corrections, and whatever stand-ins
    the model brings. Returns report.html; resumes.

    `data`: images that pictures are held against; None: the reference's own converged pictures, drawn first. Without a
    budget the cheapest plan that is no worse than what is run today.
    """
    goal, out = Goal.of(budget, max_loss if max_loss is not None or budget is not None else TOLERATED), Path(out)
    begun, subject = time.time(), open_subject(model, data, recipe, watch=watch)
    if data is not None:
        require_measurable(subject.images, subject.recipe)
    bank = with_precisions(subject.stand_ins, subject.recipe, goal, watch)
    require_reachable(goal, subject.reference(bank), bank, recipe.sample.timed)
    inputs = {"verb": "tune", "model": subject.source, "data": data or CONVERGED_DATA, "goal": str(goal)}
    open_run(out, subject.recipe, inputs, subject.content, watch, subject.read())
    if is_measured(out):
        return tell(out)
    if data is None:
        subject = open_subject(model, converged_data(subject, out, watch), recipe, watch=watch)
        require_measurable(subject.images, subject.recipe)
    recipe = subject.recipe
    bank = with_int8(subject, with_precisions(subject.stand_ins, recipe, goal), out, watch)
    return _planned(subject, with_reuse(bank, recipe.search.reuse, watch), goal, out, begun, watch)


def _planned(subject: Subject, bank: Bank, goal: Goal, out: Path, begun: float, watch: Watch) -> Path:
    """Search a plan over a bank, measure it beside both references and its controls, and write all of it."""
    found = searched(subject, bank, goal, out, watch)
    judge, chosen = found.ground.book.judge, found.answer
    write_costs(bank, out)
    controls = {name: plan for name, plan in chosen.controls.items() if plan.rows != chosen.plan.rows}
    controls |= dense_control(found)
    plans, free = named_free(("reference", found.ground.today), found.free, {"plan": chosen.plan} | controls)
    verdict = measure_plans(judge, plans, subject.recipe, free=free, watch=watch)
    disk.write_json(out / "errors.json", chosen.searched.table.to_json())
    chosen.plan.save(out / "plan.json")
    StepAwarePipeline(needed(bank, chosen.plan), chosen.plan, subject.encoder).save_pretrained(out / "pipeline")
    return write_and_tell(judge, verdict, plans, out, begun)


@releasing
@own_random
@alone
def search(
    model: str,
    data: str,
    out: Path,
    recipe: Recipe,
    *,
    budget: Asked = None,
    max_loss: float | None = None,
    watch: Watch = SILENT,
) -> StepPlan:
    """Search a plan for a bank (what `compress` wrote); writes pipeline/ and plan.json, and returns the plan. A dense
    denoiser is a bank of one entry, for which sampler, steps and corrections are searched."""
    goal, out = Goal.of(budget, max_loss), Path(out)
    subject = open_subject(model, data, recipe, watch=watch)
    bank, recipe = subject.stand_ins, subject.recipe
    require_measurable(subject.images, recipe)
    bank = with_precisions(bank, recipe, goal, watch)
    require_reachable(goal, subject.reference(bank), bank, recipe.sample.timed)
    inputs = {"verb": "search", "model": subject.source, "data": data, "goal": str(goal)}
    open_run(out, recipe, inputs, subject.content, watch, subject.read())
    bank = with_int8(subject, bank, out, watch)
    if recipe.search.reuse:
        bank = with_reuse(bank, recipe.search.reuse, watch)
    plan = searched(subject, bank, goal, out, watch).answer.plan
    plan.save(out / "plan.json")
    StepAwarePipeline(needed(bank, plan), plan, subject.encoder).save_pretrained(out / "pipeline")
    return plan


@releasing
@own_random
@alone
def shrink(
    model: str, data: str, out: Path, recipe: Recipe, *, steps: int | None = None, watch: Watch = SILENT
) -> Path:
    """Find the training-free correction of every stretch of a sampler's rows, and measure it beside its controls.

    `model`: a dense denoiser, or a step-aware pipeline, whose own plan is corrected unless `steps` is given (then the
    reference at that many). Writes pipeline/, plan.json and the report, whose path it returns; resumes.
    """
    begun, out = time.time(), Path(out)
    recipe = replace(recipe, sample=replace(recipe.sample, steps=steps)) if steps else recipe
    subject = open_subject(model, data, recipe, watch=watch)
    bank, recipe = subject.stand_ins, subject.recipe
    require_measurable(subject.images, recipe)
    plan = subject.plan if subject.plan and not steps else subject.reference()
    inputs = {"verb": "shrink", "model": subject.source, "data": data, "steps": str(steps)}
    open_run(out, recipe, inputs, subject.content, watch, subject.read())
    if is_measured(out):
        return tell(out)
    ground = Ground(subject, bank, out, watch)
    judge = ground.book.judge
    write_costs(bank, out)
    counts = [k * plan.sampler.steps for k in (2, 10) if k * plan.sampler.steps <= subject.process.timesteps]
    more = {f"{count} steps, no correction": fewer_steps(plan, count) for count in counts}
    tried, spec = 8 + 4 * min(recipe.shrink.parts, len(plan.rows)) * recipe.shrink.rounds, recipe.shrink
    work = [Drawing(images=tried * spec.images, plan=plan), Drawing(images=4 * spec.final_images, plan=plan)]
    announce(watch, bank, [*work, *drawings_of([plan] * 4 + [*more.values()], recipe)], batch=recipe.sample.batch)
    found = shrink_plan(ground.book, plan, spec, seed=recipe.seed, watch=watch)
    watch.say(f"best on fresh seeds: {found.chosen}")
    controls = {name: p for name, p in found.plans.items() if name not in ("none", found.chosen)}
    plans = {"reference": found.plans["none"], "plan": found.plan} | controls | more
    plans, free = with_free(ground, plans)
    verdict = measure_plans(judge, plans, recipe, free=free, watch=watch)
    found.plan.save(out / "plan.json")
    StepAwarePipeline(bank, found.plan, subject.encoder).save_pretrained(out / "pipeline")
    return write_and_tell(judge, verdict, plans, out, begun)


# ------------------------------------------------------------------------------------------- using what there is


@own_random
@alone
def profile(
    model: str,
    *,
    batch: int = 1,
    repeats: int = 10,
    dtype: str = "float32",
    runtime: RuntimeName = "eager",
    watch: Watch = SILENT,
) -> dict[str, Cost]:
    """Parameters, MACs, latency and memory of a denoiser, or of every entry of a step-aware pipeline.

    `dtype`: in what precision, as torch names it; `runtime`: by what (see `settle_runtimes`).
    """
    bank = open_model(model).bank  # whatever process it was trained under: a network costs the same
    watch.say(about_bank(model, bank))
    bank.to(default_device(), getattr(torch, dtype))
    settle_runtimes(bank, None, runtime, batch, watch=watch)
    return bank.costs(batch=batch, repeats=repeats)


def _in_turn(bank: Bank, classes: Sequence[str | int]) -> tuple[Sequence[int], list[str]]:
    """The classes that are drawn in turn, by number, and that in words; nothing for a model without classes."""
    number = class_count(bank.config)
    asked = numbers_of(classes, number, bank.classes) if classes else range(number)
    names = (bank.classes[k] if bank.classes else str(k) for k in asked)
    return asked, [f"classes in turn: {listed(names)}"] if asked else []


@releasing
@own_random
def sample(
    model: str,
    out: Path,
    recipe: Recipe,
    *,
    count: int = 16,
    classes: Sequence[str | int] = (),
    own_plan: bool = True,
    dtype: str = "float32",
    watch: Watch = SILENT,
) -> Path:
    """Draw images: out/000000.png …, and out/grid.png. Returns the grid's path; resumes, and helps a run of another
    process that is the same.

    A step-aware pipeline runs its own plan (not `own_plan`: its reference under the recipe's sampler), a dense denoiser
    the recipe's sampler. Image k depends on the recipe's seed and k alone. `classes`: what a class-conditional model
    draws, by name or number, in turn; without any all of its classes. `dtype`: in what precision, as torch names it.
    Raises RunError for a folder with other files, or with the images of another request.
    """
    by_itself(count)
    out, subject = Path(out), open_subject(model, None, recipe, watch=watch)
    bank, plan = subject.stand_ins, subject.plan
    if plan is None or not own_plan:
        plan = subject.reference()
    asked, in_turn = _in_turn(bank, classes)
    read = (*subject.read(), *in_turn)
    inputs = {"verb": "sample", "model": subject.source, "count": str(count), "seed": str(recipe.seed), "dtype": dtype}
    inputs["classes"] = ", ".join(map(str, asked))
    if plan is not subject.plan:
        inputs["sampler"] = plan.sampler.told
    first = open_or_join(out, None, inputs, subject.content, watch, read)
    wanted = Conditions.of_classes(asked) if asked else subject.conditions
    drawing = Pictures(needed(bank, plan), plan, count, recipe, wanted, out)
    if not first:
        if wait_until_ready(out, dtype, watch):
            help_with(drawing.parts(dtype, watch), watch)
        if finished_by_first(out, out / "grid.png"):
            return out / "grid.png"
        open_run(out, None, inputs, subject.content, watch)
    parts = drawing.parts(dtype, watch)
    announce(watch, drawing.bank, [Drawing(images=count, plan=plan)], batch=drawing.batch)
    ready(out, dtype, watch)
    given = {"model": model, "out": out, "recipe": recipe, "count": count, "classes": classes, "own_plan": own_plan}
    with helpers(parts, watch, sample, **given, dtype=dtype), watch.stage("sample", count) as told:
        parts.work(drawing.pace(told))
    shutil.rmtree(parts.place, ignore_errors=True)
    disk.write_png(out / "grid.png", picture_grid(drawing.drawn(min(count, 64))))
    return out / "grid.png"


@releasing
@own_random
def evaluate(
    model: str,
    data: str,
    out: Path,
    recipe: Recipe,
    *,
    dtype: str = "float32",
    watch: Watch = SILENT,
) -> Comparison:
    """Measure a pipeline's plan beside its reference, or a dense denoiser under the recipe's sampler as the reference;
    writes out/quality.json and returns it; what was drawn before it was killed is not drawn again. Helps a run of
    another process that is the same, and then returns what that one wrote.

    `dtype`: in what precision they run, as torch names it."""
    by_itself(recipe.eval.images)
    out, subject = Path(out), open_subject(model, data, recipe, watch=watch)
    bank, recipe = subject.stand_ins, subject.recipe
    require_measurable(subject.images, recipe)
    inputs = {"verb": "evaluate", "model": subject.source, "data": data, "dtype": dtype}
    first = open_or_join(out, recipe, inputs, subject.content, watch, subject.read())
    plans = {"reference": subject.reference()}
    if subject.plan is not None:
        plans = {"reference": subject.plan.uniform(), "plan": subject.plan}
    bank.to(getattr(torch, dtype))
    if not first:
        if wait_until_ready(out, dtype, watch):
            help_with(drawn_for(judge_for(bank, subject, out, watch, helping=True), plans.values(), recipe, out), watch)
        if finished_by_first(out, out / "quality.json"):
            return read_comparison(out / "quality.json")
        open_run(out, recipe, inputs, subject.content, watch)
    judge = judge_for(bank, subject, out, watch)
    watch.say(f"measured under {plans['reference'].sampler.told}")
    announce(watch, bank, drawings_of(plans.values(), recipe), batch=recipe.sample.batch)
    parts = drawn_for(judge, plans.values(), recipe, out)
    ready(out, dtype, watch)
    given = {"model": model, "data": data, "out": out, "recipe": recipe, "dtype": dtype}
    with helpers(parts, watch, evaluate, **given), watch.stage("draw", len(parts.names)) as told:
        lead(parts, lambda done: told(done), bank)
    verdict = measure_plans(judge, plans, recipe, watch=watch)
    disk.write_json(out / "quality.json", verdict.record.to_json())
    shutil.rmtree(parts.place, ignore_errors=True)
    return verdict.record


TOLD: dict[str, Callable[[Path], Path]] = {
    "optimize": tell,
    "tune": tell,
    "compress": tell,
    "shrink": tell,
    "spectrum": tell_spectra,
    "compare": tell_compared,
}
"""The verbs whose report can be written again from what lies in the folder, and what writes it."""


def report(out: Path) -> Path:
    """Write the report of a finished run again; returns its path. Raises RunError for a folder that is no run's, and
    for a run of a verb that writes none from its files."""
    out = Path(out)
    if not (out / "recipe.json").is_file():
        raise RunError(got="no recipe.json", expected="the folder of a run", where=out, do="give what a verb wrote")
    verb = RunRecord.load(out).inputs.get("verb", "optimize")  # the first records named none
    if verb.split()[0] not in TOLD:
        raise RunError(
            got=f"a run of {verb}",
            expected=f"one of {', '.join(TOLD)}, which write a report of their files",
            where=out,
            do=f"look at what it wrote, and at its settings with halfstep recipe {out}",
        )
    return TOLD[verb.split()[0]](out)
