"""Images that fit the model, as they are trained on, and what a run folder wants to know of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from halfstep.bank import Bank
from halfstep.content import fingerprint
from halfstep.data import Images, load_images
from halfstep.device import default_device
from halfstep.latents import Latents, encode_images, shape_for
from halfstep.recipe import Recipe
from halfstep.watch import SILENT, Watch


def contents_of(images: Images | None, *model: Any) -> dict[str, str]:
    """What `open_run` wants to know of the data and of a model's parts: modules, banks, configs; None is absent."""
    modules = [part for one in model for part in ([one[name] for name in one] if isinstance(one, Bank) else [one])]
    found = {} if images is None else {"data_content": images.fingerprint}
    if any(part is not None for part in modules):
        found["model_content"] = fingerprint(*modules)
    return found


def images_for(recipe: Recipe, source: str, split: str = "train", watch: Watch = SILENT) -> Images:
    """The images that a recipe asks for."""
    return load_images(source, size=recipe.data.size, channels=recipe.data.channels, split=split, watch=watch)


def encoded(images: Images, vae: Any, watch: Watch = SILENT) -> Images | Latents:
    """What a denoiser is trained on: the images, or their latents where it comes with a VAE."""
    if vae is None:
        return images
    found = encode_images(vae.to(default_device()), images, watch=watch)
    vae.cpu()
    return found


def fit_data(recipe: Recipe, config: Mapping[str, Any], vae: Any = None) -> Recipe:
    """The recipe with the data's size and channels taken from the model (or its VAE) where it leaves them open."""
    channels, size = shape_for(config, vae)
    data = replace(recipe.data, size=recipe.data.size or size, channels=recipe.data.channels or channels)
    return replace(recipe, data=data)
