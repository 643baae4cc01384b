"""Oracles: plain `UNet2DModel`s, hand-sliced weights, manual accumulation of gradients, MAC counts of the DDSM spec."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DModel
from scipy.stats import chisquare

from halfstep.errors import ModelError
from halfstep.profiling import macs_by_kind
from halfstep.recipe import NoiseSpec, SlimSpec
from halfstep.slices import cut
from halfstep.slimmable import Supernet, narrow_config, sandwich_objective, skeleton, slices_for, sort_channels
from halfstep.train import Batch, Diffusion

WIDTHS = (1.0, 0.75, 0.5, 0.25)
CIFAR = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
CONFIGS = {
    "attention": {},
    "two layers, RGB": {"layers_per_block": 2, "in_channels": 3, "out_channels": 3},
    "class-conditional": {"num_class_embeds": 10},
    "class as timestep": {"class_embed_type": "timestep"},
    "class as embedding": {"class_embed_type": "identity"},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift"},
    "fourier time": {"time_embedding_type": "fourier"},
    "learned time": {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    "resnet sampling": {"downsample_type": "resnet", "upsample_type": "resnet"},
    "one head": {"attention_head_dim": None},
    "heads wider than the narrow net": {"attention_head_dim": 32},
    "no attention": {
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "add_attention": False,
    },
    "own time size": {"time_embedding_dim": 64},
    "shifted frequencies": {"freq_shift": 1, "flip_sin_to_cos": False},
    "dropout": {"dropout": 0.1},
}


def make(seed: int = 0, **changes) -> UNet2DModel:
    torch.manual_seed(seed)
    config = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    }
    model = UNet2DModel(**{**config, **changes}).eval()
    for name, p in model.named_parameters():  # norms and biases must not be trivial
        if p.ndim == 1 and p.requires_grad and "time_proj" not in name:
            p.data += 0.2 * torch.randn_like(p)
    return model


def inputs(model: UNet2DModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    x = torch.randn(2, model.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(1))
    kind = model.config.class_embed_type
    labels = torch.tensor([1, 3]) if model.config.num_class_embeds or kind == "timestep" else None
    if kind == "identity":
        labels = torch.randn(2, 64, generator=torch.Generator().manual_seed(2))
    return x, torch.tensor([3, 600]), labels


def run(model: UNet2DModel, x, t, labels):
    return model(x, t, **({} if labels is None else {"class_labels": labels})).sample


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_every_width_is_a_plain_unet_that_stock_diffusers_loads(name, tmp_path):
    model = make(**CONFIGS[name])
    supernet = Supernet(model, WIDTHS)
    x, t, labels = inputs(model)
    assert torch.equal(supernet.predict(1.0)(x, t, labels), run(model, x, t, labels))
    for width in WIDTHS:
        subnet = supernet.subnet(width)
        subnet.save_pretrained(tmp_path / str(width))
        loaded = UNet2DModel.from_pretrained(tmp_path / str(width)).eval()
        out = run(loaded, x, t, labels)
        assert out.shape == x.shape and out.isfinite().all()
        assert (out - supernet.predict(width)(x, t, labels)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_sorting_channels_keeps_the_function_and_sorts(name):
    model = make(**CONFIGS[name])
    args = inputs(model)
    ordered = sort_channels(model)
    assert torch.allclose(run(ordered, *args), run(model, *args), rtol=1e-4, atol=2e-5)
    block = ordered.mid_block.resnets[0]
    score = (block.norm2.weight.abs() * block.conv2.weight.flatten(2).norm(dim=(0, 2))).view(4, -1).sum(1)
    assert (score.diff() <= 1e-5).all()


@pytest.mark.parametrize("concat", ["aligned", "leading"])
def test_nets_are_nested_and_gradients_stay_inside_the_slices(concat):
    model = make()
    supernet = Supernet(model, WIDTHS, concat)
    x, t, labels = inputs(model)
    before = supernet.predict(0.5)(x, t, labels)
    before.square().sum().backward()
    slices = supernet.slices[0.5]
    for name, p in model.named_parameters():
        inside = torch.zeros_like(p)
        view = cut(torch.arange(p.numel()).view(p.shape), slices[name]).flatten()
        inside.view(-1)[view] = 1
        assert (p.grad[inside == 0] == 0).all(), name
        assert p.grad[inside == 1].any() or "to_k.bias" in name, name  # a key bias shifts all scores alike
        p.data[inside == 0] += 1.0
    assert torch.equal(supernet.predict(0.5)(x, t, labels), before)
    model.conv_in.weight.data[0] += 0.1
    assert not torch.equal(supernet.predict(0.5)(x, t, labels), before)


def test_concatenated_inputs_are_sliced_by_segment_or_by_prefix():
    config = make().config
    name = "up_blocks.0.resnets.0.conv1.weight"  # hidden 32 and skip 32 channels at full width
    assert slices_for(config, 0.5, "aligned")[name][1] == ((0, 16), (32, 16))
    assert slices_for(config, 0.5, "leading")[name][1] == ((0, 32),)
    assert slices_for(config, 0.5, "aligned")["up_blocks.0.resnets.1.norm1.weight"][0] == ((0, 16), (32, 8))
    full = slices_for(config, 1.0, "aligned")[name][1]
    weight = torch.randn(32, 64, 3, 3)
    assert torch.equal(cut(weight, ((((0, 32),)), full, ((0, 3),), ((0, 3),))), weight)


def test_group_norm_at_a_width_is_a_fresh_one_with_the_leading_affine():
    model = make()
    narrow = Supernet(model, WIDTHS).subnet(0.5).down_blocks[0].resnets[0].norm2
    wide = model.down_blocks[0].resnets[0].norm2
    fresh = torch.nn.GroupNorm(4, 8, eps=wide.eps)
    fresh.load_state_dict({"weight": wide.weight[:8], "bias": wide.bias[:8]})
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(narrow(x), fresh(x))


def test_half_width_takes_exactly_every_second_frequency():
    model = make(freq_shift=0)
    narrow = Supernet(model, WIDTHS).subnet(0.5)
    t = torch.tensor([7.0, 500.0])
    wide, slim = model.time_proj(t), narrow.time_proj(t)
    columns = torch.cat(
        [torch.arange(s, s + n) for s, n in slices_for(model.config, 0.5)["time_embedding.linear_1.weight"][1]]
    )
    assert torch.allclose(wide[:, columns], slim, atol=1e-6)


def test_macs_of_the_cifar_net_are_the_papers():
    config = dict(skeleton({"_class_name": "UNet2DModel", **CIFAR}).config)
    for width, published in zip(WIDTHS, (6054, 3407, 1515, 380), strict=True):
        kinds = macs_by_kind(skeleton(narrow_config(config, width)))
        assert (kinds["conv"] + kinds["linear"]) / 1e6 == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize("widths", [(1.0, 0.3), (1.0, 0.1), (1.0, 0.6)])
def test_widths_without_whole_groups_are_refused_with_usable_ones(widths):
    with pytest.raises(ModelError) as error:
        Supernet(make(), widths)
    assert "0.25" in str(error.value) and "\n" not in str(error.value)


def test_other_models_are_refused():
    with pytest.raises(ModelError):
        Supernet(torch.nn.Linear(2, 2), WIDTHS)


# --- the sandwich -----------------------------------------------------------------------------------------------------


def gradients(model):
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_a_sandwich_step_is_the_sum_of_three_independent_gradients():
    model, diffusion = make(), Diffusion(NoiseSpec())
    supernet = Supernet(model, WIDTHS)
    batch = Batch(torch.randn(4, 1, 8, 8), None)
    torch.manual_seed(5)
    for loss in sandwich_objective(supernet, diffusion.draw, SlimSpec(distill="none"))(batch):
        loss.backward()
    found = gradients(model)
    model.zero_grad()
    torch.manual_seed(5)
    middle = (0.75, 0.5)[int(torch.randint(2, (1,)))]
    total = 0
    for width in (1.0, 0.25, middle):
        noisy, timestep, target = diffusion.draw(batch.clean)
        total = total + (supernet.predict(width)(noisy, timestep, None) - target).square().mean()
    total.backward()
    for a, b in zip(found, gradients(model), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


class Spy(Supernet):
    """A supernet that writes down which widths are asked for and runs a cheap stand-in of the right shape."""

    def __init__(self, *args):
        super().__init__(*args)
        self.asked = []

    def predict(self, width):
        def stand_in(sample, timestep, labels):
            self.asked.append(width)
            return sample * 0.0

        return stand_in


def test_the_middle_width_is_uniform_and_both_ends_are_in_every_step():
    spy = Spy(make(), WIDTHS)
    objective = sandwich_objective(spy, Diffusion(NoiseSpec()).draw, SlimSpec(distill="none"))
    torch.manual_seed(0)
    for _ in range(2000):
        list(objective(Batch(torch.zeros(1, 1, 8, 8), None)))
    steps = [tuple(spy.asked[i : i + 3]) for i in range(0, 6000, 3)]
    assert all(step[:2] == (1.0, 0.25) for step in steps)
    counts = [sum(step[2] == w for step in steps) for w in (0.75, 0.5)]
    assert sum(counts) == 2000 and chisquare(counts).pvalue > 1e-3


def test_shared_noise_is_one_draw_and_own_noise_three():
    draws = []
    diffusion = Diffusion(NoiseSpec())

    def draw(clean):
        draws.append(diffusion.draw(clean))
        return draws[-1]

    for shared, expected in ((True, 1), (False, 3)):
        draws.clear()
        objective = sandwich_objective(Spy(make(), WIDTHS), draw, SlimSpec(distill="none", shared_noise=shared))
        list(objective(Batch(torch.zeros(2, 1, 8, 8), None)))
        assert len(draws) == expected


def test_distillation_targets_the_teacher_for_narrow_widths_only():
    supernet, diffusion = Supernet(make(), (1.0, 0.5)), Diffusion(NoiseSpec())
    batch = Batch(torch.randn(4, 1, 8, 8), None)
    losses = {}
    for distill in ("none", "dense"):
        torch.manual_seed(3)
        spec = SlimSpec(widths=(1.0, 0.5), distill=distill)
        objective = sandwich_objective(supernet, diffusion.draw, spec, lambda x, t, y: torch.full_like(x, 100.0))
        losses[distill] = [float(loss) for loss in objective(batch)]
    assert losses["none"][0] == losses["dense"][0]
    assert losses["dense"][1] > 5000 > losses["none"][1]
