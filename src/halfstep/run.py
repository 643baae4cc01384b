"""The verbs as functions: train, features, compress, search, sample, evaluate, profile, optimize, report.

Each takes plain values, writes a run folder and can be called again to resume. What is going on is told to a `Watch`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMPipeline, UNet2DModel
from PIL import Image

from halfstep import disk
from halfstep.bank import Bank, Shared, load_denoiser
from halfstep.data import Images, load_images
from halfstep.errors import HalfstepError, PlanError, RunError
from halfstep.features import feature_net_for, train_features
from halfstep.find import Found, baselines, search_plan
from halfstep.judge import Judge, check_fit, default_device, extractor_for, measure_plans, to_uint8
from halfstep.loop import new_model, require_tracker, run_loop
from halfstep.profiling import count_macs, latency, machine
from halfstep.recipe import Recipe
from halfstep.report import picture_grid
from halfstep.results import Cost
from halfstep.sampling import StepAwarePipeline, reference_plan, sample_images
from halfstep.slimmable import Supernet, copy_of, sandwich_objective, supernet_of, width_name
from halfstep.story import tell
from halfstep.train import Diffusion, TrainState, dense_objective, predictor
from halfstep.watch import SILENT, Watch

# ---------------------------------------------------------------------------------------------------------- the house


IGNORED = {"train": ("name", "sample.", "search.", "eval."), "compress slimmable": ("name", "search.", "eval.")}
"""Fields that make no difference to what a verb writes: they may change between two calls for one run folder."""


def open_run(out: Path, recipe: Recipe, inputs: Mapping[str, str]) -> Path:
    """Make or re-enter a run folder. Raises RunError when it is not writable or belongs to another recipe."""
    require_tracker(recipe.train.tracker)
    out = disk.require_writable(Path(out))
    disk.recover(out)
    file = out / "recipe.json"
    if file.is_file():
        record = disk.read_json(file, what="the recipe of this run", do="choose another --out")
        old = Recipe.from_json(record.get("recipe", {}), where=file)
        ignored = IGNORED.get(inputs["verb"], ())
        changed = [name for name in old.differences(recipe) if not name.startswith(ignored)]
        changed += [k for k, v in inputs.items() if record.get("inputs", {}).get(k) != v]
        if changed:
            raise RunError(
                got=f"a run of another recipe ({', '.join(changed[:4])} differ)",
                expected="the same recipe, to resume",
                where=out,
                do="choose another --out, or repeat the old settings",
            )
    elif any(p for p in out.iterdir() if not p.name.startswith(".")):
        raise RunError(
            got="a folder with other files", expected="an empty or a run folder", where=out, do="choose another --out"
        )
    else:
        disk.write_json(file, {"format": 1, "recipe": recipe.to_json(), "inputs": dict(inputs), "machine": machine()})
    return out


def images_for(recipe: Recipe, source: str, split: str = "train") -> Images:
    """The images that a recipe asks for."""
    return load_images(source, size=recipe.data.size, channels=recipe.data.channels, split=split)


def fit_data(recipe: Recipe, config: Mapping[str, Any]) -> Recipe:
    """The recipe with the data's size and channels taken from the model where it leaves them open."""
    size = config["sample_size"]
    size = size if isinstance(size, int) else size[0]
    data = replace(recipe.data, size=recipe.data.size or size, channels=recipe.data.channels or config["in_channels"])
    return replace(recipe, data=data)


# ---------------------------------------------------------------------------------------------------------- training


