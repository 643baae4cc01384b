"""Denoisers and VAEs of folders in diffusers' format: priced before they are built, compared before they are loaded."""

from __future__ import annotations

import inspect
import json
import math
import warnings
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict

from halfstep.core.bundled import BUNDLED, model_of
from halfstep.core.disk import read_json
from halfstep.core.errors import ModelError
from halfstep.core.process import FLOW_SCHEDULERS, Process
from halfstep.core.sums import require_whole
from halfstep.core.typed import near, shown
from halfstep.data.classes import read_classes
from halfstep.nets.architectures import ARCHITECTURES, example_of, shape_of
from halfstep.nets.denoiser import Memo, class_count, cond_to, predictor
from halfstep.nets.files import weight_files
from halfstep.nets.hub import SCHEME, hub_folder
from halfstep.nets.weights import (
    open_weights,
    require_finite,
    require_plain,
    require_same_shapes,
    shapes_of,
    stored_dtypes,
    stored_shapes,
)

MODEL_CLASSES: dict[str, type[ModelMixin]] = {name: family.kind for name, family in ARCHITECTURES.items()}
"""The denoiser classes that may be loaded, by the name in their config.json. Nothing else is ever imported."""

VAE_CLASSES: dict[str, type[ModelMixin]] = {"AutoencoderKL": diffusers.AutoencoderKL}

MOST = {
    "sample_size": 8192,
    "in_channels": 4096,
    "out_channels": 4096,
    "latent_channels": 4096,
    "block_out_channels": 65536,
    "base_channels": 65536,
    "embed_dim": 65536,
    "layers_per_block": 64,
    "transformer_layers_per_block": 64,
    "reverse_transformer_layers_per_block": 64,
    "depth": 512,
    "levels": 12,
    "patch_size": 8192,
    "num_heads": 4096,
    "num_attention_heads": 4096,
    "num_layers": 512,
    "num_single_layers": 512,
    "num_embeds_ada_norm": 1 << 20,
    "cross_attention_dim": 65536,
    "joint_attention_dim": 65536,
    "pooled_projection_dim": 65536,
    "caption_projection_dim": 65536,
    "caption_channels": 65536,
    "pos_embed_max_size": 8192,
    "attention_head_dim": 65536,
    "norm_num_groups": 65536,
    "time_embed_dim": 65536,
    "time_embedding_dim": 65536,
    "num_class_embeds": 1 << 20,
    "num_train_timesteps": 1 << 20,
    "solver_steps": 1000,
}
"""The most that a config may ask for, field by field, and the least is 1: many times what any published model has."""
_MAYBE_NONE = ("transformer_layers_per_block", "reverse_transformer_layers_per_block")
"""Fields of which the least is 0: SSD-1B has no transformer in some blocks."""
MAX_LEVELS = 16
MAX_PIXELS = 1 << 26
"""Numbers in one sample: 256 MiB of float32."""
MAX_PARAMETERS = 1 << 34
"""A network of 64 GiB of float32, which holds FLUX.1's 12 billion."""


# ------------------------------------------------------------------------------------------------------------- configs


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model's folder. Raises ModelError."""
    file = Path(folder) / "config.json"
    if not file.exists():
        raise ModelError(
            got="no config.json",
            expected="a diffusers model or pipeline folder",
            where=folder,
            do=f"give the folder that save_pretrained wrote, or a bundled one's name: {', '.join(BUNDLED)}",
        )
    return read_json(file, what="a diffusers config.json", do="save the model again", error=ModelError)


def _class_of(config: Mapping[str, Any], where: object, classes: Mapping[str, type[ModelMixin]]) -> type[ModelMixin]:
    """The class that a config names, once its fields are known to be that class's, typed and of sane sizes."""
    name = config.get("_class_name") if isinstance(config, Mapping) else None
    if not isinstance(name, str) or name not in classes:
        raise ModelError(
            got=f"a {name if isinstance(name, str) else 'config without a class'}",
            expected=f"a model of class {' or '.join(classes)}",
            where=where,
            do="give a denoiser (or for latents its VAE) in diffusers format",
        )
    defaults = {n: p.default for n, p in inspect.signature(classes[name].__init__).parameters.items() if n != "self"}
    for field, value in config.items():
        if field.startswith("_"):  # whose it is, and which version wrote it
            continue
        if field not in defaults:
            raise _unusable(shown(field), f"only fields of {name} as this diffusers knows it", where)
        if not _is_like(value, defaults[field]):
            got, expected = f"{field} {shown(value)}", f"a value like {json.dumps(defaults[field])}"
            raise _unusable(got, expected, where)
        least = 0 if field in _MAYBE_NONE else 1
        if field in MOST and not all(least <= number <= MOST[field] for number in _numbers(value)):
            raise _unusable(f"{field} {shown(value)}", f"numbers from {least} to {MOST[field]}", where)
    return classes[name]


