"""Run folders against the file system: whose a folder is, who works in it, and what its model and data were."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from folders import home_in, listing, tiny
from halfstep.core import lock
from halfstep.core.errors import HalfstepError, RunError
from halfstep.core.folder import IGNORED, MEASURED, open_run
from halfstep.core.recipe import RunRecord, field_names

INPUTS = {"verb": "train", "model": "m", "data": "d"}


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    return home_in(tmp_path)


def test_every_name_that_may_change_between_two_calls_is_a_field():
    assert set(MEASURED) <= set(field_names())
    for prefix in {prefix for prefixes in IGNORED.values() for prefix in prefixes}:
        assert any(name == prefix or (prefix.endswith(".") and name.startswith(prefix)) for name in field_names())


AS_RANK = """
import sys, time
from pathlib import Path
from halfstep.core.folder import open_run
from halfstep.core.recipe import Recipe

class Slow:
    def say(self, line):
        print("said", line, end=" ")
        time.sleep(1.5)

inputs = {"verb": "train", "model": "m", "data": "d"}
out = open_run(Path(sys.argv[1]), Recipe(), inputs, {}, Slow(), ["pictures"])
print("opened" if (out / "recipe.json").is_file() else "not there yet")
"""


@pytest.mark.slow
def test_the_second_of_two_processes_waits_until_the_first_has_opened_the_folder(tmp_path: Path):
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", AS_RANK, tmp_path / "run"],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [rank.communicate(timeout=60)[0].strip() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert told == ["said pictures opened", "opened"]


# ---- whose folder it is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"inputs": 3}', '{"format": 1, "recipe": {}, "inputs": {}, "oven": "200 degrees"}']
)
def test_a_recipe_json_of_somebody_else_opens_no_folder(mine: Path, text: str):
    (mine / "recipe.json").write_text(text)
    before = listing(mine)
    with pytest.raises(HalfstepError):
        open_run(mine, tiny(), INPUTS, {})
    assert listing(mine) == before


def test_only_our_own_left_overs_are_cleared_and_only_in_our_own_run(mine: Path, tmp_path: Path):
    out = open_run(tmp_path / "run", tiny(), INPUTS, {})
    shutil.copytree(mine, out, dirs_exist_ok=True)
    with pytest.raises(RunError, match="differ"):
        open_run(out, tiny(), INPUTS | {"data": "e"}, {})
    assert set(listing(mine)) <= set(listing(out))
    open_run(out, tiny(), INPUTS, {})
    gone = set(listing(mine)) - set(listing(out))
    assert len(gone) == 1 and gone.pop().endswith(".halfstep-tmp")


# ---- what lay behind the names -------------------------------------------------------------------------------------


def test_a_run_is_resumed_with_the_same_content_alone(tmp_path: Path):
    out, contents = tmp_path / "run", {"model_content": "a", "data_content": "b"}
    open_run(out, tiny(), INPUTS, contents)
    (out / "log.jsonl").touch()
    assert RunRecord.load(out).inputs == INPUTS | contents
    open_run(out, tiny(), INPUTS, contents)
    for name, what in (("model_content", "another model behind 'm'"), ("data_content", "another data behind 'd'")):
        with pytest.raises(RunError, match=what):
            open_run(out, tiny(), INPUTS, contents | {name: "c"})


def test_a_run_of_before_is_believed_with_a_word_and_knows_its_content_from_then_on(tmp_path: Path):
    said: list[str] = []
    out = open_run(tmp_path / "run", tiny(), INPUTS, {})
    (out / "log.jsonl").touch()
    open_run(out, tiny(), INPUTS, {"model_content": "a"}, SimpleNamespace(say=said.append))  # type: ignore[arg-type]
    assert len(said) == 1 and "what lies there now is believed" in said[0]
    assert RunRecord.load(out).inputs["model_content"] == "a"
    with pytest.raises(RunError, match="another model"):
        open_run(out, tiny(), INPUTS, {"model_content": "b"})


# ---- what was asked for --------------------------------------------------------------------------------------------


def test_a_run_that_has_only_its_record_is_begun_anew_and_one_that_has_more_is_not(tmp_path: Path):
    out = open_run(tmp_path / "run", tiny(), INPUTS, {})
    (out / "supernet").mkdir()
    (out / "supernet" / "recipe.json").write_text((out / "recipe.json").read_text())
    open_run(out, tiny().edit(["seed=3"]), INPUTS | {"data": "e"}, {})
    assert RunRecord.load(out).recipe.seed == 3 and RunRecord.load(out).inputs["data"] == "e"
    (out / "supernet" / "log.jsonl").touch()
    with pytest.raises(RunError, match="seed, data differ"):
        open_run(out, tiny(), INPUTS, {})


@pytest.mark.parametrize(
    ("edit", "moved"),
    [
        ("eval.tolerance=0.2", ["quality.json", "report.html"]),
        (
            "eval.features=digits",
            ["features", "finals.json", "quality.json", "report.html", "scores.jsonl", "search.jsonl"],
        ),
    ],
)
def test_another_measurement_sets_aside_what_hangs_on_it_and_nothing_that_was_trained(tmp_path, edit, moved):
    out, inputs = tmp_path / "run", INPUTS | {"verb": "optimize"}
    open_run(out, tiny(), inputs, {})
    measured = ("quality.json", "report.html", "scores.jsonl", "search.jsonl", "finals.json", "features/x")
    for name in (*measured, "supernet/x", "plan.json"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(name)
    before = listing(out)
    said: list[str] = []
    other = tiny().edit([edit])
    for _ in range(2):  # the second time it is this run's own recipe
        open_run(out, other, inputs, {}, SimpleNamespace(say=said.append))  # type: ignore[arg-type]
    assert sorted(p.name for p in (out / "earlier-1").iterdir()) == moved and len(said) == 1
    after = listing(out)
    for name, content in before.items():
        if content is not None and name != "recipe.json":
            assert content in (after.get(name), after.get(f"earlier-1/{name}"))
    assert RunRecord.load(out).recipe == other
    with pytest.raises(RunError, match=r"train\.lr differ"):
        open_run(out, other.edit(["train.lr=1"]), inputs, {})
    open_run(out, tiny(), inputs, {})
    assert not (out / "earlier-2").exists()  # nothing was measured in between


def test_what_was_read_is_said_once_by_a_run_and_the_runs_inside_of_it(tmp_path: Path):
    said: list[str] = []
    watch = SimpleNamespace(say=said.append)

    @lock.releasing
    def verb() -> None:
        out = open_run(tmp_path / "run", tiny(), INPUTS, {}, watch, ["pictures", "model"])  # type: ignore[arg-type]
        open_run(out / "supernet", tiny(), INPUTS, {}, watch, ["pictures", "model"])  # type: ignore[arg-type]

    verb()
    assert said == ["pictures", "model"]
    assert RunRecord.load(tmp_path / "run" / "supernet").read == ("pictures", "model")


# ---- who works in it -----------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from halfstep.core import lock
lock.hold(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_process_is_told_who_works_in_a_run_folder_and_goes_on_after_it(tmp_path: Path):
    out = tmp_path / "run"

    @lock.releasing
    def stopped() -> None:
        open_run(out, tiny(), INPUTS, {})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    other = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout and other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=rf"process {other.pid} on .* since .*one process at a time"):
            open_run(out, tiny(), INPUTS, {})
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    open_run(out, tiny(), INPUTS, {})
    assert json.loads((out / ".holder.json").read_text())["pid"] == os.getpid()


def test_locks_nest_and_are_given_back_in_their_order(tmp_path: Path):
    for name in ("a", "a/b"):
        (tmp_path / name).mkdir()

    @lock.releasing
    def inner() -> None:
        lock.hold(tmp_path / "a" / "b")
        lock.hold(tmp_path / "a")
        assert (tmp_path / "a" / "b" / ".holder.json").exists()

    @lock.releasing
    def outer() -> None:
        lock.hold(tmp_path / "a")
        inner()
        assert (tmp_path / "a" / ".holder.json").exists() and not (tmp_path / "a" / "b" / ".holder.json").exists()

    outer()
    assert not list(tmp_path.rglob(".holder.json"))


def test_what_a_kill_in_the_first_write_of_all_left_is_gone_after_the_next_call(tmp_path: Path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = tmp_path / f".recipe.json.{dead.pid}.halfstep-tmp"
    left.write_text("{")
    open_run(tmp_path, tiny(), INPUTS, {})
    assert not left.exists()


def test_a_home_of_hidden_files_is_no_empty_folder_and_what_systems_leave_is(tmp_path: Path):
    home, empty = tmp_path / "home", tmp_path / "empty"
    for folder, names in ((home, (".bashrc", ".ssh")), (empty, (".DS_Store", ".lock", ".log.jsonl.1.halfstep-tmp"))):
        folder.mkdir()
        for name in names:
            (folder / name).write_text("x")
    with pytest.raises(RunError, match=r"other files \(.bashrc, .ssh\)"):
        open_run(home, None, {"verb": "sample"}, {})
    assert sorted(p.name for p in home.iterdir()) == [".bashrc", ".ssh"]
    assert open_run(empty, None, {"verb": "sample"}, {}) == empty


def test_a_run_that_knew_its_model_otherwise_is_told_as_one_that_may_be_of_before(tmp_path: Path):
    for verb, told in (("shrink", True), ("search", False)):
        out, inputs = tmp_path / verb, INPUTS | {"verb": verb}
        open_run(out, tiny(), inputs, {"model_content": "a"})
        (out / "scores.jsonl").touch()
        with pytest.raises(RunError, match="another model behind 'm'") as refused:
            open_run(out, tiny(), inputs, {"model_content": "b"})
        assert ("a run of before 2026-11-27" in str(refused.value)) is told
        with pytest.raises(RunError, match=f"got a run of {verb}, expected an empty folder, or a run of sample"):
            open_run(out, tiny(), INPUTS | {"verb": "sample"}, {"model_content": "a"})


@pytest.mark.parametrize("verb", ["search", "evaluate", "shrink"])
def test_the_process_that_a_record_names_beside_its_models_content_makes_no_other_run(verb: str, tmp_path: Path):
    inputs, contents = INPUTS | {"verb": verb}, {"model_content": "a"}
    open_run(tmp_path / "o", tiny(), inputs, contents)
    (tmp_path / "o" / "scores.jsonl").touch()
    open_run(tmp_path / "o", tiny().edit(["noise.set_alpha_to_one=false"]), inputs, contents)
