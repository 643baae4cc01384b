"""The wavelet and the net that resamples by it. Oracles: PyWavelets, pooling, published sizes."""

from __future__ import annotations

import numpy as np
import pytest
import pywt
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.core.errors import DataError, ModelError
from halfstep.engine.profiling import count_params, macs_by_kind
from halfstep.nets.wavelet import Gates, SpectralUNet2DModel, WaveletDown, WaveletUp, haar, inverse_haar
from tiny import wavelet_unet


def forced(module, values: tuple[float, float, float, float]):
    """The module with gates of these values, whatever it sees."""
    module.gate.forward = lambda x: torch.tensor(values).view(1, 4, 1, 1, 1)
    return module


# --- the wavelet ------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_haar_is_pywavelets_and_comes_back_with_its_energy(height, width, seed):
    x = torch.randn(2, 3, 2 * height, 2 * width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    bands = haar(x)
    low, (across_rows, across_columns, both) = pywt.dwt2(x.numpy(), "haar")
    for ours, theirs in zip(bands.unbind(1), (low, across_rows, across_columns, both), strict=True):
        assert np.allclose(ours.numpy(), theirs, atol=1e-12)
    assert torch.allclose(inverse_haar(bands), x, atol=1e-12)
    assert torch.allclose(bands.square().sum(), x.square().sum())


def test_bands_are_what_they_are_called():
    flat = haar(torch.full((1, 1, 4, 4), 3.0))
    assert (flat[:, 0] == 6).all() and not flat[:, 1:].any()
    columns = torch.arange(4.0).expand(1, 1, 4, 4)
    assert haar(columns)[:, 2].any() and not haar(columns)[:, [1, 3]].any()
    assert haar(columns.mT)[:, 1].any() and not haar(columns.mT)[:, [2, 3]].any()
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(2, 2)[None, None]
    assert haar(board)[:, 3].any() and not haar(board)[:, :3].any()


def test_gradients_flow_and_odd_sizes_are_refused():
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(haar, x) and torch.autograd.gradcheck(lambda y: inverse_haar(haar(y) ** 2), x)
    with pytest.raises(DataError, match="5x4"):
        haar(torch.zeros(1, 1, 5, 4))


# --- gated resampling -------------------------------------------------------------------------------------------------


def test_downsampling_is_pooling_or_decimation_for_these_gates():
    down, x = WaveletDown(8, True, (2.0, -2.0)), torch.randn(2, 8, 6, 6)
    assert torch.allclose(forced(down, (0.5, 0, 0, 0))(x), F.avg_pool2d(x, 2), atol=1e-6)
    assert torch.allclose(forced(down, (1, 0, 0, 0))(x), 2 * F.avg_pool2d(x, 2), atol=1e-6)
    assert torch.allclose(forced(down, (0.5, 0.5, 0.5, 0.5))(x), x[..., ::2, ::2], atol=1e-6)


def test_upsampling_is_nearest_or_the_inverse_transform_for_these_gates():
    up, x = WaveletUp(8, True, (2.0, -2.0)), torch.randn(2, 2, 6, 6)
    up.project = torch.nn.Identity()
    bands = haar(x)
    assert torch.allclose(forced(up, (1, 1, 1, 1))(bands.flatten(1, 2)), x, atol=1e-6)
    low = F.interpolate(bands[:, 0], scale_factor=2) / 2
    assert torch.allclose(forced(up, (1, 0, 0, 0))(bands.flatten(1, 2)), low, atol=1e-6)


@pytest.mark.parametrize("gates", [1, 8])
def test_gates_lie_between_0_and_1_start_near_averaging_and_see_the_mean_only(gates):
    gate, x = Gates(8, gates, (2.0, -2.0)), torch.randn(2, 8, 6, 6)
    found = gate(x)
    assert found.shape == (2, 4, gates, 1, 1) and ((found > 0) & (found < 1)).all()
    assert not torch.allclose(found[0], found[1])
    shuffled = x.flatten(2)[..., torch.randperm(36)].view_as(x)
    assert torch.allclose(gate(shuffled), found, atol=1e-6)
    assert found[:, 0].mean() > 0.8 and found[:, 1:].mean() < 0.2


def test_gates_of_the_network_answer_to_the_timestep():
    model, seen = wavelet_unet(), []
    gate = model.net.down_blocks[0].downsamplers[0].gate
    gate.register_forward_hook(lambda _m, _i, out: seen.append(out))
    x = torch.randn(1, 1, 8, 8)
    model(x, 0)
    model(x, 999)
    assert not torch.allclose(seen[0], seen[1], atol=1e-5)


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"gate": "scalar"}, {"num_class_embeds": 3}])
def test_it_saves_and_loads_as_a_diffusers_model(tmp_path, config):
    model, x = wavelet_unet(**config), torch.randn(2, 1, 8, 8)
    kwargs = {"class_labels": torch.tensor([0, 2])} if "num_class_embeds" in config else {}
    model.save_pretrained(tmp_path)
    again = SpectralUNet2DModel.from_pretrained(tmp_path)
    assert torch.equal(again(x, 3, **kwargs).sample, model(x, 3, **kwargs).sample)
    assert model(x, 3, **kwargs).sample.shape == x.shape


def test_published_sizes():
    """LDM's FFHQ layout at base 64: 7.85 G and 22.41 M with convolutions, 6.69 G and 21.12 M with wavelets."""
    from diffusers import UNet2DModel

    layout = {
        "sample_size": 64, "in_channels": 3, "out_channels": 3, "block_out_channels": (64, 128, 192, 256),
        "layers_per_block": 2, "attention_head_dim": 32, "norm_num_groups": 32,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    with torch.device("meta"):
        plain = UNet2DModel(**layout)
    slim = SpectralUNet2DModel(**layout)
    cost = {name: macs_by_kind(model) for name, model in (("plain", plain), ("slim", slim))}
    gmacs = {name: (kinds["conv"] + kinds["linear"]) / 1e9 for name, kinds in cost.items()}
    assert gmacs["plain"] == pytest.approx(7.85, rel=0.03) and gmacs["slim"] == pytest.approx(6.69, rel=0.03)
    assert count_params(plain) / 1e6 == pytest.approx(22.41, rel=0.03)
    assert count_params(slim) / 1e6 == pytest.approx(21.12, rel=0.03)
    assert gmacs["plain"] - gmacs["slim"] == pytest.approx(1.16, rel=0.05)


@pytest.mark.parametrize(
    "config",
    [
        {"sample_size": 9},
        {"block_out_channels": (18, 32), "norm_num_groups": 2},
        {"down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D")},
    ],
)
def test_sizes_that_do_not_fit_are_refused(config):
    with pytest.raises(ModelError, match="change the model's config"):
        wavelet_unet(**config)
