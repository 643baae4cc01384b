"""The files of a finished run as typed records: what `halfstep` wrote is read, what does not fit is one line."""

from __future__ import annotations

import copy
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfstep.core import disk
from halfstep.core.errors import RunError
from halfstep.core.results import Cost, read_comparison, read_costs
from halfstep.report.story import MAX_PICTURES, _pictures, tell_spectra
from halfstep.report.tables import plans_table
from halfstep.search.damage import ErrorTable

QUALITY = {
    name: {"metric": name, "value": 1, "low": 0.5, "high": 2.0, "n": 8, "n_reference": 8, "features": "f"}
    | {"reference": "r", "seed": 3}
    for name in ("fd", "kid", "precision", "recall")
}
CHANGE = {"value": 0, "low": 0, "high": 0, "share": None, "relative_low": None, "relative_high": None}
CHANGE |= {"fd_a": 1, "fd_b": 1, "n": 8, "features": "f", "reference": "r", "seed": 3}
ROW = {"macs": 5, "share": 1, "calls": 4, "wall_ms": 1.5, "wall_share": 1, "wall_share_low": 1, "wall_share_high": 1}
ROW |= {"quality": QUALITY, "difference": CHANGE, "held": True}
ABOUT = {"reference": "reference", "batch": 8, "repeats": 5, "seed": 3, "n": 8, "tolerance": 0.05, "data": "abc"}
ABOUT |= {"machine": {"cpu": "x"}, "device": "cpu", "dtype": "float32", "layout": "each in its own"}
RECORD: dict[str, Any] = {"about": ABOUT, "plans": {"reference": ROW, "plan": ROW}}
TABLE = {"timesteps": [9, 5], "entries": ["a", "b"], "local": [[0, 1], [0, 2]], "damage": [[0, 3]], "images": 4}


def changed(record: dict, path: str, value: object) -> dict:
    record = copy.deepcopy(record)
    *above, last = path.split("/")
    place = record
    for name in above:
        place = place[name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return record


def test_a_comparison_of_before_is_read_as_it_was_written(tmp_path: Path):
    disk.write_json(tmp_path / "quality.json", RECORD)
    found = read_comparison(tmp_path / "quality.json")
    assert found.plans["plan"].quality["fd"].value == 1 and found.about.floor is None
    with pytest.raises(RunError, match="measure again"):  # it has nothing to be held against
        found.plans["plan"].difference.verdict(0.05)


def test_a_comparison_is_written_with_the_fields_that_were_read_in_their_order(tmp_path: Path):
    change = {name: CHANGE[name] for name in list(CHANGE)[:8]} | {"scale": 1.5, "least": 4}
    change |= {name: CHANGE[name] for name in list(CHANGE)[8:]}
    quality = {name: one | {"raw": None} for name, one in QUALITY.items()}
    row = ROW | {"quality": quality, "difference": change, "verdict": "held", "decided_by": None}
    row |= {"free_difference": change, "free_verdict": "held", "free_wall": 0.25, "predicted_ms": 1.5, "alone_ms": 2.5}
    names = (
        "reference free batch repeats seed n tolerance floor scale warnings data machine device dtype threads layout"
    )
    about = ABOUT | {"floor": {"raw": 1.5, "high": 2.5, "fresh": 1.75}, "scale": 1.5, "warnings": ["one"], "threads": 1}
    about |= {"free": "plan"}
    for seconds in ({}, {"seconds": 2.5}):
        record = {"about": {name: about[name] for name in names.split()}, "plans": {"reference": row, "plan": row}}
        disk.write_json(tmp_path / "quality.json", record | seconds)
        disk.write_json(tmp_path / "again.json", read_comparison(tmp_path / "quality.json").to_json())
        again = json.loads((tmp_path / "again.json").read_text())
        assert again == record | seconds and list(again["about"]) == names.split()
        assert list(again["plans"]["plan"]["difference"]) == list(change) and list(again["plans"]["plan"]) == list(row)


def test_a_dense_model_alone_is_told_as_a_table_and_is_no_report(tmp_path: Path):
    file = tmp_path / "quality.json"
    disk.write_json(file, changed(RECORD, "plans/plan", None))
    table = plans_table(read_comparison(file, rows=()))
    assert [row[0] for row in table.rows] == ["reference"] and table.best is None
    with pytest.raises(RunError, match="no plan 'plan'"):
        read_comparison(file)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("about", None, "no about"),
        ("about/reference", "other", "no plan 'other'"),
        ("plans/plan", None, "no plan 'plan'"),
        ("plans/plan/quality/fd", None, "no fd of 'reference'"),
        ("plans/plan/quality/fd/value", "1", "quality.fd.value: got '1', expected a number"),
        ("plans/plan/difference", 3, "expected a section of fields"),
        ("plans/plan/calls", 2.5, "calls: got 2.5"),
        ("plans", [], "expected names"),
        ("abuot", 1, "did you mean about?"),
    ],
)
def test_a_comparison_that_does_not_fit_is_refused_in_one_line(tmp_path: Path, path: str, value: object, message: str):
    file = tmp_path / "quality.json"
    disk.write_json(file, changed(RECORD, path, value))
    with pytest.raises(RunError) as caught:
        read_comparison(file)
    told = str(caught.value)
    assert message in told and str(file) in told and "run again" in told and "\n" not in told


