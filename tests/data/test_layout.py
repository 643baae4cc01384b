"""What names say: the folders that people have, each with what a person would expect of it."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfstep.core.errors import DataError
from halfstep.data.layout import arrange, in_order, sift, split_of


def seen(text: str, split: str = "train") -> tuple[dict[str, str | None], tuple[str, ...]]:
    """The class of every chosen path among paths separated by spaces, and what was left out."""
    paths = [PurePosixPath(path) for path in text.split()]
    found = arrange(paths, split, "there")
    labels = [None] * len(found.chosen) if found.labels is None else [found.classes[k] for k in found.labels]
    return {str(paths[i]): label for i, label in zip(found.chosen, labels, strict=True)}, found.left_out


@pytest.mark.parametrize(
    "name, kind",
    [("train", "train"), ("Train", "train"), ("TRAINING", "train"), ("training_set", "train"), ("train2017", "train")]
    + [("Test", "test"), ("testing", "test"), ("test-images", "test"), ("Test Set", "test"), ("testset", "test")]
    + [("val", "val"), ("Valid", "val"), ("validation", "val"), ("dev", "val"), ("val_data", "val")]
    + [(name, None) for name in ("", "set", "trains", "trainer", "device", "evaluate", "testament", "cat", "1")],
)
def test_splits_by_the_names_that_people_use(name, kind):
    assert split_of(name) == kind


@given(st.lists(st.integers(0, 10**6).map(str) | st.sampled_from(["cat", "dog", "Dog", "1a", "٣", "²"]), max_size=12))
def test_names_are_in_one_order_whatever_order_they_come_in(names):
    ordered = in_order(names)
    assert ordered == in_order(reversed(names)) and set(ordered) == set(names) and len(ordered) == len(set(names))
    if all(name.isascii() and name.isdigit() for name in names):
        assert [int(name) for name in ordered] == sorted(int(name) for name in ordered)


@pytest.mark.parametrize("other", ["test", "val", "valid", "Validation", "dev", "Test_Set"])
def test_splits_hold_the_same_classes(other):
    text = f"Train/cat/1.png Train/dog/2.png {other}/cat/3.png {other}/bird/4.png"
    assert seen(text) == ({"Train/cat/1.png": "cat", "Train/dog/2.png": "dog"}, ())
    assert seen(text, other) == ({f"{other}/cat/3.png": "cat", f"{other}/bird/4.png": "bird"}, ())
    assert arrange([PurePosixPath(x) for x in text.split()], "train", "").classes == ("bird", "cat", "dog")


def test_a_lone_folder_is_a_split_by_its_name_and_a_class_otherwise():
    assert seen("train/cat/1.png") == ({"train/cat/1.png": "cat"}, ())
    assert seen("train/1.png") == ({"train/1.png": None}, ())
    assert seen("cat/1.png") == ({"cat/1.png": "cat"}, ())
    with pytest.raises(DataError, match="expected one of: test;"):
        seen("test/1.png")


def test_classes_by_the_names_of_splits_stay_classes_beside_others():
    assert seen("bus/1.png train/2.png") == ({"bus/1.png": "bus", "train/2.png": "train"}, ())
    assert seen("bus/1.png test/2.png valid/3.png")[0] == {
        "bus/1.png": "bus", "test/2.png": "test", "valid/3.png": "valid"
    }  # fmt: skip


def test_folders_around_everything_are_opened():
    inside = "cat/1.png cat/2.png dog/3.png dog/4.png"
    for around in ("photos", "a/b/c", "set"):
        text = " ".join(f"{around}/{path}" for path in inside.split())
        assert seen(text) == ({f"{around}/{path}": path[:3] for path in inside.split()}, ())
    text = " ".join(f"photos/{path}" for path in inside.split())
    assert seen(f"{text} cover.png")[1] == ("1 picture beside the folder photos",)
    assert seen("p/train/cat/1.png p/test/cat/2.png", "test") == ({"p/test/cat/2.png": "cat"}, ())
    deep = "cat/1.png cat/more/2.png cat/more/3.png cat/more/4.png"  # one class, in no order
    assert set(seen(deep)[0].values()) == {"cat"} and len(seen(deep)[0]) == 4


def test_few_pictures_beside_classes_are_left_out_and_many_are_the_pictures():
    assert seen("1.png cat/2.png dog/3.png") == (
        {"cat/2.png": "cat", "dog/3.png": "dog"},
        ("1 picture beside the class folders",),
    )
    for text in ("1.png 2.png cat/3.png dog/4.png", "1.png more/2.png more/3.png", "1.png 2.png"):
        assert seen(text) == (dict.fromkeys(text.split()), ())


def test_what_lies_beside_the_splits_is_left_out():
    text = "train/cat/1.png test/cat/2.png unlabeled/3.png unlabeled/4.png 5.png"
    assert seen(text) == ({"train/cat/1.png": "cat"}, ("3 pictures beside the splits",))
    assert seen("train/cat/1.png train/dog/2.png test/3.png test/4.png", "test")[0] == {
        "test/3.png": None, "test/4.png": None
    }  # fmt: skip


def test_two_folders_for_one_split_are_refused_only_when_it_is_asked_for():
    text = "train/cat/1.png val/cat/2.png dev/cat/3.png"
    assert len(seen(text)[0]) == 1
    with pytest.raises(DataError, match="folders dev, val"):
        seen(text, "val")


def test_no_picture_is_left_out_for_its_suffix():
    for name in ("a.gif", "a.HEIC", "cat/scan.dcm", "photo.png.crdownload"):
        with pytest.raises(DataError, match=name):
            sift([PurePosixPath(name)], "there")
    kept = ["a.PNG", "b.JPG", "c.jfif", "d.jpe", "e.tiff"]
    assert sift([PurePosixPath(name) for name in kept], "there") == ([0, 1, 2, 3, 4], ())