def _unusable(got: str, expected: str, where: object) -> ModelError:
    return ModelError(got=got, expected=expected, where=f"{where}: config.json", do="mend it")


def _is_like(value: Any, default: Any, deep: bool = False) -> bool:
    """Whether a value of a config is of the kind of the class's default; where that is None, any plain value is. In the
    place of one number there may be one for every level, and in a `deep` list one for every block of each."""
    if isinstance(value, list | tuple):
        inner = next(iter(default), None) if isinstance(default, list | tuple) else None
        return (
            (default is None or isinstance(default, list | tuple | int))
            and len(value) <= MAX_LEVELS
            and all(not (deep and isinstance(one, list | tuple)) and _is_like(one, inner, deep=True) for one in value)
        )
    if value is None or default is None:
        return value is None or isinstance(value, bool | int | float | str)
    kinds = {bool: bool, str: str}
    if type(default) in kinds:
        return isinstance(value, kinds[type(default)])
    return isinstance(default, int | float) and isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(value: Any) -> list[int | float]:
    if isinstance(value, list | tuple):
        return [number for one in value for number in _numbers(one)]
    return [value] if isinstance(value, int | float) else []


def build_model(
    config: Mapping[str, Any], *, where: object, classes: Mapping[str, type[ModelMixin]] = MODEL_CLASSES
) -> ModelMixin:
    """A model with fresh weights from a diffusers config that names one of `classes`. Raises ModelError."""
    empty_model(config, where=where, classes=classes)
    return classes[config["_class_name"]].from_config(dict(config))


def empty_model(
    config: Mapping[str, Any], *, where: object, classes: Mapping[str, type[ModelMixin]] = MODEL_CLASSES
) -> ModelMixin:
    """The same without memory, on the meta device: what a config asks for, before anybody pays for it.

    Raises ModelError for a config that builds nothing, or nothing of a sane size.
    """
    kind = _class_of(config, where, classes)
    try:
        with torch.device("meta"):
            model = kind.from_config(dict(config))
    except ModelError:  # our own classes say it in their own words
        raise
    except Exception as error:  # whatever a constructor makes of values that do not fit together
        name = config["_class_name"]
        raise ModelError(
            got=f"a config that builds nothing ({error})", expected=f"a {name}", where=where, do="mend it"
        ) from error
    parameters, size = sum(p.numel() for p in model.parameters()), model.config.get("sample_size")
    if parameters > MAX_PARAMETERS:
        raise _unusable(f"a network of {parameters:,} parameters", f"at most {MAX_PARAMETERS:,}", where)
    sides = [size, size] if isinstance(size, int) else list(size) if isinstance(size, list | tuple) else []
    sized = "sample_size" in inspect.signature(kind.__init__).parameters  # FLUX takes pictures of any
    if classes is MODEL_CLASSES and sized and not (len(sides) == 2 and all(isinstance(s, int) for s in sides)):
        raise _unusable(f"sample_size {shown(size)}", "the side of the images, or two sides", where)
    channels = max(model.config["in_channels"], model.config["out_channels"] or 0)
    if sides and math.prod(sides) * channels > MAX_PIXELS:
        raise _unusable(f"samples of {size} pixels a side", f"at most {MAX_PIXELS:,} numbers in one", where)
    if classes is MODEL_CLASSES and not ARCHITECTURES[config["_class_name"]].own_checks:
        _require_runs(model, where)
    return model


@torch.no_grad()
def _require_runs(model: Any, where: object) -> None:
    """Raise ModelError unless a network on the meta device maps a sample to one of its size: many a config builds
    what cannot be called."""
    sample = torch.empty(shape_of(model, 1), device="meta")
    step = torch.zeros(1, dtype=torch.long, device="meta")
    try:
        cond = cond_to(example_of(model, 1), "meta")
        found, sides = (tuple(x.shape[2:]) for x in (predictor(model)(sample, step, cond, Memo()), sample))
    except ModelError:
        raise
    except Exception as error:  # whatever torch makes of layers that do not fit together
        raise _unusable(f"a network that does not run ({error})", "layers that fit together", where) from error
    if found != sides:
        raise _unusable(f"a network from {sides} pixels to {found}", "samples of one size", where)


# ------------------------------------------------------------------------------------------------------------- weights


