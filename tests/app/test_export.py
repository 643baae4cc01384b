"""Exported plans: the runner, without PyTorch, draws the pipeline's pictures from the pipeline's noise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import halfstep_run
from halfstep.app.export import export, write_program
from halfstep.core.bundled import model_of
from halfstep.core.errors import HalfstepError, ModelError, PlanError, RunError
from halfstep.core.plan import Correction, Guide
from halfstep.core.process import Process
from halfstep.core.recipe import Recipe, SampleSpec
from halfstep.engine.bank import Bank
from halfstep.engine.calibration import calibrated
from halfstep.engine.entry import Entry, Reuse
from halfstep.engine.sampling import denoise, image_generators, reference_plan, start_noise, to_images
from halfstep.engine.stepaware import StepAwarePipeline
from pipelines import vae
from tiny import cond_for_net, text_unet, uvit

pytest.importorskip("onnxruntime")
RUNNER = Path(halfstep_run.__file__)
CLOSE = 1e-4


def pipeline(entries, spec, **more):
    """A class-conditional pipeline with a cut, whose rows run these entries in turn."""
    model, small = (uvit(seed, num_class_embeds=3) for seed in (0, 1))
    links = [Reuse("full", 0), Reuse("full", 0, 1), Reuse("full", "out")]
    bank = Bank(
        {"full": model, "small": small, **{link.name: Entry(model, link) for link in links}}, "full", "epsilon", **more
    )
    plan = reference_plan(bank, Process(), spec)
    return StepAwarePipeline(bank, plan.with_entries([entries[i % len(entries)] for i in range(len(plan.rows))]))


def require_same(pipe, program, count=5, seed=3):
    wanted = pipe(batch_size=count, seed=seed, output_type="np").images
    found = np.concatenate(list(program.images(count, seed, batch=2)))
    assert found.shape == wanted.shape and np.abs(found - wanted).max() <= CLOSE
    return found


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A plan of all that a row can be: widths, features reused as they are, forecast and whole, corrections, guides."""
    at = tmp_path_factory.mktemp("export")
    pipe = pipeline(["full", "full", "full~0+", "full~0", "small", "full~out"], SampleSpec(scheduler="ddpm", steps=7))
    guides = [Guide("small", 1.5), None, None, Guide("small", 0.8), None, None, None]
    corrections = [Correction(0.98, 0.01 * k) for k in range(7)]
    pipe.plan = pipe.plan.with_guides(guides).with_corrections(corrections)
    pipe.save_pretrained(at / "pipe")
    return pipe, export(str(at / "pipe"), "onnx", at / "onnx", Recipe())


def test_the_runner_draws_the_pipelines_pictures(exported):
    pipe, folder = exported
    program = halfstep_run.Program.open(folder)
    require_same(pipe, program)
    assert sorted(program.graphs) == ["full", "full~0", "small"] and program.draws == 7
    assert (folder / "plan.json").is_file() and json.loads((folder / "program.json").read_text())["made_with"]


def test_noise_of_a_seed_is_torchs():
    for shape in ((1, 8, 8), (3, 5, 7)):  # of whole blocks of sixteen numbers, and not
        for k, generator in enumerate(image_generators(11, 0, 3)):
            own = halfstep_run.Noise(11, k)
            for _ in range(3):
                wanted = torch.randn((1, *shape), generator=generator)[0].numpy()
                assert np.abs(own.draw(shape) - wanted).max() <= 1e-6


BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "diffusers", "halfstep", "PIL", "safetensors", "onnx"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def ran(*args):
    """The command in a process that can import none of what it must do without."""
    command = [sys.executable, "-c", BLOCKED, RUNNER, *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env, check=False)


