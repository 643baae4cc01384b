"""The one way in: what people hold opens, as the same thing, once; oracles: the weights, a count of calls."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, PNDMPipeline, PNDMScheduler
from PIL import Image
from safetensors.torch import load_file

from halfstep.app import verbs
from halfstep.app.subject import open_subject
from halfstep.core.bundled import model_of
from halfstep.core.errors import HalfstepError, PlanError
from halfstep.core.recipes import named
from halfstep.core.sums import compare
from halfstep.engine.bank import Bank
from halfstep.engine.device import default_device
from halfstep.engine.entry import Cut, Entry
from halfstep.engine.sampling import reference_plan
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.methods.slimmable import supernet_of
from halfstep.nets.files import WEIGHTS
from tiny import recipes, unet

tiny = recipes("""
train.steps=4 train.batch=8 train.warmup=0 train.sample_every=0 slim.widths=1,0.5 sample.steps=3 sample.batch=32
sample.layout=contiguous eval.features=pixels eval.images=24 eval.bootstrap=10 eval.free=false
search.images=24 search.error_images=8
search.fit=2 search.genes=2 search.population=2 search.generations=1 search.final_images=24 search.finalists=1
""")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One net in every form in which people hold one."""
    root = tmp_path_factory.mktemp("held")
    model, scheduler = unet(), DDPMScheduler()
    DDPMPipeline(model, scheduler).save_pretrained(root / "stock")
    model.save_pretrained(root / "model")
    scheduler.save_pretrained(root / "model")
    shutil.copytree(root / "stock", root / "run" / "pipeline")
    super_ = supernet_of(model, tiny("slim.sort=false").slim)
    bank = Bank({"full": model, "w0.50": Entry(super_.subnet(0.5), Cut("full", super_.slices[0.5]))}, "full", "epsilon")
    plan = reference_plan(bank, scheduler.config, tiny().sample).uniform("w0.50")
    StepAwarePipeline(bank, plan).save_pretrained(root / "aware")
    shutil.copytree(root / "aware", root / "aware run" / "pipeline")
    return {one.name: one for one in root.iterdir()}


HELD = ("stock", "model", "run", "aware", "aware run")


def test_the_bundled_fashion_is_a_bank_whose_reference_is_the_dense_net():
    subject = open_subject("fashion", "fashion", named("fashion"))
    full = load_file(model_of("fashion") / "bank" / "full" / WEIGHTS)
    assert {value.dtype for value in full.values()} == {torch.float16}
    assert subject.bank.names == ("full", "w0.75", "w0.50", "w0.25") and subject.bank.dtype == torch.float32
    assert all(torch.equal(value, full[name].float()) for name, value in subject.dense.state_dict().items())
    assert subject.plan == subject.reference() and len(subject.plan.rows) == 50 and set(subject.plan.nets) == {"full"}
    assert len(subject.images) == 6000 and {one.state for one in compare(model_of("fashion"))} == {"whole"}


def test_what_was_not_opened_is_refused_by_name_where_it_is_wanted(folders):
    with pytest.raises(HalfstepError, match="--model: got no model"):
        verbs.search("", "digits", folders["model"].parent / "out", tiny(), budget=0.5)
    with pytest.raises(HalfstepError, match="--data: got no images"):
        open_subject(folders["model"], None, tiny()).images  # noqa: B018 (it raises)
    assert not (folders["model"].parent / "out").exists()


@pytest.mark.parametrize("name", HELD)
def test_whatever_holds_a_net_opens_as_that_net(name, folders):
    subject = open_subject(folders[name], "digits", tiny())
    weights = unet().state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in subject.dense.state_dict().items())
    assert subject.process.timesteps == 1000 and subject.recipe.noise == subject.process
    assert (subject.images.size, subject.recipe.data.size, subject.recipe.data.channels) == (8, 8, 1)
    assert (subject.plan is not None) == name.startswith("aware")
    assert list(subject.stand_ins) == (["full", "w0.50"] if subject.plan else ["full"])


def test_one_net_is_one_content_whatever_folder_it_lies_in(folders):
    contents = {open_subject(folders[name], "digits", tiny()).content["model_content"] for name in HELD[:3]}
    assert len(contents) == 1
    assert open_subject(folders["aware"], "digits", tiny()).content["model_content"] not in contents


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "aware" else [pytest.mark.slow]) for n in HELD])
def test_every_verb_takes_every_form(name, folders, tmp_path):
    model = str(folders[name])
    assert verbs.sample(model, tmp_path / "pictures", tiny(), count=2).is_file()
    record = verbs.evaluate(model, "digits", tmp_path / "quality", tiny())
    assert list(record.plans) == (["reference", "plan"] if name.startswith("aware") else ["reference"])
    found = verbs.search(model, "digits", tmp_path / "found", tiny(), budget=1.0)
    assert found.macs <= found.baseline.price.macs
    assert next(iter(verbs.profile(model, repeats=1))) == "full"
    pipe = verbs.make("slimmable", model, "digits", tmp_path / "slim", tiny())
    assert list(pipe.bank) == ["full", "w1.00", "w0.50"]
    assert verbs.train("digits", tmp_path / "more", tiny(), model=model).is_dir()


