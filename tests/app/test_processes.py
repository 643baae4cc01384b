"""Several processes that draw one run: their files against those of one process, killed ones, and who is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from folders import listing
from halfstep.app import verbs, workers
from halfstep.app.workers import SIGN, Worker, by_itself, use_processes
from halfstep.core.errors import RunError
from halfstep.core.machine import alone, apart, launched
from halfstep.core.recipe import Recipe
from halfstep.core.watch import Watch
from tiny import recipes, unet

tiny = recipes("""
sample.steps=3 sample.batch=8 sample.layout=contiguous eval.images=40 eval.bootstrap=20 eval.repeats=1
eval.features=pixels
""")


class Ear(Watch):
    """Remembers what it is told."""

    def __init__(self):
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def several():
    """`use_processes`, which holds for the process that calls it."""
    threads = torch.get_num_threads()
    yield use_processes
    workers._PROCESSES.clear()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    unet(3).save_pretrained(folder)
    return folder


def command(*words: object, **env: str) -> subprocess.Popen:
    line = [sys.executable, "-m", "halfstep", *map(str, words)]
    return subprocess.Popen(line, env=os.environ | env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


# ---- drawing -------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_keeps_its_pictures_and_draws_only_the_batches_that_are_not_whole(model, tmp_path):
    out, recipe = tmp_path / "o", tiny()
    verbs.sample(str(model), out, recipe, count=20)
    whole = {name: one for name, one in listing(out).items() if name.endswith(".png")}
    (out / "000009.png").unlink()
    (out / "grid.png").unlink()
    marked = [out / f"{k:06d}.png" for k in (0, 16)]  # of batches that are whole
    for file in marked:
        os.utime(file, (1, 1))
    verbs.sample(str(model), out, recipe, count=20)
    assert {name: one for name, one in listing(out).items() if name.endswith(".png")} == whole
    assert all(file.stat().st_mtime == 1 for file in marked) and (out / "000008.png").stat().st_mtime > 1


def test_an_interrupted_evaluation_draws_the_rest_and_says_the_same(model, tmp_path, monkeypatch):
    def measured(out: Path) -> dict:
        record = verbs.evaluate(str(model), "digits", out, tiny()).to_json()
        return {name: row["quality"] for name, row in record["plans"].items()}

    wanted, drawn = measured(tmp_path / "a"), []
    original = verbs.measure_plans
    monkeypatch.setattr(verbs, "measure_plans", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measured(tmp_path / "b")
    kept = sorted((tmp_path / "b" / "state" / "drawn").glob("*.npz"))
    assert len(kept) == 5
    kept[2].unlink()
    for file in kept[:2]:
        os.utime(file, (1, 1))

    def measure(judge, *args, **kwargs):
        drawn.extend(file.stat().st_mtime for file in kept)
        return original(judge, *args, **kwargs)

    monkeypatch.setattr(verbs, "measure_plans", measure)
    assert measured(tmp_path / "b") == wanted
    assert drawn[:2] == [1, 1] and drawn[2] > 1
    assert not kept[0].parent.exists()


@pytest.mark.slow
def test_files_are_the_same_bit_for_bit_whether_one_process_draws_them_or_two(model, tmp_path, several):
    found = []
    for count in (1, 2):
        several(count)
        out = tmp_path / str(count)
        verbs.sample(str(model), out, tiny(), count=60)
        found.append({name: one for name, one in listing(out).items() if name.endswith(".png")})
    assert len(found[0]) == 61 and found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("who", ["first", "helper"])
def test_what_a_killed_process_did_not_draw_another_draws(model, tmp_path, who):
    """Two commands for one folder, as two machines give them; one of them is killed in the middle."""
    alone, out = tmp_path / "alone", tmp_path / "o"
    words = ["--model", model, "--count", 240, "--steps", 100, "--batch", 8, "--set", "sample.layout=contiguous"]
    command("sample", "--out", alone, *words, OMP_NUM_THREADS="1").communicate(timeout=200)
    first = command("sample", "--out", out, *words, OMP_NUM_THREADS="1")
    while not (out / SIGN).is_file():
        assert first.poll() is None
        time.sleep(0.02)
    helper = command("sample", "--out", out, *words, OMP_NUM_THREADS="1")
    doomed, other = (first, helper) if who == "first" else (helper, first)
    while who == "helper" and len(list((out / "state" / "drawing").glob("*.lock"))) < 2:  # until both are at work
        time.sleep(0.005)
    if who == "first":
        while not list(out.glob("000*.png")):
            time.sleep(0.005)
    doomed.send_signal(signal.SIGKILL)
    doomed.communicate()
    told = other.communicate(timeout=200)
    assert other.returncode == 0, told
    pictures = [{n: b for n, b in listing(one).items() if n.endswith(".png")} for one in (alone, out)]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 241


# ---- who may help --------------------------------------------------------------------------------------------------


def as_first(out: Path, **changes: str) -> None:
    """Let a run look like one that another process holds and draws in, with other facts than here."""
    sign = replace(Worker.here("float32"), **changes)
    (out / "state").mkdir(parents=True, exist_ok=True)
    (out / SIGN).write_text(json.dumps(asdict(sign)))


@pytest.mark.parametrize(
    "changes", [{"torch": "1.0"}, {"halfstep": "9"}, {"diffusers": "0"}, {"device": "tpu"}, {"dtype": "float16"}]
)
def test_a_worker_that_draws_otherwise_is_refused_with_what_differs(tmp_path, changes):
    as_first(tmp_path, **changes)
    [(name, other)] = changes.items()
    with pytest.raises(RunError, match=rf"a worker with {name} .*, not {other}.*choose another --out"):
        workers.wait_until_ready(tmp_path, "float32", Ear())


def test_another_processor_is_said_and_may_help(tmp_path):
    ear = Ear()
    as_first(tmp_path, cpu="another")
    assert workers.wait_until_ready(tmp_path, "float32", ear)
    assert len(ear.lines) == 1 and "not another: the last digits" in ear.lines[0]
    as_first(tmp_path, torch="1.0")
    workers.ready(tmp_path, "float32", ear)
    assert "goes on with torch" in ear.lines[1] and Worker.first(tmp_path) == Worker.here("float32")


def test_a_run_whose_first_process_ended_is_not_waited_for(tmp_path):
    assert not workers.wait_until_ready(tmp_path, "float32", Ear())
    assert not workers.finished_by_first(tmp_path, tmp_path / "grid.png")
    (tmp_path / "grid.png").touch()
    assert workers.finished_by_first(tmp_path, tmp_path / "grid.png")


HOLD = """
import sys
from pathlib import Path
from halfstep.core.folder import open_run
from halfstep.core.recipe import Recipe
open_run(Path(sys.argv[1]), Recipe(), {"verb": "evaluate", "model": "m", "data": "d"}, {})
print("held", flush=True)
sys.stdin.read()
"""


def test_a_run_that_another_process_holds_is_joined_if_it_is_the_same_and_else_refused(tmp_path):
    from halfstep.core.folder import open_or_join

    out = tmp_path / "o"
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline().strip() == "held"
        inputs = {"verb": "evaluate", "model": "m", "data": "d"}
        assert open_or_join(out, Recipe(), inputs, {}) is False
        for other, match in (
            ({**inputs, "model": "n"}, "another recipe .model differs"),
            ({**inputs, "verb": "sample"}, "a run of evaluate"),
        ):
            with pytest.raises(RunError, match=match):
                open_or_join(out, Recipe(), other, {})
        with pytest.raises(RunError, match=r"eval.images., which another process works at"):
            open_or_join(out, Recipe().edit(["eval.images=77"]), inputs, {})
        assert not workers.is_free(out)
    finally:
        child.communicate("")
    assert workers.is_free(out) and open_or_join(out, Recipe(), inputs, {})


def test_more_processes_than_images_are_refused_and_than_batches_are_said(several, model, tmp_path):
    several(5)
    with pytest.raises(RunError, match=r"5 processes for 4 images.*ask for at most 4"):
        verbs.sample(str(model), tmp_path / "o", tiny(), count=4)
    assert not (tmp_path / "o").exists()
    by_itself(5)
    ear = Ear()
    several(3)
    verbs.sample(str(model), tmp_path / "o", tiny(), count=7, watch=ear)
    assert any("1 batches for 3 processes" in line for line in ear.lines)


@pytest.mark.slow
def test_a_worker_that_fails_is_told_and_the_others_do_its_work(model, tmp_path, several, capfd):
    several(2)
    ear, moved = Ear(), tmp_path / "moved"
    (tmp_path / "m").mkdir()
    for file in model.iterdir():
        (tmp_path / "m" / file.name).write_bytes(file.read_bytes())

    class Thief(Ear):
        def stage(self, name: str, total: int):
            if name == "sample":  # the helper has not read it yet
                (tmp_path / "m").rename(moved)
            return super().stage(name, total)

    ear = Thief()
    verbs.sample(str(tmp_path / "m"), tmp_path / "o", tiny("sample.steps=50"), count=160, watch=ear)
    assert len(list((tmp_path / "o").glob("0*.png"))) == 160
    assert any("worker 1 ended with 2" in line for line in ear.lines)
    assert "error: worker: " in capfd.readouterr().err


# ---- launchers -----------------------------------------------------------------------------------------------------


def test_under_a_launcher_of_several_what_one_does_is_refused_and_what_each_does_goes_on(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    assert launched() == 3
    with pytest.raises(RunError, match="tune: got a launch of 3 processes"):
        verbs.tune("m", None, Path("o"), Recipe())
    with pytest.raises(RunError, match="got a launch of 3"):
        alone(np.zeros)()
    apart()
    assert launched() == 1 and "RANK" not in os.environ


@pytest.mark.slow
def test_a_training_in_two_processes_ends_in_one_pipeline_and_one_log_and_goes_on_in_one(tmp_path):
    words = (
        "model.channels=4,4 model.groups=2 model.head_dim=2 data.size=8 train.batch=8 train.warmup=0 train.log_every=2"
    )
    words += " train.sample_every=0 train.save_every=2 train.precision=no train.steps=8"
    edits = [word for one in words.split() for word in ("--set", one)]

    def train(out: str, *more: object) -> str:
        child = command("train", "--data", "digits", "--out", tmp_path / out, *edits, *more, OMP_NUM_THREADS="1")
        told = child.communicate(timeout=200)[1]
        assert child.returncode == 0, told
        return told

    def losses(out: str) -> list[float]:
        return [json.loads(line)["loss"] for line in (tmp_path / out / "log.jsonl").read_text().splitlines()]

    train("one")
    told = train("two", "--processes", 2)
    assert told.count("a fresh UNet2DModel") == 1
    assert losses("two") == pytest.approx(losses("one"), rel=1e-5) and len(losses("two")) == 4
    for name in ("pipeline", "samples.png"):
        (tmp_path / "two" / name).rename(tmp_path / name)
    told = train("two", "--set", "train.batch=6", "--set", "train.accumulate=3")
    assert (
        "a step has 6 images now and had 8" in told
        and "steps had 8 images" in (tmp_path / "two" / "recipe.json").read_text()
    )
    refused = command("train", "--data", "digits", "--out", tmp_path / "no", *edits, "--processes", 3)
    told = refused.communicate(timeout=200)[1]
    assert refused.returncode == 2 and told.strip().splitlines() == [told.strip()] and "train.batch=6" in told
    assert not (tmp_path / "no").exists()