def test_the_command_imports_no_torch_and_writes_pngs(exported, tmp_path):
    pipe, folder = exported
    done = ran(folder, "--count", 3, "--out", tmp_path / "pics", "--classes", 2, "--seed", 4)
    assert done.returncode == 0, done.stderr
    wanted = pipe(batch_size=3, seed=4, class_labels=2, output_type="np").images
    for k in range(3):
        with Image.open(tmp_path / "pics" / f"{k:06d}.png") as picture:
            found = np.asarray(picture)
        assert np.abs(found / 255 - wanted[k, :, :, 0]).max() <= 0.5 / 255 + CLOSE
    noise = np.zeros((3, 7, 1, 8, 8), np.float32)
    np.save(tmp_path / "noise.npy", noise)
    done = ran(folder, "--count", 2, "--noise", tmp_path / "noise.npy", "--out", tmp_path / "two.npy")
    assert done.returncode == 0 and np.load(tmp_path / "two.npy").shape == (2, 8, 8, 1)
    for args, told in (
        (("--classes", "zebra"), "zebra"),
        (("--noise", tmp_path / "two.npy"), "noise of"),
        (("--count", 0), "1 or more"),
    ):
        done = ran(folder, *args, "--out", tmp_path / "none")
        assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1


def test_a_changed_file_and_a_folder_that_is_there_are_refused(exported, tmp_path):
    _, folder = exported
    with pytest.raises(RunError, match="a folder that is there"):
        export("digits", "onnx", folder, Recipe())
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "small.onnx").write_bytes(b"")
    with pytest.raises(halfstep_run.RunnerError, match=r"small\.onnx"):
        halfstep_run.Program.open(tmp_path)


def test_a_net_of_one_batch_is_refused(tmp_path, monkeypatch):
    pipe = pipeline(["full"], SampleSpec(scheduler="ddim", steps=3))
    graph = SimpleNamespace(batch=3)  # as `test_graphs` shows of such a net
    monkeypatch.setattr("halfstep.app.export.graph_of", lambda *args: graph)
    with pytest.raises(ModelError, match="entry 'full': got a net whose code fixes the batch"):
        write_program(tmp_path / "out", pipe.bank, pipe.plan)


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_nothing_is_left_of_an_export_that_fails(to, tmp_path, monkeypatch):
    pipe = pipeline(["full"], SampleSpec(scheduler="ddim", steps=3))
    pipe.save_pretrained(tmp_path / "pipe")
    if to == "openvino":
        monkeypatch.setitem(sys.modules, "openvino", None)
        kind, told = ModelError, r"halfstep\[openvino\]"
    else:
        monkeypatch.setattr("halfstep.app.export.compiled", refusing)
        kind, told = PlanError, "no table"
    with pytest.raises(kind, match=told):
        export(str(tmp_path / "pipe"), to, tmp_path / "out", Recipe())
    assert [one.name for one in tmp_path.iterdir()] == ["pipe"]


def refusing(plan):
    raise PlanError(got="no table", expected="one", where="a test", do="nothing")


def test_export_to_diffusers_is_a_pipeline_folder(tmp_path):
    folder = export("digits", "diffusers", tmp_path / "pipe", Recipe().edit(["sample.steps=4"]))
    assert len(StepAwarePipeline.from_pretrained(folder).plan.rows) == 4


@pytest.mark.slow
def test_openvino_and_guidance_by_a_null_condition(tmp_path):
    pytest.importorskip("openvino")
    model = uvit(0, num_class_embeds=3)
    pipe = pipeline(["full", "full~0"], SampleSpec(scheduler="unipc", steps=4),
                    null={"class_labels": cond_for_net(model, 1)["class_labels"]}, guidance=2.0)  # fmt: skip
    assert all(guide is not None for guide in pipe.plan.guides)
    pipe.save_pretrained(tmp_path / "pipe")
    recipe = Recipe().edit(["sample.guidance=2"])
    folder = export(str(tmp_path / "pipe"), "openvino", tmp_path / "ir", recipe)
    require_same(pipe, halfstep_run.Program.open(folder))
    with pytest.raises(halfstep_run.RunnerError, match="graphs of OpenVINO"):
        halfstep_run.Program.open(folder, "onnxruntime")


