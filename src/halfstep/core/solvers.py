"""The stock samplers that a recipe names: which scheduler each is, what it is called, what it can be asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from halfstep.core.recipe import SamplerName

EVEN = ("leading", "trailing", "linspace")
"""Even spacings of the training's timesteps (arXiv 2305.08891, table 2); every scheduler of betas has them."""
SPACED: dict[str, tuple[str, str]] = {
    "karras": ("use_karras_sigmas", "Karras"),
    "lambdas": ("use_lu_lambdas", "log-SNR"),
}
"""Spacings of noise levels instead of timesteps, each with the key that diffusers has for it and a word for sentences:
sigma^(1/7) at even steps (arXiv 2206.00364, equation 5), and log-SNR at even steps (arXiv 2206.00927)."""


@dataclass(frozen=True)
class Solver:
    """A stock sampler: `cls`, the diffusers class; `told`, its name in sentences; `options`, what its config says
    beside the process; the `spacings` and `orders` that it can be asked for; `order`, the one it has by itself, 0 where
    there is no choice. `flow`: the class for flow matching, "" for none."""

    cls: str
    told: str
    options: Mapping[str, Any] = field(default_factory=dict)
    spacings: tuple[str, ...] = EVEN
    orders: tuple[int, ...] = ()
    order: int = 0
    flow: str = ""


SOLVERS: dict[SamplerName, Solver] = {
    "ddim": Solver("DDIMScheduler", "DDIM"),
    "ddpm": Solver("DDPMScheduler", "DDPM"),
    "dpmsolver++": Solver(
        "DPMSolverMultistepScheduler",
        "DPM-Solver++",
        {"algorithm_type": "dpmsolver++"},
        (*EVEN, "karras", "lambdas"),
        (1, 2, 3),
        2,
        "DPMSolverMultistepScheduler",
    ),
    "unipc": Solver(
        "UniPCMultistepScheduler",
        "UniPC",
        {},
        (*EVEN, "karras"),
        (1, 2, 3),
        2,
        "UniPCMultistepScheduler",
    ),
    "deis": Solver("DEISMultistepScheduler", "DEIS", {}, (*EVEN, "karras"), (1, 2, 3), 2),
    "heun": Solver("HeunDiscreteScheduler", "Heun", {}, (*EVEN, "karras"), flow="FlowMatchHeunDiscreteScheduler"),
    "euler": Solver("EulerDiscreteScheduler", "Euler", {}, (*EVEN, "karras"), flow="FlowMatchEulerDiscreteScheduler"),
    "pndm": Solver("PNDMScheduler", "PNDM", {"skip_prk_steps": True}),
}
"""By the name that `sample.scheduler` has for each."""

_BY_CLASS = {cls: solver for solver in SOLVERS.values() for cls in (solver.cls, solver.flow) if cls}


def solver_of(cls: str) -> Solver | None:
    """The stock sampler of a diffusers class; None where no recipe names it."""
    return _BY_CLASS.get(cls)


WORDS: dict[str, type] = {
    "timestep_spacing": str,
    "algorithm_type": str,
    "solver_order": int,
    "shift": float,
    "flow_shift": float,
}
"""What `name_of` reads from a config, each with what it has to be where it is given."""


def name_of(cls: str, config: Mapping[str, Any], spacing: str | None) -> str:
    """A sampler as sentences have it, by its class and its config: "DPM-Solver++ 3 Karras", "DDIM trailing".

    `spacing`: of its timesteps, where that is not what the class does by itself.
    """
    solver = _BY_CLASS.get(cls, Solver(cls, cls.removesuffix("Scheduler")))
    kind = str(config.get("algorithm_type", ""))
    told = solver.told.replace("++", "") if kind in ("dpmsolver", "sde-dpmsolver") else solver.told
    order = config.get("solver_order", solver.order)
    level = next((word for key, word in SPACED.values() if config.get(key)), spacing)
    shift = config.get("flow_shift" if config.get("use_flow_sigmas") else "shift", 1.0)
    flow = ["flow"] if "FlowMatch" in cls or config.get("use_flow_sigmas") else []
    flow += [f"shift {shift:g}"] if flow and shift != 1 else []
    return " ".join([told, *(["SDE"] if kind.startswith("sde-") else []), *([str(order)] if order else []),
                     *([level] if level else []), *flow])  # fmt: skip
