"""DiT as a family of the house. Oracles: stock diffusers' pipeline and classes, and a supernet's weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel

from halfstep.core.errors import ModelError, PlanError
from halfstep.core.plan import Guide
from halfstep.core.process import Process
from halfstep.engine.bank import Bank
from halfstep.engine.entry import Cut, Entry, Reuse
from halfstep.engine.profiling import count_macs, example_inputs, reused_macs
from halfstep.engine.sampling import denoise, image_generators, plan_for, start_noise, to_images
from halfstep.methods.slimmable import Supernet
from halfstep.nets.architectures import architecture_of
from halfstep.nets.denoiser import Memo, class_count, predictor, require_same_shape
from halfstep.nets.models import build_model, load_model
from transformers_tiny import dit, flux, inputs_of, pixart, sd3

WIDTHS = (1.0, 0.75, 0.5, 0.25)


@torch.no_grad()
def test_a_plan_samples_the_pictures_of_stock_dit_pipeline_without_guidance():
    torch.manual_seed(5)
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    vae = AutoencoderKL(latent_channels=2, block_out_channels=(4,), norm_num_groups=2, **blocks).eval()
    model, labels = dit(), [2, 0]
    bank = Bank({"full": model}, "full", "epsilon", vae)
    plan = plan_for(bank, DDIMScheduler(clip_sample=False), 4, {"full": 1})
    generators = image_generators(0, 0, 2)
    mine = denoise(bank, plan, start_noise(bank, generators), generators, {"class_labels": torch.tensor(labels)})
    pipe = DiTPipeline(model, vae, DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    drawn = {"generator": image_generators(0, 0, 2), "num_inference_steps": 4, "output_type": "np"}
    stock = torch.from_numpy(pipe(labels, guidance_scale=1.0, **drawn).images).permute(0, 3, 1, 2) * 2 - 1
    assert torch.allclose(to_images(bank, mine), stock, atol=1e-5) and stock.std() > 0.1


@torch.no_grad()
def test_guides_under_the_null_class_are_stock_dit_pipelines_guidance():
    torch.manual_seed(5)
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    vae = AutoencoderKL(latent_channels=2, block_out_channels=(4,), norm_num_groups=2, **blocks).eval()
    model, null = dit(num_embeds_ada_norm=1000), {"class_labels": torch.tensor([1000])}
    bank = Bank({"full": model}, "full", "epsilon", vae, null=null)
    plan = plan_for(bank, DDIMScheduler(clip_sample=False), 4, {"full": 1}).with_guides([Guide("full", 4.0)] * 4)
    generators = image_generators(0, 0, 2)
    mine = denoise(bank, plan, start_noise(bank, generators), generators, {"class_labels": torch.tensor([7, 0])})
    pipe = DiTPipeline(model, vae, DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    drawn = {"generator": image_generators(0, 0, 2), "num_inference_steps": 4, "output_type": "np"}
    stock = torch.from_numpy(pipe([7, 0], guidance_scale=4.0, **drawn).images).permute(0, 3, 1, 2) * 2 - 1
    assert torch.allclose(to_images(bank, mine), stock, atol=1e-4)


@torch.no_grad()
def test_a_bank_of_dits_is_saved_and_loaded_with_its_widths_and_reuse(tmp_path):
    supernet = Supernet(dit(), (1.0, 0.5))
    entries = {"full": Entry(supernet.subnet(1.0))}
    entries["w0.50"] = Entry(supernet.subnet(0.5), Cut("full", supernet.slices[0.5]))
    bank = Bank(entries, "full", "epsilon").with_reuse([0, 1, "out"])
    bank.save_pretrained(tmp_path / "bank")
    again = Bank.from_pretrained(tmp_path / "bank")
    assert set(again) == set(bank) and {type(again[name]) for name in again.computed} == {DiTTransformer2DModel}
    scheduler = DDIMScheduler()
    plan = plan_for(bank, scheduler, 5, bank.prices()).with_entries(["full", "full~0", "full~1", "w0.50", "full~out"])
    generators = [image_generators(0, 0, 2) for _ in range(2)]
    cond = {"class_labels": torch.tensor([1, 2])}
    first, second = (
        denoise(b, plan, start_noise(b, g), g, cond) for b, g in zip((bank, again), generators, strict=True)
    )
    assert torch.equal(first, second)
    assert isinstance(again.entries["full~0"].weights, Reuse)


@pytest.mark.parametrize("gate", ["gelu-approximate", "geglu"])
@pytest.mark.parametrize("width", WIDTHS)
@torch.no_grad()
def test_a_width_of_the_supernet_is_its_subnet_and_stock_diffusers_loads_it(width, gate, tmp_path):
    model = dit(activation_fn=gate)
    supernet, inputs = Supernet(model, WIDTHS), inputs_of(model)
    subnet = supernet.subnet(width)
    wanted = supernet.predict(width)(*inputs, Memo())
    assert torch.allclose(predictor(subnet)(*inputs, Memo()), wanted, atol=1e-5)
    assert subnet.config.num_attention_heads == 4 * width
    subnet.save_pretrained(tmp_path)
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(predictor(loaded.eval())(*inputs, Memo()), predictor(subnet)(*inputs, Memo()))


def test_the_weights_of_a_width_are_trained_through_the_supernet():
    model = dit()
    Supernet(model, WIDTHS).predict(0.5)(*inputs_of(model), Memo()).square().sum().backward()
    gradient = model.transformer_blocks[0].norm1.linear.weight.grad
    touched = gradient.abs().sum(1) > 0
    assert torch.equal(touched.nonzero().flatten(), torch.cat([torch.arange(16) + 32 * k for k in range(6)]))


@torch.no_grad()
def test_widths_keep_to_each_chunk_of_adaptive_norms():
    """Oracle: the six chunks of stock's own layer, cut one by one."""
    model = dit()
    cut = Supernet(model, (1.0, 0.5)).subnet(0.5).transformer_blocks[0].norm1.linear.weight
    full = model.transformer_blocks[0].norm1.linear.weight.chunk(6)
    assert torch.equal(cut, torch.cat([part[:16, :16] for part in full]))


