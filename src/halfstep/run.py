"""The verbs as functions: train, features, compress, search, sample, evaluate, profile, optimize, report.

Each takes plain values, writes a run folder and can be called again to resume. What is going on is told to a `Watch`.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DDPMPipeline, LDMPipeline

from halfstep import compress, disk
from halfstep.bank import Bank
from halfstep.classes import listed, numbers_of, write_classes
from halfstep.content import fingerprint
from halfstep.corrections import shrink_plan
from halfstep.denoiser import class_count, cond_of, cond_to, copy_of, predictor
from halfstep.device import default_device
from halfstep.driver import Found, baselines, require_goal, search_steps
from halfstep.errors import DataError, ModelError, PlanError
from halfstep.fit import fit, names_of
from halfstep.folder import CONTENT, open_run
from halfstep.fresh import new_model
from halfstep.job import images_of, opened, process_of, read_of
from halfstep.judge import measure_plans
from halfstep.lock import releasing
from halfstep.loop import preview_of, run_loop
from halfstep.measured import (
    is_measured,
    judge_for,
    open_pipeline,
    require_fit,
    require_measurable,
    write_and_tell,
    write_costs,
)
from halfstep.models import load_classes, load_denoiser, load_vae
from halfstep.pictures import picture, picture_grid, read_picture, to_uint8
from halfstep.plan import StepPlan
from halfstep.process import Process
from halfstep.reading import about_bank, about_images
from halfstep.recipe import Recipe
from halfstep.restore import (
    CLASSICAL,
    Denoiser,
    Restored,
    compare_denoisers,
    matching_timestep,
    require_channels,
    require_scorable,
    restore_picture,
    timesteps_from,
)
from halfstep.results import Comparison, Cost
from halfstep.rundir import contents_of, encoded
from halfstep.sampling import StepAwarePipeline, fewer_steps, reference_plan, sample_images
from halfstep.scores import open_scores
from halfstep.seeds import own_random
from halfstep.slimmable import supernet_of
from halfstep.spectrum import spectra
from halfstep.story import tell, tell_restored, tell_spectra
from halfstep.sums import write_sums
from halfstep.train import Diffusion, TrainState, dense_objective
from halfstep.watch import SILENT, Watch

# ---------------------------------------------------------------------------------------------------------- training


@releasing
@own_random
def train(data: str, out: Path, recipe: Recipe, *, model: str | None = None, watch: Watch = SILENT) -> Path:
    """Train a dense denoiser on `data` (from the recipe's model spec, or on from the folder `model`).

    Returns the folder of a stock `DDPMPipeline` (with `model.vae` a `LDMPipeline`), out/pipeline. Resumes when called
    again.
    """
    torch.manual_seed(recipe.seed)
    source, recipe = opened(model, recipe)
    net, _, vae, classes = source
    fitted = images_of(source, data, recipe, watch)
    images = fitted.images
    seen = encoded(images, vae, watch)
    if net is None:
        net = new_model(recipe.model, seen, recipe.noise.timesteps)
        fit(net.config, images, vae, images.classes)
    diffusion = Diffusion(recipe.noise)
    contents = contents_of(images, *source) if model else contents_of(images, vae)
    read = read_of(source, model, fitted, net)
    out = open_run(out, recipe, {"verb": "train", "data": data, "model": model or ""}, contents, watch, read)
    done = out / "pipeline"
    if (done / "model_index.json").is_file():
        watch.say(f"{done} is there already")
        return done

    def preview(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        twin = copy_of(net)
        twin.load_state_dict(weights)
        bank = Bank({"full": twin}, "full", recipe.noise.prediction, vae=vae and vae.to(twin.device))
        return preview_of(bank, recipe.noise, recipe)

    state = TrainState.new(net, recipe.train)
    run_loop(out, state, seen, recipe, dense_objective(net, diffusion), "dense", watch, preview)
    net.load_state_dict(state.average())
    pipeline: Any = DDPMPipeline(net.cpu(), diffusion.scheduler)
    if vae is not None:
        pipeline = LDMPipeline(vae.cpu(), net.cpu(), diffusion.scheduler)

    def write(folder: Path) -> None:
        pipeline.save_pretrained(folder)
        write_classes(folder, names_of(net.config, images, classes))
        write_sums(folder)

    if PartialState().is_main_process:
        disk.write_atomic(done, write)
    return done


# ----------------------------------------------------------------------------------------- measuring and the main job


@own_random
def profile(
    source: str, *, batch: int = 1, repeats: int = 10, dtype: str = "float32", watch: Watch = SILENT
) -> dict[str, Cost]:
    """Parameters, MACs, latency and memory of a denoiser, or of every entry of a step-aware pipeline.

    `dtype`: in what precision, as torch names it.
    """
    if any((folder / "plan.json").is_file() for folder in (Path(source), Path(source) / "pipeline")):
        bank = open_pipeline(source).bank
    else:  # whatever process it was trained under: a network costs the same
        bank = Bank({"full": load_denoiser(source)[0]}, "full", "epsilon")
    watch.say(about_bank(source, bank))
    return bank.to(default_device(), getattr(torch, dtype)).costs(batch=batch, repeats=repeats)


@releasing
@own_random
def search(
    model: str,
    data: str,
    out: Path,
    recipe: Recipe,
    *,
    budget: float | None = None,
    max_loss: float | None = None,
    watch: Watch = SILENT,
) -> Found:
    """Search a plan for an existing step-aware pipeline (what `compress` wrote); writes pipeline/ and plan.json."""
    pipe, goal = open_pipeline(model), goal_text(budget, max_loss)
    fitted = require_fit(pipe.bank, data, recipe, watch)
    images = fitted.images
    require_measurable(images, recipe)
    plan = reference_plan(pipe.bank, pipe.process, recipe.sample)
    require_goal(plan, pipe.bank.names, recipe, budget=budget, max_loss=max_loss)
    inputs = {"verb": "search", "model": str(model), "data": data, "goal": goal}
    contents = contents_of(images, pipe.bank, pipe.bank.vae, pipe.plan.to_content())
    read = [about_images(fitted), about_bank(model, pipe.bank, pipe.process)]
    out = open_run(out, recipe, inputs, contents, watch, read)
    judge, recipe = judge_for(pipe.bank, data, recipe, out, watch)
    book = open_scores(judge, out, watch)
    found = search_steps(book, plan, recipe, out, budget=budget, max_loss=max_loss, watch=watch)
    StepAwarePipeline(pipe.bank, found.plan).save_pretrained(out / "pipeline")
    return found


def goal_text(budget: float | None, max_loss: float | None) -> str:
    """Exactly one goal, as text. Raises PlanError."""
    if (budget is None) == (max_loss is None):
        raise PlanError(
            got="both" if budget is not None else "neither",
            expected="--budget or --max-loss",
            where="goal",
            do="give one",
        )
    if budget is not None and not 0 < budget <= 1:
        raise PlanError(got=budget, expected="a share of the MACs in (0, 1]", where="--budget", do="write e.g. 0.5")
    if max_loss is not None and not max_loss >= 0:
        raise PlanError(got=max_loss, expected="a share of 0 or more", where="--max-loss", do="write e.g. 0.05")
    return f"budget {budget}" if budget is not None else f"max-loss {max_loss}"


@releasing
@own_random
def sample(
    source: str,
    out: Path,
    *,
    count: int = 16,
    seed: int = 0,
    batch: int = 64,
    classes: Sequence[str | int] = (),
    dtype: str = "float32",
    watch: Watch = SILENT,
) -> Path:
    """Draw images with a step-aware pipeline: out/000000.png …, and out/grid.png. Returns the grid's path.

    `classes`: what a class-conditional model draws, by name or number, in turn; without any all of its classes.
    `dtype`: in what precision, as torch names it.
    Raises RunError for a folder with other files, or with the images of another request.
    """
    pipe = open_pipeline(source)
    bank, names = pipe.bank, pipe.bank.classes
    asked = numbers_of(classes, class_count(bank.config), names) if classes else range(class_count(bank.config))
    read = [about_bank(source, bank, pipe.process)]
    if asked:
        read.append(f"classes in turn: {listed(names[k] if names else str(k) for k in asked)}")

    def choose(k: int) -> int:
        return asked[k % len(asked)]

    inputs = {"verb": "sample", "model": str(source), "count": str(count), "seed": str(seed), "dtype": dtype}
    inputs["classes"] = ", ".join(map(str, asked))
    out = open_run(out, None, inputs, contents_of(None, bank, bank.vae, pipe.plan.to_content()), watch, read)
    pipe.to(default_device(), getattr(torch, dtype))
    begun, done = time.perf_counter(), 0
    shown = []
    with watch.stage("sample", count) as told:
        for images in sample_images(bank, pipe.plan, count, seed=seed, batch=batch, labels=choose):
            pixels = to_uint8(images)
            shown.append(pixels[: max(0, 64 - done)])
            for i, one in enumerate(pixels):
                disk.write_png(out / f"{done + i:06d}.png", picture(one))
            done += len(pixels)
            told(done, f"{done / (time.perf_counter() - begun):.1f} images/s")
    grid = picture_grid(np.concatenate(shown))
    disk.write_png(out / "grid.png", grid)
    return out / "grid.png"


@releasing
@own_random
def evaluate(
    source: str, data: str, out: Path, recipe: Recipe, *, dtype: str = "float32", watch: Watch = SILENT
) -> Comparison:
    """Measure a step-aware pipeline's plan beside its reference; writes out/quality.json and returns it.

    `dtype`: in what precision both run, as torch names it.
    """
    pipe = open_pipeline(source)
    fitted = require_fit(pipe.bank, data, recipe, watch)
    images = fitted.images
    require_measurable(images, recipe)
    contents = contents_of(images, pipe.bank, pipe.bank.vae, pipe.plan.to_content())
    read = [about_images(fitted), about_bank(source, pipe.bank, pipe.process)]
    inputs = {"verb": "evaluate", "model": str(source), "data": data, "dtype": dtype}
    out = open_run(out, recipe, inputs, contents, watch, read)
    pipe.to(getattr(torch, dtype))
    judge, recipe = judge_for(pipe.bank, data, recipe, out, watch)
    verdict = measure_plans(judge, {"reference": pipe.plan.uniform(), "plan": pipe.plan}, recipe, watch=watch)
    disk.write_json(out / "quality.json", verdict.record.to_json())
    return verdict.record


@releasing
@own_random
def optimize(
    model: str,
    data: str,
    out: Path,
    recipe: Recipe,
    *,
    budget: float | None = None,
    max_loss: float | None = None,
    watch: Watch = SILENT,
) -> Path:
    """The main job: a denoiser and images in, a cheaper pipeline, its plan and a report out. Returns report.html.

    Stages that an earlier call finished are not done again.
    """
    goal = goal_text(budget, max_loss)
    source, recipe = opened(model, recipe)
    fitted = images_of(source, data, recipe, watch)
    require_measurable(fitted.images, recipe)
    supernet = supernet_of(source.dense, recipe.slim)
    untrained = compress.slim_bank(
        source.dense, supernet, recipe.noise.prediction, compress.slim_maskings(supernet, recipe)
    )
    plan = reference_plan(untrained, source.noise, recipe.sample)
    require_goal(plan, untrained.names, recipe, budget=budget, max_loss=max_loss)
    inputs = {"verb": "optimize", "model": str(model), "data": data, "goal": goal}
    out = open_run(out, recipe, inputs, contents_of(fitted.images, *source), watch, read_of(source, model, fitted))
    if is_measured(out):
        return tell(out)
    begun = time.time()
    watch.say("1 profile the dense model")
    folder = compress.slimmable(model, data, out / "supernet", recipe, watch=watch)
    pipe = StepAwarePipeline.from_pretrained(folder)
    judge, recipe = judge_for(pipe.bank, data, recipe, out, watch)
    if not (out / "cost.json").is_file():
        write_costs(pipe.bank, out)
    plan = reference_plan(pipe.bank, pipe.process, recipe.sample)
    book = open_scores(judge, out, watch)
    found = search_steps(book, plan, recipe, out, budget=budget, max_loss=max_loss, watch=watch)
    plans = {"reference": plan, "plan": found.plan} | baselines(plan, found)
    verdict = measure_plans(judge, plans, recipe, watch=watch)
    StepAwarePipeline(pipe.bank, found.plan).save_pretrained(out / "pipeline")
    return write_and_tell(judge, verdict, out, begun)


@releasing
@own_random
def spectrum(
    models: Sequence[str],
    data: str,
    out: Path,
    *,
    timesteps: Sequence[int] = (20, 100, 300, 600),
    images: int = 256,
    watch: Watch = SILENT,
) -> Path:
    """Power spectra of each model's clean estimate beside the data's and the best linear denoiser's, by timestep.

    Every entry of a step-aware pipeline is a model; one that is there already (the teacher of two runs) is left out.
    Writes out/spectrum.json and out/report.html, whose path it returns. Raises DataError for images that do not fit.
    """
    lines: dict[str, dict[str, Any]] = {}
    loaded, contents, read = [], [], []
    for source in models:
        bank, _, process = _bank_and_plan(source)
        last = int((process.scheduler().alphas_cumprod > 0).sum()) - 1  # at zero SNR there is no picture to estimate
        for timestep in timesteps:
            if not 0 <= timestep <= last:
                raise PlanError(got=timestep, expected=f"0 to {last}", where="--timestep", do="choose one of these")
        fitted = require_fit(bank, data, Recipe(), watch)
        pixels = fitted.images
        loaded.append((source, bank, process, pixels))
        read += [about_images(fitted), about_bank(source, bank, process)]
        contents.append(contents_of(pixels, bank, bank.vae, process))
    inputs = {"verb": "spectrum", "model": ", ".join(map(str, models)), "data": data, "images": str(images)}
    inputs["timesteps"] = ", ".join(map(str, timesteps))
    content = {name: fingerprint(*(one[name] for one in contents)) for name in CONTENT}
    out = open_run(out, None, inputs, content, watch, list(dict.fromkeys(read)))
    for source, bank, process, pixels in loaded:
        alphas = process.scheduler().alphas_cumprod
        found = encoded(pixels, bank.vae)
        chosen = slice(0, min(images, len(found)))
        draws = torch.Generator().manual_seed(0)  # latents are drawn: the same ones for every model
        clean = found.batch(chosen, generator=draws).to(default_device())
        cond = cond_of(found.batch_labels(chosen) if bank.config.get("num_class_embeds") else None)
        cond = cond_to(cond, default_device())
        bank.to(default_device())
        for entry, timestep in itertools.product(bank, timesteps):
            rings = spectra(
                predictor(bank[entry]),
                clean,
                timestep,
                alphas,
                bank.prediction_type,
                bins=max(4, found.size // 2),
                cond=cond,
            )
            record = {name: line.tolist() for name, line in rings.items()}
            drawn = lines.setdefault(str(timestep), {})
            if record not in drawn.values():
                drawn[source if len(bank) == 1 else f"{source} {entry}"] = record
    disk.write_json(out / "spectrum.json", {"data": data, "images": images, "timesteps": lines})
    return tell_spectra(out)


SIDE_BY_SIDE = 8
"""So many pictures are shown in the report of `denoise`; more would make a page that no one scrolls through."""


@releasing
@own_random
def denoise(
    models: Sequence[str],
    pictures: Sequence[Path],
    out: Path,
    *,
    noise: float,
    steps: Sequence[int] = (1,),
    noisy: bool = False,
    seed: int = 0,
    classes: Sequence[str | int] = (),
    watch: Watch = SILENT,
) -> list[Restored]:
    """Denoise real pictures with every model (every entry of a step-aware pipeline), each with so many steps.

    Noise of standard deviation `noise` (on pictures in [0, 1]) is added to them first, and classical denoisers and
    PSNR and SSIM stand beside, unless they are `noisy` already: then they are only restored. Writes
    out/<picture>/<method>.png, out/denoise.json and report.html with the first pictures side by side.
    `classes`: what class-conditional models take the pictures for, by name or number; with several every picture is
    restored as each of them. Raises DataError for pictures that cannot be read or do not fit, PlanError for a class
    that a model does not know, and for none where it needs one.
    """
    methods: dict[str, Denoiser] = {}
    contents, read = [], []
    counts: dict[str, int] = {}
    banks = {source: _bank_and_plan(source) for source in models}
    if classes and not any(class_count(bank.config) for bank, _, _ in banks.values()):
        numbers_of(classes, 0)  # refuses them
    for source, (bank, _, process) in banks.items():
        contents.append(contents_of(None, bank, process)["model_content"])
        read.append(about_bank(source, bank, process))
        start = matching_timestep(noise, process.scheduler().alphas_cumprod)
        prefix = f"{Path(source).name} " if len(models) > 1 else ""
        for entry, call in _restorers(source, bank, process, classes).items():
            for count in steps:
                timesteps_from(start, count)  # refuses more than there are
                name = f"{prefix}{entry}, {count} step{'s' * (count > 1)}"
                methods[name], counts[name] = partial(call, steps=count), count
    clean = [torch.from_numpy(read_picture(Path(file)).copy()).float() / 255 for file in pictures]
    for given, (bank, _, _) in itertools.product(clean, banks.values()):
        require_channels(given, bank.config["in_channels"])
    for given in clean if not noisy else ():
        require_scorable(given)
    names = [Path(file).stem for file in pictures]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(got=f"two pictures {twice!r}", expected="different names", where="denoise", do="rename one")
    inputs = {"verb": "denoise", "model": ", ".join(map(str, models)), "data": ", ".join(map(str, pictures))}
    inputs |= {"noise": str(noise), "steps": ", ".join(map(str, steps)), "noisy": str(noisy), "seed": str(seed)}
    inputs["classes"] = ", ".join(map(str, classes))
    pixels = fingerprint(*(hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in clean))
    content = {"model_content": fingerprint(*contents), "data_content": pixels}
    sizes = listed(
        f"{Path(file).name} {one.shape[2]}x{one.shape[1]}" for file, one in zip(pictures, clean, strict=True)
    )
    out = open_run(out, None, inputs, content, watch, [f"{len(clean)} pictures: {sizes}", *read])
    total = len(pictures) * (len(methods) + (0 if noisy else len(CLASSICAL) + 1))
    with watch.stage("denoise", total) as told:
        done, shown = itertools.count(1), {}

        def keep(k: int, name: str, image: torch.Tensor) -> None:
            pixels = to_uint8(2 * image[None] - 1)[0]
            disk.write_png(out / names[k] / f"{name.replace(', ', '-').replace(' ', '-')}.png", picture(pixels))
            if k < SIDE_BY_SIDE:
                shown[f"{names[k]}: {name}"] = pixels
            told(next(done), name)

        if noisy:
            for k, given in enumerate(clean):
                for name, call in methods.items():
                    keep(k, name, call(given, noise))
            tell_restored(out, (), shown)
            return []
        records = compare_denoisers(methods | CLASSICAL, clean, noise, seed, steps=counts, shown=keep)
    disk.write_json(out / "denoise.json", [record.to_json() for record in records])
    tell_restored(out, records, shown)
    return records


def _restorers(
    source: str, bank: Bank, process: Process, classes: Sequence[str | int]
) -> dict[str, Callable[..., torch.Tensor]]:
    """What every entry of a model's folder restores pictures with, as each class, but for the number of steps."""
    if bank.vae is not None:
        raise ModelError(got="a latent model", expected="one on pixels", where=source, do="bring a pixel model")
    bank.to(default_device())
    size, channels = bank.config["sample_size"], bank.config["in_channels"]
    kinds = {"process": process, "size": size, "channels": channels}
    conds = {"": cond_of(None)}
    if class_count(bank.config):
        asked = zip(classes, _numbers(bank, classes, source), strict=True)
        conds = {f" as {one}": cond_of(torch.tensor([number], device=bank.device)) for one, number in asked}
    return {
        entry + told: partial(restore_picture, predictor(bank[entry]), cond=cond, device=bank.device, **kinds)
        for entry in bank
        for told, cond in conds.items()
    }


def _numbers(bank: Bank, classes: Sequence[str | int], source: str) -> list[int]:
    """The classes asked for. Raises PlanError for none: a picture restored as any class would be drawn towards it."""
    count = class_count(bank.config)
    if not classes:
        raise PlanError(
            got="no class",
            expected=f"the pictures' class: {listed(bank.classes or map(str, range(count)))}",
            where=source,
            do="add --class NAME; repeat it to compare several",
        )
    return numbers_of(classes, count, bank.classes)


@releasing
@own_random
def shrink(
    model: str, data: str, out: Path, recipe: Recipe, *, steps: int | None = None, watch: Watch = SILENT
) -> Path:
    """Find the training-free correction of every stretch of a sampler's rows, and measure it beside its controls.

    `model`: a dense denoiser, or a step-aware pipeline, whose own plan is corrected unless `steps` is given (then the
    reference at that many). Writes pipeline/, plan.json and the report, whose path it returns; resumes.
    """
    begun = time.time()
    bank, own, process = _bank_and_plan(model)
    recipe = replace(recipe, sample=replace(recipe.sample, steps=steps)) if steps else recipe
    fitted = require_fit(bank, data, recipe, watch)
    require_measurable(fitted.images, recipe)
    plan = own if own and not steps else reference_plan(bank, process, recipe.sample)
    inputs = {"verb": "shrink", "model": str(model), "data": data, "steps": str(steps)}
    contents = contents_of(fitted.images, bank, bank.vae, process, own and own.to_content())
    read = [about_images(fitted), about_bank(model, bank, process)]
    out = open_run(out, recipe, inputs, contents, watch, read)
    if is_measured(out):
        return tell(out)
    judge, recipe = judge_for(bank, data, recipe, out, watch)
    if not (out / "cost.json").is_file():
        write_costs(bank, out)
    book = open_scores(judge, out, watch)
    found = shrink_plan(book, plan, recipe.shrink, seed=recipe.seed, watch=watch)
    watch.say(f"best on fresh seeds: {found.chosen}")
    controls = {name: p for name, p in found.plans.items() if name not in ("none", found.chosen)}
    counts = [k * plan.sampler.steps for k in (2, 10) if k * plan.sampler.steps <= process.timesteps]
    more = {f"{count} steps, no correction": fewer_steps(plan, count) for count in counts}
    plans = {"reference": found.plans["none"], "plan": found.plan} | controls | more
    verdict = measure_plans(judge, plans, recipe, watch=watch)
    found.plan.save(out / "plan.json")
    StepAwarePipeline(bank, found.plan).save_pretrained(out / "pipeline")
    return write_and_tell(judge, verdict, out, begun)


def _bank_and_plan(model: str) -> tuple[Bank, StepPlan | None, Process]:
    """The bank of a folder, with its plan where it is a step-aware pipeline, and the process it was trained under."""
    folder = Path(model)
    if any((place / "plan.json").is_file() for place in (folder, folder / "pipeline")):
        pipe = open_pipeline(model)
        return pipe.bank, pipe.plan, pipe.process
    dense, config = load_denoiser(model)
    vae, classes = load_vae(model), load_classes(model, dense.config)
    process = process_of(model, dense, config, vae)
    return Bank({"full": dense}, "full", process.prediction, vae=vae, classes=classes), None, process


def report(out: Path) -> Path:
    """Write the report of a finished `optimize` run again; returns its path."""
    return tell(Path(out))
