"""The one way to open what a user names: a model of any kind and images, validated once, whole or refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from halfstep.core.disk import read_json
from halfstep.core.errors import ModelError
from halfstep.core.plan import StepPlan
from halfstep.core.process import Process
from halfstep.core.recipe import Recipe
from halfstep.core.watch import SILENT, Watch
from halfstep.data.images import Images, load_images
from halfstep.data.latents import check_vae, shape_for
from halfstep.engine.bank import Bank
from halfstep.engine.samplers import settled
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.engine.subject import Subject
from halfstep.engine.text import conditions_of, takes_text, with_text
from halfstep.nets.architectures import architecture_of
from halfstep.nets.content import fingerprint
from halfstep.nets.denoiser import require_same_shape, sample_shape
from halfstep.nets.fit import Fitted, fit
from halfstep.nets.models import load_classes, load_denoiser, load_vae, pipeline_folder
from halfstep.nets.prompting import load_prompter


def open_subject(
    model: str | Path | None,
    data: str | None,
    recipe: Recipe,
    *,
    opened: Opened | None = None,
    watch: Watch = SILENT,
) -> Subject:
    """What a verb works on.

    `model`: "fashion" or "digits" (bundled), a stock diffusers pipeline folder, a model folder, a run folder of any
    verb that wrote a pipeline, or a step-aware pipeline; None: images alone, from which the recipe's model is yet to be
    trained.
    `data`: as `load_images` takes it; None for a verb without images.
    `opened`: the model, where it was opened already.
    Raises ModelError, RunError or PlanError for a model that is not whole or whose process cannot be carried, DataError
    for images that cannot be read or do not fit it.
    """
    if not model:
        return _without_model(data, recipe, watch)
    opened = opened or open_model(model)
    bank, process = opened.bank, process_of(opened, model)
    prompter = conditions = None
    if takes_text(bank):
        prompter = load_prompter(model, bank[bank.reference], bank.vae)
        bank = with_text(bank, prompter, recipe.sample.guidance)
        conditions = conditions_of(prompter, recipe.data.prompts, data)
    else:
        bank = _without_text(bank, recipe)
    sample = settled(process, recipe.sample, opened.scheduler)
    recipe = replace(_with_size_of(recipe, bank), noise=process, sample=sample)
    fitted = None
    if data is not None:
        fitted = fit(bank.config, images_of(recipe, data, watch), bank.vae, bank.classes)
    return Subject(
        source=str(model),
        data=data or "",
        bank=bank,
        plan=opened.plan,
        process=process,
        vae=bank.vae,
        classes=bank.classes,
        fitted=fitted,
        recipe=recipe,
        scheduler=opened.scheduler,
        conditions=conditions,
        prompter=prompter,
    )


def contents_of(subjects: Sequence[Subject]) -> dict[str, str]:
    """The fingerprints of several subjects as one, by the names of `folder.CONTENT`."""
    names = dict.fromkeys(name for subject in subjects for name in subject.content)
    return {name: fingerprint(*(subject.content[name] for subject in subjects)) for name in names}


def _without_text(bank: Bank, recipe: Recipe) -> Bank:
    """The bank of a model without prompts, guided where its family has a null condition. Raises ModelError for prompts
    and for guidance that the model does not take."""
    null, weight = architecture_of(bank[bank.reference]).null, recipe.sample.guidance
    if recipe.data.prompts:
        got, where = f"prompts {recipe.data.prompts}", "--prompts"
        raise ModelError(got=got, expected="a model that is conditional on text", where=where, do="leave it out")
    if bank.null is None and null is None and weight != 1:
        got, expected = f"guidance {weight:g}", "a model with a null condition: of text, or a DiT"
        raise ModelError(got=got, expected=expected, where="--guidance", do="leave it out")
    if bank.null is not None or null is None:
        return bank if bank.null is None else bank.with_null(bank.null, weight)
    return bank.with_null(null(bank.config), weight)


class Opened(NamedTuple):
    """A model's folder: its bank, the plan of a step-aware pipeline, and the config of the scheduler beside it."""

    bank: Bank
    plan: StepPlan | None
    scheduler: dict[str, Any]


