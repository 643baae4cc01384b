"""Halfstep: make diffusion models cheap to run, and prove that their pictures held. Importing it does no work."""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "Bank": "bank",
    "StepPlan": "plan",
    "Row": "plan",
    "Cost": "results",
    "Quality": "results",
    "Recipe": "recipe",
    "HalfstepError": "errors",
    "StepAwarePipeline": "sampling",
    "Supernet": "slimmable",
    "load_images": "data",
    "load_denoiser": "models",
    "optimize": "run",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> object:
    """Fetch a public name from its home when it is first used: torch is imported only then."""
    if name not in _HOMES:
        raise AttributeError(f"module 'halfstep' has no attribute {name!r}")
    return getattr(import_module(f"halfstep.{_HOMES[name]}"), name)