@pytest.mark.slow
def test_rows_in_eight_bits(tmp_path):
    plain = Bank({"full": uvit(0, num_class_embeds=3)}, "full", "epsilon")
    plan = reference_plan(plain, Process(), SampleSpec(scheduler="ddim", steps=4))
    bank = plain.with_int8(calibrated(plain, plan, seed=0))
    plan = replace(plan, prices=bank.prices()).with_entries(["full", "full@int8", "full@int8", "full"])
    pipe = StepAwarePipeline(bank, plan)
    pipe.save_pretrained(tmp_path / "pipe")
    folder = export(str(tmp_path / "pipe"), "onnx", tmp_path / "onnx", Recipe())
    program = halfstep_run.Program.open(folder)
    assert sorted(program.graphs) == ["full", "full@int8"]
    nodes = onnx.load(folder / "full@int8.onnx").graph.node
    assert sum(node.op_type == "QuantizeLinear" for node in nodes) > 4
    found = np.concatenate(list(program.images(5, 3, batch=2)))
    simulated = pipe(batch_size=5, seed=3, output_type="np").images
    pipe.plan = pipe.plan.uniform("full")
    whole = pipe(batch_size=5, seed=3, output_type="np").images
    assert 0 < np.linalg.norm(found - simulated) < 0.02 * np.linalg.norm(simulated), "but for what lies on an edge"
    assert np.linalg.norm(found - whole) > np.linalg.norm(found - simulated), "in eight bits, not in float"


@pytest.mark.slow
def test_a_bundled_model_of_many_widths(tmp_path):
    pipe = StepAwarePipeline.from_pretrained(model_of("fashion"))
    names = [*pipe.bank.computed][:3]
    full = pipe.bank.reference
    link = Reuse(full, 2, 1)
    bank = Bank({**pipe.bank.entries, link.name: Entry(pipe.bank[full], link)}, full, pipe.bank.prediction_type,
                classes=pipe.bank.classes)  # fmt: skip
    plan = reference_plan(bank, pipe.process, SampleSpec(scheduler="dpmsolver++", order=3, steps=8))
    plan = plan.with_entries([full, full, link.name, *names, full, link.name][:8])
    plan = plan.with_corrections([Correction(1.02, 0.02)] * 8)
    pipe = StepAwarePipeline(bank, plan)
    pipe.save_pretrained(tmp_path / "pipe")
    program = halfstep_run.Program.open(export(str(tmp_path / "pipe"), "onnx", tmp_path / "onnx", Recipe()))
    found = require_same(pipe, program)
    assert found.std() > 0.1  # pictures, not grey


@pytest.mark.slow
def test_latents_of_a_model_of_text_under_conditions_of_a_file(tmp_path):
    random = torch.Generator().manual_seed(5)
    text = torch.randn(3, 5, 12, generator=random)
    net = text_unet(in_channels=2, out_channels=2)
    null = {"encoder_hidden_states": torch.zeros(1, 5, 12)}
    bank = Bank({"full": net}, "full", "v_prediction", vae=vae(2).eval(), null=null, guidance=3.0)
    plan = reference_plan(bank, replace(Process(), prediction="v_prediction"), SampleSpec(scheduler="euler", steps=3))
    write_program(tmp_path / "onnx", bank, plan)
    with pytest.raises(halfstep_run.RunnerError, match="encoder_hidden_states"):
        halfstep_run.Program.open(tmp_path / "onnx").conditions()
    np.savez(tmp_path / "texts.npz", encoder_hidden_states=text.numpy())
    done = ran(tmp_path / "onnx", "--count", 3, "--conditions", tmp_path / "texts.npz", "--out", tmp_path / "three.npy")
    assert done.returncode == 0, done.stderr
    generators = image_generators(0, 0, 3)
    sample = denoise(bank, plan, start_noise(bank, generators), generators, {"encoder_hidden_states": text})
    wanted = (to_images(bank, sample) / 2 + 0.5).permute(0, 2, 3, 1).detach().numpy()
    assert np.abs(np.load(tmp_path / "three.npy") - wanted).max() <= CLOSE


def test_a_runner_error_is_no_error_of_halfstep():
    assert not issubclass(halfstep_run.RunnerError, HalfstepError)
