"""Halfstep: make diffusion models cheap to run, and prove that their pictures held. Importing it does no work."""

from __future__ import annotations

from importlib import import_module

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
