"""What cannot work is refused before anything is trained and leaves nothing behind; oracle: the folder is not there."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDPMPipeline, DDPMScheduler

from halfstep.app import verbs
from halfstep.core.errors import HalfstepError, RecipeError
from halfstep.core.recipe import Recipe
from halfstep.data.images import Images
from halfstep.engine.reading import about_images, about_model
from halfstep.measure.features import FeatureNet
from halfstep.nets.fit import fit
from tiny import recipes, unet

tiny = recipes("""
train.steps=2 train.batch=4 train.warmup=0 slim.widths=1,0.5 sample.steps=2 sample.batch=8 spectral.reduction=2
search.genes=2 eval.images=16
""")


def pictures(file: Path, n: int, side: int = 8) -> str:
    np.savez(file, images=np.random.default_rng(0).integers(0, 256, (n, side, side), dtype=np.uint8))
    return f"npz:{file}"


@pytest.fixture
def model(tmp_path) -> str:
    DDPMPipeline(unet(), DDPMScheduler()).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


VERBS = {
    "optimize": lambda model, data, out, recipe: verbs.optimize(model, data, out, recipe, budget=0.9),
    "shrink": verbs.shrink,
    **{f"compress {method}": partial(verbs.compress, method) for method in verbs.METHODS},
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_that_ends_in_a_measurement_asks_first_whether_it_can_be_made(verb, model, tmp_path):
    data = pictures(tmp_path / "x.npz", 20)
    FeatureNet(channels=3, size=16, n_classes=4).save(tmp_path / "features")
    (tmp_path / "x.safetensors").write_bytes(b"")
    for edits, told in {
        "eval.features=oen": "did you mean own",
        "eval.features=file:/nowhere": "/nowhere",
        f"eval.features=file:{tmp_path / 'features'}": "[1, 8, 8]",
        f"eval.features=inception:{tmp_path / 'x.safetensors'}": "inception"
        if find_spec("torchvision") is None
        else "unreadable",
        "eval.images=5": "at least 6",
    }.items():
        with pytest.raises(HalfstepError) as caught:
            VERBS[verb](model, data, tmp_path / "out", tiny(*edits.split()))
        assert told in str(caught.value)
        assert not (tmp_path / "out").exists()
    with pytest.raises(HalfstepError, match="at least 6"):
        VERBS[verb](model, pictures(tmp_path / "five.npz", 5), tmp_path / "out", tiny())
    assert not (tmp_path / "out").exists()


def test_pictures_too_small_for_a_feature_network_are_refused_early(tmp_path):
    DDPMPipeline(unet(size=4), DDPMScheduler()).save_pretrained(tmp_path / "model")
    data = pictures(tmp_path / "four.npz", 20, 4)
    with pytest.raises(HalfstepError, match=r"eval\.features=pixels"):
        verbs.optimize(str(tmp_path / "model"), data, tmp_path / "out", tiny(), budget=0.9)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("goal", "edits", "told"),
    [
        ({"budget": 0.01}, (), "the cheapest plan there is"),
        ({"budget": "3parsecs"}, (), "a unit of"),
        ({"budget": "2t"}, (), "a share of the time"),
        ({}, (), "--budget or --max-loss"),
        ({"budget": 0.9}, ("slim.widths=1,0.3",), "widths such as"),
        ({"budget": 0.9}, ("slim.patterns=2:4,3:2",), "3:2"),
    ],
)
def test_optimize_refuses_a_goal_or_a_space_that_cannot_be_searched(goal, edits, told, model, tmp_path):
    with pytest.raises(HalfstepError) as caught:
        verbs.optimize(model, pictures(tmp_path / "x.npz", 20), tmp_path / "out", tiny(*edits), **goal)
    assert told in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_wavelets_on_odd_pictures_are_refused_before_the_training(tmp_path):
    odd = tiny(
        "model.channels=8", "model.attention=false", "model.groups=4", "model.head_dim=4", "regular.basis=wavelet"
    )
    data = pictures(tmp_path / "x.npz", 20, 9)
    for verb in (verbs.make, verbs.compress):
        with pytest.raises(HalfstepError, match="even sizes"):
            verb("regularized", None, data, tmp_path / "out", odd)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["search.final_images", "shrink.images", "shrink.final_images", "eval.images"])
def test_one_image_has_no_covariance(name):
    with pytest.raises(RecipeError, match="expected a whole number, 2 to"):
        Recipe().edit([f"{name}=1"])


# ---- what was read, in a line --------------------------------------------------------------------------------------


def test_a_line_says_what_was_read():
    images = Images(
        name="folder:x",
        pixels=np.zeros((5, 1, 8, 8), np.uint8),
        labels=np.array([0, 1, 1, 1, 1]),
        classes=("cat", "dog"),
        fingerprint="0" * 16,
        left_out=("3 hidden files",),
        sizes=((20, 16), (300, 200)),
    )
    model = unet(num_class_embeds=3)
    told = about_images(fit(model.config, images, names=("cat", "dog", "eel")))
    for part in ("5 pictures of folder:x", "20x16 to 300x200 made 8x8 grey", "cat: 1, dog: 4", "by name", "3 hidden"):
        assert part in told
    told = about_model("there", model, "1000 timesteps", classes=("cat", "dog", "eel"), entries=3)
    for part in ("UNet2DModel of there", f"{model.num_parameters():,} parameters", "3 classes (cat, dog, eel)", "1000"):
        assert part in told
    many = tuple("n" * 200 + str(k) for k in range(1000))
    long = Images(
        name="y", pixels=np.zeros((1, 1, 8, 8), np.uint8), labels=np.zeros(1, np.int64), classes=many, fingerprint="0"
    )
    assert len(about_images(fit(unet().config, long))) < 600
