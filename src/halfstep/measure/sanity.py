"""Whether a reference is fit to be held against: pictures at black or white, samplers that DDIM leaves far behind."""

from __future__ import annotations

import numpy as np
from diffusers import DDIMScheduler

from halfstep.core.errors import HalfstepError
from halfstep.core.plan import StepPlan
from halfstep.core.recipe import SampleSpec
from halfstep.engine.bank import Bank
from halfstep.engine.sampling import reference_plan

FAR = 4
"""A reference of so many times the distance of DDIM, with the same net and number of calls, is broken."""
CONTROL = 256
"""Images of that control, at most."""


def at_limits(pictures: np.ndarray) -> float:
    """The share of the values of uint8 pictures that are black or white, 0 or 255."""
    return float(np.isin(pictures, (0, 255)).mean())


def flat(pictures: np.ndarray, real: np.ndarray) -> str | None:
    """What is wrong with uint8 pictures that are mostly at the limits, by half of what the real ones leave; or None.

    Drawings and digits have much true black and white, photographs next to none.
    """
    share, true = at_limits(pictures), at_limits(real)
    if share <= (1 + true) / 2:
        return None
    return f"{share:.0%} of the reference's pixels are black or white, of the real images' {true:.0%}"


def lost(distance: float, spread: float) -> str | None:
    """What is wrong with a reference as far from the data as one constant picture at its mean, which scores the data's
    whole spread; or None."""
    if distance <= spread:
        return None
    return (
        f"the reference has distance {distance:.3g}, one constant picture {spread:.3g}: its pictures are not the data's"
    )


def control_plan(bank: Bank, reference: StepPlan) -> StepPlan | None:
    """DDIM with the same net and number of calls; None for plans of several nets, for DDIM itself, and for forward
    processes that DDIM cannot run."""
    if reference.sampler.name == DDIMScheduler.__name__ or set(reference.nets) != {reference.reference}:
        return None
    spec = SampleSpec(scheduler="ddim", steps=len(reference.rows))
    try:
        return reference_plan(bank, reference.sampler.scheduler_config, spec, reference.prices)
    except (HalfstepError, ValueError):
        return None


def far_from(control: float, distance: float, scale: float, calls: int) -> str | None:
    """What is wrong with a reference far worse than its control, by distances at equal n; or None.

    `scale`: of a good model; nearer than that, nobody sees how many times worse one is.
    """
    if distance <= FAR * control + scale:
        return None
    return f"the reference has distance {distance:.3g} where DDIM with the same net and {calls} calls has {control:.3g}"
