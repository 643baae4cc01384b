"""What every `compress METHOD` has in common: a run folder, images, a dense denoiser, and the training to a bank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState

from halfstep.bank import Bank
from halfstep.denoiser import copy_of, require_same_shape
from halfstep.device import default_device
from halfstep.fit import Fitted, fit, names_of
from halfstep.folder import open_run
from halfstep.latents import check_vae
from halfstep.loop import preview_of, run_loop
from halfstep.models import load_classes, load_denoiser, load_vae
from halfstep.process import Process
from halfstep.reading import about_images, about_model
from halfstep.recipe import Recipe
from halfstep.rundir import contents_of, encoded, fit_data, images_for
from halfstep.sampling import StepAwarePipeline, reference_plan
from halfstep.train import Diffusion, Objective, TrainState
from halfstep.watch import Watch


class Source(NamedTuple):
    """What a method starts from: the dense denoiser (None: images alone), the process it was trained under, for latents
    its VAE, and the names of its classes, where they are known."""

    dense: Any
    noise: Process
    vae: Any
    classes: tuple[str, ...] = ()


def opened(model: str | None, recipe: Recipe) -> tuple[Source, Recipe]:
    """The dense denoiser of a folder, and the recipe with what follows from it: its forward process, the size of the
    data. Without one, the recipe's process. Raises ModelError for a process that cannot be carried whole."""
    if model is None:
        vae = load_vae(recipe.model.vae) if recipe.model.vae else None
        process = recipe.noise if vae is None else replace(recipe.noise, clip_sample=False)  # latents are no pixels
        process.scheduler()  # refuses betas that leave no signal
        return Source(None, process, vae), replace(recipe, noise=process)
    dense, config = load_denoiser(model)
    vae = load_vae(model)
    source = Source(dense, process_of(model, dense, config, vae), vae, load_classes(model, dense.config))
    if source.vae is not None:
        check_vae(source.vae, source.dense.config, model)
    return source, replace(fit_data(recipe, source.dense.config, source.vae), noise=source.noise)


def process_of(source: str, dense: Any, config: Mapping[str, Any], vae: Any) -> Process:
    """The process of a denoiser by its scheduler's config. Raises ModelError for one that is not carried whole, and for
    a denoiser that predicts more than that process asks of it."""
    require_same_shape(dense.config, source)
    process = Process.of(config, where=source, latent=vae is not None)
    process.scheduler()
    return process


def images_of(source: Source, data: str, recipe: Recipe, watch: Watch) -> Fitted:
    """The images of a recipe as the dense denoiser takes them, where there is one. Raises DataError."""
    images = images_for(recipe, data, watch=watch)
    if source.dense is None:
        return Fitted(images, "")
    return fit(source.dense.config, images, source.vae, source.classes)


def read_of(source: Source, model: str | None, fitted: Fitted, fresh: Any = None) -> tuple[str, str]:
    """What a method read, in words; `fresh`: the net that it trains where there is no dense one."""
    if source.dense is not None:
        told = about_model(str(model), source.dense, source.noise, source.vae, source.classes)
    else:
        told = about_model(None, fresh, source.noise, source.vae, names_of(fresh.config, fitted.images))
    return about_images(fitted), told


class Job:
    """What the methods have in common: the images, the dense teacher, the run folder, and the training to a bank."""

    def __init__(
        self,
        method: str,
        model: str | None,
        data: str,
        out: Path,
        recipe: Recipe,
        source: Source,
        watch: Watch,
    ):
        self.out, self.inputs = Path(out), {"verb": f"compress {method}", "model": str(model or ""), "data": data}
        self.recipe, self.watch, self.source = recipe, watch, source
        self.dense, self.noise, self.vae, self.classes = source
        self.done = self.out / "pipeline"
        self.diffusion = Diffusion(recipe.noise)
        self.fitted = images_of(source, data, recipe, watch)
        self.pictures = self.fitted.images
        self.contents = contents_of(self.pictures, *source) if model else contents_of(self.pictures, source.vae)
        self.images = encoded(self.pictures, self.vae, watch)

    def begun(self, fresh: Any = None) -> bool:
        """Make or re-enter the run folder, once everything else was found good; False when the run is finished.

        `fresh`: the net to train, where there is no dense one.
        """
        read = read_of(self.source, self.inputs["model"], self.fitted, fresh)
        open_run(self.out, self.recipe, self.inputs, self.contents, self.watch, read)
        return not (self.done / "model_index.json").is_file()

    def teacher(self) -> Any:
        """The dense denoiser as a teacher, on the device of the training."""
        return self.dense.to(default_device()).requires_grad_(False)

    def run(
        self,
        tag: str,
        state: TrainState,
        objective: Objective,
        bank_of: Callable[[Any], Bank],
        part: Any = None,
    ) -> Path:
        """Train, then save the bank of the averaged weights with the reference's plan.

        `part`: the `model` inside of what is trained, when more is trained than is kept.
        """
        net, prefix = (state.model, "") if part is None else (part, "model.")

        def kept(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name.removeprefix(prefix): v for name, v in weights.items() if name.startswith(prefix)}

        def preview(weights: dict[str, torch.Tensor]) -> torch.Tensor:
            twin = copy_of(net)
            twin.load_state_dict(kept(weights))
            bank = bank_of(twin).with_vae(self.vae)
            bank.to(str(twin.device))
            return preview_of(bank, self.noise, self.recipe, 16)

        run_loop(self.out, state, self.images, self.recipe, objective, tag, self.watch, preview)
        net.load_state_dict(kept(state.average()))
        bank = bank_of(net.cpu())
        bank = bank.with_vae(self.vae, names_of(bank.config, self.pictures, self.classes))
        bank.cpu()
        plan = reference_plan(bank, self.noise, self.recipe.sample)
        if PartialState().is_main_process:
            StepAwarePipeline(bank, plan).save_pretrained(self.done)
        return self.done
