"""Tables: datasets in folders, parquet as other tools write it, the hub's cache with and without a network."""

from __future__ import annotations

import os
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import pytest

from halfstep.core.errors import DataError
from halfstep.data.captions import read_captions
from halfstep.data.images import load_images
from painted import class_folder, pictures, png

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def parquet(folder: Path, split: str = "train", **columns: object) -> str:
    """A file of plain arrow columns, as pandas, polars and Spark write them: no types of datasets in it."""
    folder.mkdir(exist_ok=True)
    pa.parquet.write_table(pa.table(columns), folder / f"{split}.parquet")
    return f"hub:{folder}"


def refused(source: str, *words: str, **options: object) -> None:
    with pytest.raises(DataError) as caught:
        load_images(source, **options)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_hub_reads_a_local_image_folder(tmp_path: Path) -> None:
    arrays = class_folder(tmp_path / "pets" / "train")
    class_folder(tmp_path / "pets" / "test", per_class=1)
    images = load_images(f"hub:{tmp_path / 'pets'}")
    assert images.classes == ("cat", "dog") and images.labels.tolist() == [0, 0, 1, 1]
    assert np.array_equal(images.pixels, np.stack(list(arrays.values())).transpose(0, 3, 1, 2))
    assert len(load_images(f"hub:{tmp_path / 'pets'}", split="test")) == 2


def test_hub_reads_parquet_without_labels(tmp_path: Path) -> None:
    pixels = pictures(3, 6, 6)
    features = datasets.Features({"picture": datasets.Image(), "note": datasets.Value("string")})
    rows = {"picture": [{"bytes": png(x), "path": None} for x in pixels], "note": ["a", "b", "c"]}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / "train.parquet")
    images = load_images(f"hub:{tmp_path / 'set'}")
    assert np.array_equal(images.pixels[:, 0], pixels) and images.labels is None
    with pytest.raises(DataError, match="split 'val'"):
        load_images(f"hub:{tmp_path / 'set'}", split="val")


def in_bytes(x: list[bytes]) -> pa.Array:
    return pa.array(x)


def in_large_bytes(x: list[bytes]) -> pa.Array:
    return pa.array(x, pa.large_binary())


def in_struct(x: list[bytes]) -> pa.Array:
    return pa.array([{"bytes": y, "path": f"{k}.png"} for k, y in enumerate(x)])


def in_large_struct(x: list[bytes]) -> pa.Array:
    return pa.array([{"bytes": y} for y in x], pa.struct({"bytes": pa.large_binary()}))


@pytest.mark.parametrize("column", [in_bytes, in_large_bytes, in_struct, in_large_struct])
def test_columns_of_bytes_are_pictures_whatever_wrote_them(tmp_path: Path, column) -> None:
    pixels = pictures(4, 6, 6)
    source = parquet(tmp_path / "set", content=column([png(x) for x in pixels]), length=pa.array([1, 2, 3, 4]))
    images = load_images(source)
    assert np.array_equal(images.pixels[:, 0], pixels) and images.labels is None
    assert images.left_out == ("1 column (length)",)
    refused(parquet(tmp_path / "two", a=column([b"1"]), b=column([b"2"])), "2 image columns")
    refused(parquet(tmp_path / "odd", a=column([png(pixels[0]), b"no picture"])), "row 1")
    refused(parquet(tmp_path / "gap", a=column([png(pixels[0]), b""])), "row 1")


