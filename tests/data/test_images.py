"""Images: every source against an oracle, the cache against kills and damage, every bad input against its message."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from halfstep.core.errors import DataError
from halfstep.core.watch import Watch
from halfstep.data import encoded, sources, tars
from halfstep.data import images as images_module
from halfstep.data.images import Images, load_images
from painted import class_folder, pictures, png, tarred

FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALFSTEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def save(array: np.ndarray, path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def idx_folder(root: Path, images: np.ndarray, labels: np.ndarray | None, stem: str = "train") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / f"{stem}-images-idx3-ubyte").write_bytes(idx(images))
    if labels is not None:
        (root / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return root


def refused(source: str, *words: str, **options: object) -> None:
    """Loading raises a one-line DataError that holds every word, and leaves nothing in the cache."""
    with pytest.raises(DataError) as caught:
        load_images(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    root = Path(os.environ["HALFSTEP_CACHE"]) / "data"
    assert not root.is_dir() or not list(root.iterdir())


# ---- sources -------------------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    oracle = load_digits()
    train, test = load_images("digits"), load_images("digits", split="test")
    assert (len(train), len(test)) == (1500, 297)
    assert (train.size, train.channels, train.classes) == (8, 1, tuple("0123456789"))

    def rows(pixels: np.ndarray, labels: np.ndarray) -> list[tuple]:
        return sorted(map(tuple, np.column_stack([pixels.reshape(len(pixels), -1), labels]).tolist()))

    both = rows(np.concatenate([train.pixels, test.pixels]), np.concatenate([train.labels, test.labels]))
    assert both == rows(np.rint(oracle.images * 255 / 16).astype(np.uint8), oracle.target)
    assert train.pixels.max() == 255
    assert np.bincount(test.labels, minlength=10).min() > 15  # shuffled: every class is there


def test_the_bundled_fashion_has_equally_many_pictures_of_each_class() -> None:
    for split, count in (("train", 600), ("test", 100)):
        images = load_images("fashion", split=split)
        assert (images.size, images.channels, images.classes) == (16, 1, sources.FASHION_CLASSES)
        assert images.counts == (count,) * 10
    assert load_images("fashion", size=8).size == 8


@pytest.mark.skipif(not FASHION.is_dir(), reason="dataset-fashion-mnist is not installed")
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_bundled_fashion_is_a_part_of_the_whole_as_it_is_decoded(split: str) -> None:
    part, whole = load_images("fashion", split=split), load_images(f"idx:{FASHION}", size=16, split=split)

    def rows(images: Images) -> list[bytes]:
        return [bytes([label]) + one.tobytes() for one, label in zip(images.pixels, images.labels, strict=True)]

    theirs = iter(rows(whole))
    assert all(row in theirs for row in rows(part))  # in the order of their source, each once


@pytest.mark.skipif(not FASHION.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist_has_its_published_counts() -> None:
    test = load_images(f"idx:{FASHION}", split="test")
    assert test.pixels.shape == (10_000, 1, 28, 28)
    assert np.bincount(test.labels).tolist() == [1000] * 10
    with gzip.open(FASHION / "t10k-images-idx3-ubyte.gz") as file:
        assert test.pixels.tobytes() == file.read()[16:]


@pytest.mark.parametrize("split, stem", [("train", "train"), ("test", "t10k")])
def test_idx_round_trip(tmp_path: Path, split: str, stem: str) -> None:
    pixels, labels = pictures(5, 4, 4), np.array([3, 0, 1, 1, 2], dtype=np.uint8)
    images = load_images(f"idx:{idx_folder(tmp_path / 'idx', pixels, labels, stem)}", split=split)
    assert np.array_equal(images.pixels[:, 0], pixels)
    assert images.labels.tolist() == labels.tolist() and images.labels.dtype == np.int64
    assert images.classes == ("0", "1", "2", "3")


def test_idx_without_labels(tmp_path: Path) -> None:
    images = load_images(f"idx:{idx_folder(tmp_path / 'idx', pictures(3, 4, 4), None)}")
    assert images.labels is None and images.classes == () and images.batch_labels(slice(0, 2)) is None


def test_folder_is_lossless_and_names_classes(tmp_path: Path) -> None:
    arrays = class_folder(tmp_path / "pets")
    (tmp_path / "pets" / "README.md").write_text("about")
    (tmp_path / "pets" / ".hidden.png").write_text("not an image")
    images = load_images(f"folder:{tmp_path / 'pets'}")
    assert np.array_equal(images.pixels, np.stack(list(arrays.values())).transpose(0, 3, 1, 2))
    assert images.labels.tolist() == [0, 0, 1, 1] and images.classes == ("cat", "dog")


def test_what_a_folder_and_its_tar_leave_out_is_said_also_from_the_cache(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    arrays = class_folder(root)
    save(pictures(1, 6, 6, 3)[0], root / "stray.png")
    for name in ("@eaDir", "cat/@eaDir", "__MACOSX"):
        save(pictures(1, 6, 6, 3)[0], root / name / "thumb.png")
    for name in ("cat/.DS_Store", "dog/._0.png", "dog/Thumbs.db", "notes.txt", "more.txt", "LICENSE"):
        (root / name).write_text("no picture")
    with tarfile.open(tmp_path / "pets.tar", "w") as tar:
        tar.add(root, "pets")
    for source in (f"folder:{root}", f"tar:{tmp_path / 'pets.tar'}"):
        for _ in range(2):
            images = load_images(source)
            assert images.classes == ("cat", "dog") and images.counts == (2, 2)
            assert {x.tobytes() for x in images.pixels.transpose(0, 2, 3, 1)} == {x.tobytes() for x in arrays.values()}
            assert images.left_out[0] == "1 picture beside the class folders"
            assert set(images.left_out[1:]) == {
                "2 @eaDir",
                "1 __MACOSX",
                "2 names beginning with a dot",
                "2 files .txt",
                "1 file .db",
                "1 file without a suffix",
            }


def test_folders_of_numbers_are_classes_in_the_order_of_the_numbers(tmp_path: Path) -> None:
    for k in range(12):
        save(pictures(1, 6, 6)[0], tmp_path / "numbers" / str(k) / "0.png")
    images = load_images(f"folder:{tmp_path / 'numbers'}")
    assert images.classes == tuple(map(str, range(12))) and sorted(images.labels) == list(range(12))
    assert np.array_equal(
        images.pixels[images.labels == 10][0, 0], np.asarray(Image.open(tmp_path / "numbers/10/0.png"))
    )


def test_class_numbers_that_start_at_one_or_have_gaps_are_the_classes_that_are_there(tmp_path: Path) -> None:
    for numbers in ([1, 2, 3], [3, 500, 60000], [0, 1, 10**12]):
        labels = np.array(numbers)[[2, 0, 1, 0]]
        np.savez(tmp_path / "a.npz", images=pictures(4, 5, 5), labels=labels)
        images = load_images(f"npz:{tmp_path / 'a.npz'}")
        assert images.classes == tuple(map(str, numbers)) and images.labels.tolist() == [2, 0, 1, 0]


def test_a_class_that_one_split_lacks_has_its_number_all_the_same(tmp_path: Path) -> None:
    x = pictures(2, 5, 5)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=np.array([0, 4]), x_test=x, y_test=np.array([[2], [4]], np.uint8))
    found = {split: load_images(f"npz:{tmp_path / 'a.npz'}", split=split) for split in ("train", "test")}
    root = idx_folder(tmp_path / "idx", x, np.array([0, 4], np.uint8))
    idx_folder(root, x, np.array([2, 4], np.uint8), "t10k")
    for images in (found, {split: load_images(f"idx:{root}", split=split) for split in ("train", "test")}):
        assert images["train"].classes == images["test"].classes == ("0", "2", "4")
        assert images["train"].labels.tolist() == [0, 2] and images["test"].labels.tolist() == [1, 2]


def test_names_that_are_no_utf8_are_read_and_escaped_where_a_person_reads(tmp_path: Path) -> None:
    root = os.fsencode(tmp_path) + b"/caf\xe9"
    for place in (b"/chat\xe9", b"/chien"):
        os.makedirs(root + place)
        save(pictures(1, 6, 6)[0], Path(os.fsdecode(root + place + b"/\xe9.png")))
    with tarfile.open(tmp_path / "latin.tar", "w") as tar:
        tar.add(os.fsdecode(root), "pets")
    for source in (f"folder:{os.fsdecode(root)}", f"tar:{tmp_path / 'latin.tar'}"):
        for _ in range(2):
            images = load_images(source)
            assert images.classes == ("chat\\udce9", "chien") and len(images) == 2
            "".join(images.classes).encode()
    Path(os.fsdecode(root + b"/chien/\xe9.png")).write_bytes(b"no picture")
    with pytest.raises(DataError) as caught:
        load_images(f"folder:{os.fsdecode(root)}")
    assert "\\udce9.png" in str(caught.value) and str(caught.value).encode()


def test_folder_splits_number_classes_alike(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    class_folder(root / "train")
    dog = save(pictures(1, 6, 6, 3)[0], root / "test" / "dog" / "0.png")  # no cat here
    train, test = load_images(f"folder:{root}"), load_images(f"folder:{root}", split="test")
    assert (len(train), len(test)) == (4, 1)
    assert test.classes == train.classes == ("cat", "dog") and test.labels.tolist() == [1]
    assert np.array_equal(test.pixels[0].transpose(1, 2, 0), np.asarray(Image.open(dog)))


def test_folder_follows_links_but_not_in_circles(tmp_path: Path) -> None:
    class_folder(tmp_path / "real")
    (tmp_path / "pets").mkdir()
    (tmp_path / "pets" / "linked").symlink_to(tmp_path / "real")
    assert len(load_images(f"folder:{tmp_path / 'pets'}")) == 4
    (tmp_path / "pets" / "loop").symlink_to(tmp_path / "pets")
    with pytest.raises(DataError, match=r"loop: got a folder that was met before"):
        load_images(f"folder:{tmp_path / 'pets'}")


@pytest.mark.parametrize(
    "shape, view",
    [((3, 5, 5), lambda x: x[:, None]), ((3, 5, 5, 3), lambda x: x.transpose(0, 3, 1, 2)), ((3, 3, 5, 5), lambda x: x)],
    ids=["NHW", "NHWC", "NCHW"],
)
def test_npz_axes(tmp_path: Path, shape: tuple, view: object) -> None:
    pixels = pictures(*shape)
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.array([[2], [0], [1]]))
    images = load_images(f"npz:{tmp_path / 'a.npz'}")
    assert np.array_equal(images.pixels, view(pixels)) and images.labels.tolist() == [2, 0, 1]


def test_npz_floats_and_splits(tmp_path: Path) -> None:
    pixels = pictures(4, 5, 5)
    pixels[0, 0, :2] = (0, 255)
    zero_one = (pixels / 255).astype(np.float32)
    np.savez(tmp_path / "a.npz", x_train=zero_one, y_train=np.arange(4), test_images=zero_one * 2 - 1)
    train = load_images(f"npz:{tmp_path / 'a.npz'}")
    test = load_images(f"npz:{tmp_path / 'a.npz'}", split="test")
    assert np.array_equal(train.pixels[:, 0], pixels) and np.array_equal(test.pixels, train.pixels)
    assert train.labels.tolist() == [0, 1, 2, 3] and test.labels is None
    assert train.fingerprint != test.fingerprint  # labels are content


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_tar_without_splits(tmp_path: Path, mode: str) -> None:
    arrays = {f"./pets/{c}/{i}.png": pictures(1, 6, 6, 3)[0] for i in range(2) for c in ("dog", "cat")}
    members = {"pets/README.md": b"about"} | {name: png(array) for name, array in arrays.items()}
    images = load_images(f"tar:{tarred(tmp_path / 'pets.tar', members, mode)}")
    assert np.array_equal(images.pixels, np.stack(list(arrays.values())).transpose(0, 3, 1, 2))
    assert images.classes == ("cat", "dog") and images.labels.tolist() == [1, 0, 1, 0]  # the archive's order


def test_tar_with_splits(tmp_path: Path) -> None:
    arrays = {f"{s}/{c}/0.png": pictures(1, 6, 6)[0] for s in ("train", "test") for c in ("cat", "dog")}
    source = f"tar:{tarred(tmp_path / 'pets.tar', {name: png(array) for name, array in arrays.items()})}"
    for split in ("train", "test"):
        images = load_images(source, split=split)
        assert np.array_equal(images.pixels[:, 0], np.stack([arrays[f"{split}/{c}/0.png"] for c in ("cat", "dog")]))
        assert images.channels == 1 and images.labels.tolist() == [0, 1]


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = pytest.importorskip("datasets").config
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


# ---- decoding ------------------------------------------------------------------------------------------------------


def test_grey_and_colour_convert(tmp_path: Path) -> None:
    grey, colour = pictures(1, 6, 6)[0], pictures(1, 6, 6, 3)[0]
    save(grey, tmp_path / "grey" / "a.png")
    assert load_images(f"folder:{tmp_path / 'grey'}").channels == 1
    assert np.array_equal(load_images(f"folder:{tmp_path / 'grey'}", channels=3).pixels[0], np.stack([grey] * 3))
    save(grey, tmp_path / "mixed" / "a.png")
    save(colour, tmp_path / "mixed" / "b.png")
    mixed = load_images(f"folder:{tmp_path / 'mixed'}")
    assert mixed.channels == 3 and np.array_equal(mixed.pixels[0], np.stack([grey] * 3))
    assert np.array_equal(
        load_images(f"folder:{tmp_path / 'mixed'}", channels=1).pixels[1, 0],
        np.asarray(Image.fromarray(colour).convert("L")),
    )


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    rgba = pictures(1, 4, 4, 4)[0]
    rgba[0, :, 3], rgba[1, :, 3], rgba[2:, :, 3] = 0, 255, 128
    save(rgba, tmp_path / "a" / "a.png")
    got = load_images(f"folder:{tmp_path / 'a'}").pixels[0].transpose(1, 2, 0).astype(float)
    alpha = rgba[..., 3:] / 255
    assert np.abs(got - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1
    assert (got[0] == 255).all() and np.array_equal(got[1], rgba[1, :, :3])


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    deep = np.array([[0, 257], [32896, 65535]], dtype=np.uint16)
    save(deep, tmp_path / "a" / "a.png")
    assert load_images(f"folder:{tmp_path / 'a'}").pixels[0, 0].tolist() == [[0, 1], [128, 255]]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    array = pictures(1, 6, 6)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by a quarter
    save(array, tmp_path / "a" / "a.png", exif=exif)
    assert np.array_equal(load_images(f"folder:{tmp_path / 'a'}").pixels[0, 0], np.rot90(array, -1))


def test_shrinking_averages_areas_of_the_centre(tmp_path: Path) -> None:
    wide = pictures(1, 8, 12)[0]
    save(wide, tmp_path / "a" / "a.png")
    got = load_images(f"folder:{tmp_path / 'a'}", size=4).pixels[0, 0].astype(float)
    assert np.abs(got - wide[:, 2:10].reshape(4, 2, 4, 2).mean(axis=(1, 3))).max() <= 1
    same = load_images(f"folder:{tmp_path / 'a'}", size=8)
    assert np.array_equal(same.pixels[0, 0], wide[:, 2:10])  # only cropped
    assert load_images(f"folder:{tmp_path / 'a'}", size=20).pixels.shape == (1, 1, 20, 20)


# ---- Images --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(index=st.lists(st.integers(0, 1499), max_size=9), seed=st.integers(0, 2**31))
def test_batch_is_the_pixels_in_range_and_flipping_twice_is_nothing(index: list[int], seed: int) -> None:
    images, where = digits(), torch.tensor(index, dtype=torch.long)
    flip = torch.rand(len(index), generator=torch.Generator().manual_seed(seed)) < 0.5
    plain, mirrored = images.batch(where), images.batch(where, flip=flip)
    assert plain.dtype == torch.float32 and plain.shape == (len(index), 1, 8, 8)
    assert not len(index) or (plain.min() >= -1 and plain.max() <= 1)
    assert np.array_equal(((plain + 1) * 127.5).round().to(torch.uint8).numpy(), images.pixels[index])
    assert torch.equal(torch.where(flip[:, None, None, None], mirrored.flip(-1), mirrored), plain)
    assert torch.equal(mirrored[~flip], plain[~flip])
    assert images.batch_labels(where).tolist() == images.labels[index].tolist()


_DIGITS: list[Images] = []


def digits() -> Images:
    if not _DIGITS:
        _DIGITS.append(load_images("digits"))
    return _DIGITS[0]


def test_batch_takes_slices_arrays_and_tensors() -> None:
    images = digits()
    for index in (slice(2, 5), np.array([2, 3, 4]), torch.tensor([2, 3, 4])):
        assert torch.equal(images.batch(index), images.batch(slice(2, 5)))
    with pytest.raises(ValueError, match="flip"):
        images.batch(slice(0, 3), flip=torch.tensor([True]))
    batch = images.batch(slice(0, 1))
    batch.fill_(0)  # a copy: the cache does not change
    assert images.pixels[0].max() > 0 and not images.pixels.flags.writeable


def test_subset_is_distinct_and_repeatable() -> None:
    images = digits()
    few, more, other = images.subset(10, seed=1), images.subset(20, seed=1), images.subset(10, seed=2)
    assert np.array_equal(few.pixels, images.subset(10, seed=1).pixels)
    assert np.array_equal(few.pixels, more.pixels[:10]) and np.array_equal(few.labels, more.labels[:10])
    assert len({images.fingerprint, few.fingerprint, more.fingerprint, other.fingerprint}) == 4
    everything = images.subset(len(images))
    assert sorted(x.tobytes() for x in everything.pixels) == sorted(x.tobytes() for x in images.pixels)
    for n in (0, 1501):
        with pytest.raises(DataError, match="digits"):
            images.subset(n)


# ---- the cache -----------------------------------------------------------------------------------------------------


def test_second_load_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class_folder(tmp_path / "pets")
    first = load_images(f"folder:{tmp_path / 'pets'}")
    monkeypatch.setattr(images_module, "_build", lambda *_: pytest.fail("decoded again"))
    again = load_images(f"folder:{tmp_path / 'pets'}")
    assert again.fingerprint == first.fingerprint and np.array_equal(again.pixels, first.pixels)
    assert isinstance(again.pixels, np.memmap)


def test_a_changed_file_and_other_options_decode_anew(tmp_path: Path) -> None:
    class_folder(tmp_path / "pets")
    source = f"folder:{tmp_path / 'pets'}"
    first = load_images(source)
    assert load_images(source, size=3).fingerprint != first.fingerprint
    save(np.zeros((6, 6, 3), dtype=np.uint8), tmp_path / "pets" / "cat" / "0.png")
    assert load_images(source).pixels[0].max() == 0
    assert load_images(source, cache=tmp_path / "elsewhere").pixels[0].max() == 0
    assert (tmp_path / "elsewhere" / "data").is_dir()


@pytest.mark.parametrize("name", ["pixels.npy", "labels.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_cache_is_rebuilt(cache: Path, name: str, damage: str) -> None:
    first = load_images("digits", split="test")
    file = next(cache.iterdir()) / name
    content = bytearray(file.read_bytes())
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    again = load_images("digits", split="test")
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.pixels, first.pixels) and np.array_equal(again.labels, first.labels)
    assert len(list(cache.iterdir())) == 1


def test_a_changed_byte_anywhere_in_the_record_is_noticed(cache: Path) -> None:
    first = load_images("digits", split="test")
    file = next(cache.iterdir()) / "meta.json"
    content = file.read_bytes()
    for place in range(0, len(content), 3):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        found = images_module._open_cache(file.parent, "digits")
        assert found is None or (found.left_out, found.sizes, found.classes) == ((), first.sizes, first.classes)
    file.write_text("[" * 10**5)
    assert images_module._open_cache(file.parent, "digits") is None


def test_a_killed_decode_leaves_nothing_half(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def interrupted(*given: object) -> np.ndarray:
        done.append(given)
        if len(done) > 100:
            raise KeyboardInterrupt
        return pixels(*given)

    pixels = encoded.decode
    monkeypatch.setattr(encoded, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_images("digits")
    assert not list(cache.iterdir())
    monkeypatch.setattr(encoded, "decode", pixels)
    assert len(load_images("digits")) == 1500


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="HALFSTEP_CACHE"):
        load_images("digits", cache=tmp_path / "file")


# ---- what is told ---------------------------------------------------------------------------------------------------


class Heard(Watch):
    """Keeps what it is told: (stage, units done)."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, float]] = []

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator:
        yield lambda done, note="": self.lines.append((f"{name} of {total}", done))


