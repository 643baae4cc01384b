"""Banks of Stable Diffusion's U-Net. Oracles: the saved folder, stock diffusers, torch's own counter on a call."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch.utils.flop_counter import FlopCounterMode

from halfstep.core.errors import ModelError
from halfstep.engine.bank import Bank, calls_of
from halfstep.engine.conditions import cond_for
from halfstep.engine.entry import Cut, Entry, Own, Twin
from halfstep.engine.pricing import PriceBook
from halfstep.engine.profiling import Inputs, count_macs, example_inputs
from halfstep.engine.sampling import plan_for
from halfstep.methods.slimmable import Supernet
from halfstep.nets.denoiser import Memo, predictor
from halfstep.nets.masks import Masking, Pattern, mask_all
from halfstep.nets.models import filled_model
from halfstep.nets.reuse import shallow, tapped
from tiny import SDXL, cond_for_net, text_unet

CUT_NAMES = ("full~0", "full~1+")


def masked(model) -> tuple[UNet2DConditionModel, Masking]:
    """The same net with 2:4 in its feed-forward layers and cross-attention."""
    ends = (".ff.net.0.proj.weight", ".attn2.to_k.weight")
    names = tuple(name for name, _ in model.named_parameters() if name.endswith(ends))
    masking = Masking(Pattern.parse("2:4"), names)
    found = mask_all(model.state_dict(), names, masking.pattern)
    return filled_model(UNet2DConditionModel.from_config(model.config), found), masking


@pytest.fixture
def bank() -> Bank:
    model = text_unet(**SDXL)
    supernet = Supernet(model, (1.0, 0.5))
    (own, masking), (twin, _) = masked(text_unet(3, **SDXL)), masked(model)
    entries = {
        "full": model,
        "w0.50": Entry(supernet.subnet(0.5), Cut("full", supernet.slices[0.5])),
        "2:4": Entry(own, Own(), masking),
        "full 2:4": Entry(twin, Twin("full"), masking),
    }
    bank = Bank(entries, "full", "epsilon", null=cond_for_net(model, 1))
    return bank.with_reuse([0]).with_reuse([1], [1])


def inputs_of(bank: Bank) -> Inputs:
    return Inputs(torch.randn(2, 1, 8, 8), torch.tensor([3, 700]), cond_for_net(bank["full"]))


@torch.no_grad()
def test_a_bank_of_a_width_masks_and_reuse_is_saved_and_loaded(bank: Bank, tmp_path):
    bank.save_pretrained(tmp_path / "bank")
    loaded, inputs = Bank.from_pretrained(tmp_path / "bank"), inputs_of(bank)
    assert loaded.names == bank.names and set(CUT_NAMES) <= set(loaded.names)
    assert {name: one.weights for name, one in loaded.entries.items()} == {
        name: one.weights for name, one in bank.entries.items()
    }
    for name in bank.computed:
        found, kept = tapped(loaded[name], *inputs, [1])
        assert torch.equal(found, predictor(bank[name])(*inputs, Memo())), name
        assert torch.equal(shallow(bank[name], *inputs, 1, kept[1]), found)
        assert loaded.fingerprint(name) == bank.fingerprint(name)
    assert loaded.prices() == bank.prices() and loaded.tokens == bank.tokens == 5
    stock = UNet2DConditionModel.from_pretrained(tmp_path / "bank" / "full")
    assert torch.equal(predictor(stock)(*inputs, Memo()), predictor(bank["full"])(*inputs, Memo()))


def counted(call) -> int:
    """MACs of a call on real numbers. Attention has to run as two products, for those are what torch counts."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("tokens", [5, None])
def test_macs_are_those_that_torch_counts_in_a_call_of_the_length_of_text(bank: Bank, tokens):
    bank = bank if tokens else bank.with_null(None)
    for name in ("full", "w0.50"):
        model = bank[name]
        model.set_attn_processor(AttnProcessor())
        sample, timestep, cond = example_inputs(model, 1, tokens=tokens)
        assert cond["encoder_hidden_states"].shape[1] == (tokens or 77)
        assert bank.prices()[name].macs == counted(lambda: model(sample, timestep, **cond))  # noqa: B023
        _, kept = tapped(model, sample, timestep, cond, [1])
        less = counted(lambda: shallow(model, sample, timestep, cond, 1, kept[1]))  # noqa: B023
        assert bank.prices()[f"{name}~1+"].macs == less < bank.prices()[name].macs


def test_a_mask_counts_half_of_what_it_masks(bank: Bank):
    model, masking = bank["2:4"], bank.entries["2:4"].masking
    assert masking is not None
    tokens = {".ff.net.0.proj.weight": 16, ".attn2.to_k.weight": 5}  # pixels of the lower level, and the text's
    shapes = {name: model.get_parameter(name).shape for name in masking.names}
    spared = sum(math.prod(shape) * n for name, shape in shapes.items() for end, n in tokens.items() if end in name) / 2
    assert bank.prices()["2:4"].macs == count_macs(model, inputs=example_inputs(model, tokens=5)) - spared


def test_every_entry_is_timed_and_so_is_a_whole_trajectory(bank: Bank):
    assert set(calls_of(bank, 2)) == set(bank)
    ticks = iter(range(10**6))
    book = PriceBook(bank, 2, clock=lambda: float(next(ticks)))
    plan = book.priced(plan_for(bank, DDIMScheduler(), 3))
    assert plan.whole.us is not None and plan.whole.macs == 3 * bank.prices()["full"].macs
    costs = bank.costs(batch=2, repeats=1)
    assert {name: cost.macs for name, cost in costs.items()} == {n: p.macs for n, p in bank.prices().items()}


def test_images_of_a_text_model_need_a_text(bank: Bank):
    with pytest.raises(ModelError, match="no conditions, expected encoder_hidden_states and added_cond_kwargs"):
        cond_for(bank, 0, 2)
