"""Skipped ranges of blocks. Oracles: stock diffusers bit for bit, forward hooks' record, an evaluation by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock

from halfstep.core.errors import ModelError
from halfstep.nets.architectures import architecture_of
from halfstep.nets.blocks import skipped
from halfstep.nets.denoiser import Memo, prediction_of, predictor
from halfstep.nets.reuse import Forwards, cut_count, leaving, shallow, taking, tapped
from transformers_tiny import dit, flux, inputs_of, pixart, sd3

MODELS = {
    "DiT": dit,
    "DiT without a learned variance": partial(dit, out_channels=None),
    "DiT, gated": partial(dit, activation_fn="geglu", num_layers=3),
    "PixArt": pixart,
    "PixArt of one size": partial(
        pixart, use_additional_conditions=True, num_attention_heads=3, cross_attention_dim=24
    ),
    "SD3": sd3,
    "SD3.5": partial(sd3, dual_attention_layers=(0, 1), qk_norm="rms_norm"),
    "Flux": flux,
    "Flux, guided": partial(flux, guidance_embeds=True, num_layers=3, num_single_layers=2),
    "two blocks": partial(dit, num_layers=2),
}
BLOCKS = (BasicTransformerBlock, JointTransformerBlock, FluxTransformerBlock, FluxSingleTransformerBlock)


def called(model, seed: int = 0):
    sample, timestep, cond = inputs_of(model, seed)
    if getattr(model, "use_additional_conditions", False):
        cond["added_cond_kwargs"] = {"resolution": torch.tensor([[8.0, 8]] * 2), "aspect_ratio": torch.ones(2, 1)}
    return sample, timestep, cond


def stock(model, inputs) -> torch.Tensor:
    """The whole output of diffusers' own call."""
    sample, timestep, cond = inputs
    return model(sample, timestep=timestep, **cond, return_dict=False)[0]


def ran(model, call) -> list[int]:
    """The blocks that a call runs, by number."""
    blocks = [m for m in model.modules() if isinstance(m, BLOCKS)]
    seen: list[int] = []
    handles = [b.register_forward_hook(lambda *_, i=i: seen.append(i)) for i, b in enumerate(blocks)]
    call()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_tapped_call_and_a_pass_on_fresh_features_are_the_stock_call_bit_for_bit(name):
    model = MODELS[name]()
    inputs, cuts, rows = called(model), architecture_of(model).cuts, range(cut_count(model))
    wanted = stock(model, inputs)
    found, kept = cuts.tapped(model, *inputs, rows)
    assert torch.equal(found, wanted) and set(kept) == set(rows)
    for cut in rows:
        assert torch.equal(cuts.shallow(model, *inputs, cut, kept[cut]), wanted)
        alone, one = cuts.tapped(model, *inputs, [cut])
        assert torch.equal(alone, wanted) and torch.equal(one[cut], kept[cut])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_house_predicts_the_first_half_where_a_variance_stands_beside(name):
    model = MODELS[name]()
    sample, timestep, cond = inputs = called(model)
    wanted = stock(model, inputs)
    if wanted.shape[1] == 2 * sample.shape[1]:
        wanted = wanted[:, : sample.shape[1]]
    assert torch.equal(predictor(model)(*inputs, Memo()), wanted)
    prediction, kept = tapped(model, *inputs, [0, "out"])
    assert torch.equal(prediction, wanted) and torch.equal(kept["out"], wanted)
    assert torch.equal(shallow(model, *inputs, 0, kept[0]), wanted)
    now = timestep[0]  # of no axes, as the loop has it
    both = stock(model, (sample, now.expand(2), cond))
    assert torch.equal(predictor(model)(sample, now, cond, Memo()), prediction_of(both, sample))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_cut_runs_one_block_more_than_the_one_below_it_from_both_ends(name):
    model = MODELS[name]()
    inputs, cuts = called(model), architecture_of(model).cuts
    total = cut_count(model) + 1
    kept = cuts.tapped(model, *inputs, range(total - 1))[1]
    for cut in range(total - 1):
        left_out = skipped(cut, total)
        seen = ran(model, lambda cut=cut: cuts.shallow(model, *inputs, cut, kept[cut]))
        assert seen == [i for i in range(total) if i not in left_out] and len(seen) == cut + 1
    assert list(skipped(0, total)) == list(range(1, total))