def train(data: str, out: Path, recipe: Recipe, *, model: str | None = None, watch: Watch = SILENT) -> Path:
    """Train a dense denoiser on `data` (from the recipe's model spec, or on from the folder `model`).

    Returns the folder of a stock `DDPMPipeline` (out/pipeline). Resumes when called again.
    """
    out = open_run(out, recipe, {"verb": "train", "data": data, "model": model or ""})
    done = out / "pipeline"
    images = images_for(recipe, data)
    torch.manual_seed(recipe.seed)
    net = load_denoiser(model)[0] if model else new_model(recipe.model, images, recipe.noise.timesteps)
    diffusion = Diffusion(recipe.noise)
    if (done / "model_index.json").is_file():
        watch.say(f"{done} is there already")
        return done

    def preview(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        net_copy = UNet2DModel.from_config(dict(net.config))
        net_copy.load_state_dict(weights)
        return _preview(Bank({"full": net_copy.to(net.device)}, "full", recipe.noise.prediction), diffusion, recipe)

    state = TrainState.new(net, recipe.train)
    run_loop(out, state, images, recipe, dense_objective(net, diffusion), "dense", watch, preview)
    net.load_state_dict(state.average())
    pipeline = DDPMPipeline(net.cpu(), diffusion.scheduler)
    disk.write_atomic(done, lambda folder: pipeline.save_pretrained(folder))
    return done


def _preview(bank: Bank, diffusion: Diffusion, recipe: Recipe, count: int = 32) -> torch.Tensor:
    sample = replace(recipe.sample, scheduler="ddim", steps=20)
    plan = reference_plan(bank, diffusion.scheduler.config, sample, dict.fromkeys(bank, 1))
    return torch.cat(list(sample_images(bank, plan, count, seed=1234)))


def features(data: str, out: Path, recipe: Recipe, *, watch: Watch = SILENT) -> Path:
    """Train the data's own feature classifier and save it in `out`; returns `out`."""
    out = Path(out)
    if (out / "features.json").is_file():
        return out
    disk.require_writable(out)
    images = images_for(recipe, data)
    net = feature_net_for(images, seed=recipe.seed)
    steps = recipe.eval.feature_steps
    test = None
    try:
        test = images_for(recipe, data, "test")
    except HalfstepError:
        watch.say("no test split: the accuracy is the training images'")
    with watch.stage("train features", steps) as told:
        for record in train_features(net, images, test=test, steps=steps, seed=recipe.seed):
            told(record.step, f"accuracy {record.accuracy:.1%}")
    share = net.record["accuracy"]
    watch.say(f"feature network: accuracy {share:.1%} on {'test' if test else 'training'} images")
    net.save(out)
    return out


# ------------------------------------------------------------------------------------------------------- compression


def compress_slimmable(model: str, data: str, out: Path, recipe: Recipe, *, watch: Watch = SILENT) -> Path:
    """DDSM's supernet from a dense denoiser: a bank of widths. Returns the folder of a `StepAwarePipeline`.

    The bank's reference, "full", is the dense denoiser as it came; "w1.00" … are the supernet's widths.
    """
    dense, noise = load_denoiser(model)
    recipe = _with_noise(fit_data(recipe, dense.config), noise)
    supernet = supernet_of(dense, recipe.slim)  # refuses widths before anything is written
    net = supernet.model
    out = open_run(out, recipe, {"verb": "compress slimmable", "model": str(model), "data": data})
    done = out / "pipeline"
    if (done / "model_index.json").is_file():
        return done
    images = images_for(recipe, data)
    check_fit(Bank({"full": dense}, "full", recipe.noise.prediction), images)
    diffusion = Diffusion(recipe.noise)

    def preview(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        twin = copy_of(net)
        twin.load_state_dict(weights)
        twins = Supernet(twin, supernet.widths, recipe.slim.concat, supernet.own)
        bank = slim_bank(dense, twins, recipe.noise.prediction)
        plan = reference_plan(bank, noise, replace(recipe.sample, scheduler="ddim", steps=20), dict.fromkeys(bank, 1))
        rows = [plan.uniform(name) for name in bank]
        return torch.cat([x for p in rows for x in sample_images(bank, p, 16, seed=1234)])

    dense.to(default_device())
    teacher = predictor(dense.requires_grad_(False)) if recipe.slim.distill == "dense" else None
    objective = sandwich_objective(supernet, diffusion.draw, recipe.slim, teacher)
    state = TrainState.new(net, recipe.train)
    run_loop(out, state, images, recipe, objective, "supernet", watch, preview)
    net.load_state_dict(state.average())
    net.cpu()
    dense.cpu()
    bank = slim_bank(dense, supernet, recipe.noise.prediction)
    macs = {name: count_macs(bank[name]) for name in bank}
    pipeline = StepAwarePipeline(bank, reference_plan(bank, noise, recipe.sample, macs))
    pipeline.save_pretrained(done)
    return done


def slim_bank(dense: UNet2DModel, supernet: Supernet, prediction: str) -> Bank:
    """The bank of a supernet: the dense reference "full", and every width, sharing the widest one's stored weights."""
    entries = {"full": dense} | {width_name(w): supernet.subnet(w) for w in supernet.widths}
    shared = {width_name(w): Shared(width_name(supernet.own), slices) for w, slices in supernet.slices.items()}
    return Bank(entries, "full", prediction, shared)


def _with_noise(recipe: Recipe, noise: Mapping[str, Any]) -> Recipe:
    """The recipe with the forward process that the model was trained with."""
    names = {"num_train_timesteps": "timesteps", "prediction_type": "prediction"}
    known = {names.get(k, k): noise[k] for k in (*names, "beta_schedule", "beta_start", "beta_end") if k in noise}
    return Recipe.from_json({**recipe.to_json(), "noise": known}, where="the model's scheduler")


# ----------------------------------------------------------------------------------------- measuring and the main job


def profile(source: str, *, batch: int = 1, repeats: int = 10) -> dict[str, Cost]:
    """Parameters, MACs, latency and memory of a denoiser, or of every entry of a step-aware pipeline."""
    folder = Path(source)
    for place in (folder, folder / "pipeline"):
        if (place / "plan.json").is_file():
            bank = StepAwarePipeline.from_pretrained(place).bank
            return latency({name: bank[name] for name in bank}, batch=batch, repeats=repeats)
    return latency({"full": load_denoiser(source)[0]}, batch=batch, repeats=repeats)


def open_pipeline(source: str) -> StepAwarePipeline:
    """A step-aware pipeline from its folder or from the run folder around it."""
    folder = Path(source)
    inner = folder / "pipeline"
    return StepAwarePipeline.from_pretrained(inner if (inner / "model_index.json").is_file() else folder)


def judge_for(bank: Bank, data: str, recipe: Recipe, out: Path, watch: Watch) -> tuple[Judge, Recipe]:
    """A judge on the data of a recipe; trains the data's own feature network where the recipe wants one."""
    recipe = fit_data(recipe, bank.config)
    images = images_for(recipe, data)
    check_fit(bank, images)
    if recipe.eval.features == "own":
        features(data, out / "features", recipe, watch=watch)
    bank.to(default_device())
    bank.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # up to twice as fast on CPUs
    extractor = extractor_for(recipe.eval.features, out / "features", str(bank.device))
    return Judge(bank, images, extractor, cache=out / "state", batch=recipe.sample.batch), recipe


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
    pipe = open_pipeline(model)
    out = open_run(
        out, recipe, {"verb": "search", "model": str(model), "data": data, "goal": goal_text(budget, max_loss)}
    )
    judge, recipe = judge_for(pipe.bank, data, recipe, out, watch)
    macs = {name: count_macs(pipe.bank[name]) for name in pipe.bank}
    plan = reference_plan(pipe.bank, pipe.scheduler.config, recipe.sample, macs)
    found = search_plan(judge, plan, recipe, out, budget=budget, max_loss=max_loss, watch=watch)
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


def sample(source: str, out: Path, *, count: int = 16, seed: int = 0, batch: int = 64, watch: Watch = SILENT) -> Path:
    """Draw images with a step-aware pipeline: out/000000.png …, and out/grid.png. Returns the grid's path."""
    pipe = open_pipeline(source).to(default_device())
    out, begun, done = disk.require_writable(Path(out)), time.perf_counter(), 0
    shown = []
    with watch.stage("sample", count) as told:
        for images in sample_images(pipe.bank, pipe.plan, count, seed=seed, batch=batch):
            pixels = to_uint8(images)
            shown.append(pixels[: max(0, 64 - done)])
            for i, one in enumerate(pixels):
                picture = Image.fromarray(one[0] if len(one) == 1 else one.transpose(1, 2, 0))
                disk.write_png(out / f"{done + i:06d}.png", picture)
            done += len(pixels)
            told(done, f"{done / (time.perf_counter() - begun):.1f} images/s")
    grid = picture_grid(np.concatenate(shown))
    disk.write_png(out / "grid.png", grid)
    return out / "grid.png"


def evaluate(source: str, data: str, out: Path, recipe: Recipe, *, watch: Watch = SILENT) -> dict[str, Any]:
    """Measure a step-aware pipeline's plan beside its reference; writes out/quality.json and returns it."""
    pipe = open_pipeline(source)
    out = open_run(out, recipe, {"verb": "evaluate", "model": str(source), "data": data})
    judge, recipe = judge_for(pipe.bank, data, recipe, out, watch)
    verdict = measure_plans(judge, {"reference": pipe.plan.uniform(), "plan": pipe.plan}, recipe, watch=watch)
    disk.write_json(out / "quality.json", verdict.record)
    return verdict.record


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
    dense, _ = load_denoiser(model)
    recipe = fit_data(recipe, dense.config)
    supernet_of(dense, recipe.slim)  # refuses what cannot work before the first file is written
    check_fit(Bank({"full": dense}, "full", recipe.noise.prediction), images_for(recipe, data))
    out = open_run(out, recipe, {"verb": "optimize", "model": str(model), "data": data, "goal": goal})
    begun = time.time()
    watch.say("1 profile the dense model")
    folder = compress_slimmable(model, data, out / "supernet", recipe, watch=watch)
    pipe = StepAwarePipeline.from_pretrained(folder)
    if not (out / "cost.json").is_file():
        costs = latency({name: pipe.bank[name] for name in pipe.bank}, batch=64, repeats=10)
        disk.write_json(out / "cost.json", {name: cost.to_json() for name, cost in costs.items()})
    judge, recipe = judge_for(pipe.bank, data, recipe, out, watch)
    macs = {name: count_macs(pipe.bank[name]) for name in pipe.bank}
    plan = reference_plan(pipe.bank, pipe.scheduler.config, recipe.sample, macs)
    found = search_plan(judge, plan, recipe, out, budget=budget, max_loss=max_loss, watch=watch)
    plans = {"reference": plan, "plan": found.plan} | baselines(plan, found)
    verdict = measure_plans(judge, plans, recipe, watch=watch)
    StepAwarePipeline(pipe.bank, found.plan).save_pretrained(out / "pipeline")
    pictures = verdict.pictures | {"real images": np.asarray(judge.images.subset(min(32, len(judge.images))).pixels)}
    disk.write_atomic(out / "pictures.npz", lambda path: _save_arrays(path, pictures))
    disk.write_json(out / "quality.json", verdict.record | {"seconds": round(time.time() - begun, 1)})
    return tell(out)


def _save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def report(out: Path) -> Path:
    """Write the report of a finished `optimize` run again; returns its path."""
    return tell(Path(out))
