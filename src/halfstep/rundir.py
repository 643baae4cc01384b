"""What every verb begins with: a run folder of one recipe, images that fit the model, the model's forward process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from halfstep import disk
from halfstep.data import Images, load_images
from halfstep.errors import RunError
from halfstep.judge import default_device
from halfstep.latents import Latents, encode_images, shape_for
from halfstep.loop import require_tracker
from halfstep.profiling import machine
from halfstep.recipe import Recipe
from halfstep.watch import SILENT, Watch

_PLANS = ("name", "search.", "shrink.")
_LATER = (*_PLANS, "eval.")
IGNORED = {
    "train": ("sample.", *_LATER),
    "compress slimmable": _LATER,
    "compress sparse": _PLANS,  # this and the next two end in a report, which hangs on eval
    "compress spectral": _PLANS,
    "compress continuous": _PLANS,
    "compress regularized": (*_LATER, "regular.grid"),  # one r of the grid
}
"""Fields that make no difference to what a verb writes: they may change between two calls for one run folder."""


def open_run(out: Path, recipe: Recipe, inputs: Mapping[str, str]) -> Path:
    """Make or re-enter a run folder. Raises RunError when it is not writable or belongs to another recipe."""
    require_tracker(recipe.train.tracker)
    out = disk.require_writable(Path(out))
    disk.recover(out)
    file = out / "recipe.json"
    if file.is_file():
        record = disk.read_json(file, what="the recipe of this run", do="choose another --out")
        old = Recipe.from_json(record.get("recipe", {}), where=file)
        ignored = IGNORED.get(inputs["verb"], ())
        changed = [name for name in old.differences(recipe) if not name.startswith(ignored)]
        changed += [k for k, v in inputs.items() if record.get("inputs", {}).get(k) != v]
        if changed:
            raise RunError(
                got=f"a run of another recipe ({', '.join(changed[:4])} differ)",
                expected="the same recipe, to resume",
                where=out,
                do="choose another --out, or repeat the old settings",
            )
    elif any(p for p in out.iterdir() if not p.name.startswith(".")):
        raise RunError(
            got="a folder with other files", expected="an empty or a run folder", where=out, do="choose another --out"
        )
    else:
        disk.write_json(file, {"format": 1, "recipe": recipe.to_json(), "inputs": dict(inputs), "machine": machine()})
    return out


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