def open_model(source: str | Path) -> Opened:
    """The networks of a folder, whatever process they were trained under. Raises ModelError, RunError or PlanError."""
    folder = pipeline_folder(source)
    if _is_step_aware(folder):
        pipe = StepAwarePipeline.from_pretrained(folder)
        return Opened(pipe.bank, pipe.plan, pipe.plan.sampler.scheduler_config)
    _require_alone(folder)
    dense, config = load_denoiser(source)
    sample_shape(dense.config)  # refuses FLUX, which has none
    vae = load_vae(source, checked=True)
    if vae is not None:
        check_vae(vae, dense.config, source)
    classes = load_classes(source, dense.config)
    bank = Bank({"full": dense}, "full", str(config["prediction_type"]), vae=vae, classes=classes)
    return Opened(bank, None, config)


def _require_alone(folder: Path) -> None:
    """Raise ModelError for a pipeline whose denoiser is told more than its own loop here would tell it."""
    file = folder / "model_index.json"
    index = read_json(file, what="a pipeline", do="copy it again") if file.is_file() else {}
    for name in ("controlnet", "adapter"):
        if (index.get(name) or [None])[0] is not None:
            raise ModelError(
                got=f"a {index.get('_class_name')} with its {name}",
                expected="a pipeline without one: pictures are drawn, and plans judged, by its denoiser alone",
                where=folder,
                do="give the text-to-image pipeline of the same denoiser; its plan can be attached to this one",
            )


def process_of(opened: Opened, where: object) -> Process:
    """The process of an opened model. Raises ModelError for one that is not carried whole, for betas that leave no
    signal, and for a denoiser that predicts more than a picture."""
    require_same_shape(opened.bank.config, where)
    process = Process.of(opened.scheduler, where=where, latent=opened.bank.vae is not None)
    process.check()
    return process


def _without_model(data: str | None, recipe: Recipe, watch: Watch) -> Subject:
    vae = load_vae(recipe.model.vae) if recipe.model.vae else None
    process = recipe.noise if vae is None else replace(recipe.noise, clip_sample=False)  # latents are no pixels
    process.check()  # refuses betas that leave no signal
    recipe = replace(recipe, noise=process, sample=settled(process, recipe.sample, None))
    return Subject(
        source="",
        data=data or "",
        bank=None,
        plan=None,
        process=process,
        vae=vae,
        classes=(),
        fitted=None if data is None else Fitted(images_of(recipe, data, watch), ""),
        recipe=recipe,
    )


def _is_step_aware(folder: Path) -> bool:
    """Whether a folder is a step-aware pipeline, or says that it is one."""
    index = folder / "model_index.json"
    if (folder / "plan.json").is_file() or not index.is_file():
        return (folder / "plan.json").is_file()
    record = read_json(index, what="a pipeline", do="give the pipeline/ folder of a run")
    return record.get("_class_name") == "StepAwarePipeline"


def images_of(recipe: Recipe, data: str, watch: Watch, split: str = "train") -> Images:
    """The images of a source as a recipe reads them. Raises DataError."""
    spec = recipe.data
    return load_images(
        data,
        size=spec.size,
        channels=spec.channels,
        split=split,
        watch=watch,
        stream=spec.stream,
        workers=spec.workers,
    )


def _with_size_of(recipe: Recipe, bank: Bank) -> Recipe:
    """The recipe with the images' size and channels taken from the model (or its VAE) where it leaves them open."""
    channels, size = shape_for(bank.config, bank.vae)
    data = replace(recipe.data, size=recipe.data.size or size, channels=recipe.data.channels or channels)
    return replace(recipe, data=data)
