"""What comes with Halfstep, by the one word that names its model, its images and its feature network."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"

BUNDLED = ("digits", "fashion")
"""`digits`: scikit-learn's 8x8 digits and a dense model of them. `fashion`: some thousand pictures of Fashion-MNIST at
16x16 (MIT licence, Zalando SE), a step-aware pipeline of them (a dense model and its bank of narrower widths)."""


def model_of(word: str) -> Path:
    """The folder of a bundled model."""
    return ASSETS / f"{word}_model"


def features_of(word: str) -> Path:
    """The folder of a bundled feature network."""
    return ASSETS / f"{word}_features"


FASHION_IMAGES = ASSETS / "fashion_images" / "images.npz"
"""6,000 pictures of the training split and 1,000 of the test split, uint8 [N, 16, 16], equally many of each class."""
