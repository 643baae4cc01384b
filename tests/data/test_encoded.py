"""Pictures that stay where they lie, against the same ones decoded; arrays that go on where a kill left them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_shards import samples, tarred, written

from halfstep.core.errors import DataError
from halfstep.data import arrays, encoded
from halfstep.data import images as images_module
from halfstep.data.ahead import ahead
from halfstep.data.arrays import Growing, cached
from halfstep.data.encoded import Encoded
from halfstep.data.images import load_images
from halfstep.data.pictures import decode
from halfstep.measure.features import feature_net_for, raw_pixels, train_features
from halfstep.measure.quality import reference_stats
from painted import class_folder, pictures, png

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def noted_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "NOTED_BYTES", 1)


# ---- work ahead ----------------------------------------------------------------------------------------------------


def halved(number: int) -> int:
    if number % 2:
        raise DataError(got=number, expected="an even one", where="here", do="add one")
    return number // 2


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_work_ahead_is_map(workers: int) -> None:
    state = torch.get_rng_state()
    assert list(ahead(halved, range(0, 40, 2), workers)) == list(range(20))
    with pytest.raises(DataError, match="here: got 7, expected an even one; add one"):
        list(ahead(halved, [2, 4, 7, 8], workers))
    assert torch.equal(state, torch.get_rng_state())


# ---- arrays that grow ----------------------------------------------------------------------------------------------


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=8),
    kills=st.lists(st.integers(0, 8), max_size=3),
    garbage=st.binary(max_size=9),
)
def test_an_array_grows_to_the_same_whatever_kills_it(tmp_path: Path, noted_often, sizes, kills, garbage) -> None:
    file, whole = tmp_path / "a.npy", np.random.default_rng(0).integers(0, 99, (sum(sizes), 3), dtype=np.uint8)
    file.unlink(missing_ok=True)
    parts = dict(zip(np.cumsum([0, *sizes]).tolist(), sizes, strict=False))

    def grow(most: int) -> bool:
        growing = Growing(file, whole.shape, "|u1", b"head")
        assert growing.note == ({"rows": growing.rows} if growing.rows else {})
        while growing.rows < len(whole) and most:
            begin, most = growing.rows, most - 1
            growing.add(whole[begin : begin + parts[begin]], {"rows": begin + parts[begin]})
        if growing.rows == len(whole):
            assert growing.finish().digest() == hashlib.sha256(b"head" + whole.tobytes()).digest()
            return True
        growing.out.flush()
        with growing.part.open("ab") as part:  # rows of which nothing was noted
            part.write(garbage)
        return False

    done = any(grow(most) for most in kills) or grow(99)
    assert done and np.array_equal(np.load(file), whole)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("a.")] == ["a.npy"]


@pytest.mark.parametrize("damage", ["part", "note", "shape"])
def test_a_damaged_part_is_begun_anew(tmp_path: Path, noted_often: None, damage: str) -> None:
    whole = np.arange(12, dtype=np.uint8).reshape(4, 3)
    growing = Growing(tmp_path / "a.npy", (4, 3), "|u1")
    growing.add(whole[:2])
    growing.close()
    file = tmp_path / ("a.npy.part" if damage == "part" else "a.npy.part.json")
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    shape = (4, 3) if damage != "shape" else (2, 6)
    assert Growing(tmp_path / "a.npy", shape, "|u1").rows == 0


def test_an_array_in_the_cache_goes_on_behind_the_parts_that_are_whole(tmp_path: Path, noted_often: None) -> None:
    whole, begun = np.random.default_rng(0).random((10, 2)).astype("<f4"), []

    def parts(row: int, most: int = 99):
        begun.append(row)
        for k in range(row, 10, 2):
            if k >= most:
                raise KeyboardInterrupt
            yield whole[k : k + 2]

    file = tmp_path / "x" / "a.npy"
    with pytest.raises(KeyboardInterrupt):
        cached(file, whole.shape, "<f4", lambda row: parts(row, 6))
    for _ in range(2):
        assert np.array_equal(cached(file, whole.shape, "<f4", parts), whole)
    assert begun == [0, 6]
    arrays.write_cached(tmp_path / "b.npy", whole.shape, "<f4", [whole])
    assert (tmp_path / "b.npy").read_bytes() == file.read_bytes()
    assert (tmp_path / "b.json").read_bytes() == file.with_suffix(".json").read_bytes()


# ---- ingest --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shards", "folder", "packed"])
def test_a_decode_that_was_killed_goes_on(
    tmp_path: Path, own_cache: Path, noted_often: None, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    _, members = samples(300, 100, labels=kind == "shards")
    if kind == "shards":
        source = written(tmp_path / "in", members)
    elif kind == "folder":
        (tmp_path / "in").mkdir()
        for name, content in {k: v for shard in members for k, v in shard.items()}.items():
            (tmp_path / "in" / name).write_bytes(content)
        source = f"folder:{tmp_path / 'in'}"
    else:
        source = f"tar:{tarred(tmp_path / 'in.tar.gz', {k: v for shard in members for k, v in shard.items()}, 'w:gz')}"
    whole = load_images(source, cache=tmp_path / "other")
    done = []

    def interrupted(*given: object) -> np.ndarray:
        done.append(given)
        if len(done) == 200:
            raise KeyboardInterrupt
        return decode(*given)

    monkeypatch.setattr(encoded, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_images(source)
    assert len(list((own_cache / "data").iterdir())) == 1
    done.extend([None])
    images = load_images(source)
    assert len(done) - 201 == 300 - 192  # three stretches of 64 were noted
    assert (images.fingerprint, images.sizes) == (whole.fingerprint, whole.sizes)
    assert np.array_equal(images.pixels, whole.pixels)


def test_a_colour_among_many_grey_pictures_makes_all_of_them_colour(tmp_path: Path, own_cache: Path) -> None:
    pixels, members = samples(200, 100)
    members[1]["000150.png"] = png(pictures(1, 6, 6, 3)[0])
    images = load_images(written(tmp_path / "in", members))
    assert images.channels == 3 and np.array_equal(images.pixels[0], np.stack([pixels[0]] * 3))
    assert sorted(path.name for path in next((own_cache / "data").iterdir()).iterdir()) == [
        "labels.npy",
        "meta.json",
        "pixels.npy",
    ]
    assert load_images(f"tar:{tmp_path / 'in'}", stream=64).channels == 3


# ---- without a decoded copy ----------------------------------------------------------------------------------------


def test_what_is_streamed_is_what_is_decoded(tmp_path: Path, own_cache: Path) -> None:
    _, members = samples(150, 40)
    source = written(tmp_path / "in", members)
    here, wanted = load_images(source, size=4, stream=32), load_images(source, size=4)
    assert isinstance(here.pixels, Encoded) and here.pixels.shape == wanted.pixels.shape and here.buffer == 32
    same = ("size", "channels", "classes", "counts", "left_out", "sizes")
    assert all(getattr(here, name) == getattr(wanted, name) for name in same)
    index, flip = torch.tensor([149, 0, 77, 77]), torch.tensor([True, False, True, False])
    for which in (index, slice(3, 9), slice(0, 0), np.array([5, 2])):
        assert torch.equal(here.batch(which), wanted.batch(which))
        assert torch.equal(here.batch_labels(which), wanted.batch_labels(which))
    assert torch.equal(here.batch(index, flip=flip), wanted.batch(index, flip=flip))
    assert here.subset(20).fingerprint == wanted.subset(20).fingerprint
    assert here.fingerprint == load_images(source, size=4, stream=99).fingerprint != wanted.fingerprint
    assert not list((own_cache / "data").glob("*/pixels.npy")) or len(list((own_cache / "data").iterdir())) == 2


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_what_comes_is_what_was_asked_for_in_that_order(tmp_path: Path, workers: int) -> None:
    _, members = samples(60, 20)
    source = written(tmp_path / "in", members)
    here, wanted = load_images(source, stream=16, workers=workers), load_images(source)
    asked = [torch.randperm(60, generator=torch.Generator().manual_seed(k))[:8] for k in range(9)]
    for images in (here, wanted):
        for index, (at, seen) in zip(asked, images.coming(iter(asked)), strict=True):
            assert torch.equal(seen.batch(at), wanted.batch(index))
            assert torch.equal(seen.batch_labels(at), wanted.batch_labels(index))


def test_a_reference_and_a_feature_network_are_those_of_the_decoded_pictures(tmp_path: Path) -> None:
    _, members = samples(60, 20)
    source = written(tmp_path / "in", members)
    both = [load_images(source, size=8, stream=stream) for stream in (0, 16)]
    found = [reference_stats(raw_pixels(images), images, cache=None) for images in both]
    assert np.array_equal(found[0].mu, found[1].mu) and np.array_equal(found[0].features, found[1].features)
    nets = [feature_net_for(images, width=4, n_features=4) for images in both]
    for net, images in zip(nets, both, strict=True):
        assert list(train_features(net, images, steps=2, batch=8))
    weights = [torch.cat([p.flatten() for p in net.parameters()]) for net in nets]
    assert torch.equal(*weights)


def test_a_folder_is_streamed_too(tmp_path: Path) -> None:
    class_folder(tmp_path / "pets")
    source = f"folder:{tmp_path / 'pets'}"
    assert torch.equal(load_images(source, stream=4).batch(slice(0, 4)), load_images(source).batch(slice(0, 4)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_changed_under_a_training_is_refused_by_name(tmp_path: Path, workers: int) -> None:
    pixels, members = samples(6, 3)
    source = written(tmp_path, members)
    images = load_images(source, stream=4, workers=workers)
    tarred(tmp_path / "000001.tar", {**members[1], "000005.png": png(255 - pixels[5])})
    assert len(images.batch(slice(0, 5))) == 5
    with pytest.raises(DataError, match=r"000001.tar:000005.png: got another picture"):
        list(images.coming([torch.tensor([5])]))
    assert load_images(source, stream=4).fingerprint != images.fingerprint


def test_a_pass_that_was_killed_goes_on(tmp_path: Path, noted_often: None, monkeypatch: pytest.MonkeyPatch) -> None:
    _, members = samples(300, 100)
    source, done = written(tmp_path / "in", members), []
    whole = load_images(source, stream=8, cache=tmp_path / "other")
    grey = encoded.is_grey

    def interrupted(image: object) -> bool:
        done.append(1)
        if len(done) == 200:
            raise KeyboardInterrupt
        return grey(image)

    monkeypatch.setattr(encoded, "is_grey", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_images(source, stream=8)
    images = load_images(source, stream=8)
    assert len(done) == 200 + 300 - 192
    assert (images.fingerprint, images.sizes) == (whole.fingerprint, whole.sizes)
    assert load_images(source, stream=8).fingerprint == whole.fingerprint and len(done) == 308  # not looked at again


def test_pixels_and_packed_archives_are_not_streamed(tmp_path: Path) -> None:
    _, members = samples(4, 4, labels=False)
    packed = f"tar:{tarred(tmp_path / 'in.tar.gz', members[0], 'w:gz')}"
    for source, what in (("digits", "pixels"), (packed, "a packed archive")):
        with pytest.raises(DataError, match=f"got {what}, to be streamed"):
            load_images(source, stream=8)


def test_a_pictures_size_is_refused_while_looking_through(tmp_path: Path) -> None:
    _, members = samples(6, 3)
    members[1]["000004.png"] = png(pictures(1, 7, 7)[0])
    source = written(tmp_path / "in", members)
    with pytest.raises(DataError, match=r"000004.png: got 7x7, expected 6x6 as those before it"):
        load_images(source, stream=8)
    assert load_images(source, stream=8, size=5).sizes == ((6, 6), (7, 7))
    assert images_module.FEW > 6
