"""Reuse of features. Oracles: the plain call bit for bit, forward hooks' record of what ran, lines in closed form."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from halfstep.core.errors import ModelError
from halfstep.nets.architectures import ROWS, narrowed, slices_for
from halfstep.nets.denoiser import Memo, predictor
from halfstep.nets.masks import Masking, Pattern, mask_all
from halfstep.nets.models import filled_model
from halfstep.nets.reuse import OUT, Forwards, cut_count, forecast, leaving, require_cut, shallow, taking, tapped
from halfstep.nets.slices import cut_all
from tiny import SDXL, cond_for_net, ode_unet, text_unet, unet, uvit, wavelet_unet
from transformers_tiny import dit
from transformers_tiny import inputs_of as dit_inputs_of

deep = partial(unet, channels=(8, 16, 16), size=16, attend=True)
MODELS = {
    "one layer a level": partial(unet, size=16),
    "two": partial(deep, layers_per_block=2),
    "three": partial(deep, layers_per_block=3),
    "one level": partial(unet, channels=(8,), layers_per_block=2, size=16),
    "resnets that resample": partial(
        deep,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
    ),
    "no middle": partial(deep, mid_block_type=None),
    "Fourier times, centred": partial(deep, time_embedding_type="fourier", center_input_sample=True),
    "scale and shift": partial(deep, resnet_time_scale_shift="scale_shift", add_attention=False),
    "classes": partial(deep, num_class_embeds=3),
    "U-ViT": partial(uvit, sample_size=16, depth=6),
    "U-ViT of classes": partial(uvit, sample_size=16, num_class_embeds=3, mlp_time_embed=True),
    "text": partial(text_unet, sample_size=16, layers_per_block=2),
    "text with sizes": partial(text_unet, sample_size=16, **SDXL),
    "wavelets": partial(wavelet_unet, sample_size=16, layers_per_block=2, num_class_embeds=3),
}


def made(name: str) -> nn.Module:
    """A net no weight of which is trivial."""
    model = MODELS[name]()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def inputs_of(model, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    size = model.config.sample_size
    return torch.randn(2, 1, size, size, generator=draw), torch.tensor([3, 700]), cond_for_net(model, 2, seed)


def plain(model, inputs):
    return predictor(model)(*inputs, Memo())


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_tapped_call_and_a_pass_on_fresh_features_are_the_plain_call_bit_for_bit(name):
    model = made(name)
    inputs, cuts = inputs_of(model), [*range(cut_count(model)), OUT]
    wanted = plain(model, inputs)
    found, kept = tapped(model, *inputs, cuts)
    assert torch.equal(found, wanted) and set(kept) == set(cuts)
    for cut in cuts:
        alone, one = tapped(model, *inputs, [cut])
        assert torch.equal(alone, wanted) and set(one) == {cut} and torch.equal(one[cut], kept[cut])
        assert torch.equal(shallow(model, *inputs, cut, kept[cut]), wanted)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_there_is_a_cut_for_every_skip_and_a_timestep_may_be_a_number_of_no_axes(name):
    """Oracle: the parts that join two states, counted in the net."""
    model = made(name)
    net = getattr(model, "net", model)
    joins = net.out_blocks if hasattr(net, "out_blocks") else [r for block in net.up_blocks for r in block.resnets]
    assert cut_count(model) == len(joins)
    sample, _, cond = inputs_of(model)
    now = torch.tensor(7)
    found, kept = tapped(model, sample, now, cond, [0])
    assert torch.equal(found, plain(model, (sample, now, cond)))
    assert torch.equal(shallow(model, sample, now, cond, 0, kept[0]), found)


def ran(model, call) -> list[nn.Module]:
    """The leaves that a call runs."""
    seen: list[nn.Module] = []
    leaves = [m for m in model.modules() if not list(m.children())]
    handles = [m.register_forward_hook(lambda m, _i, _o: seen.append(m)) for m in leaves]
    call()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_shallow_pass_runs_less_the_lower_the_cut_and_leaves_the_middle_out(name):
    model = made(name)
    inputs, count = inputs_of(model), cut_count(model)
    _, kept = tapped(model, *inputs, range(count))
    whole = ran(model, lambda: plain(model, inputs))
    parts = [ran(model, lambda c=cut: shallow(model, *inputs, c, kept[c])) for cut in range(count)]
    for less, more in zip(parts, [*parts[1:], whole], strict=True):
        assert set(less) <= set(more) and (less != more or MODELS[name] is MODELS["no middle"])
    net = getattr(model, "net", model)
    assert net.mid_block is None or not set(net.mid_block.modules()) & set(parts[-1])


@pytest.mark.parametrize("name", ["two", "U-ViT", "text", "wavelets"])
@torch.no_grad()
def test_features_of_another_input_are_the_deep_part_of_that_input(name):
    """Oracle: the cut at the middle block, by a hook that puts the other input's state there."""
    model = made(name)
    first, second = inputs_of(model, 1), inputs_of(model, 2)
    cut = cut_count(model) - 1
    _, kept = tapped(model, *first, [cut])
    middle = getattr(model, "net", model).mid_block
    handle = middle.register_forward_hook(lambda _m, _i, _o: kept[cut])
    wanted = plain(model, second)
    handle.remove()
    assert torch.equal(shallow(model, *second, cut, kept[cut]), wanted)
    assert not torch.equal(wanted, plain(model, second))


