"""Halfstep: make diffusion models cheap to run, and prove that their pictures held. Importing it does no work."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what type checkers and editors see of the names that `__getattr__` fetches
    from halfstep.app.subject import open_subject  # noqa: F401
    from halfstep.app.verbs import compress, evaluate, optimize, profile, sample, shrink, train, tune  # noqa: F401
    from halfstep.core.errors import HalfstepError  # noqa: F401
    from halfstep.core.plan import Correction, Guide, Price, Row, Sampler, StepPlan  # noqa: F401
    from halfstep.core.process import Process  # noqa: F401
    from halfstep.core.recipe import Recipe  # noqa: F401
    from halfstep.core.results import Cost, Quality  # noqa: F401
    from halfstep.data.images import load_images  # noqa: F401
    from halfstep.engine.attach import attach, attached, detach  # noqa: F401
    from halfstep.engine.bank import Bank  # noqa: F401
    from halfstep.engine.entry import Entry  # noqa: F401
    from halfstep.engine.pipelines import plan_for  # noqa: F401
    from halfstep.engine.stepaware import StepAwarePipeline  # noqa: F401
    from halfstep.methods.slimmable import Supernet  # noqa: F401
    from halfstep.nets.models import load_denoiser  # noqa: F401

__version__ = "0.1.0"

_HOMES = {
    "Recipe": "core.recipe",
    "HalfstepError": "core.errors",
    "Process": "core.process",
    "StepPlan": "core.plan",
    "Row": "core.plan",
    "Sampler": "core.plan",
    "Correction": "core.plan",
    "Guide": "core.plan",
    "Price": "core.plan",
    "Cost": "core.results",
    "Quality": "core.results",
    "load_images": "data.images",
    "load_denoiser": "nets.models",
    "Bank": "engine.bank",
    "Entry": "engine.entry",
    "StepAwarePipeline": "engine.stepaware",
    "attach": "engine.attach",
    "attached": "engine.attach",
    "detach": "engine.attach",
    "plan_for": "engine.pipelines",
    "Supernet": "methods.slimmable",
    "open_subject": "app.subject",
    "train": "app.verbs",
    "compress": "app.verbs",
    "tune": "app.verbs",
    "optimize": "app.verbs",
    "shrink": "app.verbs",
    "sample": "app.verbs",
    "evaluate": "app.verbs",
    "profile": "app.verbs",
}
"""The public names and the modules that they live in."""
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> object:
    """Fetch a public name from its home when it is first used: torch is imported only then."""
    if name not in _HOMES:
        raise AttributeError(f"module 'halfstep' has no attribute {name!r}")
    return getattr(import_module(f"halfstep.{_HOMES[name]}"), name)
