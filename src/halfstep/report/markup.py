"""Pieces of a page: pictures in their tags, boxes that scroll, figures whose colours follow the reader's light."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable
from html import escape

import numpy as np
from PIL import Image

from halfstep.data.pictures import picture
from halfstep.report.palette import in_dark

MOST_SIDE = 160
"""Pixels of a picture beside others; larger ones are shrunk, so that a page stays light."""
LOSSLESS = 64
"""Pixels of a side up to which pictures are kept as they are; larger ones are compressed as photographs are."""

_COLOUR = re.compile(r"(?<=[:=\"\s])#([0-9a-f]{6})\b")


def image_tag(image: Image.Image, alt: str, *, side: int, small: bool = False) -> str:
    """A picture in its tag. `side`: pixels of one of those in it; `small`: grown by the page, its pixels stay hard."""
    hard = ' class="hard"' * (small or side <= MOST_SIDE)
    width, height = image.size
    return f'<img{hard} src="{data_of(image, side)}" width="{width}" height="{height}" alt="{escape(alt)}">'


def data_of(image: Image.Image, side: int) -> str:
    """A picture as the address of itself: PNG where its parts are small, else WebP."""
    file = io.BytesIO()
    if side <= LOSSLESS:
        image.save(file, "PNG", optimize=True)
    else:
        image.save(file, "WEBP", quality=88)
    kind = "png" if side <= LOSSLESS else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def tiles(images: np.ndarray, columns: int) -> Image.Image:
    """Pictures uint8 [N, C, H, W] row by row, as many pixels as they have; between them one sees through."""
    count, _, height, width = images.shape
    gap = max(1, height // 32)
    sheet = Image.new("RGBA", (columns * (width + gap), -(-count // columns) * (height + gap)))
    for k, one in enumerate(images):
        sheet.paste(picture(one), (k % columns * (width + gap), k // columns * (height + gap)))
    return sheet


def shrunk(images: np.ndarray, most: int = MOST_SIDE) -> np.ndarray:
    """Pictures uint8 [N, C, H, W] of at most `most` pixels a side."""
    side = max(images.shape[2:])
    if side <= most:
        return images
    height, width = (max(1, round(one * most / side)) for one in images.shape[2:])
    found = [np.asarray(picture(one).resize((width, height), Image.Resampling.BOX)) for one in images]
    return np.stack([one[None] if one.ndim == 2 else one.transpose(2, 0, 1) for one in found])


def scrolling(inner: str, what: str) -> str:
    """A box that scrolls by itself where its content is wider than the page, by keyboard too."""
    return f'<div class="wide" role="region" tabindex="0" aria-label="{escape(what)}">{inner}</div>'


def var(colour: str) -> str:
    """A colour "#rrggbb" that follows the reader's light, by `light_and_dark`."""
    return f"var(--c{colour[1:]})"


def themed(svg: str) -> str:
    """A drawing whose colours follow the reader's light."""
    return _COLOUR.sub(lambda found: var(found[0]), svg)


def light_and_dark(page: str) -> str:
    """The style that says what each colour of `var` in a page is, in the light and in the dark."""
    used = sorted(set(re.findall(r"var\(--c([0-9a-f]{6})\)", page)))
    return _rule(":root", ((one, f"#{one}") for one in used)) + (
        "@media screen and (prefers-color-scheme:dark){"
        + _rule(":root", ((one, in_dark(f"#{one}")) for one in used))
        + "}"
    )


def _rule(selector: str, colours: Iterable[tuple[str, str]]) -> str:
    return f"{selector}{{{';'.join(f'--c{name}:{colour}' for name, colour in colours)}}}"
