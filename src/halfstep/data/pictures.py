"""Pictures in and out: the one reader of a file, its bytes or an array, whatever cameras and tools put around them.

Orientation is applied, transparency laid on white, 16-bit grey scaled. Animations, 32-bit pixels and decompression
bombs are refused before anything is decoded; broken metadata around whole pixels does no harm.
Out they go as uint8, alone or in a grid.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from halfstep.core.errors import DataError
from halfstep.data.sources import MAX_FILE_BYTES, bad, reading

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
MAX_PIXELS = 1 << 28  # of one picture: phones make 200 megapixels, and 3 bytes of memory each are 0.8 GB
FREE_PIXELS = 1 << 26  # up to so many are decoded whatever the file's size
PIXELS_PER_BYTE = 200  # above, no more: a flat grey JPEG has 85 in one byte, a bomb of 400 megapixels in 50 kB 8,000
KEPT = 8  # a JPEG's decoder scales it down as long as one of our pixels is so many of its wide: 1/255 off in the mean

CELL, GAP = 64, 2  # pixels of a picture in a grid, about, and between two of them

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@contextmanager
def opened(where: object, raw: Path | bytes | np.ndarray) -> Iterator[Image.Image]:
    """The picture, opened but not decoded; the block that decodes it runs inside, so that its errors name the picture.

    Raises: DataError, for what cannot be read, and before decoding for what would be too large or is no still picture
    of 8 bits a channel or 16-bit grey.
    """
    with reading(where, f"a whole image ({', '.join(FORMATS)})"):
        if isinstance(raw, np.ndarray):
            yield Image.fromarray(raw)
            return
        if isinstance(raw, Path) and not raw.is_file():
            got = "something that is no file" if raw.exists() else "nothing there"
            raise bad(where, got, "a picture", "check the path")
        stored = raw.stat().st_size if isinstance(raw, Path) else len(raw)
        if stored > MAX_FILE_BYTES:
            raise OSError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # Pillow's limit knows nothing of the file's size
        try:
            # Pillow warns of metadata that it cannot read: nothing that a user could mend.
            with (
                warnings.catch_warnings(action="ignore"),
                Image.open(raw if isinstance(raw, Path) else io.BytesIO(raw), formats=FORMATS) as image,
            ):
                _check(image, stored, where)
                yield image
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _check(image: Image.Image, stored: int, where: object) -> None:
    pixels = image.width * image.height
    if pixels > MAX_PIXELS or pixels > max(FREE_PIXELS, PIXELS_PER_BYTE * stored):
        got = f"{image.width}x{image.height} pixels in {stored} bytes, perhaps a decompression bomb"
        expected = f"up to {MAX_PIXELS >> 20} Mi pixels, and above {FREE_PIXELS >> 20} Mi a byte for {PIXELS_PER_BYTE}"
        raise bad(where, got, expected, "scale it down before")
    if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a camera's JPEG and its preview
        raise bad(where, "several frames in one file", "a still picture", "save one frame")
    if image.mode in ("I", "F"):
        raise bad(where, f"32-bit pixels (mode {image.mode})", "8-bit pixels, or 16-bit grey", "scale it to 8 bits")


def is_grey(image: Image.Image) -> bool:
    """Whether one channel holds all of an opened picture."""
    return image.mode in ("L", "1") or image.mode.startswith("I;16")


def decode(image: Image.Image, channels: int, side: int | None = None) -> np.ndarray:
    """uint8 [channels, H, W] of an opened picture; with a `side`, its largest centred square at side x side.

    It is shrunk by area (Pillow's BOX), so that nothing aliases, and grown by BICUBIC. A JPEG that is shrunk much is
    scaled by its decoder first, which takes a fifth of the time for 24 megapixels.
    """
    if side is not None and image.format in ("JPEG", "MPO"):
        image.draft(None, (KEPT * side, KEPT * side))
    image = _upright(image)
    short = min(image.size)
    if side is not None and image.width != image.height:
        left, top = (image.width - short) // 2, (image.height - short) // 2
        image = image.crop((left, top, left + short, top + short))
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips; 65535 / 255 = 257, and + 128 rounds
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        front = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", front.size, "white"), front).convert("RGB")
    image = image.convert("L" if channels == 1 else "RGB")
    if side is not None and short != side:
        image = image.resize((side, side), Image.Resampling.BOX if short > side else Image.Resampling.BICUBIC)
    array = np.asarray(image)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its metadata say, where they can be read."""
    image.load()
    if image.format is None:  # an array
        return image
    try:
        turn = _UPRIGHT.get(image.getexif().get(0x0112, 1))
    except Exception:  # Pillow's parser raises whatever it stumbles over; the pixels are whole all the same
        turn = None
    return image if turn is None else image.transpose(turn)


def read_picture(file: Path) -> np.ndarray:
    """uint8 [C, H, W] of a picture file in its own size: grey where it is grey, else RGB. Raises: DataError."""
    with opened(file, file) as image:
        return decode(image, 1 if is_grey(image) else 3)


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """[-1, 1] float [N,C,H,W] -> uint8."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()


def picture(pixels: np.ndarray) -> Image.Image:
    """uint8 [1 or 3, H, W] as a picture."""
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def picture_grid(images: np.ndarray, columns: int = 8, scale: int | None = None) -> Image.Image:
    """Images uint8 [N, 1 or 3, H, W] row by row, each pixel repeated `scale` times (by default to about 64 a cell)."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        got, expected = f"{images.dtype} {list(images.shape)}", "uint8 [N, 1 or 3, height, width]"
        raise DataError(got=got, expected=expected, where="picture grid", do="convert the images first")
    count, channels, height, width = images.shape
    scale = scale or max(1, round(CELL / max(height, width, 1)))
    columns = max(1, min(columns, count))
    rows, tall, wide = max(1, -(-count // columns)), height * scale + GAP, width * scale + GAP
    canvas = np.full((rows * tall - GAP, columns * wide - GAP, channels), 255, np.uint8)
    for k, image in enumerate(images.transpose(0, 2, 3, 1)):
        top, left = k // columns * tall, k % columns * wide
        canvas[top : top + tall - GAP, left : left + wide - GAP] = image.repeat(scale, 0).repeat(scale, 1)
    return Image.fromarray(canvas[..., 0] if channels == 1 else canvas)