RINGS = {name: [1, 2.5] for name in ("frequency", "data", "model", "wiener", "error")}
SPECTRA = {"data": "digits", "images": 4, "timesteps": {"20": {"a": RINGS}}}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("images", None, "no images"),
        ("timesteps/20/a/error", None, "no timesteps.20.a.error"),
        ("timesteps/20/a/error", ["1"], "timesteps.20.a.error"),
        ("timesteps/20/a/error", [1], "lines of [1, 2] numbers"),
        ("timesteps", [], "expected names"),
    ],
)
def test_spectra_are_told_or_refused_in_one_line(tmp_path: Path, path: str, value: object, message: str):
    file = tmp_path / "spectrum.json"
    disk.write_json(file, SPECTRA)
    assert "digits" in tell_spectra(tmp_path).read_text()
    disk.write_json(file, changed(SPECTRA, path, value))
    with pytest.raises(RunError) as caught:
        tell_spectra(tmp_path)
    told = str(caught.value)
    assert message in told and str(file) in told and "\n" not in told


@pytest.mark.parametrize("record", [{"a": 3}, {"a": {"macs": 1}}, {"a": {"macs": 1, "params": "2"}}, {"a": []}])
def test_costs_of_another_shape_are_refused(tmp_path: Path, record: dict):
    disk.write_json(tmp_path / "a.json", record)
    with pytest.raises(RunError, match=r"a\.json"):
        read_costs(tmp_path / "a.json")
    cost = Cost(macs=1, params=2, device="cpu")
    disk.write_json(tmp_path / "a.json", {"a": cost.to_json()})
    assert read_costs(tmp_path / "a.json") == {"a": cost}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("local", [[0, 1]]),
        ("local", [[0, 1], [0]]),
        ("damage", [[0]]),
        ("entries", ["a"]),
        ("images", "4"),
        ("damage", 3),
    ],
)
def test_an_error_table_of_uneven_sizes_is_refused(tmp_path: Path, path: str, value: object):
    disk.write_json(tmp_path / "errors.json", TABLE)
    assert ErrorTable.load(tmp_path / "errors.json").shape == (2, 1)
    disk.write_json(tmp_path / "errors.json", TABLE | {path: value})
    with pytest.raises(RunError, match="delete it to measure again"):
        ErrorTable.load(tmp_path / "errors.json")


def test_pictures_are_read_whole_or_refused_in_one_line(tmp_path: Path):
    file = tmp_path / "pictures.npz"
    whole = {"reference": np.zeros((2, 1, 4, 4), np.uint8), "plan": np.ones((2, 1, 4, 4), np.uint8)}
    np.savez_compressed(file, **whole)
    assert {name: one.tolist() for name, one in _pictures(file, "run again").items()} == {
        n: o.tolist() for n, o in whole.items()
    }
    bad = {"objects": np.array([{}, []], dtype=object), "flat": np.zeros(4, np.uint8), "floats": whole["plan"] / 2}
    for one in bad.values():
        np.savez(file, **whole, more=one)
        refused(file)
    np.savez(file, plan=whole["plan"])
    refused(file)
    np.savez_compressed(file, **whole)
    content = file.read_bytes()
    for share in (0.0, 0.3, 0.9):
        file.write_bytes(content[: int(share * len(content))])
        refused(file)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("plan.npy", "w") as bomb:
        np.lib.format.write_array_header_1_0(bomb, {"descr": "|u1", "fortran_order": False, "shape": (1 << 34,)})
        for _ in range(MAX_PICTURES // (1 << 24) + 1):
            bomb.write(bytes(1 << 24))
    refused(file)
    file.unlink()
    refused(file)


def refused(file: Path) -> None:
    with pytest.raises(RunError) as caught:
        _pictures(file, "run again")
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
