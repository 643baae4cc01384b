"""What the terminal shows; oracles: a clock that is moved by hand, the text that was given, the outputs' own bytes."""

from __future__ import annotations

import _thread
import io
import json
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from halfstep.app import terminal
from halfstep.app.cli import main
from halfstep.app.terminal import Pace, RichWatch, duration, line

HOSTILE = ["run[v2]", "a [/b]", "[red]x[/red]", ":smile:", "x" * 300, "caf\udce9.png"]
TINY = [
    *("model.channels=8,8", "model.groups=4", "model.head_dim=4", "train.batch=4", "train.warmup=0"),
    *("train.sample_every=0", "train.save_every=5", "train.log_every=5"),
]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rate_and_remaining_time_by_hand():
    clock = Clock()
    pace = Pace(100, clock)
    clock.now += 10
    assert str(pace) == ""  # nothing was done yet, so there is nothing to tell from
    pace.tell(20)
    assert str(pace) == "2.0/s, 40 s left"
    clock.now += 15
    assert str(pace) == "2.0/s, 25 s left"  # between two tellings the time still goes on
    clock.now += 65
    pace.tell(30)
    assert str(pace) == "3.0 s each, 3:30 min left"
    clock.now += 300
    assert str(pace) == "3.0 s each"  # longer than was thought: no "0 s left" for as long as it takes
    pace.tell(100)
    assert "left" not in str(pace)


def test_what_a_resumed_stage_found_done_is_no_work_of_now():
    clock = Clock()
    pace = Pace(1000, clock)
    for done in (1, 2, 900):  # read back from files in a moment
        clock.now += 0.01
        pace.tell(done)
    clock.now += 10
    pace.tell(910)
    assert str(pace) == "1.0 s each, 1:30 min left"


def test_a_stage_that_is_a_whole_tells_shares():
    clock = Clock()
    pace = Pace(1, clock)
    clock.now += 30
    pace.tell(0.25)
    assert (pace.progress(), str(pace)) == ("25%", "1:30 min left")


def test_durations_read_as_clocks_do():
    assert [duration(s) for s in (0.4, 59, 60, 200, 3600, 3725)] == [
        "0 s",
        "59 s",
        "1:00 min",
        "3:20 min",
        "1:00:00 h",
        "1:02:05 h",
    ]


def test_without_a_terminal_a_stage_speaks_of_its_own_accord_in_whole_lines(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "EVERY", 0.05)
    watch = RichWatch()
    with watch.stage("search [fit]", 4) as told:
        told(2, "score 1.5 [x]")
        time.sleep(0.3)  # one unit that takes long
    with watch.stage("short", 2) as told:
        told(2)
    text = capsys.readouterr().err
    *often, last, short = text.splitlines()
    assert len(often) >= 2 and "\r" not in text and "\x1b" not in text
    assert all(one.startswith("search [fit]: 2 of 4, 0 s so far") and one.endswith("score 1.5 [x]") for one in often)
    assert last.startswith("search [fit]: 2 of 4 in ") and short.startswith("short: 2 of 2 in ")


def test_a_stage_that_fails_stops_speaking(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "EVERY", 0.02)
    with pytest.raises(ZeroDivisionError), RichWatch().stage("broken", 3):
        _ = 1 / 0
    before = threading.active_count()
    time.sleep(0.1)
    assert capsys.readouterr().err == "" and threading.active_count() == before


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_printed_as_they_are(name, monkeypatch):
    for encoding in ("utf-8", "ascii"):
        told = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", told)
        terminal.accept_any_text()
        line(f"pipeline: {name} ±1")
        told.flush()
        expected = f"pipeline: {name} ±1\n".encode(encoding, "backslashreplace")
        assert told.buffer.getvalue() == expected


@pytest.mark.parametrize("name", HOSTILE)
def test_a_stage_takes_any_name_on_a_terminal_too(name, monkeypatch):
    told = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(told, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", told)
    monkeypatch.setenv("TERM", "xterm")
    terminal.accept_any_text()
    with RichWatch().stage(name, 2) as tell:
        tell(1, name)
        RichWatch().say(name)
    told.flush()
    assert told.buffer.getvalue().count(name[:4].encode("ascii", "backslashreplace")) >= 2


def test_a_table_reaches_a_terminal_that_is_no_utf8(monkeypatch):
    told = io.TextIOWrapper(io.BytesIO(), encoding="ascii")  # as PYTHONIOENCODING=ascii makes it
    monkeypatch.setattr(sys, "stdout", told)
    monkeypatch.setattr(sys, "argv", ["halfstep", "profile", "--model", "digits", "--repeats", "1"])
    with pytest.raises(SystemExit) as stop:
        main()
    told.flush()
    assert not stop.value.code and b"full" in told.buffer.getvalue()


def stopped(monkeypatch, capsys, sign: Path, *words: object) -> tuple[int, str]:
    """Ctrl-C as soon as the file `sign` is there; the exit code, and what standard error told last."""
    monkeypatch.setattr(sys, "argv", ["halfstep", *map(str, words)])

    def press() -> None:
        for _ in range(6000):
            if sign.exists():
                return _thread.interrupt_main()
            time.sleep(0.01)
        return None

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
    finger = threading.Thread(target=press, daemon=True)
    finger.start()
    try:
        with pytest.raises(SystemExit) as stop:
            main()
    finally:
        finger.join()
        signal.signal(signal.SIGINT, before)
    return int(stop.value.code or 0), capsys.readouterr().err.splitlines()[-1]


def test_ctrl_c_says_how_to_go_on_and_the_repeated_command_does(tmp_path, monkeypatch, capsys):
    out = tmp_path / "o"
    edits = [word for edit in (*TINY, "train.steps=30") for word in ("--set", edit)]
    words = ("train", "--data", "digits", "--out", out, *edits)
    code, told = stopped(monkeypatch, capsys, out / "state" / "train.safetensors", *words)
    assert code == 130 and told == "stopped; repeat the command to go on from there"
    assert not (out / "pipeline").exists()
    monkeypatch.setattr(sys, "argv", ["halfstep", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code and "resuming dense at step" in capsys.readouterr().err
    steps = [json.loads(record)["step"] for record in (out / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(5, 31, 5))


def test_ctrl_c_in_a_verb_that_begins_anew_promises_nothing(tmp_path, monkeypatch, capsys):
    edits = ("--set", "eval.feature_steps=100000")
    words = ("features", "--data", "digits", "--out", tmp_path / "o", *edits)
    assert stopped(monkeypatch, capsys, tmp_path / "o", *words) == (130, "stopped")
