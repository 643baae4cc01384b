"""Captions; oracles: the `datasets` library's own imagefolder, the pictures that `load_images` gives, round trips."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from halfstep.core.errors import DataError
from halfstep.data.captions import Captions, read_captions
from halfstep.data.images import load_images

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")


def pictures(root: Path, names: str, begin: int = 0) -> list[str]:
    """Pictures of one grey each, so that each tells its number; their names."""
    for number, name in enumerate(names.split(), start=begin):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(root / name)
    return names.split()


def tell(root: Path, told: dict[str, object]) -> None:
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in told.items()]
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def numbers(source: str, **given) -> list[int]:
    return load_images(source, **given).pixels[:, 0, 0, 0].tolist()


def test_a_metadata_file_names_the_caption_of_every_picture_in_the_order_of_the_images(tmp_path):
    root = tmp_path / "set"
    names = pictures(root, "b.png deep/a.png c.jpg deep/d.png")
    tell(root, {name: f"picture {k}" for k, name in reversed(list(enumerate(names)))})
    found = read_captions(f"folder:{root}")
    assert [found[k] for k in range(len(found))] == [f"picture {n}" for n in numbers(f"folder:{root}")]
    assert found[5] == found[1]  # after the last they begin again


def test_datasets_reads_the_same_captions_from_the_same_folder(tmp_path):
    """Oracle: the library whose convention it is, as our own `hub:` reads it."""
    root = tmp_path / "set"
    names = pictures(root, "b.png a.png c.png")
    tell(root, {name: f"picture {k}" for k, name in enumerate(names)})
    pairs = []
    for source in (f"folder:{root}", f"hub:{root}"):
        captions = read_captions(source)
        pairs.append({n: captions[k] for k, n in enumerate(numbers(source))})
    assert pairs[0] == pairs[1] == {0: "picture 0", 1: "picture 1", 2: "picture 2"}


def test_splits_have_the_captions_of_their_own_pictures(tmp_path):
    for split, begin in (("train", 0), ("test", 2)):
        names = pictures(tmp_path / "set" / split, "a.png b.png", begin)
        tell(tmp_path / "set" / split, {name: f"picture {k}" for k, name in enumerate(names, start=begin)})
    for split in ("train", "test"):
        found = read_captions(f"folder:{tmp_path / 'set'}", split=split)
        assert list(found.texts) == [f"picture {n}" for n in numbers(f"folder:{tmp_path / 'set'}", split=split)]


def test_a_txt_beside_each_picture_is_its_caption(tmp_path):
    root = tmp_path / "set"
    for k, name in enumerate(pictures(root, "x/b.png y/a.jpeg")):
        (root / name).with_suffix(".txt").write_text(f"picture {k}\n", encoding="utf-8-sig")
    found = read_captions(f"folder:{root}")
    assert [found[k] for k in range(2)] == [f"picture {n}" for n in numbers(f"folder:{root}")]


@pytest.mark.parametrize("how", ["metadata", "beside"])
def test_an_archive_has_the_captions_of_its_pictures_in_its_own_order(how, tmp_path):
    root, archive = tmp_path / "set", tmp_path / "set.tar.gz"
    names = pictures(root, "b.png deep/a.png c.jpg deep/d.png")
    texts = {name: f"picture {k}" for k, name in enumerate(names)}
    if how == "metadata":
        tell(root, texts)
    else:
        for name, text in texts.items():
            (root / name).with_suffix(".txt").write_text(text)
    with tarfile.open(archive, "w:gz") as tar:
        for file in sorted((one for one in root.rglob("*") if one.is_file()), reverse=True):
            tar.add(file, f"./{file.relative_to(root)}")
    found = read_captions(f"tar:{archive}")
    assert [found[k] for k in range(len(found))] == [f"picture {n}" for n in numbers(f"tar:{archive}")]
    assert sorted(found.texts) == sorted(read_captions(f"folder:{root}").texts) == sorted(texts.values())
    if how == "beside":
        (root / "deep" / "d.txt").unlink()
        with tarfile.open(archive, "w") as tar:
            tar.add(root, ".")
        with pytest.raises(DataError, match=r"set\.tar\.gz: .*1 of 4 pictures without a caption, the first deep/d"):
            read_captions(f"tar:{archive}")


def test_texts_are_kept_once_and_the_order_says_whose_they_are():
    found = Captions.of(["a cat", "a dog", " a cat "], "here")
    assert found.texts == ("a cat", "a dog") and found.order.tolist() == [0, 1, 0]
    assert found.fingerprint != Captions.of(["a cat", "a dog", "a dog"], "here").fingerprint


def test_the_mixed_order_holds_every_caption_as_often_and_its_label_with_it():
    labels = np.repeat([0, 1], 50)
    found = Captions(name="here", texts=("a cat", "a dog"), order=labels, labels=labels)
    mixed = found.mixed(seed=1)
    assert np.array_equal(mixed.order, mixed.labels) and np.array_equal(np.sort(mixed.order), labels)
    assert 3 < mixed.order[:20].sum() < 17 and mixed.fingerprint == found.mixed(seed=1).fingerprint


def test_prompts_come_a_line_each_or_as_records_with_their_class(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\r\n a dog\na cat")
    found = read_captions(f"prompts:{tmp_path / 'p.txt'}")
    assert [found[k] for k in range(4)] == ["a cat", "a dog", "a cat", "a cat"] and found.labels is None
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat", "label": 3}\n{"text": "a dog", "label": 0}\n')
    found = read_captions(f"prompts:{tmp_path / 'p.jsonl'}")
    assert found.texts == ("a cat", "a dog") and found.labels.tolist() == [3, 0]
    (tmp_path / "q.jsonl").write_text('{"text": "a cat", "short": "cat"}\n')
    assert read_captions(f"prompts:{tmp_path / 'q.jsonl'}", column="short").texts == ("cat",)


@pytest.mark.parametrize(
    "file, content, told",
    [
        ("p.txt", "", "an empty file"),
        ("p.txt", "a cat\n\na dog\n", "line 2: got an empty caption"),
        ("p.txt", b"a \xff cat", "no UTF-8"),
        ("p.csv", "a cat\n", "a .csv file"),
        ("p.jsonl", '{"texts": "a cat"}\n', "line 1: got fields texts"),
        ("p.jsonl", '{"text": "a cat", "prompt": "a dog"}\n', "line 1: got fields text, prompt"),
        ("p.jsonl", '{"text": 3}\n', "line 1: got 3"),
        ("p.jsonl", "a cat\n", "line 1: got an unreadable"),
        ("p.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', "line 2: got label None"),
        ("p.jsonl", '{"text": "a", "label": true}\n', "line 1: got label True"),
    ],
)
def test_files_that_hold_no_prompts_are_refused_by_line(tmp_path, file, content, told):
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=told) as error:
        read_captions(f"prompts:{tmp_path / file}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "told, refusal",
    [
        ({"a.png": "a cat"}, "1 of 2 pictures without a caption, the first b.png"),
        ({"a.png": "a cat", "b.png": " "}, "line 2: got an empty caption"),
        ({"a.png": "a cat", "c.png": "a dog"}, "line 2: got file_name 'c.png'"),
        ({"a.png": "a cat", "b.png": "two\nlines"}, "line 2: got 2 lines"),
        ({"a.png": "a cat", "./a.png": "a dog"}, "for the second time"),
        ({}, "an empty file"),
    ],
)
def test_tables_that_do_not_fit_their_pictures_are_refused(tmp_path, told, refusal):
    pictures(tmp_path / "set", "a.png b.png")
    tell(tmp_path / "set", told)
    with pytest.raises(DataError, match=refusal):
        read_captions(f"folder:{tmp_path / 'set'}")


def test_captions_for_some_pictures_or_none_are_refused(tmp_path):
    pictures(tmp_path / "set", "a.png b.png")
    with pytest.raises(DataError, match="pictures without captions"):
        read_captions(f"folder:{tmp_path / 'set'}")
    (tmp_path / "set" / "a.txt").write_text("a cat")
    with pytest.raises(DataError, match="1 of 2 pictures without a caption, the first b"):
        read_captions(f"folder:{tmp_path / 'set'}")
    with pytest.raises(DataError, match="columns image, expected one of text"):
        read_captions(f"hub:{tmp_path / 'set'}")


@pytest.mark.parametrize("source", ["digits", "idx:there", "prompt:p.txt", "prompts:"])
def test_sources_without_captions_are_refused_by_name(source):
    with pytest.raises(DataError, match="expected one of folder:…, tar:…, parquet:…, hub:…, prompts:…"):
        read_captions(source)
    with pytest.raises(DataError, match="no such file"):
        read_captions("prompts:nowhere.txt")