@torch.no_grad()
def test_channels_of_free_order_leave_the_net_as_it_is():
    for gate in ("gelu-approximate", "swiglu"):
        model = dit(activation_fn=gate)
        inputs = inputs_of(model)
        wanted, count = predictor(model)(*inputs, Memo()), 0
        for free in architecture_of(model).free(model):
            free.apply(free.by_score())
            count += 1
        assert torch.allclose(predictor(model)(*inputs, Memo()), wanted, atol=1e-5)
        assert count == 4 * (4 if gate == "swiglu" else 5)


@pytest.mark.parametrize("width", [0.3, 0.1])
def test_a_width_without_whole_heads_is_refused(width):
    with pytest.raises(ModelError, match="heads"):
        Supernet(dit(), (1.0, width))


def test_classes_and_a_learned_variance_are_read_from_the_config():
    assert class_count(dit().config) == 3 and class_count(pixart().config) == 0
    require_same_shape(dit().config, "bank")
    require_same_shape(dit(out_channels=None).config, "bank")
    with pytest.raises(ModelError, match="3 channels out"):
        require_same_shape(dit(out_channels=3).config, "bank")


def test_a_sampler_that_would_read_the_variance_is_refused_by_its_name():
    bank = Bank({"full": dit()}, "full", "epsilon")
    for kind in ("learned", "learned_range"):
        with pytest.raises(PlanError, match=f"variance_type '{kind}'"):
            plan_for(bank, DDPMScheduler(variance_type=kind), 4, {"full": 1})
    with pytest.raises(ModelError, match="variance_type 'learned_range'"):
        Process.of({"_class_name": "DDPMScheduler", "variance_type": "learned_range"})


@pytest.mark.parametrize("make", [dit, pixart, sd3, flux], ids=["DiT", "PixArt", "SD3", "Flux"])
def test_a_transformer_is_built_saved_loaded_and_priced(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(model)
    inputs = inputs_of(model)
    with torch.no_grad():
        assert torch.equal(predictor(loaded)(*inputs, Memo()), predictor(model)(*inputs, Memo()))
    assert type(build_model({**model.config, "_class_name": type(model).__name__}, where="here")) is type(model)
    whole = count_macs(model)
    cut = architecture_of(model).cuts.count(model) - 1
    assert 0 < reused_macs(model, 0) < reused_macs(model, cut) < whole


@pytest.mark.parametrize("make", [dit, pixart, sd3, flux], ids=["DiT", "PixArt", "SD3", "Flux"])
@torch.no_grad()
def test_an_example_condition_runs(make):
    model = make()
    if make is not flux:  # whose own size is 4,096 tokens
        inputs = example_inputs(model, 2, tokens=3)
        assert predictor(model)(*inputs, Memo()).shape == inputs.sample.shape
    else:
        sample, _, cond = example_inputs(model.to("meta"), 1, tokens=3)
        assert sample.shape == (1, 4096, 8) and cond["img_ids"].shape == (4096, 3)