@pytest.mark.parametrize("row", [row for row in ROWS if row.slim and row.cuts], ids=lambda row: row.name)
@torch.no_grad()
def test_slices_and_masks_are_cut_like_any_net(row):
    names = {"UViT2DModel": "U-ViT", "UNet2DConditionModel": "text"}
    model = dit() if row.name.startswith("DiT") else made(names.get(row.name, "two"))
    inputs = inputs_of(model) if not row.name.startswith("DiT") else dit_inputs_of(model)
    narrow = row.kind.from_config(narrowed(row, model.config, 0.5)).eval()
    narrow.load_state_dict(cut_all(model.state_dict(), slices_for(row, model.config, 0.5)))
    names = tuple(n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.in_features % 4 == 0)
    mask = Masking(Pattern.parse("2:4"), tuple(f"{name}.weight" for name in names)[:4])
    masked = filled_model(row.kind.from_config(model.config), mask_all(model.state_dict(), mask.names, mask.pattern))
    for one in (narrow, masked):
        found, kept = tapped(one, *inputs, [1])
        assert torch.equal(found, plain(one, inputs)) and not torch.equal(found, plain(model, inputs))
        assert torch.equal(shallow(one, *inputs, 1, kept[1]), found)


class _Called(nn.Module):
    """Any function of a net as a module, so that `functional_call` reaches it."""

    def __init__(self, model, call):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *given):
        return self.call(self.model, *given)


@pytest.mark.parametrize("name", ["two", "U-ViT", "text", "wavelets"])
def test_weights_of_elsewhere_run_and_are_reached_by_gradients(name):
    model, other = made(name), MODELS[name](seed=5)
    inputs = inputs_of(model)
    weights = {f"model.{n}": p.detach().clone().requires_grad_() for n, p in other.named_parameters()}
    call = torch.func.functional_call
    found, kept = call(_Called(model, tapped), weights, (*inputs, [1]))
    assert torch.equal(found, plain(other, inputs))
    again = call(_Called(model, shallow), weights, (*inputs, 1, kept[1].detach()))
    assert torch.equal(again, found)
    again.sum().backward()
    reached = {n for n, w in weights.items() if w.grad is not None}
    assert 0 < len(reached) < len(weights)


@torch.no_grad()
def test_a_compiled_net_is_cut_inside():
    model = made("two")
    inputs = inputs_of(model)
    found, kept = tapped(torch.compile(model), *inputs, [2])
    assert torch.equal(shallow(model, *inputs, 2, kept[2]), found) and torch.equal(found, plain(model, inputs))


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("down", "up"), [("SkipDownBlock2D", "UpBlock2D"), ("DownBlock2D", "SkipUpBlock2D"), ("KDownBlock2D", "UpBlock2D")]
)
def test_blocks_that_hand_on_more_than_one_state_are_refused_by_name(down, up):
    model = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(32, 32), layers_per_block=1,
        norm_num_groups=8, down_block_types=("DownBlock2D", down), up_block_types=(up, "UpBlock2D"),
    )  # fmt: skip
    with pytest.raises(ModelError) as error:
        require_cut(model, 0, "here")
    assert (down if down != "DownBlock2D" else up) in str(error.value) and "out" in str(error.value)
    require_cut(model, OUT, "here")