def load_model(
    folder: Path,
    classes: Mapping[str, type[ModelMixin]] = MODEL_CLASSES,
    *,
    variant: str | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> ModelMixin:
    """A diffusers model from a folder with config.json and safetensors weights, in `dtype`; None: as it is stored.

    What stock diffusers opens is opened: weights in shards, of a variant ("fp16"; see `weight_files`), and attention
    under its names of 2022. Nothing is unpickled or fetched. Raises ModelError for weights that are missing, cut, not
    finite, or not those of config.json.
    """
    folder = Path(folder)
    config = read_config(folder)
    empty = empty_model(config, where=folder, classes=classes)
    found, kinds = weight_files(folder, variant), set()
    stored: dict[str, tuple[int, ...]] = {}
    for file in found.files:
        with open_weights(file) as opened:
            stored |= stored_shapes(opened)
            kinds |= stored_dtypes(opened)
    require_plain(stored, found.where)
    if found.where in found.files:  # as from_pretrained: nobody had shards when attention had its old names
        empty._fix_state_dict_keys_on_load(stored)
    require_same_shapes(stored, shapes_of(empty.state_dict()), found.where, type(empty).__name__)
    try:
        model, told = type(empty).from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            variant=found.variant,
            torch_dtype=reduce(torch.promote_types, kinds) if dtype is None else dtype,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(
            got=f"weights that diffusers cannot load ({error})",
            expected="a whole model",
            where=folder,
            do="save the model again",
        ) from error
    assert not any(told.values()), told  # the shapes were compared above
    require_finite(model.state_dict(), found.where)
    return _nameless(model).eval()


def filled_model(empty: ModelMixin, weights: Mapping[str, torch.Tensor]) -> ModelMixin:
    """An `empty_model` with these weights, which are its own from now on."""
    empty.load_state_dict(dict(weights), assign=True)
    if any(buffer.is_meta for buffer in empty.buffers()):  # constants that no file holds
        full = type(empty).from_config(dict(empty.config))
        full.load_state_dict(dict(weights))
        return full.eval()
    return empty.eval()


def _nameless(model: ModelMixin) -> ModelMixin:
    """Without the path that from_pretrained notes in the config, which a save would write down."""
    model._internal_dict = FrozenDict({k: v for k, v in model.config.items() if k != "_name_or_path"})
    return model


# ----------------------------------------------------------------------------------------------------------- pipelines


def pipeline_folder(source: str | Path) -> Path:
    """The folder of a bundled model by its word, of one of the hub, of a model or pipeline, or of a run's pipeline.
    Raises ModelError."""
    if str(source).startswith(SCHEME):
        return hub_folder(str(source))
    folder = model_of(str(source)) if source in BUNDLED else Path(source)
    if not folder.is_dir():
        expected = f"a diffusers model or pipeline folder, or a bundled one ({', '.join(BUNDLED)})"
        meant = near(str(source), BUNDLED)
        do = f"did you mean {meant}?" if meant else "check --model"
        raise ModelError(got="no such folder", expected=expected, where=folder, do=do)
    return folder / "pipeline" if (folder / "pipeline" / "model_index.json").is_file() else folder


def load_vae(source: str | Path, *, checked: bool = False) -> Any:
    """The VAE of a latent diffusion pipeline (or of a folder that is one); None for pixels. Raises ModelError.

    `checked`: the files' digests were compared already.
    """
    folder = pipeline_folder(source)
    if not checked:
        require_whole(folder)
    for place in (folder, folder / "vae", folder / "vqvae"):
        if (place / "config.json").is_file() and (
            place != folder or read_config(place).get("_class_name") in VAE_CLASSES
        ):
            return load_model(place, VAE_CLASSES).requires_grad_(False)
    return None


def load_classes(source: str | Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes of a denoiser with this config, by number; () without. Raises ModelError."""
    folder, count = pipeline_folder(source), class_count(config)
    for place in (folder, folder.parent):
        names = read_classes(place, count) if count else ()
        if names:
            return names
    return ()


def load_denoiser(
    source: str | Path, *, variant: str | None = None, dtype: torch.dtype | None = torch.float32
) -> tuple[ModelMixin, dict[str, Any]]:
    """A denoiser and the config of its noise scheduler; `variant` and `dtype` as in `load_model`.

    `source`: "digits" (bundled; `fashion` is a bank: `open_subject` gives its dense net), a diffusers pipeline folder
    (its `unet` or `transformer`, and its `scheduler`), a run folder of `halfstep train`, or a model folder with a
    `scheduler_config.json`, or with a folder `scheduler` inside or beside it. Without any of these a warning says that
    the process of DDPM is assumed. Raises ModelError, also for files that changed since digests of them were written.
    """
    folder = pipeline_folder(source)
    require_whole(folder)
    inner = next((folder / name for name in ("unet", "transformer") if (folder / name).is_dir()), folder)
    model = load_model(inner, variant=variant, dtype=dtype)
    for place in (folder / "scheduler", folder, folder.parent / "scheduler"):  # the second is the hub's layout of 2022
        if (place / "scheduler_config.json").is_file():
            file, do = place / "scheduler_config.json", "save the pipeline again"
            record = read_json(file, what="a scheduler config", do=do, error=ModelError, infinity=True)
            flow = FLOW_SCHEDULERS.get(str(record.get("_class_name"))) == "shift"
            return model, {"prediction_type": "flow_prediction" if flow else "epsilon", **record}
    process = Process()
    warnings.warn(f"{source}: no scheduler_config.json; it is taken for a model of {process}", stacklevel=2)
    return model, process.config()
