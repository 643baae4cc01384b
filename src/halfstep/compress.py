"""The `compress METHOD` family: from a dense denoiser and images to a bank of cheaper ones, resumable."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DModel

from halfstep.bank import Bank, Shared, load_denoiser, load_vae
from halfstep.denoiser import copy_of, predictor
from halfstep.errors import ModelError
from halfstep.judge import check_fit, default_device
from halfstep.latents import check_vae
from halfstep.loop import preview_of, run_loop
from halfstep.masks import Masking, Pattern, mask_all
from halfstep.profiling import count_macs
from halfstep.recipe import Recipe, SparseSpec, SpectralSpec
from halfstep.rundir import encoded, fit_data, images_for, open_run, with_noise
from halfstep.sampling import StepAwarePipeline, reference_plan
from halfstep.slimmable import Supernet, sandwich_objective, supernet_of, width_name
from halfstep.sparse import Frozen, Masked, decoupled_pull, pattern_at, patterns_of, permute, sparse_objective
from halfstep.spectral import Pupil, SpectralUNet2DModel, spectral_objective, student_configs
from halfstep.train import Diffusion, Objective, TrainState
from halfstep.watch import SILENT, Watch


def slimmable(model: str, data: str, out: Path, recipe: Recipe, *, watch: Watch = SILENT) -> Path:
    """DDSM's supernet from a dense denoiser: a bank of widths. Returns the folder of a `StepAwarePipeline`.

    The bank's reference, "full", is the dense denoiser as it came; "w1.00" … are the supernet's widths.
    """
    source, recipe = _opened(model, recipe)
    dense = source.dense
    supernet = supernet_of(dense, recipe.slim)  # refuses widths before anything is written
    maskings = slim_maskings(supernet, recipe)  # and patterns
    job = _Job("slimmable", model, data, out, recipe, source, watch)

    def bank_of(net: Any) -> Bank:
        twin = Supernet(net, supernet.widths, recipe.slim.concat, supernet.own)
        return slim_bank(dense, twin, recipe.noise.prediction, maskings)

    if job.finished:
        return job.done
    teacher = predictor(job.teacher()) if recipe.slim.distill == "dense" else None
    through = [through_mask(masking) for masking in maskings]
    objective = sandwich_objective(supernet, job.diffusion.draw, recipe.slim, teacher, through)
    return job.run("supernet", TrainState.new(supernet.model, recipe.train), objective, bank_of)


def sparse(model: str, data: str, out: Path, recipe: Recipe, *, watch: Watch = SILENT) -> Path:
    """SparseDM: the dense denoiser fine-tuned under N:M masks. Returns the folder of a `StepAwarePipeline`.

    The bank: "full", the dense denoiser as it came, and every pattern by its name, e.g. "2:4". With several patterns
    one set of weights serves them all; "off" is that set without a mask.
    """
    source, recipe = _opened(model, recipe)
    dense = source.dense
    spec, steps = recipe.sparse, recipe.train.steps
    net = sparse_net(dense, spec)  # refuses patterns and filters before anything is written
    job = _Job("sparse", model, data, out, recipe, source, watch)
    if job.finished:
        return job.done
    for line in net.told():
        watch.say(line)
    state = TrainState.new(net.model, recipe.train)
    if spec.decoupled:
        hook = decoupled_pull(net, spec, lambda: pattern_at(state.step, steps, spec))
        state.optimizer.register_step_post_hook(hook)
    teacher = predictor(job.teacher()) if spec.teacher else None
    objective = sparse_objective(net, job.diffusion.draw, spec, steps, teacher, state.restart_average)

    def bank_of(trained: Any) -> Bank:
        return sparse_bank(dense, Masked(trained, net.patterns, spec), recipe.noise.prediction)

    return job.run("sparse", state, objective, bank_of)


def spectral(model: str, data: str, out: Path, recipe: Recipe, *, watch: Watch = SILENT) -> Path:
    """Spectral Diffusion: a slim wavelet-gated student of the dense denoiser. Returns the folder of a
    `StepAwarePipeline` whose bank holds "full", the teacher as it came, and "spectral"."""
    source, recipe = _opened(model, recipe)
    dense = source.dense
    torch.manual_seed(recipe.seed)
    student = student_of(dense, recipe.spectral)  # refuses what cannot be built before anything is written
    pupil = Pupil(student, dense)
    job = _Job("spectral", model, data, out, recipe, source, watch)
    if job.finished:
        return job.done
    watch.say(f"student: channels {tuple(student.config.block_out_channels)}, {count_macs(student) / 1e6:,.1f} MMACs")
    objective = spectral_objective(pupil, job.teacher(), job.diffusion.draw, recipe.spectral, recipe.train.steps)

    def bank_of(net: Any) -> Bank:
        return Bank({"full": dense, "spectral": net}, "full", recipe.noise.prediction)

    return job.run("spectral", TrainState.new(pupil, recipe.train), objective, bank_of, student)


def student_of(dense: Any, spec: SpectralSpec) -> Any:
    """The widest student of the teacher's layout that has `spec.reduction` times fewer MACs. Raises ModelError."""
    if not isinstance(dense, UNet2DModel):
        raise ModelError(
            got=type(dense).__name__, expected="a UNet2DModel as teacher", where="--model", do="bring a pixel U-Net"
        )
    kind, more = (SpectralUNet2DModel, {"gate": spec.gate}) if spec.wavelet else (UNet2DModel, {})
    target, macs = count_macs(dense) / spec.reduction, 0
    for config in student_configs(dense.config):
        with torch.device("meta"):
            macs = count_macs(kind(**config, **more))
        if macs <= target:
            return kind(**config, **more)
    raise ModelError(
        got=f"a reduction of {spec.reduction:g}",
        expected=f"at most {count_macs(dense) / macs:.1f} for this teacher",
        where="spectral.reduction",
        do="ask for less, or bring a wider teacher",
    )