def test_images_say_how_many_of_each_class_and_what_sizes_they_came_in(tmp_path: Path) -> None:
    class_folder(tmp_path / "pets")
    save(pictures(1, 9, 30, 3)[0], tmp_path / "pets" / "dog" / "wide.png")
    for _ in range(2):  # decoded, and from the cache
        images = load_images(f"folder:{tmp_path / 'pets'}", size=6)
        assert images.counts == (2, 3) and images.sizes == ((6, 6), (30, 9)) and images.left_out == ()
    assert load_images("digits").sizes == ((8, 8), (8, 8)) and images.subset(2).sizes == images.sizes


def test_decoding_tells_how_far_it_is(tmp_path: Path) -> None:
    class_folder(tmp_path / "pets")
    source, heard = f"folder:{tmp_path / 'pets'}", Heard()
    load_images(source, watch=heard)
    assert heard.lines == [(f"decode {source} of 4", 4)]
    load_images(source, watch=heard)
    assert len(heard.lines) == 1  # nothing to do, nothing to tell


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_bad_arguments(tmp_path: Path) -> None:
    refused("zip:there", "zip:there", "folder:", "npz:")
    refused("digits:here", "digits:here", "did you mean digits?")
    refused("fashon", "'fashon'", "one of digits, fashion, idx:…", "did you mean fashion?")
    refused("foldr:x", "did you mean folder:…?")
    refused("folder:", "folder:")
    refused("digits", "0", size=0)
    refused("digits", "2 channels", channels=2)
    refused("digits", "'val'", "train, test", split="val")
    refused("fashion", "'val'", "train, test", split="val")
    for scheme in ("idx", "folder", "npz", "tar"):
        refused(f"{scheme}:{tmp_path / 'absent'}", "absent", "nothing there")
    refused(f"npz:{tmp_path}", str(tmp_path), "a file")


