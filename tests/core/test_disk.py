"""Files of a run folder against the file system itself: folder listings, the old bytes, and Linux's /dev/full."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.core import disk
from halfstep.core.errors import PlanError, RunError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
RECORDS = st.lists(st.dictionaries(st.text(max_size=4), JSON, max_size=3), max_size=6)
TREES = st.dictionaries(st.sampled_from(["a", "b", "in/c", "in/d"]), st.binary(max_size=20), max_size=4)


few = settings(max_examples=25, deadline=None)
"""For what flushes files: a disk may take ten milliseconds for each."""


class Interrupted(BaseException):
    """Stands for Ctrl-C: no subclass of Exception."""


def plant(root: Path, tree: dict[str, bytes]) -> Path:
    root.mkdir()
    for name, content in tree.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def refused(message: str, call, *args: object, where: Path) -> None:
    with pytest.raises(RunError, match=message) as caught:
        call(*args)
    assert str(where) in str(caught.value) and "\n" not in str(caught.value)


# ---- whole or absent -----------------------------------------------------------------------------------------------


@few
@given(
    old=st.none() | st.binary(max_size=50), new=st.binary(max_size=50), error=st.sampled_from([OSError, Interrupted])
)
def test_a_file_is_the_new_one_after_a_write_and_the_old_one_after_a_failed_write(old, new, error):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "deep" / "weights.bin"
        if old is not None:
            path.parent.mkdir()
            path.write_bytes(old)

        def fails(temporary: Path) -> None:
            assert temporary.parent == path.parent and temporary.name.startswith(".") and temporary != path
            temporary.write_bytes(new[: len(new) // 2])
            raise error

        with pytest.raises(error):
            disk.write_atomic(path, fails)
        assert contents(path.parent) == ({} if old is None else {"weights.bin": old})
        disk.write_atomic(path, lambda temporary: temporary.write_bytes(new))
        assert contents(path.parent) == {"weights.bin": new}


@few
@given(old=st.none() | TREES, new=TREES)
def test_a_folder_is_the_new_one_after_a_write_and_the_old_one_after_a_failed_write(old, new):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline"
        if old is not None:
            plant(path, old)
        before = contents(Path(folder))

        def fails(temporary: Path) -> None:
            plant(temporary, new)
            raise Interrupted

        with pytest.raises(Interrupted):
            disk.write_atomic(path, fails)
        assert contents(Path(folder)) == before and path.exists() == (old is not None)
        disk.write_atomic(path, lambda temporary: plant(temporary, new))
        assert contents(path) == new and [p.name for p in Path(folder).iterdir()] == ["pipeline"]


def test_a_writer_that_fails_before_it_wrote_leaves_nothing(tmp_path: Path):
    with pytest.raises(ZeroDivisionError):
        disk.write_atomic(tmp_path / "file", lambda temporary: 1 / 0)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_never_replaced_by_a_folder_nor_a_folder_by_a_file(tmp_path: Path):
    (tmp_path / "file").write_text("old")
    plant(tmp_path / "folder", {"a": b"old"})
    before = contents(tmp_path)
    write = disk.write_atomic
    refused("expected a folder that", write, tmp_path / "file", lambda t: plant(t, {"b": b""}), where=tmp_path / "file")
    refused("expected a folder that", disk.write_text, tmp_path / "folder", "new", where=tmp_path / "folder")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("delay", [0.0, 0.004, 0.017])
def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path, delay: float):
    file = tmp_path / "numbers.json"
    code = "import sys, pathlib; from halfstep.core import disk\nfor k in range(10**6):\n"
    code += "    disk.write_json(pathlib.Path(sys.argv[1]), {'numbers': [k] * 2000}); print(k, flush=True)"
    child = subprocess.Popen([sys.executable, "-c", code, file], stdout=subprocess.PIPE, text=True)
    try:
        child.stdout.readline()
        time.sleep(delay)
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    numbers = json.loads(file.read_text())["numbers"]
    assert len(numbers) == 2000 and len(set(numbers)) == 1


# ---- JSON ----------------------------------------------------------------------------------------------------------


@few
@given(st.dictionaries(st.text(max_size=4), JSON, max_size=4))
def test_json_comes_back_as_written(record):
    with tempfile.TemporaryDirectory() as folder:
        disk.write_json(Path(folder) / "a.json", record)
        assert disk.read_json(Path(folder) / "a.json", what="a record", do="nothing") == record


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "got no such file"),
        (b"", "unreadable file"),
        (b'{"steps": 4', "unreadable file"),
        (b'{"steps":\n 4,\n}', "unreadable file"),
        (b"\xff\xfe\x00", "unreadable file"),
        (b"[1, 2]", "got a JSON list"),
        (b"3", "got a JSON int"),
        (b"null", "got a JSON NoneType"),
        (b'{"a": NaN}', "NaN is no JSON"),
        (b'{"a": [-Infinity]}', "-Infinity is no JSON"),
        (b'{"a": 1e999}', "1e999 is too large a number"),
        (b'{"a": ' + b"1" * 5000 + b"}", "an integer of 5000 digits"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "unreadable file"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "nested more than 64 deep"),
    ],
)
def test_a_json_file_that_cannot_be_read_is_told_in_one_line(tmp_path: Path, content: bytes | None, message: str):
    file = tmp_path / "plan.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RunError, match=message) as caught:
        disk.read_json(file, what="a plan", do="search again")
    assert str(caught.value).startswith(f"{file}: ") and str(caught.value).endswith("expected a plan; search again")
    assert "\n" not in str(caught.value)


def _pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


@pytest.mark.parametrize(
    "made",
    [lambda p: p.parent, _pipe, lambda p: Path("/dev/zero"), lambda p: p / "a\0b"],
    ids=["folder", "pipe", "device", "nul"],
)
def test_what_is_no_file_is_told_too_and_never_hangs(tmp_path: Path, made):
    path = made(tmp_path / "plan.json")
    with pytest.raises(RunError, match=r"unreadable file|a name with NUL"):
        disk.read_json(path, what="a plan", do="search again")


def test_a_file_larger_than_any_record_is_not_read(tmp_path: Path):
    with (tmp_path / "plan.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(PlanError, match="more than 64 MiB"):
        disk.read_json(tmp_path / "plan.json", what="a plan", do="search again", error=PlanError)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1.0, float("-inf")]])
def test_no_number_that_is_not_finite_lands_on_disk(tmp_path: Path, value: object):
    file = tmp_path / "a.json"
    refused("expected finite numbers", disk.write_json, file, {"loss": value}, where=file)
    refused("expected finite numbers", disk.append_record, file, {"loss": value}, where=file)
    assert not file.exists()


@dataclass(frozen=True)
class Step:
    step: int
    loss: float = 0.0


def test_a_record_is_read_with_its_types(tmp_path: Path):
    disk.write_json(tmp_path / "a.json", {"step": 3, "loss": 1})
    assert disk.read_record(tmp_path / "a.json", Step, what="a step", do="go on") == Step(3, 1.0)
    disk.write_json(tmp_path / "b.json", {"step": "3"})
    refused("got '3', expected a whole number; go on", read_step, tmp_path / "b.json", where=tmp_path / "b.json")
    disk.write_text(tmp_path / "c.jsonl", '{"step": 1}\n{"step": 2, "loss": 0.5}\n')
    assert disk.read_records(tmp_path / "c.jsonl", Step) == [Step(1), Step(2, 0.5)]


def read_step(file: Path) -> Step:
    return disk.read_record(file, Step, what="a step", do="go on")


# ---- lines of records ----------------------------------------------------------------------------------------------


@few
@given(records=RECORDS, data=st.data())
def test_a_cut_line_costs_that_record_alone_also_when_the_run_goes_on(records, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in" / "log.jsonl"
        assert disk.read_records(path) == []
        for record in records:
            disk.append_record(path, record)
        assert disk.read_records(path) == records
        if records:
            whole = path.read_bytes()
            kept = len(whole.splitlines(keepends=True)[-1])
            cut = data.draw(st.integers(1, kept - 2), label="bytes left of the last line")
            path.write_bytes(whole[: len(whole) - kept + cut])
            assert disk.read_records(path) == records[:-1]
            disk.append_record(path, {"after": 1})
            disk.append_record(path, {"after": 2})
            assert disk.read_records(path) == [*records[:-1], {"after": 1}, {"after": 2}]


@few
@given(RECORDS)
def test_a_last_line_that_lost_only_its_end_of_line_is_kept(records):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.jsonl"
        for record in records:
            disk.append_record(path, record)
        if records:
            path.write_bytes(path.read_bytes()[:-1])
        disk.append_record(path, {"after": 1})
        assert disk.read_records(path) == [*records, {"after": 1}]


@few
@given(steps=st.lists(st.integers(0, 9), max_size=8), limit=st.integers(0, 9))
def test_kept_records_are_those_that_the_filter_accepts_in_order(steps, limit):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.jsonl"
        for step in steps:
            disk.append_record(path, {"step": step})
        disk.keep_records(path, lambda record: record.step <= limit, Step)
        assert [record["step"] for record in disk.read_records(path)] == [s for s in steps if s <= limit]
        assert os.listdir(folder) == (["log.jsonl"] if steps else [])


@pytest.mark.parametrize("line", [b"\xff\xfe", b"12", b"[1]", b'{"step": 1', b"", b'{"step": NaN}', b"\0\0"], ids=str)
def test_a_broken_line_before_the_last_is_told_by_its_number(tmp_path: Path, line: bytes):
    file = tmp_path / "search.jsonl"
    file.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    refused("line 2.*delete that line", disk.read_records, file, where=file)
    refused("line 2.*delete that line", disk.keep_records, file, lambda record: True, Step, where=file)


@pytest.mark.parametrize("line", [b"\xff\xfe", b'{"step": 1', b"", b"\0\0"], ids=str)
def test_a_cut_last_line_is_left_out_and_replaced(tmp_path: Path, line: bytes):
    file = tmp_path / "search.jsonl"
    file.write_bytes(b'{"step": 1}\n' + line)
    assert disk.read_records(file) == [{"step": 1}]
    disk.append_record(file, {"step": 2})
    assert file.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_pipe_in_place_of_records_is_told_and_never_hangs(tmp_path: Path):
    refused("not a regular one", disk.read_records, _pipe(tmp_path / "log.jsonl"), where=tmp_path)


# ---- refusals of the file system -----------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["run", "deep/run"])
def test_a_file_where_a_folder_should_be_is_refused_by_every_writer(tmp_path: Path, below: str):
    (tmp_path / "file").write_text("mine")
    path = tmp_path / "file" / below
    message = "expected a folder that can be written; choose another --out"
    refused(message, disk.write_text, path, "text", where=path)
    refused(message, disk.append_record, path, {}, where=path)
    refused(message, disk.require_writable, path, where=path)
    assert contents(tmp_path) == {"file": b"mine"}


def test_a_file_named_as_run_folder_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    refused("file exists", disk.require_writable, tmp_path / "file", where=tmp_path / "file")


def test_a_folder_without_permission_is_refused(tmp_path: Path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write anywhere")
    refused("permission denied", disk.require_writable, folder, where=folder)
    refused("permission denied", disk.write_text, folder / "a", "text", where=folder / "a")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_as_such():
    refused("a full disk", disk.append_record, Path("/dev/full"), {"step": 1}, where=Path("/dev/full"))


@pytest.fixture
def full(tmp_path: Path):
    """A folder with 8 KiB of room."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(folder)]
    if (
        sys.platform != "linux"
        or shutil.which("mount") is None
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("no right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_keeps_the_old_file_and_no_other(full: Path):
    disk.write_text(full / "a", "x" * 4096)
    refused("a full disk", disk.write_text, full / "a", "y" * 8192, where=full / "a")
    assert contents(full) == {"a": b"x" * 4096}
    disk.require_writable(full)
    (full / "b").write_text("x" * 4096)
    refused("a full disk", disk.require_writable, full, where=full)
    assert sorted(contents(full)) == ["a", "b"]


def test_a_writable_folder_is_made_and_left_empty(tmp_path: Path):
    assert disk.require_writable(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_recover_clears_what_killed_processes_left_and_brings_back_what_was_set_aside(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    inner = tmp_path / "state"
    inner.mkdir()
    half, folder = (
        inner / f".train.safetensors.{dead.pid}.halfstep-tmp",
        tmp_path / f".pipeline.{dead.pid}.halfstep-tmp",
    )
    half.write_bytes(b"half")
    folder.mkdir()
    aside = tmp_path / f".pipeline.{dead.pid}.halfstep-old"
    aside.mkdir()
    (aside / "model").write_text("whole")
    replaced = tmp_path / f".log.jsonl.{dead.pid}.halfstep-old"
    replaced.write_text("older")
    (tmp_path / f".probe.{dead.pid}.halfstep-tmp").write_bytes(b"0")
    foreign = [tmp_path / f".notes.{dead.pid}.tmp", tmp_path / f".notes.{dead.pid}.old", tmp_path / ".hidden"]
    others = [tmp_path / "log.jsonl", tmp_path / f".live.{os.getpid()}.halfstep-tmp", *foreign]
    for path in others:
        path.write_text("kept")
    disk.recover(tmp_path)
    assert {p.name for p in tmp_path.rglob("*")} == {"state", "pipeline", "model"} | {p.name for p in others}
    assert (tmp_path / "pipeline" / "model").read_text() == "whole"
    assert others[0].read_text() == "kept"


def test_a_name_that_is_no_utf8_is_written_escaped(tmp_path):
    disk.write_text(tmp_path / "page.html", os.fsdecode(b"caf\xe9, caf\xc3\xa9"))
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == "caf\\udce9, café"
