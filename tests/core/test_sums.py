"""Oracles: coreutils' `sha256sum -c`; files changed by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from typer.testing import CliRunner

from halfstep.app.cli import app
from halfstep.app.verify import verify
from halfstep.core.errors import HalfstepError, ModelError, RunError
from halfstep.core.plan import Price
from halfstep.core.process import Process
from halfstep.core.recipe import SampleSpec, TrainSpec
from halfstep.core.sums import FILE, compare, require_whole, write_sums
from halfstep.engine.bank import Bank
from halfstep.engine.sampling import reference_plan
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.nets.models import load_denoiser
from halfstep.training.train import TrainState
from tiny import unet

WEIGHTS = "bank/full/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A saved pipeline, as its files."""
    bank = Bank({"full": unet(0, (8, 8)), "2:4 one-shot": unet(0, (8, 8))}, "full", "epsilon")
    plan = reference_plan(bank, Process(), SampleSpec(scheduler="dpmsolver++", steps=3))
    folder = tmp_path_factory.mktemp("written") / "pipeline"
    StepAwarePipeline(bank, plan).save_pretrained(folder)
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def folder(written, tmp_path):
    """A copy of its own."""
    for name, content in written.items():
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / name).write_bytes(content)
    return tmp_path / "p"


def states(folder) -> dict[str, str]:
    return {one.file: one.state for one in compare(folder)}


@pytest.mark.skipif(sys.platform != "linux", reason="needs coreutils")
def test_every_file_is_recorded_as_sha256sum_reads_it(folder):
    found = subprocess.run(["sha256sum", "--strict", "-c", FILE], cwd=folder, capture_output=True, text=True)
    assert found.returncode == 0 and not found.stderr
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {FILE}
    assert {line.rsplit(":", 1)[0] for line in found.stdout.splitlines()} == files
    assert "bank/2of4 one-shot/config.json" in files and set(states(folder).values()) == {"whole"}


def change(folder):
    file = folder / WEIGHTS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


HARMED = {
    "one bit of the weights": (change, WEIGHTS),
    "a plan's entry": (lambda f: edit(f / "plan.json", rows=[{"timestep": 9.0, "entry": "full"}]), "plan.json"),
    "a file gone": (lambda f: (f / "scheduler" / "scheduler_config.json").unlink(), "scheduler/scheduler_config.json"),
    "a mask put in": (lambda f: edit(f / "bank" / "full" / "entry.json", masking={}), "bank/full/entry.json"),
    "sums of no kind": (lambda f: (f / FILE).write_text("hello\n"), FILE),
    "sums of bytes": (lambda f: (f / FILE).write_bytes(b"\xff\xfe\0"), FILE),
}


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("how", HARMED)
def test_what_changed_is_refused_when_it_is_read_and_told_how_to_accept(how, folder):
    harm, named = HARMED[how]
    harm(folder)
    with pytest.raises(HalfstepError) as error:
        StepAwarePipeline.from_pretrained(folder)
    assert named in str(error.value) and "--accept" in str(error.value) and "\n" not in str(error.value)


def test_an_edit_of_ones_own_is_accepted_on_purpose(folder):
    edit(folder / "plan.json", macs=3)
    (folder / "README.md").write_text("a file that nothing reads")
    with pytest.raises(ModelError, match=r"plan\.json changed"):
        StepAwarePipeline.from_pretrained(folder)
    told = {one.file: one.state for one in verify(folder.parent, accept=True)}
    assert told["p/plan.json"] == "changed" and told["p/README.md"] == "unrecorded"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*digests")
        StepAwarePipeline.from_pretrained(folder)
    assert set(states(folder).values()) == {"whole"}


def test_a_file_that_nothing_reads_is_no_harm(folder):
    (folder / "README.md").write_text("mine")
    assert require_whole(folder) and states(folder)["README.md"] == "unrecorded"


def test_a_pipeline_of_before_is_believed_with_a_word(folder):
    (folder / FILE).unlink()
    with pytest.warns(UserWarning, match="before files had digests"):
        StepAwarePipeline.from_pretrained(folder)
    assert set(states(folder).values()) == {"unrecorded"}


def test_stock_pipelines_are_checked_where_they_have_sums_and_silent_where_not(tmp_path):
    DDPMPipeline(unet(0, (8, 8)), DDPMScheduler()).save_pretrained(tmp_path / "stock")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_denoiser(tmp_path / "stock")
        load_denoiser("digits")
    write_sums(tmp_path / "stock")
    load_denoiser(tmp_path / "stock")
    edit(tmp_path / "stock" / "scheduler" / "scheduler_config.json", beta_end=0.03)
    with pytest.raises(ModelError, match="scheduler_config"):
        load_denoiser(tmp_path / "stock")


def test_nothing_outside_is_opened(folder, tmp_path):
    """A line may name any path, a link lead anywhere, and a pipe wait for ever."""
    os.mkfifo(folder / "pipe")
    (folder / "null").symlink_to("/dev/zero")
    (tmp_path / "outside").write_text("x")
    lines = "".join(f"{'0' * 64}  {name}\n" for name in ("../outside", "/dev/zero", "pipe", "null"))
    (folder / FILE).write_text((folder / FILE).read_text() + lines)
    found = states(folder)
    assert {found[name] for name in ("../outside", "/dev/zero", "pipe", "null")} == {"missing"}


def test_the_command_tells_a_table_and_its_exit_code(folder, tmp_path):
    call = CliRunner().invoke
    assert call(app, ["verify", str(folder)]).exit_code == 0
    change(folder)
    (folder / "model_index.json").unlink()
    found = call(app, ["verify", str(tmp_path), "--json"])
    assert found.exit_code == 2
    told = {one["file"]: one["state"] for one in json.loads(found.stdout)}
    assert told[f"p/{WEIGHTS}"] == "changed" and told["p/model_index.json"] == "missing"
    assert "changed" in call(app, ["verify", str(folder)]).stdout
    assert call(app, ["verify", str(folder), "--accept"]).exit_code == 0
    assert call(app, ["verify", str(folder)]).exit_code == 0
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="pipeline"):
        verify(tmp_path / "empty")


def test_a_failed_save_leaves_the_old_sums(folder, monkeypatch):
    before = (folder / FILE).read_bytes()
    pipe = StepAwarePipeline.from_pretrained(folder)
    pipe.plan = replace(pipe.plan, prices={**pipe.plan.prices, "full": Price(float("nan"))})
    with pytest.raises(HalfstepError):
        pipe.save_pretrained(folder)
    assert (folder / FILE).read_bytes() == before and require_whole(folder)


def test_training_states_carry_their_own_digest(tmp_path):
    state = TrainState.new(unet(0, (8, 8)), TrainSpec())
    file = tmp_path / "run" / "state" / "dense.safetensors"
    state.save(file, "stamp")
    assert [(one.file, one.state) for one in verify(tmp_path / "run")] == [("state/dense.safetensors", "whole")]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert [one.state for one in verify(tmp_path / "run")] == ["changed"]
    file.write_bytes(content[:-9])
    assert [one.state for one in verify(tmp_path / "run")] == ["changed"]
