"""Fresh denoisers: of a recipe's sizes or of a config.json, for these images; priced before they are built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halfstep.core import disk
from halfstep.core.errors import ModelError
from halfstep.core.recipe import ModelSpec
from halfstep.data.images import Images
from halfstep.data.latents import Latents
from halfstep.nets.architectures import ROWS, Architecture
from halfstep.nets.fit import require_labelled
from halfstep.nets.models import build_model


def new_model(spec: ModelSpec, images: Images | Latents, noise_timesteps: int) -> Any:
    """A fresh denoiser for these images: from `spec.config` (a config.json), or from the spec's sizes.

    Raises ModelError for sizes that fit neither each other nor the images, DataError as `new_classes` does.
    """
    if spec.config:
        return _of_config(spec.config, images)
    classes = new_classes(spec, images)
    family = next(row for row in ROWS if row.word == spec.kind)
    assert family.fresh, "a row with a word has it"
    return _built(family, family.fresh(spec, images.size, images.channels, classes, noise_timesteps))


def new_classes(spec: ModelSpec, images: Images | Latents) -> int | None:
    """How many classes a fresh denoiser is conditional on. Raises DataError where it should be and no image has one."""
    if not spec.class_conditional:
        return None
    require_labelled(images, "as --set model.class_conditional=true asks")
    return len(images.classes)


def _of_config(file: str, images: Images | Latents) -> Any:
    record = disk.read_json(Path(file), what="a diffusers config.json", do="check --set model.config")
    model = build_model({"_class_name": "UNet2DModel", **record}, where=file)
    wanted = (model.config.in_channels, model.config.sample_size)
    if wanted != (images.channels, images.size):
        raise ModelError(
            got=f"a config for {wanted[0]} channels at {wanted[1]}",
            expected=f"{images.channels} channels at {images.size}",
            where=file,
            do="change the config or --set data.size and data.channels",
        )
    return model


def _built(family: Architecture, config: dict[str, Any]) -> Any:
    try:
        return build_model({"_class_name": family.name, **config}, where="model")
    except ModelError as error:
        do = "change --set model.channels (multiples of model.groups), model.layers or model.head_dim"
        raise ModelError(got=error.got, expected=error.expected, where="model", do=do) from error
