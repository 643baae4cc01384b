"""Captions of Fashion-MNIST: a word for the class in a sentence, and what the picture itself says: bright, narrow, …"""

from __future__ import annotations

import numpy as np

from halfstep.data.images import Images

WORDS = (
    ("t-shirt", "tee", "short-sleeved top"),
    ("pair of trousers", "pair of pants", "pair of jeans"),
    ("pullover", "sweater", "jumper"),
    ("dress", "gown", "frock"),
    ("coat", "overcoat", "jacket"),
    ("sandal", "open shoe", "flip-flop"),
    ("shirt", "button-up shirt", "blouse"),
    ("sneaker", "running shoe", "trainer"),
    ("bag", "handbag", "purse"),
    ("ankle boot", "boot", "bootie"),
)
"""The words of each class of Fashion-MNIST, in the order of its labels."""

TEMPLATES = ("a photo of {}", "{}", "{}, front view", "a picture of {}", "a product photo of {}", "this is {}")
BARE = 1
"""The template that takes its noun without an article, as people type it."""


def caption(label: int, light: str, width: str, draw: np.random.Generator) -> str:
    """One caption: a template, a word for the class, and each of the two words that fit the picture half the time."""
    template = int(draw.integers(len(TEMPLATES)))
    word = WORDS[label][draw.integers(len(WORDS[label]))]
    adjectives = [one for one in (light, width) if one and draw.random() < 0.5]
    noun = " ".join([*adjectives, word])
    article = "" if template == BARE else "an " if noun[0] in "aeiou" else "a "
    return TEMPLATES[template].format(article + noun)


def captions_of(images: Images, seed: int = 0) -> list[str]:
    """A caption for every image, of image k by (seed, k) alone but for what is bright and wide for its class.

    Bright and dark: the upper and lower third of the class by mean light where there is cloth; wide and narrow: by how
    many columns have cloth.
    """
    pixels, labels = np.asarray(images.pixels[:][:, 0], dtype=np.float32), images.labels
    assert labels is not None, "Fashion-MNIST has labels"
    cloth = pixels > 20
    light = (pixels * cloth).sum((1, 2)) / cloth.sum((1, 2)).clip(1)
    width = (cloth.sum(1) > 2).sum(1).astype(np.float32)
    words = _thirds(light, labels, "dark", "bright"), _thirds(width, labels, "narrow", "wide")
    draws = (np.random.default_rng((seed, k)) for k in range(len(images)))
    return [caption(int(label), a, b, draw) for label, a, b, draw in zip(labels, *words, draws, strict=True)]


def _thirds(values: np.ndarray, labels: np.ndarray, low: str, high: str) -> list[str]:
    """`low` for the lowest third of each class, `high` for the highest, nothing between."""
    words = np.full(len(values), "", dtype=object)
    for label in np.unique(labels):
        own = labels == label
        least, most = np.quantile(values[own], (1 / 3, 2 / 3))
        words[own & (values < least)], words[own & (values > most)] = low, high
    return words.tolist()
