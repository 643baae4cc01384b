"""Named recipes: functions that return a Recipe; each says what it should reach, and where that was measured."""

from __future__ import annotations

from collections.abc import Callable

from halfstep.core.errors import RecipeError
from halfstep.core.recipe import (
    DataSpec,
    EvalSpec,
    ModelSpec,
    Recipe,
    SampleSpec,
    SearchSpec,
    ShrinkSpec,
    SlimSpec,
    TrainSpec,
)
from halfstep.core.typed import nearest


def default() -> Recipe:
    """A user's own model and images: 50 DDIM steps, three widths beside the dense net, 6,000 sandwich steps.

    No score is promised: it hangs on the data. On Fashion-MNIST this reaches what `fashion16` says.
    """
    slim = SlimSpec(widths=(0.75, 0.5, 0.25), shared_noise=True)
    return Recipe(name="default", train=TrainSpec(steps=6000, batch=64, lr=1e-3), slim=slim)


def digits_dense() -> Recipe:
    """The bundled dense model: a 0.65 M U-Net on the 8x8 digits. About 5 minutes on 2 CPU cores."""
    return Recipe(
        name="digits-dense",
        model=ModelSpec(channels=(32, 64), attention=(False, False), head_dim=32, groups=8),
        data=DataSpec(size=8, channels=1),
        train=TrainSpec(steps=4000, batch=128, lr=1e-3, sample_every=2000, save_every=500),
    )


def digits() -> Recipe:
    """The demo: the bundled digits model to half its MACs in at most 5 minutes on 2 CPU cores."""
    return Recipe(
        name="digits",
        data=DataSpec(size=8, channels=1),
        train=TrainSpec(steps=1200, batch=64, lr=1e-3, warmup=50, sample_every=600, save_every=200, ema_decay=0.99),
        slim=SlimSpec(widths=(0.75, 0.5, 0.25), shared_noise=True),
        sample=SampleSpec(steps=20, batch=512),
        search=SearchSpec(
            images=512, error_images=256, fit=20, population=6, generations=2, genes=5, final_images=2048
        ),
        eval=EvalSpec(images=2048, features="digits", bootstrap=300),
    )


def fashion() -> Recipe:
    """The bundled 16x16 Fashion-MNIST model and its pictures, against 50 DDIM steps of it."""
    return Recipe(
        name="fashion",
        data=DataSpec(size=16, channels=1),
        train=TrainSpec(steps=6000, batch=64, lr=1e-3, warmup=100, save_every=250, sample_every=3000),
        slim=SlimSpec(widths=(0.75, 0.5, 0.25), shared_noise=True),
        sample=SampleSpec(steps=50, batch=128),
        search=SearchSpec(images=256, error_images=16, fit=12, genes=5, race=8, arms=2, finalists=2, final_images=512),
        shrink=ShrinkSpec(scales=(0.96, 0.98, 0.99, 1.01)),
        eval=EvalSpec(images=512, features="fashion", bootstrap=300, repeats=2),
    )


def fashion16_dense() -> Recipe:
    """A 1.5 M U-Net on Fashion-MNIST at 16x16, 6,000 steps of 128: clean pictures after about 30 minutes on 2 cores."""
    return Recipe(
        name="fashion16-dense",
        model=ModelSpec(channels=(64, 64, 64), attention=(False, False, False), head_dim=32, groups=8),
        data=DataSpec(size=16, channels=1),
        train=TrainSpec(steps=6000, batch=128, lr=1e-3, save_every=500, sample_every=2000),
    )


def fashion16() -> Recipe:
    """Half the MACs of the 16x16 Fashion-MNIST model; `benchmarks/fashion.py` prints what it reaches."""
    return Recipe(
        name="fashion16",
        data=DataSpec(size=16, channels=1),
        train=TrainSpec(steps=6000, batch=64, lr=1e-3, warmup=100, save_every=250, sample_every=3000),
        slim=SlimSpec(widths=(0.75, 0.5, 0.25), shared_noise=True),
        sample=SampleSpec(steps=20, batch=128),
        search=SearchSpec(
            images=512, error_images=256, fit=14, population=6, generations=2, genes=10, final_images=2048
        ),
        eval=EvalSpec(images=2048),
    )


