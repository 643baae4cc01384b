"""The reader of pictures: what cameras and tools put around pixels, huge pictures and bombs; numpy as the oracle."""

from __future__ import annotations

import io
import os
import struct
import time
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from halfstep.core.errors import DataError
from halfstep.data.pictures import decode, opened, read_picture

Y, X = np.mgrid[:24, :32]
RGB = np.stack([Y * 6 + X * 3, 255 - (Y * 6 + X * 3), 0 * X + 90], -1).astype(np.uint8)
GREY = RGB[..., 0]
EXIF = b"Exif\0\0"


def coded(array: np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(orientation: int) -> bytes:
    """EXIF's payload with one entry."""
    return b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHH", 0x112, 3, 1, orientation, 0) + bytes(4)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def jpeg_with(segment: bytes, array: np.ndarray = RGB) -> bytes:
    whole = coded(array, "JPEG", quality=95)
    return whole[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + whole[2:]


def png_with(exif: bytes) -> bytes:
    whole = coded(RGB, "PNG")
    return whole[:33] + chunk(b"eXIf", exif) + whole[33:]


def bomb(side: int) -> bytes:
    """A PNG of side x side white and black pixels, eight of which are one byte of zeros before they are packed."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes((side + 7) // 8 + 1) * side, 9))
    return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")


@pytest.fixture
def place(tmp_path: Path):
    def write(content: bytes, name: str = "p.png") -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return write


def refused(file: Path, *words: str) -> None:
    with pytest.raises(DataError) as caught:
        read_picture(file)
    for word in (str(file), *words):
        assert word in str(caught.value)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("container", ["jpeg", "png"])
def test_pictures_stand_upright(place, container, orientation):
    stored = jpeg_with(EXIF + tiff(orientation)) if container == "jpeg" else png_with(tiff(orientation))
    straight = read_picture(place(coded(RGB, "JPEG", quality=95) if container == "jpeg" else coded(RGB, "PNG")))
    turns = {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: -1, 7: -1, 8: 1}  # EXIF 2.3, tag 0x112: mirrored, then turned
    mirrored = straight[..., ::-1] if orientation in (2, 4, 5, 7) else straight
    assert np.array_equal(read_picture(place(stored)), np.rot90(mirrored, turns[orientation], axes=(1, 2)))


@pytest.mark.parametrize(
    "content, turned",
    [
        (jpeg_with(b"http://ns.adobe.com/xap/1.0/\0<x>\xa8</x>"), False),
        (jpeg_with(EXIF), False),
        (jpeg_with(EXIF + tiff(6)[:14]), False),
        (jpeg_with(EXIF + tiff(99)), False),
        (jpeg_with(b"b'Exif\\x00'"), False),
        (png_with(tiff(6)[4:]), False),
        (png_with(b""), False),
        (png_with(EXIF + tiff(6)), True),
        (jpeg_with(EXIF + EXIF + tiff(6)), True),
    ],
    ids=["xmp-latin", "empty", "cut", "orientation-99", "text", "no-header", "png-empty", "prefix", "twice"],
)
def test_broken_metadata_do_no_harm_to_whole_pixels(place, content, turned):
    with warnings.catch_warnings(action="ignore"):
        whole = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    found = read_picture(place(content)).transpose(1, 2, 0)
    assert np.array_equal(found, np.rot90(whole, -1) if turned else whole)


def test_transparency_is_laid_on_white_in_every_way_to_store_it(place):
    clear = np.dstack([RGB, np.where(X < 16, 255, 0).astype(np.uint8)])
    grey = np.dstack([GREY, clear[..., 3]])
    palette = Image.fromarray(RGB).quantize(16)
    seen = palette.convert("RGB")
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=0)
    see_through = np.where(np.asarray(palette)[..., None] == 0, 255, np.asarray(seen))
    for content, want in (
        (coded(clear, "PNG"), np.where(X[..., None] < 16, RGB, 255)),
        (coded(grey, "PNG"), np.where(X[..., None] < 16, GREY[..., None], 255).repeat(3, 2)),
        (coded(clear, "WEBP", lossless=True, exact=True), np.where(X[..., None] < 16, RGB, 255)),
        (buffer.getvalue(), see_through),
    ):
        assert np.array_equal(read_picture(place(content)).transpose(1, 2, 0), want)


def test_every_value_of_sixteen_bits_is_scaled_to_the_nearest_of_eight(place):
    deep = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    assert np.array_equal(read_picture(place(coded(deep, "PNG")))[0], np.rint(deep / 257).astype(np.uint8))


def test_grey_stays_grey_and_cmyk_becomes_rgb(place):
    assert np.array_equal(read_picture(place(coded(GREY, "PNG")))[0], GREY)
    buffer = io.BytesIO()
    Image.fromarray(RGB).convert("CMYK").save(buffer, "JPEG", quality=95)
    assert read_picture(place(buffer.getvalue())).shape == (3, 24, 32)


def test_what_is_no_still_picture_of_eight_bits_is_refused(place, tmp_path):
    frames = [Image.fromarray(np.roll(RGB, k, 1)) for k in range(3)]
    for kind in ("PNG", "WEBP", "TIFF"):
        frames[0].save(tmp_path / "moving", kind, save_all=True, append_images=frames[1:])
        refused(tmp_path / "moving", "several frames")
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    refused(tmp_path / "moving.gif", "PNG, JPEG")
    refused(place(coded(GREY.astype(np.float32) / 255, "TIFF")), "32-bit")
    for content in (b"", b"no picture", bytes(1000), b"%!PS-Adobe-3.0 EPSF-3.0"):
        refused(place(content))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
@pytest.mark.filterwarnings("error")
def test_a_picture_cut_anywhere_is_refused_or_whole_without_a_warning(kind):
    content = coded(RGB, kind)

    def found(stored: bytes) -> np.ndarray:
        with opened("p", stored) as image:
            return decode(image, 3).copy()

    for cut in (*range(0, 100, 9), *range(100, len(content), 97)):
        try:
            assert np.array_equal(found(content[:cut]), found(content))
        except DataError:
            continue


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    for name, words in {"pipe.png": "no file", "loop.png": "", "absent.png": "nothing there", ".": "no file"}.items():
        refused(tmp_path / name, words)
    for name in ("x" * 5000, "nul\0.png"):
        with pytest.raises(DataError):
            read_picture(tmp_path / name)


def test_a_bomb_is_refused_at_once_and_in_little_memory(place):
    for side in (20_000, 9_000):  # 400 megapixels, and 81 that Pillow only warns of
        file = place(bomb(side))
        tracemalloc.start()
        begun = time.perf_counter()
        refused(file, f"{side}x{side} pixels in {file.stat().st_size} bytes", "bomb")
        assert time.perf_counter() - begun < 1 and tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
    assert read_picture(place(bomb(1000))).shape == (1, 1000, 1000)


def test_a_photo_of_a_hundred_megapixels_is_read():
    flat = coded(np.full((9000, 12000), 90, np.uint8), "JPEG")  # the emptiest that a phone could write
    with opened("photo", flat) as image:
        assert np.array_equal(decode(image, 1, 32), np.full((1, 32, 32), 90))


@pytest.mark.parametrize("side", [16, 24, 40])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
def test_the_decoders_own_scaling_gives_the_pictures_of_a_full_decode(side, options, monkeypatch):
    from sklearn.datasets import load_sample_image

    photo = Image.fromarray(load_sample_image("china.jpg")).resize((1281, 855), Image.Resampling.BICUBIC)
    content = coded(np.asarray(photo), "JPEG", quality=92, **options)
    with opened("photo", content) as image:
        scaled = decode(image, 3, side).astype(float)
        assert image.width < 1281
    monkeypatch.setattr("halfstep.data.pictures.KEPT", 10**6)
    with opened("photo", content) as image:
        whole = decode(image, 3, side).astype(float)
        assert image.width == 1281
    assert np.abs(scaled - whole).mean() < 1.5  # of 255


def test_pillows_own_limit_is_as_it_was(place):
    before = Image.MAX_IMAGE_PIXELS
    read_picture(place(coded(RGB, "PNG")))
    refused(place(b"nothing"))
    assert before == Image.MAX_IMAGE_PIXELS
