"""Models of text through the house. Oracle: the stock pipeline of the same folder, on the same noise."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from halfstep.app import verbs
from halfstep.app.subject import open_subject
from halfstep.core.errors import HalfstepError
from halfstep.core.plan import Guide, StepPlan
from halfstep.core.recipe import Recipe
from halfstep.engine import custom
from halfstep.engine.sampling import fewer_steps, image_generators, reference_plan, sample_images, start_noise
from halfstep.engine.stepaware import StepAwarePipeline
from pipelines import BETAS, dit, stable_diffusion, text_unet, vae

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("own_cache")
PROMPTS = ["a b c", "b", "c a"]


def pipeline():
    """A stock pipeline of grey 8x8 pictures: their pixels are features enough."""
    grey = vae(in_channels=1, out_channels=1)
    scheduler = DDIMScheduler(clip_sample=False, **BETAS)
    return stable_diffusion(scheduler=scheduler, unet=text_unet(sample_size=4), vae=grey)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("text")
    pipeline().save_pretrained(place / "pipe")
    (place / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return place


def recipe(folder, *edits: str) -> Recipe:
    small = ["sample.steps=4", "sample.batch=4", "sample.guidance=3", "eval.features=pixels"]
    return Recipe().edit([f"data.prompts={folder / 'prompts.txt'}", *small, *edits])


@torch.no_grad()
def test_guided_pictures_are_those_of_the_stock_pipeline(folder):
    subject = open_subject(folder / "pipe", None, recipe(folder))
    bank, pipe = subject.stand_ins, pipeline()
    plan = subject.reference()
    assert {row.guide for row in plan.rows} == {Guide("full", 3.0)} and plan.macs == 8 * plan.prices["full"].macs
    [found] = sample_images(bank, plan, 3, seed=0, batch=3, conditions=subject.conditions)
    noise = start_noise(bank, image_generators(0, 0, 3))
    wanted = pipe(PROMPTS, num_inference_steps=4, guidance_scale=3.0, latents=noise, output_type="pt").images
    assert torch.allclose(found / 2 + 0.5, wanted, atol=1e-4)


@pytest.mark.slow
def test_a_tuned_plan_runs_under_the_stock_pipeline(folder, tmp_path):
    """The whole way: prompts alone, reuse and guidance searched, attached."""
    from halfstep import attach

    small = "search.images=256 search.converged=300 search.error_images=4 search.fit=3 search.genes=2 search.arms=1"
    more = "search.final_images=256 search.race=4 search.reuse=0 eval.images=256 eval.bootstrap=20 eval.repeats=1"
    edits = [*small.split(), *more.split(), "sample.steps=6", "sample.timed=2", "sample.batch=64", "shrink.scales=0.99"]
    verbs.tune(str(folder / "pipe"), None, tmp_path / "run", recipe(folder, *edits), budget=0.5)
    plan = StepPlan.load(tmp_path / "run" / "plan.json")
    assert plan.guidance == 3.0 and plan.macs <= 0.5 * 12 * plan.prices["full"].macs
    told = json.loads((tmp_path / "run" / "quality.json").read_text())
    assert {"reference", "plan"} <= set(told["plans"])
    pipe = pipeline()
    attach(pipe, tmp_path / "run")
    noise = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    steps = {"num_inference_steps": plan.sampler.steps, "guidance_scale": 3.0, "output_type": "pt"}
    assert pipe(PROMPTS, latents=noise, **steps).images.isfinite().all()


WRONG = {
    "no prompts": (["data.prompts="], "prompts"),
    "a file that is not there": (["data.prompts=nowhere.txt"], "nowhere"),
    "prompts for a model of none": ([], "conditional on text"),
}


@pytest.mark.parametrize("how", WRONG)
def test_prompts_that_do_not_fit_are_refused_in_one_line(how, folder):
    edits, told = WRONG[how]
    model = "digits" if "of none" in how else folder / "pipe"
    with pytest.raises(HalfstepError, match=told) as error:
        open_subject(model, None, recipe(folder, *edits))
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_classes_of_a_dit_are_guided_from_its_null_class(tmp_path):
    """Oracle: the stock pipeline, on the same noise."""
    stock = dit()
    stock.save_pretrained(tmp_path / "dit")
    subject = open_subject(tmp_path / "dit", None, Recipe().edit(["sample.guidance=4", "sample.steps=4"]))
    pipe = StepAwarePipeline(subject.stand_ins, subject.reference())
    drawn = {"generator": torch.Generator().manual_seed(3), "output_type": "np"}
    mine = pipe(batch_size=2, class_labels=[7, 0], **drawn).images
    drawn = {"generator": torch.Generator().manual_seed(3), "output_type": "np"}
    wanted = stock([7, 0], guidance_scale=4.0, num_inference_steps=4, **drawn).images
    assert torch.allclose(torch.from_numpy(mine), torch.from_numpy(wanted), atol=1e-4)


def test_guidance_without_text_or_a_null_condition_is_refused():
    with pytest.raises(HalfstepError, match="guidance"):
        open_subject("digits", None, Recipe().edit(["sample.guidance=2"]))


def test_a_plan_of_a_guided_bank_is_guided(folder):
    subject = open_subject(folder / "pipe", None, recipe(folder))
    plan = reference_plan(subject.stand_ins, subject.process, subject.recipe.sample)
    assert plan.with_entries(["full|", "full", "full|full*2", "full"]).guides == (
        None, Guide("full", 3.0), Guide("full", 2.0), Guide("full", 3.0),
    )  # fmt: skip
    assert plan.uniform("full|").share == 0.5


def captioned_folder(place, count: int = 24):
    """Grey pictures with captions, in the imagefolder convention."""
    from PIL import Image

    place.mkdir()
    random = torch.Generator().manual_seed(0)
    lines = []
    for k in range(count):
        pixels = torch.randint(0, 255, (8, 8), generator=random, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(place / f"{k:02d}.png")
        lines.append(json.dumps({"file_name": f"{k:02d}.png", "text": PROMPTS[k % 3]}))
    (place / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def test_a_training_batch_has_the_captions_of_its_images_and_drops_its_share(folder, tmp_path):
    captioned_folder(tmp_path / "data")
    data = f"folder:{tmp_path / 'data'}"
    subject = open_subject(folder / "pipe", data, recipe(folder, "data.prompts=", "train.dropped=0.25"))
    seen = subject.lessons()
    with torch.no_grad():
        wanted, nothing = pipeline().encode_prompt(PROMPTS, "cpu", 1, True)
    index, choices = torch.arange(24).repeat(100), torch.Generator().manual_seed(0)
    found = seen.batch_cond(index, choices)["encoder_hidden_states"]
    dropped = torch.tensor([torch.allclose(one, nothing[0], atol=1e-6) for one in found])
    assert abs(float(dropped.float().mean()) - 0.25) < 0.03
    assert all(torch.equal(one, wanted[k % 3]) for one, k, gone in zip(found, index, dropped, strict=True) if not gone)
    assert set(subject.conditions.told) == set(PROMPTS)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["slimmable", "sparse"])
def test_a_method_compresses_a_net_of_text(method, folder, tmp_path):
    captioned_folder(tmp_path / "data")
    small = (
        "train.steps=4 train.batch=4 train.log_every=2 slim.widths=0.5 eval.images=256 eval.bootstrap=20 eval.free=no"
    )
    more = "eval.repeats=1 data.prompts= sample.batch=64 sparse.pattern=2:4 sparse.least=0"
    edits = [one for one in f"{small} {more}".split() if method == "sparse" or not one.startswith("sparse")]
    chosen = recipe(folder, *edits)
    verbs.compress(method, str(folder / "pipe"), f"folder:{tmp_path / 'data'}", tmp_path / "run", chosen)
    pipe = StepAwarePipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert len(pipe.bank) > 1 and pipe.bank.null is not None


@torch.no_grad()
def test_a_saved_pipeline_of_text_takes_what_users_of_diffusers_give_it(folder, tmp_path):
    """Oracle: the stock pipeline, on the same noise."""
    subject = open_subject(folder / "pipe", None, recipe(folder))
    StepAwarePipeline(subject.stand_ins, subject.reference(), subject.encoder).save_pretrained(tmp_path / "p")
    pipe, stock = StepAwarePipeline.from_pretrained(tmp_path / "p"), pipeline()
    noise = start_noise(pipe.bank, image_generators(5, 0, 4))
    asked = {"negative_prompt": "c c", "guidance_scale": 2.0, "num_images_per_prompt": 2, "output_type": "pt"}
    seen = []
    mine = pipe(PROMPTS[:2], seed=5, callback_on_step_end=lambda p, i, t, k: seen.append((i, t)), **asked).images
    stock_asked = asked | {"negative_prompt": ["c c"] * 2}
    wanted = stock(PROMPTS[:2], latents=noise, num_inference_steps=4, **stock_asked).images
    assert torch.allclose(mine, wanted, atol=1e-4)
    assert seen == [(i, row.timestep) for i, row in enumerate(pipe.plan.rows)]
    again = open_subject(tmp_path / "p", None, recipe(folder))
    assert torch.equal(again.stand_ins.null["encoder_hidden_states"], subject.stand_ins.null["encoder_hidden_states"])
    for wrong in ({"prompt": 3 * ["a"], "negative_prompt": ["b", "c"]}, {"negative_prompt": "b"}):
        with pytest.raises(HalfstepError, match="negative_prompt"):
            pipe(**wrong)
    with pytest.raises(HalfstepError, match="batch_size=2"):
        pipe(2)
    with pytest.raises(TypeError, match="eta"):
        pipe("a", eta=0.5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["text", "pixels"])
def test_diffusers_own_loader_opens_a_saved_pipeline(kind, folder, tmp_path, monkeypatch):
    """Offline, by the file that is shipped for it; oracle: the pipeline's own loader."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, chosen = (folder / "pipe", recipe(folder)) if kind == "text" else ("digits", Recipe())
    subject = open_subject(model, None, chosen)
    StepAwarePipeline(subject.stand_ins, subject.reference(), subject.encoder).save_pretrained(tmp_path / "p")
    given = {"custom_pipeline": custom.__file__, "trust_remote_code": True, "local_files_only": True}
    found = DiffusionPipeline.from_pretrained(tmp_path / "p", **given)
    wanted = StepAwarePipeline.from_pretrained(tmp_path / "p")
    assert isinstance(found, StepAwarePipeline) and found.plan == wanted.plan
    asked = {"prompt": PROMPTS} if kind == "text" else {"batch_size": 2}
    few = {"output_type": "pt", "plan": fewer_steps(wanted.plan, 2)}
    assert torch.equal(found(**asked, **few).images, wanted(**asked, **few).images)
    found.save_pretrained(tmp_path / "again")
    assert StepAwarePipeline.from_pretrained(tmp_path / "again").plan == wanted.plan


