"""Training with everything around it: resume, log.jsonl, saved states, sample grids, trackers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from halfstep import __version__
from halfstep.core import disk
from halfstep.core.errors import DivergedError, RunError
from halfstep.core.folder import DIVERGED
from halfstep.core.machine import machine, require_plain_launch
from halfstep.core.process import Process
from halfstep.core.recipe import SAME_STEP, STEADIER, Recipe, SamplerName, TrainSpec
from halfstep.core.watch import Watch
from halfstep.data.images import Images
from halfstep.data.latents import Latents
from halfstep.data.pictures import picture_grid, to_uint8
from halfstep.engine.bank import Bank
from halfstep.engine.conditions import Conditions
from halfstep.engine.sampling import reference_plan, sample_images
from halfstep.engine.text import Captioned
from halfstep.nets.content import digest_tensors
from halfstep.nets.weights import open_weights
from halfstep.training.train import Logged, Objective, TrainRecord, TrainState, batch_of, stamp, train, use_bf16


def run_loop(
    out: Path,
    state: TrainState,
    images: Images | Latents | Captioned,
    recipe: Recipe,
    objective: Objective,
    tag: str,
    watch: Watch,
    preview: Callable[[dict[str, torch.Tensor]], torch.Tensor],
) -> None:
    """Train to the end of the recipe with everything around it: resume, log.jsonl, saved states, sample grids.

    Ctrl-C and kill -9 lose at most `train.save_every` steps: a state is only whole between two steps. A training that
    diverges leaves its last saved state and state/diverged.json, with which `open_run` takes steadier settings.
    """
    spec, file, log = recipe.train, out / "state" / "train.safetensors", out / "log.jsonl"
    require_plain_launch()
    accelerator = Accelerator(**({"log_with": spec.tracker, "project_dir": str(out)} if spec.tracker else {}))
    if spec.tracker:
        accelerator.init_trackers(f"halfstep-{tag}", config={"steps": spec.steps, "lr": spec.lr, "batch": spec.batch})
    state.to(accelerator.device)
    ours, main = _stamp_of(recipe, images, tag), accelerator.is_main_process
    if file.exists():  # a folder or a pipe in its place is refused, not trained over
        checked = "" if state.load(file, ours, spec.steps) else " (a state of before, without a digest)"
        watch.say(f"resuming {tag} at step {state.step} of {spec.steps}{checked}{_otherwise(file, spec)}")
    _require_alike(accelerator, state, ours, spec)
    if main:
        _begin_log(out, tag, state.step)

    def draw() -> None:
        disk.write_png(out / "samples.png", picture_grid(to_uint8(preview(state.average()))))

    records = train(state, images, spec, objective, accelerator, seed=recipe.seed, flip=recipe.data.flip)
    with watch.stage(f"train {tag}", spec.steps) as told:
        told(state.step, "")
        if main and _grid_due(state.step, spec):  # a kill between the state and its grid left an older one
            draw()
        for record in _noting_divergence(records, out / DIVERGED) if main else records:
            if main:
                disk.append_record(log, {"tag": tag, **vars(record)})
                told(record.step, f"loss {record.loss:.4f}")
            accelerator.log({"loss": record.loss, "lr": record.lr}, step=record.step)
            if _passed(record.step, spec.save_every, spec.log_every) or record.step == spec.steps:
                state.gather()
                if main:
                    state.save(file, ours)
            if main and _grid_due(record.step, spec):
                draw()
    for tracker in accelerator.trackers:  # `end_training` would end the processes' group as well: there may be more
        tracker.finish()


def _stamp_of(recipe: Recipe, images: Images | Latents | Captioned, tag: str) -> str:
    """What a state belongs to."""
    methods, free = (recipe.slim, recipe.sparse, recipe.spectral), (*STEADIER, *SAME_STEP)  # recipe.json has those
    kept = {name: value for name, value in vars(recipe.train).items() if name not in free}
    content = f"{images.fingerprint} in buffers of {images.buffer}" if images.buffer else images.fingerprint
    return stamp(kept, recipe.noise, recipe.model, methods, recipe.seed, content, tag)


def _require_alike(accelerator: Accelerator, state: TrainState, ours: str, spec: TrainSpec) -> None:
    """Raise RunError, in every process, where one of them would compute something else than the first."""
    if accelerator.num_processes == 1:
        return
    versions = {name: machine()[name] for name in ("torch", "diffusers")} | {"halfstep": __version__}
    facts = {
        "halfstep, torch or diffusers": versions,
        "data or recipe": ours,
        "step to go on from": state.step,
        "weights": digest_tensors({name: one.contiguous().cpu() for name, one in state.model.state_dict().items()}),
        "kind of device": accelerator.device.type,
        "precision": use_bf16(spec, accelerator.device),
    }
    numbers = [int.from_bytes(hashlib.sha256(repr(one).encode()).digest()[:7]) for one in facts.values()]
    found = accelerator.gather(torch.tensor([numbers], device=accelerator.device))
    for name, column in zip(facts, found.T, strict=True):
        other = [rank for rank, number in enumerate(column.tolist()) if number != column[0]]
        if other:
            raise RunError(
                got=f"another {name} in process {other[0]} than in the first",
                expected="the same in all",
                where="training in several processes",
                do="give every machine the same command, versions, data and shared folder",
            )


def _otherwise(file: Path, spec: TrainSpec) -> str:
    """What is no more as it was when a state was saved, in words: from there on other images make up a step."""
    with open_weights(file, what="a training state", do="delete it", error=RunError) as opened:
        before = batch_of((opened.metadata() or {}).get("stamp", ""))
    if before in (None, spec.batch):
        return ""
    return f"; a step has {spec.batch} images now and had {before}: from here on they come in another order"


def _begin_log(out: Path, tag: str, step: int) -> None:
    """A log without this training's records after a step; it is there from then on, for whoever follows it."""
    (out / DIVERGED).unlink(missing_ok=True)
    log = out / "log.jsonl"
    disk.keep_records(log, lambda one: one.tag != tag or one.step <= step, Logged)
    if not log.exists():
        disk.write_text(log, "")


def _noting_divergence(records: Iterator[TrainRecord], file: Path) -> Iterator[TrainRecord]:
    """The records; where the training diverges, the last of them goes into `file`."""
    last = None
    try:
        for last in records:
            yield last
    except DivergedError:
        disk.write_json(file, {"last_record": last and vars(last)})
        raise


def preview_of(
    bank: Bank, noise: Process, recipe: Recipe, conditions: Conditions | None = None, count: int = 32
) -> torch.Tensor:
    """A few images of every entry of a bank by 20 DDIM steps, [entries * count, C, S, S]."""
    word: SamplerName = "euler" if noise.is_flow else "ddim"
    sample = replace(recipe.sample, scheduler=word, spacing="own", order=0, steps=20)
    plan = reference_plan(bank, noise, sample, dict.fromkeys(bank, 1))
    rows = [plan.uniform(name) for name in bank]
    return torch.cat([x for p in rows for x in sample_images(bank, p, count, seed=1234, conditions=conditions)])


def _grid_due(step: int, spec: TrainSpec) -> bool:
    return step > 0 and (_passed(step, spec.sample_every, spec.log_every) or step == spec.steps)


def _passed(step: int, every: int, stride: int) -> bool:
    """Whether a multiple of `every` lies in the last `stride` steps: records come every `stride` steps only."""
    return every > 0 and step // every > (step - stride) // every
