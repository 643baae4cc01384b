"""The `compress METHOD` family: from a dense denoiser and images to a bank of cheaper ones, resumable."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from halfstep.architectures import architecture_of, require
from halfstep.bank import Bank
from halfstep.continuous import continuous_objective
from halfstep.data import Images
from halfstep.denoiser import copy_of, predictor
from halfstep.entry import Cut, Entry, Own, Twin
from halfstep.errors import ModelError
from halfstep.fresh import new_classes, new_model
from halfstep.job import Job, opened
from halfstep.latents import Latents
from halfstep.lock import releasing
from halfstep.masks import Masking, Pattern, mask_all
from halfstep.ode import ContinuousUNet2DModel, with_solver
from halfstep.profiling import count_macs
from halfstep.recipe import Recipe, SparseSpec, SpectralSpec
from halfstep.regularized import coordinates, regular_objective
from halfstep.seeds import own_random
from halfstep.slimmable import Supernet, sandwich_objective, supernet_of, width_name
from halfstep.sparse import Frozen, Masked, decoupled_pull, pattern_at, patterns_of, permute, sparse_objective
from halfstep.spectral import Pupil, spectral_objective, student_configs
from halfstep.train import TrainState
from halfstep.watch import SILENT, Watch


@releasing
@own_random
def slimmable(model: str, data: str, out: Path, recipe: Recipe, *, watch: Watch = SILENT) -> Path:
    """DDSM's supernet from a dense denoiser: a bank of widths. Returns the folder of a `StepAwarePipeline`.

    The bank's reference, "full", is the dense denoiser as it came; "w1.00" … are the supernet's widths.
    """
    source, recipe = opened(model, recipe)
    dense = source.dense
    supernet = supernet_of(dense, recipe.slim)  # refuses widths before anything is written
    maskings = slim_maskings(supernet, recipe)  # and patterns
    job = Job("slimmable", model, data, out, recipe, source, watch)

    def bank_of(net: Any) -> Bank:
        twin = Supernet(net, supernet.widths, recipe.slim.concat, supernet.own)
        return slim_bank(dense, twin, recipe.noise.prediction, maskings)

    if not job.begun():
        return job.done
    teacher = predictor(job.teacher()) if recipe.slim.distill == "dense" else None
    through = [through_mask(masking) for masking in maskings]
    objective = sandwich_objective(supernet, job.diffusion.draw, recipe.slim, teacher, through)
    return job.run("supernet", TrainState.new(supernet.model, recipe.train), objective, bank_of)


@releasing
@own_random
def sparse(model: str, data: str, out: Path, recipe: Recipe, *, watch: Watch = SILENT) -> Path:
    """SparseDM: the dense denoiser fine-tuned under N:M masks. Returns the folder of a `StepAwarePipeline`.

    The bank: "full", the dense denoiser as it came, and every pattern by its name, e.g. "2:4". With several patterns
    one set of weights serves them all; "off" is that set without a mask.
    """
    source, recipe = opened(model, recipe)
    dense = source.dense
    spec, steps = recipe.sparse, recipe.train.steps
    net = sparse_net(dense, spec)  # refuses patterns and filters before anything is written
    job = Job("sparse", model, data, out, recipe, source, watch)
    if not job.begun():
        return job.done
    for line in net.told():
        watch.say(line)
    state = TrainState.new(net.model, recipe.train)
    if spec.pulls and spec.decoupled:
        hook = decoupled_pull(net, spec, lambda: pattern_at(state.step, steps, spec))
        state.optimizer.register_step_post_hook(hook)
    teacher = predictor(job.teacher()) if spec.teacher else None
    objective = sparse_objective(net, job.diffusion.draw, spec, steps, teacher, state.restart_average)

    def bank_of(trained: Any) -> Bank:
        return sparse_bank(dense, Masked(trained, net.patterns, spec), recipe.noise.prediction)

    return job.run("sparse", state, objective, bank_of)


@releasing
@own_random
def spectral(model: str, data: str, out: Path, recipe: Recipe, *, watch: Watch = SILENT) -> Path:
    """Spectral Diffusion: a slim wavelet-gated student of the dense denoiser. Returns the folder of a
    `StepAwarePipeline` whose bank holds "full", the teacher as it came, and "spectral"."""
    source, recipe = opened(model, recipe)
    dense = source.dense
    torch.manual_seed(recipe.seed)
    student = student_of(dense, recipe.spectral)  # refuses what cannot be built before anything is written
    pupil = Pupil(student, dense)
    job = Job("spectral", model, data, out, recipe, source, watch)
    if not job.begun():
        return job.done
    watch.say(f"student: channels {tuple(student.config.block_out_channels)}, {count_macs(student) / 1e6:,.1f} MMACs")
    objective = spectral_objective(pupil, job.teacher(), job.diffusion.draw, recipe.spectral, recipe.train.steps)

    def bank_of(net: Any) -> Bank:
        return Bank({"full": dense, "spectral": net}, "full", recipe.noise.prediction)

    return job.run("spectral", TrainState.new(pupil, recipe.train), objective, bank_of, student)


@releasing
@own_random
def continuous(data: str, out: Path, recipe: Recipe, *, model: str | None = None, watch: Watch = SILENT) -> Path:
    """The Missing U: a continuous U-Net from images, with a dense teacher or alone. Returns the folder of a
    `StepAwarePipeline` whose bank holds "continuous@1" … for every number of solver steps, which share one set of
    weights, and "full", the teacher as it came (without one, the most solver steps are the reference)."""
    source, recipe = opened(model, recipe)
    job = Job("continuous", model, data, out, recipe, source, watch)
    torch.manual_seed(recipe.seed)
    net = continuous_net(recipe, job.images, source.dense)
    if not job.begun(net):
        return job.done
    beside = f", {net.num_parameters() / source.dense.num_parameters():.0%} of the teacher's" if model else ""
    macs = count_macs(net) / 1e6
    watch.say(f"continuous U-Net: {net.num_parameters():,} parameters{beside}, {macs:,.1f} MMACs at one solver step")
    weight = recipe.continuous.teacher if model else 0.0
    lesson = predictor(job.teacher()) if weight else None
    if recipe.continuous.checkpoint:
        net.enable_gradient_checkpointing()
    objective = continuous_objective(net, job.diffusion.draw, recipe.continuous.steps, lesson, weight)

    def bank_of(trained: Any) -> Bank:
        return continuous_bank(source.dense, trained, recipe.continuous.steps, recipe.noise.prediction)

    return job.run("continuous", TrainState.new(net, recipe.train), objective, bank_of)


def continuous_net(recipe: Recipe, images: Images | Latents, dense: Any = None) -> ContinuousUNet2DModel:
    """The untrained net of a recipe, for these images; classes as the teacher's. Raises ModelError."""
    spec, size = recipe.continuous, images.size
    halvings = [n for n in range(1, 5) if size % 2**n == 0 and size > 2**n]
    classes = dense.config.num_class_embeds if dense is not None else new_classes(recipe.model, images)
    make = functools.partial(
        ContinuousUNet2DModel,
        sample_size=images.size,
        in_channels=images.channels,
        out_channels=images.channels,
        levels=spec.levels or max(halvings, default=1),
        attention_levels=None if spec.attention else (),
        attention_head_dim=spec.head_dim,
        order=spec.order,
        mode=spec.mode,
        num_class_embeds=classes,
        solver_steps=min(spec.steps),
    )
    return make(base_channels=spec.base or (16 if dense is None else _base_for_a_quarter(make, dense)))