def fashion32_dense() -> Recipe:
    """A 1.1 M U-Net on Fashion-MNIST at 32x32; about an hour on 2 cores."""
    return Recipe(
        name="fashion32-dense",
        model=ModelSpec(channels=(32, 64, 64), attention=(False, False, False), head_dim=32, groups=8),
        data=DataSpec(size=32, channels=1),
        train=TrainSpec(steps=4500, batch=64, lr=1e-3, save_every=250, sample_every=1500),
    )


def fashion32() -> Recipe:
    """Half the MACs of the 32x32 Fashion-MNIST model; `benchmarks/fashion.py` prints what it reaches."""
    return Recipe(
        name="fashion32",
        data=DataSpec(size=32, channels=1),
        train=TrainSpec(steps=6000, batch=64, lr=1e-3, warmup=100, save_every=200, sample_every=3000),
        slim=SlimSpec(widths=(0.75, 0.5, 0.25), shared_noise=True),
        sample=SampleSpec(steps=20, batch=128),
        search=SearchSpec(
            images=256, error_images=128, fit=14, population=6, generations=1, genes=10, final_images=1024
        ),
        eval=EvalSpec(images=1024),
    )


def fashion32_uvit_dense() -> Recipe:
    """A 1.5 M U-ViT with patches of 4 pixels on Fashion-MNIST at 32x32; about an hour on one core with fast bf16."""
    return Recipe(
        name="fashion32-uvit-dense",
        model=ModelSpec(kind="uvit", channels=(128,), layers=6, head_dim=32, patch=4),
        data=DataSpec(size=32, channels=1),
        train=TrainSpec(steps=6000, batch=64, lr=6e-4, warmup=300, save_every=500, sample_every=3000),
    )


def fashion32_sparse() -> Recipe:
    """2:4 masks on a 32x32 Fashion-MNIST model; `benchmarks/sparse.py` prints what it reaches."""
    return Recipe(
        name="fashion32-sparse",
        data=DataSpec(size=32, channels=1),
        train=TrainSpec(steps=400, batch=64, lr=2e-4, warmup=100, save_every=100, sample_every=400),
        sample=SampleSpec(steps=20, batch=128),
        search=SearchSpec(
            images=256, error_images=128, fit=10, population=4, generations=1, genes=10, final_images=1024
        ),
        eval=EvalSpec(images=1024),
    )


def fashion32_spectral() -> Recipe:
    """An eighth of the MACs of the 32x32 Fashion-MNIST model; `benchmarks/spectral.py` prints what it reaches."""
    return Recipe(
        name="fashion32-spectral",
        data=DataSpec(size=32, channels=1),
        train=TrainSpec(steps=4000, batch=64, lr=1e-3, warmup=100, save_every=250, sample_every=2000),
        sample=SampleSpec(steps=20, batch=128),
        search=SearchSpec(
            images=256, error_images=128, fit=10, population=4, generations=1, genes=10, final_images=1024
        ),
        eval=EvalSpec(images=1024),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "default": default,
    "digits": digits,
    "digits-dense": digits_dense,
    "fashion": fashion,
    "fashion16": fashion16,
    "fashion16-dense": fashion16_dense,
    "fashion32": fashion32,
    "fashion32-dense": fashion32_dense,
    "fashion32-sparse": fashion32_sparse,
    "fashion32-spectral": fashion32_spectral,
    "fashion32-uvit-dense": fashion32_uvit_dense,
}


USUAL = {"digits": ("digits", "digits-dense"), "fashion": ("fashion", "fashion16-dense")}
"""The recipes of bundled images: of all verbs, and of a training from the images alone."""


def usual(data: str, *, dense: bool = False) -> str:
    """The name of the recipe for images where none is named; `dense`: for a training from them alone."""
    return USUAL.get(data, ("default", "default"))[dense]


def named(name: str, *, where: str = "--recipe") -> Recipe:
    """A recipe by name. Raises RecipeError with the nearest name, and with `where` the name was given."""
    if name not in RECIPES:
        raise RecipeError(
            got=repr(name),
            expected=f"one of {', '.join(RECIPES)}",
            where=where,
            do=f"did you mean {nearest(name, RECIPES)}?",
        )
    return RECIPES[name]()
