"""Pipelines side by side. Oracles: a pipeline beside itself, `sample`, plans' own MACs, data made of the pictures."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from filelock import FileLock

from folders import home_in, listing
from halfstep.app import verbs
from halfstep.app.comparison import compare
from halfstep.core.errors import HalfstepError, ModelError, PlanError, RunError
from halfstep.core.lock import HeldError
from halfstep.core.recipe import Recipe, SampleSpec
from halfstep.core.results import read_compared
from halfstep.core.seeds import Stage, stage_seed
from halfstep.data.arrays import read_arrays
from halfstep.data.pictures import read_picture, to_uint8
from halfstep.engine.bank import Bank
from halfstep.engine.profiling import count_macs, count_params
from halfstep.engine.sampling import reference_plan, sample_images
from halfstep.engine.stepaware import StepAwarePipeline
from tiny import recipes, unet

SCHEDULER = DDPMScheduler(num_train_timesteps=20)
tiny = recipes("""
eval.features=pixels eval.images=256 eval.bootstrap=20 eval.repeats=1 sample.timed=2 sample.steps=4 sample.batch=64
sample.layout=contiguous
""")
WIDE, NARROW = unet(0, (16, 16)), unet(1, (8, 8))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A stock pipeline, a step-aware one of the same net and a narrower one, and data: the stock one's own pictures."""
    home = tmp_path_factory.mktemp("home")
    DDPMPipeline(WIDE, SCHEDULER).save_pretrained(home / "dense")
    DDPMPipeline(NARROW, SCHEDULER).save_pretrained(home / "other")
    bank = Bank({"full": WIDE, "w0.50": NARROW}, "full", "epsilon")
    spec = SampleSpec(scheduler="ddim", steps=5)
    plan = reference_plan(bank, SCHEDULER.config, spec)
    StepAwarePipeline(bank, plan.uniform("w0.50")).save_pretrained(home / "ours" / "pipeline")
    drawn = np.concatenate([to_uint8(x) for x in sample_images(bank, plan, 300, seed=stage_seed(0, Stage.REPORT))])
    np.savez(home / "drawn.npz", images=drawn[:, 0])
    return home


def asked(home: Path) -> list[str]:
    dense = f"{home / 'dense'}@ddim:5"
    return [dense, f"again={dense}", str(home / "ours" / "pipeline"), f"other={home / 'other'}@unipc:3"]


