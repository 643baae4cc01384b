"""The Missing U: training one continuous U-Net for any number of solver steps.

Paper: The Missing U for Efficient Diffusion Models, Calvo-Ordonez et al., TMLR 2024, arXiv 2310.20092. Its net, with
what differs there, is in `ode.py`.

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

from halfstep.denoiser import Draw, Memo, Predict, predictor, require_config
from halfstep.ode import require_steps


def continuous_objective(
    model: nn.Module,
    draw: Draw,
    spec_steps: Sequence[int],
    teacher: Predict | None = None,
    weight: float = 0.0,
) -> Callable[[Any], Iterator[torch.Tensor]]:
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

    def objective(batch: Any) -> Iterator[torch.Tensor]:
        noisy, timestep, target = draw(batch.clean, batch.generator)
        steps = spec_steps[int(torch.randint(len(spec_steps), (), generator=batch.choices))]
        found = solved[steps](noisy, timestep, batch.cond, Memo()).float()
        loss = F.mse_loss(found, target)
        if teacher is not None and weight:
            with torch.no_grad():
                lesson = teacher(noisy, timestep, batch.cond, Memo()).float()
            loss = loss + weight * F.mse_loss(found, lesson)
        yield loss

    return objective