@pytest.mark.parametrize(
    "train, test, classes",
    [
        (["dog", "cat", "dog"], ["bird"], ("bird", "cat", "dog")),
        (["10", "2", "10"], ["1"], ("1", "2", "10")),
        ([3, 1, 3], [2], ("1", "2", "3")),
        ([700, 0, 0], [9], ("0", "9", "700")),
    ],
)
def test_labels_of_text_and_of_integers_are_classes_over_all_splits(tmp_path: Path, train, test, classes) -> None:
    for split, labels in (("train", train), ("test", test)):
        x = pa.array([png(x) for x in pictures(len(labels), 6, 6)])
        source = parquet(tmp_path / "set", split, image=x, label=pa.array(labels), note=pa.array(labels))
    for split, labels in (("train", train), ("test", test)):
        images = load_images(source, split=split)
        assert images.classes == classes and images.left_out == ("1 column (note)",)
        assert [classes[k] for k in images.labels] == [str(label) for label in labels]
    x = pa.array([png(x) for x in pictures(2, 6, 6)])
    refused(parquet(tmp_path / "hole", image=x, label=pa.array(["cat", None])), "rows without label")
    assert load_images(parquet(tmp_path / "none", image=x, label=pa.array([-1, -1]))).labels is None
    assert load_images(parquet(tmp_path / "real", image=x, label=pa.array([0.5, 0.1]))).left_out == (
        "1 column (label)",
    )


def test_a_split_is_found_by_its_usual_names(tmp_path: Path) -> None:
    x = pa.array([png(pictures(1, 6, 6)[0])])
    for split in ("train", "validation"):
        source = parquet(tmp_path / "set", split, image=x)
    assert len(load_images(source, split="val")) == 1
    refused(source, "split 'test'", "train, validation", split="test")


def test_a_table_may_not_point_at_files_outside(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(pictures(1, 6, 6)[0]))
    cells = [{"bytes": None, "path": str(tmp_path / "secret.png")}]
    typed = pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    refused(parquet(tmp_path / "set", image=typed), "outside")
    cells[0]["path"] = str(tmp_path / "set2" / ".." / "secret.png")
    refused(parquet(tmp_path / "set2", image=pa.array(cells, typed.type)), "outside")
    os.mkfifo(tmp_path / "set3.png")
    cells[0]["path"] = str(tmp_path / "set3.png")
    refused(parquet(tmp_path / "set3", image=pa.array(cells, typed.type)), "outside")