def test_folder_refuses(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(f"folder:{tmp_path / 'empty'}", "empty", "no images")
    (tmp_path / "empty" / "fake.png").write_text("hello")
    refused(f"folder:{tmp_path / 'empty'}", "fake.png", "whole image")
    whole = save(pictures(1, 30, 30, 3)[0], tmp_path / "cut" / "cut.jpg")
    refused(f"folder:{tmp_path / 'cut'}", "test", split="test")  # no splits: the test images are not the train images
    whole.write_bytes(whole.read_bytes()[:-300])
    refused(f"folder:{tmp_path / 'cut'}", "cut.jpg", "truncated")
    class_folder(tmp_path / "odd")
    (tmp_path / "odd" / "cat" / "scan.dcm").write_bytes(b"DICM")
    refused(f"folder:{tmp_path / 'odd'}", "scan.dcm")


def test_sizes_that_differ_name_the_first_file(tmp_path: Path) -> None:
    for name, shape in (("a", (6, 6)), ("b", (6, 6)), ("c", (7, 7)), ("d", (8, 8))):
        save(pictures(1, *shape)[0], tmp_path / "sizes" / f"{name}.png")
    refused(f"folder:{tmp_path / 'sizes'}", "c.png", "7x7", "6x6", "pass a size")
    save(pictures(1, 6, 9)[0], tmp_path / "wide" / "a.png")
    refused(f"folder:{tmp_path / 'wide'}", "a.png", "9x6", "square")
    assert load_images(f"folder:{tmp_path / 'sizes'}", size=6).pixels.shape == (4, 1, 6, 6)


def test_animations_and_deep_pixels(tmp_path: Path) -> None:
    frames = [Image.fromarray(x) for x in pictures(2, 6, 6, 3)]
    (tmp_path / "moving").mkdir()
    frames[0].save(tmp_path / "moving" / "m.png", save_all=True, append_images=frames[1:])
    refused(f"folder:{tmp_path / 'moving'}", "m.png", "several frames")
    save(pictures(1, 6, 6)[0].astype(np.float32), tmp_path / "float" / "f.tif")
    refused(f"folder:{tmp_path / 'float'}", "f.tif", "32-bit")


def test_idx_refuses(tmp_path: Path) -> None:
    root = idx_folder(tmp_path / "idx", pictures(5, 4, 4), np.arange(5, dtype=np.uint8))
    file, good = root / "train-images-idx3-ubyte", idx(pictures(5, 4, 4))
    (root / "t10k-labels-idx1-ubyte").write_bytes(b"")
    refused(f"idx:{root}", "t10k-images", split="test")
    refused(f"idx:{root}", "t10k-labels")  # whose numbers are classes too
    (root / "t10k-labels-idx1-ubyte").unlink()
    huge = struct.pack(">4B3I", 0, 0, 8, 3, 2**31, 2**31, 2**31) + bytes(80)
    for bad in (b"", good[:9], good[:-1], good + b"\0", b"\0\0\x0d\x03" + good[4:], b"\0\0\x08\x01" + good[4:], huge):
        file.write_bytes(bad)
        refused(f"idx:{root}", file.name)
    file.write_bytes(idx(pictures(4, 4, 4)))
    refused(f"idx:{root}", str(root), "labels", "[4]")
    file.unlink()
    packed = root / f"{file.name}.gz"
    for bad in (gzip.compress(good)[:-20], gzip.compress(good)[:-4] + b"abcd", good, gzip.compress(huge)):
        packed.write_bytes(bad)
        refused(f"idx:{root}", packed.name)


class Payload:
    def __reduce__(self) -> tuple:
        return (pytest.fail, ("it was unpickled",))


def test_npz_refuses(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    good = pictures(3, 5, 5)
    objects = np.array([Payload()] * 3, dtype=object)
    cases = [
        ({"images": objects}, "allow_pickle"),
        ({"images": good, "labels": objects}, "allow_pickle"),
        ({"other": good}, "other"),
        ({"images": good.astype(np.int32)}, "int32"),
        ({"images": good.astype(np.float32)}, "values from"),
        ({"images": np.full((3, 5, 5), np.nan)}, "nan"),
        ({"images": np.full((3, 5, 5), -1.5)}, "-1.5"),
        ({"images": good[:0]}, "at least one"),
        ({"images": pictures(3, 5, 5, 2)}, "[3, 5, 5, 2]"),
        ({"images": pictures(3, 5)}, "[3, 5]"),
        ({"images": pictures(3, 5, 6)}, "image 0"),
        ({"images": good, "labels": np.arange(4)}, "labels"),
        ({"images": good, "labels": np.array([0.5, 1, 2])}, "float64"),
        ({"images": good, "labels": np.array([-1, 0, 1])}, "-1 to 1"),
        ({"images": good, "labels": np.array([0, 1, 2**63], np.uint64)}, "9223372036854775808"),
        ({"x_train": good, "y_train": np.arange(3), "y_test": np.arange(1 << 17)}, "131072 numbers"),
    ]
    for arrays, word in cases:
        np.savez(file, **arrays)
        refused(f"npz:{file}", "a.npz", word)
    np.savez(file, images=good)
    refused(f"npz:{file}", "a.npz", "'test'", split="test")
    whole = file.read_bytes()
    np.save(tmp_path / "b.npy", good)
    for bad in (whole[:-30], whole[:200], b"", b"hello", pickle.dumps(Payload()), (tmp_path / "b.npy").read_bytes()):
        file.write_bytes(bad)
        refused(f"npz:{file}", "a.npz")


def test_tar_refuses(tmp_path: Path) -> None:
    file = tmp_path / "a.tar"
    picture = png(pictures(1, 20, 20, 3)[0])
    refused(f"tar:{tarred(file, {'notes.txt': b'hello'})}", "a.tar", "no images")
    refused(f"tar:{tarred(file, {'cat/a.png': picture, 'cat/b.png': b'hello'})}", "a.tar:cat/b.png")
    refused(f"tar:{tarred(file, {'cat/a.png': picture, 'cat/b.exe': b'hello'})}", "cat/b.exe")
    tarred(file, {"cat/a.png": picture})
    with tarfile.open(file, "a") as tar:
        link = tarfile.TarInfo("cat/b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    refused(f"tar:{file}", "a.tar:cat/b.png", "link")
    tarred(file, {"cat/a.png": picture})
    with tarfile.open(file, "a") as tar:
        tar.addfile(tar.getmember("cat/a.png"), io.BytesIO(picture))
    refused(f"tar:{file}", "a.tar:cat/a.png", "2 times")
    file.write_bytes(b"hello" * 1000)
    refused(f"tar:{file}", "a.tar")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_a_tar_cut_anywhere_is_refused(tmp_path: Path, mode: str) -> None:
    file = tarred(tmp_path / "a.tar", {f"cat/{i}.png": png(pictures(1, 20, 20, 3)[0]) for i in range(3)}, mode)
    whole = file.read_bytes()
    # A plain tar is cut between members, in headers and in data, and before its closing zeros.
    cuts = range(0, len(whole.rstrip(b"\0")), 256) if mode == "w" else range(0, len(whole), 50)
    for cut in cuts:
        file.write_bytes(whole[:cut])
        refused(f"tar:{file}", "a.tar")


def test_a_damaged_tar_header_is_refused(tmp_path: Path) -> None:
    file = tarred(tmp_path / "a.tar", {f"cat/{i}.png": png(pictures(1, 6, 6, 3)[0]) for i in range(3)})
    content = bytearray(file.read_bytes())
    content[1024 + 3] ^= 0xFF  # the second member's name: its checksum fails, and tarfile takes that for the end
    file.write_bytes(content)
    refused(f"tar:{file}", "a.tar", "damaged")


@pytest.fixture
def small_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "FREE_BYTES", 1 << 21)
    monkeypatch.setattr(tars, "PADDING_BYTES", 1 << 19)


def declared(shape: tuple, dtype: str = "|u1") -> bytes:
    """The header of an .npy of this shape."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def test_what_claims_a_hundred_gigabytes_is_refused_before_memory_is_asked_for(tmp_path: Path) -> None:
    for member in ("images", "labels"):
        with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            for name in ("images", "labels"):
                shape = (10**5, 1000, 1000) if name == member else (2, 5, 5)[: 3 if name == "images" else 1]
                archive.writestr(f"{name}.npy", declared(shape) + bytes(10**6))
        refused(f"npz:{tmp_path / 'a.npz'}", f"a.npz: {member}", "100000000000 bytes")
    root = idx_folder(tmp_path / "idx", pictures(1, 4, 4), None)
    (root / "train-images-idx3-ubyte").unlink()
    header = struct.pack(">4B3I", 0, 0, 8, 3, 10**5, 1000, 1000)
    (root / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + bytes(10**7)))
    refused(f"idx:{root}", "100000000000 bytes")


@pytest.mark.parametrize("packed", [gzip.compress, lzma.compress, bz2.compress], ids=["gz", "xz", "bz2"])
def test_a_tar_of_packed_zeros_is_refused_after_few_of_them(tmp_path: Path, packed: object, small_bounds: None) -> None:
    file, zeros = tmp_path / "a.tar", bytes(1 << 23)
    header = tarfile.TarInfo("cat/a.png")
    header.size = len(zeros)
    long = tarfile.TarInfo("a")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, len(zeros)
    whole = tarred(tmp_path / "b.tar", {"cat/a.png": png(pictures(1, 6, 6)[0])}).read_bytes()
    member, name = header.tobuf() + zeros, long.tobuf() + zeros
    for content, word in ((zeros, "no end"), (member, "packed"), (name, "packed"), (whole + zeros, "no end")):
        file.write_bytes(packed(content))
        refused(f"tar:{file}", "a.tar", word)
    huge = tarfile.TarInfo("a")
    huge.type, huge.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    with file.open("wb") as sparse:
        sparse.write(huge.tobuf())
        sparse.truncate(2 << 30)
    refused(f"tar:{file}", "a header of 1073741824 bytes")


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    for name in ("a.png", "notes.txt"):
        class_folder(tmp_path / "pets")
        os.mkfifo(tmp_path / "pets" / name)
        for scheme in ("folder", "hub", "idx"):
            refused(f"{scheme}:{tmp_path / 'pets'}", name, "a pipe")
        (tmp_path / "pets" / name).unlink()
        (tmp_path / "pets" / name).symlink_to(tmp_path / "pets" / name)
        refused(f"folder:{tmp_path / 'pets'}", name, "leads nowhere")
        (tmp_path / "pets" / name).unlink()
    os.mkfifo(tmp_path / "pets" / ".pipe")  # a system's, left alone
    os.mkfifo(tmp_path / "pipe")
    assert load_images(f"folder:{tmp_path / 'pets'}").left_out == ("1 name beginning with a dot",)
    for scheme in ("folder", "hub", "idx", "npz", "tar"):
        with pytest.raises(DataError, match="pipe"):
            load_images(f"{scheme}:{tmp_path / 'pipe'}")


@pytest.mark.parametrize("scheme", ["folder", "idx", "npz", "tar", "hub"])
def test_impossible_names_are_refused_in_one_short_line(scheme: str, offline: None) -> None:
    for place in ("x" * 5000, "a/" * 3000, "nul\0", "~nobody-of-this-name/x", "line\nbreak", "\x1b[31m"):
        with pytest.raises(DataError) as caught:
            load_images(f"{scheme}:{place}")
        assert len(str(caught.value)) < 1500 and str(caught.value).isprintable()


def test_without_a_home_directory_the_cache_is_a_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HALFSTEP_CACHE", "~/kept")
    assert images_module.cache_root() == home / "kept"
    monkeypatch.delenv("HALFSTEP_CACHE")
    assert images_module.cache_root() == home / ".cache" / "halfstep"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # no account
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert images_module.cache_root().parent == tmp_path
    monkeypatch.setenv("HALFSTEP_CACHE", "~/kept")
    with pytest.raises(DataError, match="without ~"):
        images_module.cache_root()


def test_import_is_light() -> None:
    import subprocess
    import sys

    code = "import sys, halfstep.data.images; sys.exit('datasets' in sys.modules or 'sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