def _base_for_a_quarter(make: Callable[..., ContinuousUNet2DModel], dense: Any) -> int:
    """The largest even base that leaves a continuous net at most a quarter of a dense one's parameters; at least 2."""
    base = 2
    with torch.device("meta"):
        while 4 * make(base_channels=base + 2).num_parameters() <= dense.num_parameters():
            base += 2
    return base


def continuous_bank(dense: Any, net: ContinuousUNet2DModel, steps: Sequence[int], prediction: str) -> Bank:
    """The bank of a continuous net: an entry for every number of solver steps, and "full" where there is a teacher."""
    names = {n: f"continuous@{n}" for n in sorted(set(steps))}
    first = min(names)
    entries = {} if dense is None else {"full": Entry(dense)}
    for n, name in names.items():
        entries[name] = Entry(with_solver(net, n), Own() if n == first else Twin(names[first]))
    return Bank(entries, list(names.values())[-1] if dense is None else "full", prediction)


@releasing
@own_random
def regularized(data: str, out: Path, recipe: Recipe, *, model: str | None = None, watch: Watch = SILENT) -> Path:
    """Regularised score matching with one weight `regular.r`, from images or on from a dense model. Returns the folder
    of a `StepAwarePipeline` whose bank holds one entry, "r=0.1"."""
    source, recipe = opened(model, recipe)
    job = Job("regularized", model, data, out, recipe, source, watch)
    net = regular_net(source.dense, job.images, recipe)
    if not job.begun(net):
        return job.done
    levels, kind = job.diffusion.scheduler.alphas_cumprod, recipe.noise.prediction
    objective = regular_objective(net, job.diffusion.draw, recipe.regular, levels, kind)
    name = regular_name(recipe.regular.r)
    return job.run("regularized", TrainState.new(net, recipe.train), objective, lambda n: Bank({name: n}, name, kind))


