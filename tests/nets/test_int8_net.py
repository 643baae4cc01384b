"""Nets in eight bits: torch's own fake quantisation is the oracle of the numbers, ONNX Runtime and OpenVINO compute in
eight bits what is simulated here."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from halfstep.core.errors import ModelError
from halfstep.nets.denoiser import Memo, predictor
from halfstep.nets.int8 import quantised, spans_of, watched, within
from halfstep.nets.reuse import shallow, tapped
from tiny import cond_for_net, text_unet, unet

SPAN = (-1.5, 2.0, -3.0, 1.0)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def oracle(value: torch.Tensor, low: float, high: float) -> torch.Tensor:
    scale = (high - low) / 255
    return torch.fake_quantize_per_tensor_affine(value, scale, round(-low / scale), 0, 255)


@pytest.mark.parametrize("span", [(-1.5, 2.0), (0.0, 3.0), (-0.28, 9.0), (-4.0, 0.0)])
def test_activations_are_rounded_as_torch_does(span):
    value = 3 * numbers(4, 1000)
    found, wanted = within(value, *span), oracle(value, *span)
    step = (span[1] - span[0]) / 255
    assert (found - wanted).abs().max() < 1.01 * step, "a tie may fall to either side"
    assert ((found - wanted).abs() > step / 2).float().mean() < 1e-3
    assert torch.equal(within(torch.zeros(3), *span), torch.zeros(3)), "padding stays zero"
    assert len(found.unique()) <= 256 and torch.allclose(within(found, *span), found)


@pytest.mark.parametrize("made", [lambda: nn.Conv2d(3, 5, 3, padding=1), lambda: nn.Linear(8, 5)])
def test_a_layer_computes_what_torch_simulates(made):
    torch.manual_seed(0)
    net = nn.Sequential(made())
    sample = numbers(2, 3, 8, 8)
    scale = net[0].weight.detach().flatten(1).abs().amax(1) / 127
    weight = torch.fake_quantize_per_channel_affine(net[0].weight, scale, torch.zeros(5).int(), 0, -128, 127)
    inside = torch.func.functional_call(net[0], {"weight": weight, "bias": net[0].bias}, oracle(sample, *SPAN[:2]))
    found = quantised(net, {"0": SPAN})(sample)
    assert (found - oracle(inside, *SPAN[2:])).abs().max() < 1.01 * 4 / 255
    assert (found - oracle(inside, *SPAN[2:])).norm() < 0.01 * found.norm()
    assert torch.equal(net[0].weight, quantised(net, {"0": SPAN})[0].weight), "its own weights stay"


def test_a_channel_of_zeros_stays_one():
    net = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False))
    with torch.no_grad():
        net[0].weight[1] = 0
    found = quantised(net, {"0": SPAN})(numbers(1, 2, 4, 4))
    assert bool(found.isfinite().all()) and not found[:, 1].any() and found[:, 0].any()


@pytest.mark.parametrize("made", [lambda: unet(3, (8, 16)), lambda: text_unet(3)])
def test_a_net_predicts_nearly_the_same_and_its_cuts_are_those_of_it(made):
    net = made()
    sample, cond, t = numbers(2, 1, 8, 8), cond_for_net(net, 2), torch.tensor(300)
    whole = predictor(net)(sample, t, cond, Memo())
    with watched(net) as spans:
        predictor(net)(sample, t, cond, Memo())
    assert {"conv_in", "conv_out", "time_embedding.linear_1"}.isdisjoint(spans) and "mid_block.resnets.0.conv1" in spans
    assert not any("time_emb_proj" in name for name in spans)
    eight = quantised(net, spans)
    assert spans_of(eight) == spans and not spans_of(net)
    found = predictor(eight)(sample, t, cond, Memo())
    assert 0 < (found - whole).norm() / whole.norm() < 0.1
    assert torch.equal(predictor(net)(sample, t, cond, Memo()), whole), "the source is left alone"
    prediction, kept = tapped(eight, sample, t, cond, [0])
    assert torch.equal(prediction, found) and torch.equal(shallow(eight, sample, t, cond, 0, kept[0]), found)


@pytest.mark.parametrize(
    ("spans", "told"),
    [
        ({}, "got no layer"),
        ({"conv9": SPAN}, "'conv9', no layer"),
        ({"conv_norm_out": SPAN}, "'conv_norm_out', a GroupNorm, expected a Conv2d or a Linear"),
        ({"conv_in": (0.5, 1.0, -1.0, 1.0)}, r"ranges .* of 'conv_in'"),
        ({"conv_in": (0.0, 0.0, -1.0, 1.0)}, r"ranges .* of 'conv_in'"),
    ],
)
def test_what_fits_no_layer_is_refused_by_its_name(spans, told):
    with pytest.raises(ModelError, match=told):
        quantised(unet(0), spans)