def test_a_family_without_cuts_is_refused_and_gives_its_whole_output():
    model = ode_unet()
    with pytest.raises(ModelError, match="ContinuousUNet2DModel, which has no cuts"):
        tapped(model, torch.randn(1, 1, 8, 8), torch.tensor([5]), {}, [0])
    sample, now = torch.randn(1, 1, 8, 8), torch.tensor([5])
    with torch.no_grad():
        found, kept = tapped(model, sample, now, {}, [OUT])
        assert torch.equal(found, plain(model, (sample, now, {}))) and torch.equal(kept[OUT], found)


@pytest.mark.parametrize("cut", [-1, 12, 10**9])
def test_a_cut_that_the_net_does_not_have_is_refused_with_those_it_has(cut):
    with pytest.raises(ModelError, match=rf"cut {cut}, expected 0 to 11, or 'out'"):
        require_cut(made("three"), cut, "here")


# --- forecasts --------------------------------------------------------------------------------------------------------

times = st.lists(st.floats(0, 999), min_size=2, max_size=2, unique=True).filter(lambda t: abs(t[0] - t[1]) > 1)


@given(times, st.floats(0, 999), st.floats(-3, 3), st.floats(-3, 3))
def test_order_1_is_exact_on_features_that_are_linear_in_the_timestep_whatever_the_gaps(known, time, level, slope):
    at = lambda t: torch.full((2, 3), level + slope * t / 1000, dtype=torch.float64)  # noqa: E731
    found = forecast([(t, at(t)) for t in known], time, 1)
    assert torch.allclose(found, at(time), atol=1e-9)


@given(times, st.floats(0, 999))
def test_order_0_is_the_newest_and_so_is_order_1_at_its_own_time(known, time):
    features = [torch.randn(2, 3) for _ in known]
    pairs = list(zip(known, features, strict=True))
    assert forecast(pairs, time, 0) is features[-1]
    assert torch.allclose(forecast(pairs, known[-1], 1), features[-1])


def test_one_time_alone_has_no_slope():
    features = torch.randn(2, 3)
    assert forecast([(5.0, features)], 1.0, 1) is features


@torch.no_grad()
def test_a_memo_holds_the_last_two_times_and_of_one_time_the_newer_call():
    model, memo = made("two"), Memo()
    samples = [inputs_of(model, seed)[0] for seed in range(5)]
    for time, sample in zip([900.0, 700.0, 700.0, 200.0], samples, strict=False):
        leaving(Forwards.of(model), "full", [1, OUT], time)(sample, torch.tensor(time), {}, memo)
    assert {key: [time for time, _ in kept] for key, kept in memo.items()} == {
        ("full", "1"): [700.0, 200.0],
        ("full", "out"): [700.0, 200.0],
    }
    left = tapped(model, samples[2], torch.tensor(700.0), {}, [1])[1][1]
    assert torch.equal(memo["full", "1"][0][1], left)
    before = {key: [one.clone() for _, one in kept] for key, kept in memo.items()}
    found = taking(Forwards.of(model), "full", 1, 1, 100.0)(samples[4], torch.tensor(100.0), {}, memo)
    late = tapped(model, samples[3], torch.tensor(200.0), {}, [1])[1][1]
    wanted = shallow(model, samples[4], torch.tensor(100.0), {}, 1, late + 0.2 * (late - left))  # 100 / 500 further
    assert torch.allclose(found, wanted, atol=1e-5)
    assert all(torch.equal(a, b) for key in memo for a, (_, b) in zip(before[key], memo[key], strict=True))


def test_what_was_not_left_cannot_be_taken():
    model = made("two")
    with pytest.raises(ModelError, match="no features of 'full' at cut 1"):
        taking(Forwards.of(model), "full", 1, 0, 100.0)(*inputs_of(model), Memo())