def test_a_scale_for_rows_of_several_weights_is_refused(folder):
    subject = open_subject(folder / "pipe", None, recipe(folder))
    plan = subject.reference().with_entries(["full", "full|full*2", "full|", "full"])
    pipe = StepAwarePipeline(subject.stand_ins, plan, subject.encoder)
    with pytest.raises(HalfstepError, match="one weight"):
        pipe("a", guidance_scale=4.0)


@torch.no_grad()
def test_sample_draws_what_the_prompts_say(folder, tmp_path):
    """Oracle: the stock pipeline, on the same noise; pixels to one of 255."""
    from PIL import Image

    verbs.sample(str(folder / "pipe"), tmp_path / "out", recipe(folder, "seed=4"), count=3)
    assert "conditional on text" in " ".join(open_subject(folder / "pipe", None, recipe(folder)).read())
    noise = start_noise(open_subject(folder / "pipe", None, recipe(folder)).stand_ins, image_generators(4, 0, 3))
    wanted = pipeline()(PROMPTS, num_inference_steps=4, guidance_scale=3.0, latents=noise, output_type="pt").images
    for k in range(3):
        found = torch.tensor(list(Image.open(tmp_path / "out" / f"{k:06d}.png").convert("L").getdata()))
        assert (found - 255 * wanted[k].flatten()).abs().max() <= 1