def test_fewer_steps_of_a_dense_model_are_found_for_less_than_all_its_steps_cost(folders, tmp_path):
    model = str(folders["stock"])
    assert len(verbs.search(model, "digits", tmp_path / "found", tiny(), budget=0.7).rows) == 2  # of three
    with pytest.raises(PlanError, match=r"at least 0\.667"):
        verbs.search(model, "digits", tmp_path / "none", tiny(), budget=0.3)
    assert not (tmp_path / "none").exists()


def test_a_dense_model_draws_what_a_pipeline_of_its_reference_draws(folders, tmp_path):
    verbs.sample(str(folders["stock"]), tmp_path / "a", tiny("seed=3", "sample.scheduler=ddim"), count=2)
    bank = Bank({"full": unet()}, "full", "epsilon")
    pipe = StepAwarePipeline(bank, reference_plan(bank, DDPMScheduler().config, tiny().sample))
    for k, image in enumerate(pipe(batch_size=2, seed=3).images):
        with Image.open(tmp_path / "a" / f"{k:06d}.png") as drawn:
            apart = np.abs(np.asarray(drawn, dtype=int) - np.asarray(image, dtype=int))
            assert apart.max() <= (0 if default_device().type == "cpu" else 1)  # the pipeline above runs on the CPU


def test_a_pipeline_is_sampled_by_the_sampler_that_it_came_with_unless_the_recipe_says_another(folders, tmp_path):
    own = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    PNDMPipeline(unet(), own).save_pretrained(tmp_path / "pndm")
    brought, trained = (open_subject(folder, None, tiny()) for folder in (tmp_path / "pndm", folders["stock"]))
    sampler = brought.reference().sampler
    assert sampler.name == "PNDMScheduler" and sampler.config["skip_prk_steps"] and sampler.config["steps_offset"] == 1
    assert trained.reference().sampler.name == "DDIMScheduler"
    assert ["own sampler: PNDM" in brought.read()[-1], "DDIM runs" in trained.read()[-1]] == [True, True]
    asked = open_subject(tmp_path / "pndm", None, tiny("sample.scheduler=ddim"))
    assert asked.reference().sampler.name == "DDIMScheduler"
    other = PNDMScheduler(skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    other.register_to_config(skip_prk_steps=False)
    PNDMPipeline(unet(), other).save_pretrained(tmp_path / "prk")
    again, ddim = (open_subject(tmp_path / "prk", None, tiny(*edit)) for edit in ((), ("sample.scheduler=ddim",)))
    assert again.content != brought.content and ddim.content == asked.content  # a sampler that is run is content


def test_a_pipelines_own_plan_is_left_only_when_that_is_asked_for(folders, tmp_path):
    model, pictures = str(folders["aware"]), {}
    for own in (True, False):
        verbs.sample(model, tmp_path / str(own), tiny(), count=1, own_plan=own)
        pictures[own] = (tmp_path / str(own) / "000000.png").read_bytes()
    verbs.sample(str(folders["stock"]), tmp_path / "dense", tiny(), count=1)
    assert pictures[False] == (tmp_path / "dense" / "000000.png").read_bytes() != pictures[True]


def test_without_a_model_the_recipe_says_what_is_trained():
    subject = open_subject(None, "digits", tiny("noise.prediction=v_prediction"))
    assert subject.bank is None and subject.dense is None
    assert subject.process.prediction == "v_prediction" and subject.content.keys() == {"data_content"}


@pytest.mark.parametrize("model", ["", "nowhere", "file"])
def test_what_is_no_model_is_refused_by_name(model, tmp_path):
    (tmp_path / "file").write_text("x")
    if not model:
        (tmp_path / "empty").mkdir()
    with pytest.raises(HalfstepError) as caught:
        open_subject(tmp_path / (model or "empty"), "digits", tiny())
    assert str(tmp_path) in str(caught.value)


@pytest.mark.slow
def test_optimize_loads_the_net_once_sorts_its_channels_once_and_reads_the_images_once(folders, tmp_path):
    counted: Counter[str] = Counter()

    def count(frame, event, _argument):
        if event == "call" and "halfstep" in frame.f_code.co_filename:
            counted[frame.f_code.co_name] += 1

    sys.setprofile(count)
    try:
        verbs.optimize(str(folders["stock"]), "digits", tmp_path / "half", tiny(), budget=0.6)
    finally:
        sys.setprofile(None)
    assert {name: counted[name] for name in ("load_denoiser", "load_images", "sort_channels", "open_subject")} == {
        "load_denoiser": 1,
        "load_images": 1,
        "sort_channels": 1,
        "open_subject": 1,
    }