def regular_net(dense: Any, images: Images | Latents, recipe: Recipe) -> Any:
    """The net to train, a copy of the dense one where there is one. Raises for what the recipe cannot be trained on."""
    blank = torch.zeros(1, images.channels, images.size, images.size)
    coordinates(blank, blank, torch.tensor(0.5), recipe.regular)  # refuses odd sizes for wavelets
    torch.manual_seed(recipe.seed)
    return new_model(recipe.model, images, recipe.noise.timesteps) if dense is None else copy_of(dense)


def regular_name(r: float) -> str:
    """The bank name of a regularised denoiser: 0.1 -> "r=0.1"."""
    return f"r={r:g}"


def student_of(dense: Any, spec: SpectralSpec) -> Any:
    """The widest student of the teacher's layout that has `spec.reduction` times fewer MACs. Raises ModelError."""
    family = architecture_of(dense)
    gated = require(family, "gated")
    kind, more = (gated, {"gate": spec.gate}) if spec.wavelet else (family.kind, {})
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


def slim_bank(dense: Any, supernet: Supernet, prediction: str, maskings: Sequence[Masking | None] = (None,)) -> Bank:
    """The bank of a supernet: the dense reference "full", and every width, sharing the widest one's stored weights.

    With masks, every width has an entry for every pattern, "w0.50+2:4", whose weights are shared too.
    """
    entries, own = {"full": Entry(dense)}, width_name(supernet.own)
    for width in supernet.widths:
        for masking in [None, *filter(None, maskings)]:
            name = f"{width_name(width)}+{masking.pattern}" if masking else width_name(width)
            if masking is None and None not in maskings and width != supernet.own:
                continue  # the widest stays as the place of the weights, though it was not trained without a mask
            link = Cut(own, supernet.slices[width]) if width != supernet.own else Twin(own) if masking else Own()
            entries[name] = Entry(supernet.subnet(width, through_mask(masking)), link, masking)
    return Bank(entries, "full", prediction)


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
    several = len(net.patterns) > 1
    entries = {"full": Entry(dense)} | ({"off": Entry(net.bake(None))} if several else {})
    for pattern in net.patterns:
        link = Twin("off") if several else Own()
        entries[str(pattern)] = Entry(net.bake(pattern), link, Masking(pattern, net.names))
    return Bank(entries, "full", prediction)
