"""The Missing U: training one continuous U-Net for any number of solver steps.

Paper: The Missing U for Efficient Diffusion Models, Calvo-Ordonez et al., TMLR 2024, arXiv 2310.20092. Its net, with
what differs there, is in `nets/continuous.py`.

Implemented: the usual denoising loss, which the paper leaves as it is.

What differs, and why: the released code trains and runs one step of the solver; here every batch is solved in a number
of steps drawn from a set, so that one set of weights is several entries of a bank. A teacher is optional, and not in
the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from halfstep.core.recipe import Recipe
from halfstep.core.seeds import seeded
from halfstep.data.images import Images
from halfstep.data.latents import Latents
from halfstep.engine.bank import Bank
from halfstep.engine.entry import Entry, Twin
from halfstep.engine.profiling import count_macs
from halfstep.engine.subject import Subject
from halfstep.nets.continuous import ContinuousUNet2DModel, require_steps, with_solver
from halfstep.nets.denoiser import Draw, Memo, Predict, predictor, require_config
from halfstep.nets.fresh import new_classes
from halfstep.training.draft import Draft, teacher_of
from halfstep.training.train import Batch, Diffusion, Objective, TrainState


def continuous_objective(
    model: nn.Module,
    draw: Draw,
    spec_steps: Sequence[int],
    teacher: Predict | None = None,
    weight: float = 0.0,
) -> Objective:
    """One loss per batch: mean squared error to the target, plus `weight` * that to the teacher's prediction.

    L = |s_n(x_t, t) - target|^2 + weight |s_n(x_t, t) - teacher(x_t, t)|^2, s_n solved in n ~ Uniform(spec_steps).
    Every batch is solved in a number of steps drawn evenly from `spec_steps`, so that all of them work. As many
    random numbers are drawn for one step count as for several, so two runs see the same noise.
    Raises ModelError where there is no step count, or one below 1.
    """
    require_config(len(spec_steps) > 0, "no step counts", "at least one", "continuous training")
    for steps in spec_steps:
        require_steps(steps)
    solved = {steps: predictor(partial(model, solver_steps=steps)) for steps in spec_steps}

    def objective(batch: Batch) -> Iterator[torch.Tensor]:
        noisy, timestep, target = draw(batch.clean, batch.generator, batch.share)
        steps = spec_steps[int(torch.randint(len(spec_steps), (), generator=batch.choices))]
        found = solved[steps](noisy, timestep, batch.cond, Memo()).float()
        loss = F.mse_loss(found, target)
        if teacher is not None and weight:
            with torch.no_grad():
                lesson = teacher(noisy, timestep, batch.cond, Memo()).float()
            loss = loss + weight * F.mse_loss(found, lesson)
        yield loss

    return objective


# -------------------------------------------------------------------------------------------- from a subject to a draft


def draft(subject: Subject, recipe: Recipe) -> Draft:
    """A continuous U-Net, to be trained from images, with a dense teacher or alone. Its bank: "continuous@1" … for
    every number of solver steps, which share one set of weights, and "full", the teacher as it came (without one, the
    most solver steps are the reference)."""
    spec, dense = recipe.continuous, subject.dense
    with seeded(recipe.seed):
        net = continuous_net(recipe, subject.encoded(), dense)

    def bank_of(trained: Any) -> Bank:
        entries = entries_of(dense, trained, spec.steps)
        return subject.bank_of(entries, list(entries)[-1] if dense is None else "full")

    def objective(_: TrainState) -> Objective:
        weight = 0.0 if dense is None else spec.teacher
        lesson = predictor(teacher_of(subject)) if weight else None
        if spec.checkpoint:
            net.enable_gradient_checkpointing()
        return continuous_objective(net, Diffusion(recipe.noise).draw, spec.steps, lesson, weight)

    beside = "" if dense is None else f", {net.num_parameters() / dense.num_parameters():.0%} of the teacher's"
    macs = count_macs(net) / 1e6
    told = f"continuous U-Net: {net.num_parameters():,} parameters{beside}, {macs:,.1f} MMACs at one solver step"
    return Draft(
        method="continuous",
        tag="continuous",
        net=net,
        bank_of=bank_of,
        objective=objective,
        main=f"continuous@{min(spec.steps)}",
        told=(told,),
    )


def entries_of(dense: Any, net: ContinuousUNet2DModel, steps: Sequence[int]) -> dict[str, Entry]:
    """An entry for every number of solver steps, all of one set of weights, and "full" where there is a teacher."""
    first, *others = sorted(set(steps))
    entries = {} if dense is None else {"full": Entry(dense)}
    entries[f"continuous@{first}"] = Entry(with_solver(net, first))
    for count in others:
        entries[f"continuous@{count}"] = Entry(with_solver(net, count), Twin(f"continuous@{first}"))
    return entries


def continuous_net(recipe: Recipe, images: Images | Latents, dense: Any = None) -> ContinuousUNet2DModel:
    """The untrained net of a recipe, for these images; classes as the teacher's. Raises ModelError."""
    spec, size = recipe.continuous, images.size
    halvings = [n for n in range(1, 5) if size % 2**n == 0 and size > 2**n]
    classes = dense.config.num_class_embeds if dense is not None else new_classes(recipe.model, images)
    make = partial(
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