class _Source(NamedTuple):
    """What a method starts from: the denoiser, the config of its noise scheduler, and its VAE for latents."""

    dense: Any
    noise: dict[str, Any]
    vae: Any


def _opened(model: str, recipe: Recipe) -> tuple[_Source, Recipe]:
    """The dense denoiser of a folder, and the recipe with what follows from it."""
    source = _Source(*load_denoiser(model), load_vae(model))
    if source.vae is not None:
        check_vae(source.vae, source.dense.config, model)
    return source, with_noise(fit_data(recipe, source.dense.config, source.vae), source.noise)


class _Job:
    """What the methods have in common: the run folder, the images, the dense teacher, and the training to a bank."""

    def __init__(
        self,
        method: str,
        model: str,
        data: str,
        out: Path,
        recipe: Recipe,
        source: _Source,
        watch: Watch,
    ):
        self.out = open_run(out, recipe, {"verb": f"compress {method}", "model": str(model), "data": data})
        self.recipe, self.dense, self.noise, self.vae, self.watch = recipe, *source, watch
        self.done = self.out / "pipeline"
        self.finished = (self.done / "model_index.json").is_file()
        self.diffusion = Diffusion(recipe.noise)
        images = images_for(recipe, data)
        check_fit(self.dense.config, images, self.vae)
        self.images = encoded(images, self.vae, watch)

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
            self.dense.to(twin.device)
            bank = bank_of(twin)
            bank.vae = self.vae and self.vae.to(twin.device)
            return preview_of(bank, self.noise, self.recipe, 16)

        run_loop(self.out, state, self.images, self.recipe, objective, tag, self.watch, preview)
        net.load_state_dict(kept(state.average()))
        self.dense.cpu()
        bank = bank_of(net.cpu())
        bank.vae = self.vae and self.vae.cpu()
        plan = reference_plan(bank, self.noise, self.recipe.sample, bank.macs())
        StepAwarePipeline(bank, plan).save_pretrained(self.done)
        return self.done


def slim_bank(dense: Any, supernet: Supernet, prediction: str, maskings: Sequence[Masking | None] = (None,)) -> Bank:
    """The bank of a supernet: the dense reference "full", and every width, sharing the widest one's stored weights.

    With masks, every width has an entry for every pattern, "w0.50+2:4", whose weights are shared too.
    """
    entries, shared, masks = {"full": dense}, {}, {}
    own = width_name(supernet.own)
    for width in supernet.widths:
        for masking in [None, *filter(None, maskings)]:
            name = f"{width_name(width)}+{masking.pattern}" if masking else width_name(width)
            if masking is None and None not in maskings and width != supernet.own:
                continue  # the widest stays as the place of the weights, though it was not trained without a mask
            entries[name] = supernet.subnet(width, through_mask(masking))
            if name != own:
                shared[name] = Shared(own, supernet.slices.get(width))
            if masking:
                masks[name] = masking
    return Bank(entries, "full", prediction, shared, masks)


def slim_maskings(supernet: Supernet, recipe: Recipe) -> list[Masking | None]:
    """The masks of `slim.patterns`, on the layers that have whole groups at every width; None is dense."""
    patterns = [None if text == "dense" else Pattern.parse(text) for text in recipe.slim.patterns]
    masked = tuple(pattern for pattern in patterns if pattern)
    if not masked:
        return [None]
    narrow = [Masked(supernet.subnet(width), masked, recipe.sparse).names for width in supernet.widths]
    names = tuple(name for name in narrow[0] if all(name in names for names in narrow))
    return [Masking(pattern, names) if pattern else None for pattern in patterns]


def through_mask(masking: Masking | None) -> Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]] | None:
    """What a mask does to weights."""
    return None if masking is None else functools.partial(mask_all, names=masking.names, pattern=masking.pattern)


def sparse_net(dense: Any, spec: SparseSpec) -> Masked:
    """The net to fine-tune: a copy of the dense one behind its masks. Raises for patterns and filters that fit none."""
    patterns, net = tuple(p for p in patterns_of(spec) if p), copy_of(dense)
    if spec.permute:
        permute(net, Masked(net, patterns, spec).names, patterns[-1])
    return Frozen(net, patterns[0], spec) if spec.frozen else Masked(net, patterns, spec)


def sparse_bank(dense: Any, net: Masked, prediction: str) -> Bank:
    """The bank of a masked net: "full", every pattern, and for several patterns "off", whose weights they share."""
    entries = {"full": dense}
    shared = {}
    if len(net.patterns) > 1:
        entries["off"] = net.bake(None)
        shared = {str(pattern): Shared("off") for pattern in net.patterns}
    entries |= {str(pattern): net.bake(pattern) for pattern in net.patterns}
    masking = {str(pattern): Masking(pattern, net.names) for pattern in net.patterns}
    return Bank(entries, "full", prediction, shared, masking)