@torch.no_grad()
def test_what_a_shallow_pass_adds_is_what_the_range_added_to_another_sample():
    """Oracle: diffusers' own call, with a hook that puts the earlier difference in the place of the blocks' own."""
    model, added = dit(), []
    before, now = called(model, 0), called(model, 1)
    kept, block = tapped(model, *before, [2])[1][2], model.transformer_blocks[2]
    handle = block.register_forward_hook(lambda _, given, out: added.append(out - given[0]))
    stock(model, before)
    handle.remove()
    handle = block.register_forward_hook(lambda _, given, __: given[0] + added[0])
    wanted = stock(model, now)[:, :2]
    handle.remove()
    assert torch.allclose(shallow(model, *now, 2, kept), wanted, atol=1e-5)


@torch.no_grad()
def test_the_rounding_that_is_kept_makes_a_far_range_exact_where_a_plain_sum_is_not():
    """Oracle: x + (y - x) against y, in half precision too."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, y = (s * torch.randn(100_000, generator=torch.Generator().manual_seed(k)) for k, s in ((0, 30.0), (1, 0.1)))
        x, y = x.to(dtype), y.to(dtype)
        difference = y - x
        rounding = y - (x + difference)
        assert not torch.equal(x + difference, y) and torch.equal(x + difference + rounding, y)


@torch.no_grad()
def test_a_straight_line_through_two_calls_is_taken_at_the_third():
    model = sd3()
    memo = Memo()
    first, second, third = (called(model, k) for k in range(3))
    for inputs, time in ((first, 900.0), (second, 700.0)):
        leaving(Forwards.of(model), "full", [1], time)(*inputs, memo)
    (_, a), (_, b) = memo["full", "1"]
    wanted = shallow(model, *third, 1, b + (b - a) * (400 - 700) / (700 - 900))
    assert torch.allclose(taking(Forwards.of(model), "full", 1, 1, 400.0)(*third, memo), wanted, atol=1e-5)


@pytest.mark.parametrize("make", [dit, sd3, flux], ids=["DiT", "SD3", "Flux"])
def test_an_option_that_no_pass_knows_is_refused_by_its_name(make):
    model = make()
    sample, timestep, cond = called(model)
    with pytest.raises(ModelError, match="skip_layers"):
        tapped(model, sample, timestep, cond | {"skip_layers": [1]}, [0])
    tapped(model, sample, timestep, cond | {"skip_layers": None}, [0])


def test_a_net_of_one_block_has_no_cut():
    with pytest.raises(ModelError, match="1 block"):
        cut_count(dit(num_layers=1))


# --- what pipelines hand in beside ------------------------------------------------------------------------------------


def residuals(count: int, tokens: int, width: int) -> list[torch.Tensor]:
    return [torch.randn(2, tokens, width, generator=torch.Generator().manual_seed(k)) for k in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@torch.no_grad()
def test_residuals_of_a_controlnet_are_added_as_stock_does_sd3(count):
    model = sd3()
    sample, timestep, cond = called(model)
    exact(model, (sample, timestep, cond | {"block_controlnet_hidden_states": residuals(count, 16, 16)}))


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize(("double", "single"), [(1, 1), (2, 3), (3, 2), (2, 0)])
@torch.no_grad()
def test_residuals_of_a_controlnet_are_added_as_stock_does_flux(double, single, repeat):
    model = flux(num_layers=3)
    sample, timestep, cond = called(model)
    cond = cond | {"controlnet_block_samples": residuals(double, 6, 16), "controlnet_blocks_repeat": repeat}
    if single:
        cond["controlnet_single_block_samples"] = residuals(single, 6, 16)
    exact(model, (sample, timestep, cond))


def exact(model, inputs) -> None:
    """Fresh rows and passes on fresh features are stock's."""
    wanted, cuts = stock(model, inputs), architecture_of(model).cuts
    found, kept = cuts.tapped(model, *inputs, range(cut_count(model)))
    assert torch.equal(found, wanted)
    assert all(torch.equal(cuts.shallow(model, *inputs, cut, one), wanted) for cut, one in kept.items())


@pytest.mark.parametrize("make", [sd3, flux], ids=["SD3", "Flux"])
@torch.no_grad()
def test_the_scale_of_a_lora_holds_inside_a_pass_and_not_behind_it(make):
    """Oracle: stock's own call with the same scale."""
    from peft import LoraConfig

    model = make()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    sample, timestep, cond = called(model)
    plain = stock(model, (sample, timestep, cond))
    scaled = sample, timestep, cond | {"joint_attention_kwargs": {"scale": 0.5}}
    exact(model, scaled)
    assert scaled[2]["joint_attention_kwargs"] == {"scale": 0.5}
    assert not torch.equal(stock(model, scaled), plain) and torch.equal(stock(model, (sample, timestep, cond)), plain)
    exact(model, (sample, timestep, cond))