@pytest.fixture(scope="module")
def out(home, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "side"
    compare(asked(home), f"npz:{home / 'drawn.npz'}", out, tiny())
    return out


def test_a_pipeline_beside_itself_has_no_change_and_is_held(out):
    found = read_compared(out / "compare.json")
    assert list(found.pipelines) == ["dense@ddim:5", "again", "ours", "other"]
    again = found.comparison.plans["again"]
    assert (again.difference.value, again.difference.low, again.difference.high) == (0, 0, 0)
    assert again.verdict == "held" and found.comparison.plans["other"].verdict == "not held"
    first, its = found.pipelines["dense@ddim:5"], found.pipelines["again"]
    assert first.fidelity == its.fidelity and first.near == its.near and first.params == its.params


def test_what_it_draws_is_what_sample_draws_under_the_same_sampler_and_seed(home, out, tmp_path):
    recipe = Recipe().edit(["sample.scheduler=ddim", "sample.steps=5", f"seed={stage_seed(0, Stage.REPORT)}"])
    verbs.sample(str(home / "dense"), tmp_path / "drawn", recipe, count=16)
    pictures = read_arrays(out / "pictures.npz", 1 << 24, what="pictures", do="")["pictures-0"]
    for k, picture in enumerate(pictures):
        assert np.array_equal(picture, read_picture(tmp_path / "drawn" / f"{k:06d}.png"))


def test_costs_are_those_of_the_nets_that_the_plan_calls(out):
    found = read_compared(out / "compare.json")
    wide, narrow = 5 * count_macs(WIDE), 5 * count_macs(NARROW)
    assert [row.macs for row in found.comparison.plans.values()] == [wide, wide, narrow, 3 * narrow // 5]
    assert [one.params for one in found.pipelines.values()] == [
        count_params(net) for net in (WIDE, WIDE, NARROW, NARROW)
    ]
    for one in found.pipelines.values():
        assert one.held_mib == pytest.approx(4 * one.params / 2**20) and one.memory_mib > one.held_mib


def test_fidelity_says_what_it_is_taken_beside(out):
    found = read_compared(out / "compare.json").pipelines
    assert found["ours"].target == "the converged pictures of dense@ddim:5"  # of the same dense net
    assert found["other"].target == "dense@ddim:5's own pictures"
    assert found["ours"].fidelity.mse.value > found["dense@ddim:5"].fidelity.mse.value > 0
    pictures = read_arrays(out / "pictures.npz", 1 << 24, what="pictures", do="")
    twins = (pictures[f"pictures-{k}"].astype(float) / 127.5 - 1 for k in (3, 0))
    assert found["other"].fidelity.mse.value == pytest.approx(np.square(np.subtract(*twins)).mean(), rel=0.3)  # of 16


def test_pictures_that_are_images_of_the_data_are_marked(out):
    found = read_compared(out / "compare.json")
    first, other = found.pipelines["dense@ddim:5"], found.pipelines["other"]
    assert first.near == pytest.approx([0] * 16, abs=1e-6) and first.near_to == tuple(range(16))
    assert first.copies == tuple(range(16)) and found.held_out.least > 0
    assert min(other.near) > 0.1  # of another net
    assert "each without itself" in found.held_out.what
    page = (out / "report.html").read_text()
    assert page.count("<td class=marked>") == sum(len(one.copies) for one in found.pipelines.values())
    assert page.count("0, nearer than any held out") >= 32  # again's too


def test_the_lines_of_csv_are_the_numbers_of_json(out):
    found = read_compared(out / "compare.json")
    lines = {one["name"]: one for one in csv.DictReader((out / "compare.csv").open())}
    assert list(lines) == list(found.pipelines)
    for name, row in found.comparison.plans.items():
        line = lines[name]
        assert float(line["fd"]) == row.quality["fd"].value and float(line["ms_batch_2"]) == row.wall_ms
        assert float(line["ms_batch_1"]) == row.alone_ms and int(line["macs_per_image"]) == row.macs
        assert float(line["fidelity_mse_high"]) == found.pipelines[name].fidelity.mse.high


def test_a_repeated_call_measures_nothing_and_a_report_is_told_from_the_files(home, out):
    before = listing(out)
    again = compare(asked(home), f"npz:{home / 'drawn.npz'}", out, tiny())
    assert again == read_compared(out / "compare.json") and listing(out).keys() == before.keys()
    (out / "report.html").unlink()
    verbs.report(out)
    after = listing(out)
    assert {name for name in before if after[name] != before[name]} <= {"recipe.json"}


def test_what_was_drawn_before_a_kill_is_not_drawn_again(home, tmp_path, monkeypatch):
    from halfstep.app import comparison
    from halfstep.measure import drawer

    def killed(*_, **__):
        raise KeyboardInterrupt

    one = [f"{home / 'dense'}@ddim:5"]
    data, run = f"npz:{home / 'drawn.npz'}", tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(comparison, "measure_judged", killed)
        with pytest.raises(KeyboardInterrupt):
            compare(one, data, run, tiny("seed=1"))
    with monkeypatch.context() as patch:
        patch.setattr(drawer.Drawer, "part", lambda *_: pytest.fail("drawn again"))
        found = compare(one, data, run, tiny("seed=1"))
    assert found.comparison.about.n == 256 and not (run / "state" / "drawn").exists()
    assert not found.pipelines["dense@ddim:5"].copies  # fair draws of the model that drew the data, from other noise


SIZED = {"size": 16}, {"colours": 3}, {"num_class_embeds": 10}


@pytest.mark.parametrize("change, word", zip(SIZED, ("1 channel at 16x16", "3 channels", "of 10 classes"), strict=True))
def test_pipelines_that_draw_other_things_are_named(home, tmp_path, change, word):
    DDPMPipeline(unet(0, **change), SCHEDULER).save_pretrained(tmp_path / "strange")
    with pytest.raises(ModelError, match=rf"strange: .*{word}.* as {re.escape(str(home / 'dense'))}"):
        compare([str(home / "dense"), str(tmp_path / "strange")], f"npz:{home / 'drawn.npz'}", tmp_path / "o", tiny())
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "words, error, told",
    [
        (["{}@dimm:5"], PlanError, "did you mean ddim?"),
        (["{}@ddim:"], HalfstepError, "sample.steps"),
        (["{}@ddim:x"], HalfstepError, "sample.steps"),
        (["{}@ddim:0"], HalfstepError, "sample.steps"),
        (["{}@ddim:21"], HalfstepError, "at most 20"),
        (["{}", "{}/nowhere"], ModelError, "no such folder"),
        (["/dev/null"], ModelError, "no such folder"),
        (["a={}", "a={}"], PlanError, "two pipelines 'a'"),
        (["={}"], HalfstepError, "the name ''"),
        (["a\nb={}"], HalfstepError, "printable"),
        ([], ModelError, "no pipeline"),
    ],
)
def test_what_is_no_pipeline_or_no_sampler_is_refused_before_anything_is_written(home, tmp_path, words, error, told):
    given = [word.format(home / "dense") for word in words]
    with pytest.raises(error, match=re.escape(told)) as refused:
        compare(given, f"npz:{home / 'drawn.npz'}", tmp_path / "o", tiny())
    assert "\n" not in str(refused.value) and not (tmp_path / "o").exists()


@pytest.mark.parametrize("inside", [False, True])
def test_a_run_that_is_still_written_is_refused_with_who_writes_it(home, tmp_path, inside):
    run = home / "ours"
    holder = {"pid": 4321, "host": "elsewhere", "since": "2026-11-27 10:00:00"}
    (run / ".holder.json").write_text(json.dumps(holder))
    lock = FileLock(run / ".lock")
    with lock, pytest.raises(HeldError, match=r"process 4321 on elsewhere since .*, expected one that is finished"):
        compare([str(run / "pipeline" if inside else run)], f"npz:{home / 'drawn.npz'}", tmp_path / "o", tiny())
    assert not (tmp_path / "o").exists()


def test_a_folder_of_somebody_else_is_refused_untouched(home, tmp_path):
    mine = home_in(tmp_path)
    before = listing(mine)
    with pytest.raises(RunError, match="a folder with other files"):
        compare([str(home / "dense")], f"npz:{home / 'drawn.npz'}", mine, tiny())
    assert listing(mine) == before
