"""Shards: tars as webdataset writes them, against one tar, a folder and an array of the same pictures."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from halfstep.core.errors import DataError
from halfstep.data import images as images_module
from halfstep.data import shards
from halfstep.data.captions import read_captions
from halfstep.data.images import load_images
from painted import pictures, png, samples, tarred, written

pytestmark = pytest.mark.usefixtures("own_cache")


def refused(source: str, *words: object, **options: object) -> None:
    with pytest.raises(DataError) as caught:
        load_images(source, **options)
    for word in words:
        assert str(word) in str(caught.value)


def test_shards_are_one_tar_are_a_folder(tmp_path: Path) -> None:
    names = [f"{c}/{k:02d}.png" for c in ("cat", "dog", "eel") for k in range(5)]
    members = {name: png(array) for name, array in zip(names, pictures(15, 6, 6, 3), strict=True)}
    for name, content in members.items():
        (tmp_path / "pets" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pets" / name).write_bytes(content)
    pieces = [dict(list(members.items())[k : k + 4]) for k in range(0, 15, 4)]
    sources = (
        f"folder:{tmp_path / 'pets'}",
        f"tar:{tarred(tmp_path / 'pets.tar', members)}",
        written(tmp_path / "shards", pieces),
    )
    found = [load_images(source) for source in sources]
    assert found[0].classes == ("cat", "dog", "eel") and found[0].counts == (5, 5, 5)
    assert len({(x.fingerprint, x.classes, x.left_out) for x in found}) == 1
    assert np.array_equal(found[0].pixels, found[2].pixels)


def test_the_layout_of_webdataset_is_the_array_of_the_same_pictures_and_classes(tmp_path: Path) -> None:
    pixels, members = samples(11, 4, captions=True)
    source = written(tmp_path / "shards", members)
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.arange(11) % 3)
    here, wanted = load_images(source), load_images(f"npz:{tmp_path / 'a.npz'}")
    assert here.fingerprint == wanted.fingerprint and here.classes == wanted.classes == ("0", "1", "2")
    assert here.left_out == ("11 files .txt",)
    captions = read_captions(source)
    assert [captions[k] for k in range(11)] == [f"picture {k}" for k in range(11)]


def test_names_of_classes_and_numbers_from_one_shard_to_the_next(tmp_path: Path) -> None:
    a, b, c = map(png, pictures(3, 6, 6))
    one = {"a.png": a, "a.cls": b" zebra\n", "b.png": b, "b.cls": b"ape"}
    two = {"a.cls": b"ape", "a.png": c}  # the same key as in the other shard
    images = load_images(written(tmp_path / "named", [one, two]))
    assert images.classes == ("ape", "zebra") and images.labels.tolist() == [1, 0, 0]
    one["a.cls"], one["b.cls"], two["a.cls"] = b"010", b"9", b"09"
    images = load_images(written(tmp_path / "numbered", [one, two]))
    assert images.classes == ("9", "10") and images.labels.tolist() == [1, 0, 0]


def test_braces_globs_and_folders_name_the_same_shards(tmp_path: Path) -> None:
    _, members = samples(9, 3)
    written(tmp_path, members, "train-")
    places = ("train-{000000..000002}.tar", "train-*.tar", "train-00000{0,1,2}.tar", "train-{000000..000001}*.tar")
    counts = [len(load_images(f"tar:{tmp_path}/{place}")) for place in (*places, "train-00000{1..2}.tar", "")]
    assert counts == [9, 9, 9, 6, 6, 9]
    refused(f"tar:{tmp_path}/train-{{000000..000003}}.tar", "train-000003.tar", "nothing there", "000000..000003")
    refused(f"tar:{tmp_path}/test-*.tar", "test-*.tar", "nothing there")
    refused(f"tar:{tmp_path}/train-{{0..999999999}}.tar", "{0..999999999}", "mend the braces")
    (tmp_path / "empty").mkdir()
    refused(f"tar:{tmp_path / 'empty'}", "empty", "0 files .tar")


@pytest.mark.parametrize("names", [("train/{}", "test/{}"), ("train-{}", "val-{}"), ("c-train-{}", "c-validation-{}")])
def test_splits_by_the_names_of_shards_number_their_classes_alike(tmp_path: Path, names: tuple) -> None:
    _, (first, second) = samples(6, 3)
    del second["000003.cls"], second["000003.png"]  # class 0 is not there
    for name, members in zip(names, (first, second), strict=True):
        tarred(tmp_path / f"{name.format('00000-of-00001')}.tar", members)
    other = "test" if "test" in names[1] else "val"
    train, rest = load_images(f"tar:{tmp_path}"), load_images(f"tar:{tmp_path}", split=other)
    assert train.classes == rest.classes == ("0", "1", "2")
    assert (train.labels.tolist(), rest.labels.tolist()) == ([0, 1, 2], [1, 2])
    refused(f"tar:{tmp_path}", "'other'", f"{min('train', other)}, {max('train', other)}", split="other")


def test_a_shard_cut_anywhere_is_refused_by_its_name(tmp_path: Path) -> None:
    _, members = samples(6, 3)
    source = written(tmp_path, members)
    file = tmp_path / "000001.tar"
    whole = file.read_bytes()
    for cut in range(0, len(whole.rstrip(b"\0")), 512):
        file.write_bytes(whole[:cut])
        refused(source, file)
    file.write_bytes(whole)
    assert len(load_images(source)) == 6


BAD = {
    "a label is missing": (lambda m: m.pop("000004.cls"), "000001.tar:000004.png", "no .cls beside this picture"),
    "all are missing": (lambda m: [m.pop(f"00000{k}.cls") for k in (3, 4, 5)], "000001.tar", "without any .cls"),
    "a picture is missing": (lambda m: m.pop("000004.png"), "000001.tar:000004", "0 pictures of one key"),
    "two pictures": (lambda m: m.update({"000005.jpg": m["000005.png"]}), "000001.tar:000005", "2 pictures"),
    "apart": (lambda m: m.update({"000003.cls": m.pop("000003.cls")}), "000001.tar:000003", "0 pictures of one key"),
    "no text": (lambda m: m.update({"000003.cls": b"\xff\xfe"}), "000001.tar:000003.cls", "a class"),
    "empty": (lambda m: m.update({"000003.cls": b"\n"}), "000001.tar:000003.cls", "a class ''"),
    "strange": (lambda m: m.update({"000003.exe": b"MZ"}), "000001.tar/000003.exe", "a .exe file"),
    "broken": (lambda m: m.update({"000004.png": b"no picture"}), "000001.tar:000004.png", "whole image"),
}


@pytest.mark.parametrize("change, where, what", BAD.values(), ids=BAD)
def test_bad_shards_are_refused_by_name(tmp_path: Path, change: object, where: str, what: str) -> None:
    _, members = samples(9, 3)
    change(members[1])
    refused(written(tmp_path, members), where, what)


def test_a_key_that_comes_twice_in_a_shard_is_refused(tmp_path: Path) -> None:
    _, members = samples(6, 3)
    source = written(tmp_path, members)
    with tarfile.open(tmp_path / "000001.tar", "a") as tar:
        for suffix in ("cls", "png"):
            content = members[1][f"000003.{suffix}"]
            info = tarfile.TarInfo(f"000003.{suffix}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    refused(source, "000001.tar:000003.png", "2 times")


def test_a_packed_tar_among_shards_is_refused(tmp_path: Path) -> None:
    _, members = samples(6, 3)
    source = written(tmp_path, members)
    with tarfile.open(tmp_path / "000002.tar", "w:gz"):
        pass
    refused(source, "000002.tar", "a packed tar among shards", "unpack it")


def test_only_a_shard_that_changed_is_walked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, members = samples(6, 3)
    source = written(tmp_path, members)
    first = load_images(source)
    walked = []
    index = shards.index_shard
    monkeypatch.setattr(shards, "index_shard", lambda file: walked.append(file.name) or index(file))
    assert load_images(source, size=3).size == 3 and walked == []
    tarred(tmp_path / "000001.tar", {**members[1], "000005.png": png(255 - pixels[5])})
    again = load_images(source)
    assert walked == ["000001.tar"] and again.fingerprint != first.fingerprint
    assert np.array_equal(again.pixels[5, 0], 255 - pixels[5])


@pytest.mark.parametrize("damage", [lambda x: x[: len(x) // 2], lambda x: b"", lambda x: x[:60] + b"~" * 9 + x[69:]])
def test_a_damaged_index_is_made_again(tmp_path: Path, own_cache: Path, damage: object) -> None:
    _, members = samples(6, 3)
    source = written(tmp_path / "in", members)
    first = load_images(source)
    for file in (own_cache / "shards").iterdir():
        file.write_bytes(damage(file.read_bytes()))
    again = load_images(source, size=6)
    assert (again.fingerprint, again.classes) == (first.fingerprint, first.classes)


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_read_the_same_in_the_same_order_and_name_what_they_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    _, members = samples(300, 100)
    source = written(tmp_path, members)
    alone = load_images(source, workers=0)
    monkeypatch.setattr(images_module, "FEW", 2)
    assert load_images(source, workers=workers, cache=tmp_path / "other").fingerprint == alone.fingerprint
    members[2]["000250.png"] = b"no picture"
    written(tmp_path, members)
    refused(source, "000002.tar:000250.png", "whole image", workers=workers)
