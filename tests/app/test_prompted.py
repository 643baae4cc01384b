"""Pipelines of several text encoders through the house. Oracle: the stock pipeline, on the same prompts and noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from halfstep import attach, attached
from halfstep.app import verbs
from halfstep.app.subject import open_subject
from halfstep.core.errors import HalfstepError, ModelError
from halfstep.core.plan import StepPlan
from halfstep.core.process import FLOW_SCHEDULERS
from halfstep.core.recipe import Recipe
from halfstep.engine.bank import Bank
from halfstep.engine.sampling import image_generators, sample_images, start_noise
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.methods.slimmable import Supernet
from halfstep.search.arms import Stock
from pipelines import controlnet, ddpm, flux, ip_adapter, pixart, sd3, sdxl, stable_diffusion

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("own_cache")
PROMPTS = ["a b c", "b", "c a"]
MADE = {"sdxl": sdxl, "pixart": pixart, "sd3": sd3}
"""Of grey 8x8 pictures: their pixels are features enough."""
OPTIONS: dict[str, dict[str, Any]] = {"pixart": {"use_resolution_binning": False}}


def stock(kind: str) -> Any:
    return MADE[kind](colours=1, sample_size=4)


def saved(kind: str, place: Any) -> Any:
    stock(kind).save_pretrained(place / "pipe")
    (place / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return place / "pipe"


def recipe(place, *edits: str) -> Recipe:
    small = ["sample.steps=4", "sample.batch=4", "sample.guidance=3", "eval.features=pixels"]
    return Recipe().edit([f"data.prompts={place / 'prompts.txt'}", *small, *edits])


def drawn(kind: str, pipe: Any, steps: int, noise: torch.Tensor, prompts=PROMPTS, **more: Any) -> torch.Tensor:
    options = {"guidance_scale": 3.0, "output_type": "pt", **OPTIONS.get(kind, {}), **more}
    return pipe(prompts, num_inference_steps=steps, latents=noise, **options).images


@torch.no_grad()
@pytest.mark.parametrize("kind", MADE)
def test_guided_pictures_are_those_of_the_stock_pipeline(kind, tmp_path):
    subject = open_subject(saved(kind, tmp_path), None, recipe(tmp_path))
    bank, plan = subject.stand_ins, subject.reference()
    noise = start_noise(bank, image_generators(0, 0, 3))
    wanted = drawn(kind, stock(kind), 4, noise)
    [found] = sample_images(bank, plan, 3, seed=0, batch=3, conditions=subject.conditions)
    assert torch.allclose(found / 2 + 0.5, wanted, atol=1e-4)
    under = attach(stock(kind), plan)
    assert torch.equal(drawn(kind, under, 4, noise), wanted)  # every row is fresh and full


@torch.no_grad()
@pytest.mark.parametrize("kind", MADE)
def test_a_saved_pipeline_has_its_encoders_and_takes_prompts(kind, tmp_path):
    subject = open_subject(saved(kind, tmp_path), None, recipe(tmp_path))
    StepAwarePipeline(subject.stand_ins, subject.reference(), subject.encoder).save_pretrained(tmp_path / "p")
    pipe = StepAwarePipeline.from_pretrained(tmp_path / "p")
    noise = start_noise(pipe.bank, image_generators(5, 0, 2))
    mine = pipe(PROMPTS[:2], seed=5, negative_prompt="c c", output_type="pt").images
    wanted = drawn(kind, stock(kind), 4, noise, PROMPTS[:2], negative_prompt=["c c"] * 2)
    assert torch.allclose(mine, wanted, atol=1e-4)
    again = open_subject(tmp_path / "p", None, recipe(tmp_path))
    assert again.conditions.content == subject.conditions.content


@torch.no_grad()
def test_every_sampler_that_a_flow_is_searched_over_runs_under_its_pipeline(tmp_path):
    """Oracle: our own loop, on the same noise."""
    subject = open_subject(saved("sd3", tmp_path), None, recipe(tmp_path))
    arms = [arm for _, arm in Stock(subject.stand_ins, subject.process, lambda plan: plan).at(5)]
    assert {arm.base.sampler.name for arm in arms} == set(FLOW_SCHEDULERS)
    noise = start_noise(subject.stand_ins, image_generators(0, 0, 3))
    for arm in arms:
        [wanted] = sample_images(subject.stand_ins, arm.base, 3, seed=0, batch=3, conditions=subject.conditions)
        with attached(stock("sd3"), arm.base) as pipe:
            found = drawn("sd3", pipe, arm.base.sampler.steps, noise)
        assert torch.allclose(found, wanted / 2 + 0.5, atol=1e-4), arm.told


@pytest.mark.slow
@pytest.mark.parametrize("kind", MADE)
def test_a_tuned_plan_runs_under_the_stock_pipeline(kind, tmp_path):
    """The whole way: prompts alone, sampler, reuse and guidance searched, attached."""
    small = "search.images=256 search.converged=300 search.error_images=4 search.fit=3 search.genes=2 search.arms=1"
    more = "search.final_images=256 search.race=4 search.reuse=0 eval.images=256 eval.bootstrap=20 eval.repeats=1"
    edits = [*small.split(), *more.split(), "sample.steps=6", "sample.timed=2", "sample.batch=64", "shrink.scales=0.99"]
    folder = saved(kind, tmp_path)
    verbs.tune(str(folder), None, tmp_path / "run", recipe(tmp_path, *edits), budget=0.5)
    plan = StepPlan.load(tmp_path / "run" / "plan.json")
    assert plan.guidance == 3.0 and plan.macs <= 0.5 * 12 * plan.prices["full"].macs
    pipe = attach(stock(kind), tmp_path / "run")
    noise = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert drawn(kind, pipe, plan.sampler.steps, noise).isfinite().all()
    assert kind != "sd3" or plan.sampler.name in FLOW_SCHEDULERS


@pytest.mark.parametrize("kind", MADE)
def test_prompts_that_no_encoder_reads_to_their_end_are_refused(kind, tmp_path):
    folder = saved(kind, tmp_path)
    (tmp_path / "prompts.txt").write_text("a " * 200 + "\n")
    with pytest.raises(HalfstepError, match="tokens, expected") as error:
        open_subject(folder, None, recipe(tmp_path))
    assert "\n" not in str(error.value)


def test_what_is_not_carried_is_refused_by_name(tmp_path):
    flux().save_pretrained(tmp_path / "flux")
    (tmp_path / "prompts.txt").write_text("a\n")
    with pytest.raises(HalfstepError, match=r"without a sample_size.*plan_for"):
        open_subject(tmp_path / "flux", None, recipe(tmp_path))
    pipe = saved("sdxl", tmp_path)
    index = (pipe / "model_index.json").read_text()
    (pipe / "model_index.json").write_text(index.replace("StableDiffusionXLPipeline", "StableDiffusionPipeline"))
    with pytest.raises(HalfstepError, match=r"added_cond_kwargs\.text_embeds of 16"):
        open_subject(pipe, None, recipe(tmp_path))


def loaded(what: str) -> Any:
    """A pipeline into whose U-Net a LoRA or an IP-Adapter was loaded."""
    pipe = stable_diffusion()
    if what == "LoRA":
        peft = pytest.importorskip("peft")
        pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    else:
        pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet)])
    return pipe


@pytest.mark.parametrize("what", ["LoRA", "IP-Adapter"])
def test_what_was_loaded_into_a_net_is_refused_where_it_would_be_left_out(what, tmp_path):
    pipe = loaded(what)
    for make in (lambda: Supernet(pipe.unet, (1.0, 0.5)), lambda: Bank({"full": pipe.unet}, "full", "epsilon")):
        with pytest.raises(ModelError, match=f"an? {what} beside its weights") as error:
            make()
        assert "\n" not in str(error.value)
    pipe.save_pretrained(tmp_path / "pipe")
    with pytest.raises(ModelError, match=what):
        open_subject(tmp_path / "pipe", None, recipe(tmp_path))


def test_a_lora_that_is_fused_is_carried():
    pipe = loaded("LoRA")
    pipe.unet.fuse_lora()
    fused = {name.replace(".base_layer", ""): one for name, one in pipe.unet.state_dict().items()}
    pipe.unet.unload_lora()
    assert torch.equal(Bank({"full": pipe.unet}, "full", "epsilon")["full"].state_dict()[TO_Q], fused[TO_Q])
    assert not torch.equal(stable_diffusion().unet.state_dict()[TO_Q], fused[TO_Q])


TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"


def test_a_pipeline_that_tells_its_denoiser_more_is_refused(tmp_path):
    controlnet().save_pretrained(tmp_path / "pipe")
    with pytest.raises(ModelError, match="StableDiffusionControlNetPipeline with its controlnet"):
        open_subject(tmp_path / "pipe", None, recipe(tmp_path))


def test_the_support_matrix_says_what_is_tuned_here():
    page = Path(__file__).parents[2] / "docs" / "pipelines.md"
    rows = [line.strip("|").split("|") for line in page.read_text().splitlines() if line.startswith("| `")]
    told = {cells[0].strip(" `") for cells in rows if cells[5].strip() == "✓"}
    assert told == {type(make()).__name__ for make in (*MADE.values(), stable_diffusion, ddpm)}  # and test_verbs