def test_class_numbers_beyond_the_names_are_refused(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    table = pa.table({"image": in_struct([png(pictures(1, 6, 6)[0])]), "label": pa.array([5])})
    table = table.replace_schema_metadata(features.arrow_schema.metadata)
    (tmp_path / "set").mkdir()
    pa.parquet.write_table(table, tmp_path / "set" / "train.parquet")
    with pytest.raises(DataError):
        load_images(f"hub:{tmp_path / 'set'}")


# ---- the hub -------------------------------------------------------------------------------------------------------


def cached(tmp_path: Path, name: str) -> np.ndarray:
    """A dataset as the hub's library leaves it in its cache; its pictures."""
    pixels = pictures(3, 6, 6)
    x = pa.array([png(x) for x in pixels])
    folder = tmp_path / name.split("/")[1]
    parquet(folder, image=x)
    datasets.load_dataset(str(folder))
    prepared = next((tmp_path / "hf").glob("*/*/*/*/*.arrow")).parent
    shutil.copytree(prepared, tmp_path / "hf" / name.replace("/", "___") / "default" / "0.0.0" / prepared.name)
    shutil.rmtree(folder)
    return pixels


def test_a_cached_dataset_is_read_offline_and_without_a_network(tmp_path: Path, online: None, monkeypatch) -> None:
    pixels = cached(tmp_path, "someone/small_set")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert np.array_equal(load_images("hub:someone/small_set").pixels[:, 0], pixels)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert len(load_images("hub:someone/small_set", size=3)) == 3


def test_a_hub_that_does_not_answer_is_one_line_at_once(online: None, monkeypatch, capfd, caplog) -> None:
    monkeypatch.setattr("halfstep.data.tables.REACH_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the call and says nothing
        for port in (9, silent.getsockname()[1]):
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
            begun = time.perf_counter()
            refused("hub:someone/nothing", "nothing in the cache", f"127.0.0.1:{port} does not answer", "connect")
            assert time.perf_counter() - begun < 3
    assert capfd.readouterr() == ("", "") and not caplog.records
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    refused("hub:someone/nothing", "HF_HUB_OFFLINE is set")
    assert datasets.is_progress_bar_enabled()


def test_hub_refuses(tmp_path: Path) -> None:
    refused("hub:nobody/nothing-of-this-name", "hub:nobody/nothing-of-this-name")
    (tmp_path / "text").mkdir()
    datasets.Dataset.from_dict({"text": ["a", "b"]}).to_parquet(tmp_path / "text" / "train.parquet")
    refused(f"hub:{tmp_path / 'text'}", "0 image columns", "text")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    for name, rows in {
        "broken": [{"bytes": b"hello", "path": "broken.png"}, 1],
        "absent": [None, 1],
        "unlabelled": [{"bytes": png(pictures(1, 6, 6)[0]), "path": None}, -1],
    }.items():
        good = {"bytes": png(pictures(1, 6, 6)[0]), "path": None}
        table = datasets.Dataset.from_dict({"image": [good, rows[0]], "label": [0, rows[1]]}, features=features)
        (tmp_path / name).mkdir()
        table.to_parquet(tmp_path / name / "train.parquet")
        refused(f"hub:{tmp_path / name}", name, "label" if name == "unlabelled" else "row 1")


def parquets(folder: Path, **columns: list) -> str:
    """Three shards of a table."""
    folder.mkdir(parents=True)
    for k in range(3):
        part = {name: values[2 * k : 2 * k + 2] for name, values in columns.items()}
        pa.parquet.write_table(pa.table(part), folder / f"train-0000{k}-of-00003.parquet")
    return f"parquet:{folder}"


def test_parquet_shards_are_the_table_and_the_captions_of_one_file(tmp_path: Path) -> None:
    pixels = pictures(6, 6, 6)
    columns = {"image": list(map(png, pixels)), "label": list("cabcab"), "text": [f"picture {k}" for k in range(6)]}
    source = parquets(tmp_path / "set", **columns)
    one = load_images(parquet(tmp_path / "one", **columns))
    for name in (source, f"{source}/*.parquet", f"{source}/train-{{00000..00002}}-of-00003.parquet"):
        images = load_images(name)
        assert (images.fingerprint, images.classes, images.left_out) == (one.fingerprint, one.classes, one.left_out)
    streamed = load_images(source, stream=4)
    assert np.array_equal(streamed.pixels[np.arange(6)], images.pixels) and streamed.labels.tolist() == [2, 0, 1] * 2
    captions = read_captions(source)
    assert [captions[k] for k in range(6)] == columns["text"]
    refused(source, "split 'test'", "one of: train", split="test")
    pa.parquet.write_table(pa.table({name: x[:1] for name, x in columns.items()}), tmp_path / "set" / "test-0.parquet")
    train, test = load_images(source), load_images(source, split="test")
    assert (len(train), len(test)) == (6, 1) and test.classes == ("a", "b", "c") and test.labels.tolist() == [2]


def test_a_bad_parquet_shard_is_refused_by_its_name(tmp_path: Path) -> None:
    columns = {"image": list(map(png, pictures(6, 6, 6))), "label": [0, 1] * 3}
    hole = parquets(tmp_path / "hole", **columns | {"label": [0, 1, 0, None, 0, 1]})
    refused(hole, "train-00001-of-00003.parquet: row 1", "rows without label")
    broken = parquets(tmp_path / "broken", **columns | {"image": [*columns["image"][:5], b"no picture"]})
    refused(broken, "train-00002-of-00003.parquet: row 1", "whole image")
    source = parquets(tmp_path / "set", **columns)
    file = tmp_path / "set" / "train-00001-of-00003.parquet"
    whole = file.read_bytes()
    for cut in (0, 3, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        refused(source, file.name, "whole parquet")
    pa.parquet.write_table(pa.table({"image": columns["image"][:2]}), file)
    refused(source, file.name, "label differ")
