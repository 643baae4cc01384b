"""Oracles: stock `UNet2DModel`s, forward hooks, NumPy prefixes, gradients added by hand, MACs of the DDSM spec."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from scipy.stats import chisquare

from halfstep.core.errors import ModelError
from halfstep.core.process import Process
from halfstep.core.recipe import SlimSpec
from halfstep.engine.profiling import count_macs, macs_by_kind
from halfstep.methods.slimmable import (
    Supernet,
    sandwich_objective,
    supernet_of,
)
from halfstep.nets.architectures import ARCHITECTURES, skeleton, slices_for, sort_channels
from halfstep.nets.denoiser import Memo, cond_of
from halfstep.nets.slices import cut
from halfstep.nets.unet import narrow_config
from halfstep.training.train import Batch, Diffusion
from tiny import unet

UNET = ARCHITECTURES["UNet2DModel"]
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
    "attention without heads, two layers": {"attention_head_dim": None, "layers_per_block": 2},
    "own time size": {"time_embedding_dim": 64},
    "own time size, class as embedding": {"time_embedding_dim": 64, "class_embed_type": "identity"},
    "scale and shift, class, two layers": {
        "resnet_time_scale_shift": "scale_shift",
        "num_class_embeds": 10,
        "layers_per_block": 2,
    },
    "resnet sampling, scale and shift": {
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
    },
    "resnet blocks that sample": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    },
    "three unequal levels, two layers": {
        "block_out_channels": (16, 48, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
    },
    "no middle": {"mid_block_type": None},
    "own groups in the middle's attention": {"attn_norm_num_groups": 8},
    "skip blocks": {  # these have 32 norm groups whatever the config says, so that no width below 1/2 fits
        "block_out_channels": (64, 128),
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        "in_channels": 3,
        "out_channels": 3,
    },
    "shifted frequencies": {"freq_shift": 1, "flip_sin_to_cos": False},
    "dropout": {"dropout": 0.1},
}


def widths_of(name: str) -> tuple[float, ...]:
    return (1.0, 0.5) if name == "skip blocks" else WIDTHS


def make(seed: int = 0, **changes) -> UNet2DModel:
    model = unet(seed, (16, 32), attend=True, **({"attention_head_dim": 8} | changes))
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


def asked(predict, x, t, labels=None):
    return predict(x, t, cond_of(labels), Memo())


def run(model: UNet2DModel, x, t, labels):
    return model(x, t, **({} if labels is None else {"class_labels": labels})).sample


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_every_width_is_a_plain_unet_that_stock_diffusers_loads(name, tmp_path):
    model = make(**CONFIGS[name])
    supernet = Supernet(model, widths_of(name))
    x, t, labels = inputs(model)
    whole = run(model, x, t, labels)
    assert torch.equal(asked(supernet.predict(1.0), x, t, labels), whole)
    assert torch.equal(run(supernet.subnet(1.0), x, t, labels), whole)
    for width in supernet.widths:
        subnet = supernet.subnet(width)
        assert type(subnet) is UNet2DModel
        subnet.save_pretrained(tmp_path / str(width))
        loaded = UNet2DModel.from_pretrained(tmp_path / str(width)).eval()
        out = run(loaded, x, t, labels)
        assert out.shape == x.shape and out.isfinite().all()
        assert torch.equal(out, run(subnet, x, t, labels))
        assert (out - asked(supernet.predict(width), x, t, labels)).abs().max() <= 1e-5
        assert width == 1.0 or not torch.allclose(out, whole, atol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_leading_slices_are_prefixes_of_every_weight(name):
    model = make(**CONFIGS[name])
    supernet = Supernet(model, widths_of(name), "leading")
    args = inputs(model)
    for width in supernet.widths[1:]:
        subnet = supernet.subnet(width)
        weights = model.state_dict()
        for key, value in subnet.state_dict().items():
            if key.endswith("embedding.linear_1.weight") or (
                ".time_emb_proj." in key and model.config.resnet_time_scale_shift == "scale_shift"
            ):
                continue  # chosen by frequency, or made of two halves: see the tests below
            prefix = weights[key].numpy()[tuple(slice(n) for n in value.shape)]
            assert np.array_equal(value.numpy(), prefix), key
        assert (run(subnet, *args) - asked(supernet.predict(width), *args)).abs().max() <= 1e-5


@torch.no_grad()
def test_scale_and_shift_are_each_cut_to_their_own_prefix():
    model = make(**CONFIGS["resnet sampling, scale and shift"])
    wide, slim = (m.state_dict() for m in (model, Supernet(model, WIDTHS).subnet(0.5)))
    for key in (key for key in slim if ".time_emb_proj." in key):
        whole, half = wide[key].chunk(2), slim[key].chunk(2)
        for a, b in zip(whole, half, strict=True):
            assert np.array_equal(b.numpy(), a.numpy()[tuple(slice(n) for n in b.shape)]), key


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_sorting_channels_keeps_the_function(name):
    model = make(**CONFIGS[name])
    args = inputs(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = run(model, *args)
    ordered = sort_channels(model)
    assert (run(ordered, *args) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # it is a copy
    assert any(not torch.equal(value, before[key]) for key, value in ordered.state_dict().items())


def falling(values: torch.Tensor) -> bool:
    return bool((values.diff(dim=-1) <= 1e-5 * values.abs().max()).all())


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_sorted_channels_fall_in_importance_group_by_group_and_inside_each_group(name):
    model = make(**CONFIGS[name])
    ordered = sort_channels(model)
    moved = 0
    for (where, block), (_, old) in zip(ordered.named_modules(), model.named_modules(), strict=True):
        if isinstance(block, ResnetBlock2D):

            def importance(b):
                return b.norm2.weight.abs() * b.conv2.weight.square().sum((0, 2, 3)).sqrt()

            found, was = importance(block), importance(old)
            groups = found.view(block.norm2.num_groups, -1)
            assert falling(groups.sum(1)) and falling(groups), where
            assert torch.allclose(found.sort()[0], was.sort()[0], rtol=1e-4)
            moved += int(not torch.equal(found, was))
        elif isinstance(block, Attention):
            value = block.to_v.weight.norm(dim=1) * block.to_out[0].weight.norm(dim=0)
            heads = value.view(block.heads, -1)
            assert falling(heads.sum(1)) and falling(heads), where
    assert moved


@pytest.mark.parametrize("concat", ["aligned", "leading"])
@pytest.mark.parametrize(
    "name",
    [
        "attention",
        "class-conditional",
        "class as timestep",
        "scale and shift, class, two layers",
        "fourier time",
        "learned time",
        "resnet sampling",
        "three unequal levels, two layers",
        "skip blocks",
    ],
)
def test_nets_are_nested_and_gradients_stay_inside_the_slices(name, concat):
    model = make(**CONFIGS[name])
    supernet = Supernet(model, widths_of(name), concat)
    x, t, labels = inputs(model)
    before = asked(supernet.predict(0.5), x, t, labels)
    before.square().sum().backward()
    slices = supernet.slices[0.5]
    for key, p in model.named_parameters():
        inside = torch.zeros_like(p)
        view = cut(torch.arange(p.numel()).view(p.shape), slices[key]).flatten()
        inside.view(-1)[view] = 1
        assert inside.sum() == view.numel() and (inside == 1).any()
        if p.requires_grad:
            assert (p.grad[inside == 0] == 0).all(), key
            assert p.grad[inside == 1].any() or "to_k.bias" in key, key  # a key bias shifts all scores alike
        p.data[inside == 0] += 1.0
    assert torch.equal(asked(supernet.predict(0.5), x, t, labels), before)
    for key in ("conv_in.weight", "conv_out.weight", "up_blocks.0.resnets.0.conv1.weight"):
        touched = cut(model.get_parameter(key).data, slices[key][:1])  # a view: the leading output channels
        touched[0] += 0.1
        after = asked(supernet.predict(0.5), x, t, labels)
        assert not torch.equal(after, before), key
        before = after


def test_concatenated_inputs_are_sliced_by_segment_or_by_prefix():
    config = make().config
    name = "up_blocks.0.resnets.0.conv1.weight"  # hidden 32 and skip 32 channels at full width
    assert slices_for(UNET, config, 0.5, "aligned")[name][1] == ((0, 16), (32, 16))
    assert slices_for(UNET, config, 0.5, "leading")[name][1] == ((0, 32),)
    assert slices_for(UNET, config, 0.5, "aligned")["up_blocks.0.resnets.1.norm1.weight"][0] == ((0, 16), (32, 8))
    full = slices_for(UNET, config, 1.0, "aligned")[name][1]
    weight = torch.randn(32, 64, 3, 3)
    assert torch.equal(cut(weight, ((((0, 32),)), full, ((0, 3),), ((0, 3),))), weight)


@torch.no_grad()
def test_the_two_concatenation_modes_coincide_at_full_width_and_differ_below():
    model = make()
    args = inputs(model)
    aligned, leading = (Supernet(model, WIDTHS, concat) for concat in ("aligned", "leading"))
    assert torch.equal(asked(aligned.predict(1.0), *args), asked(leading.predict(1.0), *args))
    whole = model.state_dict()
    for concat in ("aligned", "leading"):
        for key, dims in slices_for(UNET, model.config, 1.0, concat).items():
            assert torch.equal(cut(whole[key], dims), whole[key]), (concat, key)
    for width in WIDTHS[1:]:
        one, other = (slices_for(UNET, model.config, width, concat) for concat in ("aligned", "leading"))
        differing = {key for key in one if one[key] != other[key]}
        owners = {key.rsplit(".", 2)[-2] for key in differing}
        assert differing and all(key.startswith("up_blocks.") for key in differing)
        assert owners == {"norm1", "conv1", "conv_shortcut"}
        assert not torch.allclose(asked(aligned.predict(width), *args), asked(leading.predict(width), *args), atol=1e-3)


@pytest.mark.parametrize(
    "name",
    ["attention", "two layers, RGB", "three unequal levels, two layers", "resnet blocks that sample", "skip blocks"],
)
@torch.no_grad()
def test_aligned_slices_part_each_concatenation_where_the_running_network_joins_it(name):
    model = make(**CONFIGS[name])
    narrow = Supernet(model, widths_of(name)).subnet(0.5)
    joins = {}
    for net in (model, narrow):
        skips = [net.conv_in.out_channels]  # channels of every skip in the order in which they are pushed
        for block in net.down_blocks:
            block.register_forward_hook(lambda _, __, out, skips=skips: skips.extend(r.shape[1] for r in out[1]))
        found = joins[net] = {}
        for b, block in enumerate(net.up_blocks):
            for r, resnet in enumerate(block.resnets):

                def join(_, args, where=f"up_blocks.{b}.resnets.{r}", skips=skips, found=found):
                    skip = skips.pop()
                    found[where] = (args[0].shape[1] - skip, skip)

                resnet.register_forward_pre_hook(join)
        run(net, *inputs(model))
        assert skips == []
    slices = slices_for(UNET, model.config, 0.5, "aligned")
    for where, (hidden, _) in joins[model].items():
        slim_hidden, slim_skip = joins[narrow][where]
        assert slices[f"{where}.conv1.weight"][1] == ((0, slim_hidden), (hidden, slim_skip))


@pytest.mark.parametrize("width", WIDTHS)
@torch.no_grad()
def test_every_layer_has_its_share_of_the_channels_and_whole_groups(width):
    # heads of 4 fit every level at every width; diffusers rounds attention down to whole heads where they do not
    model = make(**CONFIGS["three unequal levels, two layers"], attention_head_dim=4)
    narrow = Supernet(model, WIDTHS).subnet(width)
    sizes = {}
    for net in (model, narrow):
        for where, layer in net.named_modules():
            if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
                layer.register_forward_hook(
                    lambda layer, _, out, key=(net, where): sizes.__setitem__(
                        key, out.shape[1 if isinstance(layer, torch.nn.Conv2d) else -1]
                    )
                )
            if isinstance(layer, torch.nn.GroupNorm):
                assert layer.num_groups == 4 and layer.num_channels % 4 == 0
        run(net, *inputs(model))
    for where in (where for net, where in sizes if net is narrow):
        share = 1 if where == "conv_out" else width
        assert sizes[narrow, where] == share * sizes[model, where], where


def test_group_norm_at_a_width_is_a_fresh_one_with_the_leading_affine():
    model = make()
    narrow = Supernet(model, WIDTHS).subnet(0.5).down_blocks[0].resnets[0].norm2
    wide = model.down_blocks[0].resnets[0].norm2
    fresh = torch.nn.GroupNorm(4, 8, eps=wide.eps)
    fresh.load_state_dict({"weight": wide.weight[:8], "bias": wide.bias[:8]})
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(narrow(x), fresh(x))


@pytest.mark.parametrize("changes", [{}, {"flip_sin_to_cos": False}, CONFIGS["fourier time"], CONFIGS["learned time"]])
@torch.no_grad()
def test_half_width_reads_exactly_the_time_features_that_it_has(changes):
    model = make(**{"freq_shift": 0, **changes})
    narrow = Supernet(model, WIDTHS).subnet(0.5)
    t = torch.tensor([7, 500])
    wide, slim = model.time_proj(t), narrow.time_proj(t)
    pieces = slices_for(UNET, model.config, 0.5)["time_embedding.linear_1.weight"][1]
    columns = torch.cat([torch.arange(s, s + n) for s, n in pieces])
    assert torch.allclose(wide[:, columns], slim, atol=1e-6)


@pytest.mark.parametrize("freq_shift", [0, 1])
@pytest.mark.parametrize("width", WIDTHS[1:])
def test_other_widths_read_the_nearest_frequencies(width, freq_shift):
    config = make(freq_shift=freq_shift, block_out_channels=(32, 32)).config
    wide, slim = 16, int(16 * width)
    exponents = np.arange(wide) / (wide - freq_shift)  # frequency = 10000 ** -exponent
    wanted = np.arange(slim) / (slim - freq_shift)
    pieces = slices_for(UNET, config, width)["time_embedding.linear_1.weight"][1]
    columns = np.concatenate([np.arange(s, s + n) for s, n in pieces])
    assert np.array_equal(columns[slim:], columns[:slim] + wide)  # sine and cosine alike
    off = np.abs(exponents[columns[:slim]] - wanted)
    nearest = np.abs(exponents[None] - wanted[:, None]).min(1)
    assert np.allclose(off, nearest)


@torch.no_grad()
def test_dropout_is_on_in_training_mode_and_off_outside_it():
    model = make(**CONFIGS["dropout"])
    supernet, args = Supernet(model, WIDTHS), inputs(model)
    for width in WIDTHS:
        still = asked(supernet.predict(width), *args)
        assert torch.equal(asked(supernet.predict(width), *args), still)
        model.train()
        twin = supernet.subnet(width).train()
        outs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outs.append(asked(supernet.predict(width), *args))
        torch.manual_seed(1)
        assert torch.allclose(run(twin, *args), outs[0], atol=1e-5)
        assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
        assert not torch.equal(outs[0], still)
        model.eval()
        assert torch.equal(asked(supernet.predict(width), *args), still)


def test_macs_of_the_cifar_net_are_the_papers():
    config = dict(skeleton(UNET, {"_class_name": "UNet2DModel", **CIFAR}).config)
    for width, published in zip(WIDTHS, (6054, 3407, 1515, 380), strict=True):
        kinds = macs_by_kind(skeleton(UNET, narrow_config(config, width)))
        assert (kinds["conv"] + kinds["linear"]) / 1e6 == pytest.approx(published, rel=0.005)


def test_macs_fall_about_as_the_square_of_the_width():
    config = dict(skeleton(UNET, {"_class_name": "UNet2DModel", **CIFAR}).config)
    macs = {width: macs_by_kind(skeleton(UNET, narrow_config(config, width))) for width in WIDTHS}
    layers = {width: kinds["conv"] + kinds["linear"] for width, kinds in macs.items()}
    for width, count in layers.items():
        assert count / layers[1.0] == pytest.approx(width**2, rel=0.03)
    ordered = sorted(layers)
    assert [layers[width] for width in ordered] == sorted(layers.values())
    assert count_macs(skeleton(UNET, config)) == sum(macs[1.0].values())


@pytest.mark.parametrize("widths", [(1.0, 0.3), (1.0, 0.1), (1.0, 0.6), (0.0,), (1.0, 0.5, 0.45)])
def test_widths_without_whole_groups_are_refused_with_usable_ones(widths):
    with pytest.raises(ModelError) as error:
        Supernet(make(), widths)
    assert "0.25" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("channels", "groups"), [((16, 32), 4), ((24, 24), 8), ((24, 40), 8), ((96, 192), 32), ((112, 336), 16)]
)
def test_every_width_that_the_refusal_names_is_usable(channels, groups):
    config = {**make().config, "block_out_channels": channels, "norm_num_groups": groups}
    with pytest.raises(ModelError) as error:
        narrow_config(config, 0.97)
    named = [float(number) for number in re.findall(r"[\d.]+", str(error.value).partition("such as")[2])]
    assert named[-1] == 1.0
    for width in named:
        narrow = narrow_config(config, width)["block_out_channels"]
        assert all(c % groups == 0 and abs(c - full * width) < 0.01 for c, full in zip(narrow, channels, strict=True))


@pytest.mark.parametrize("kind", ["positional", "fourier", "learned"])
def test_an_odd_first_level_is_refused_where_it_halves_a_sine(kind):
    """12 x .75 = 9 channels in 3 groups: an AssertionError before."""
    options = {"num_train_timesteps": 1000} if kind == "learned" else {}
    model = make(block_out_channels=(12, 24), norm_num_groups=3, time_embedding_type=kind, **options)
    if kind != "positional":
        assert Supernet(model, (1.0, 0.75)).subnet(0.75).config.block_out_channels == (9, 18)
        return
    with pytest.raises(ModelError, match="even") as error:
        Supernet(model, (1.0, 0.75))
    named = [float(number) for number in re.findall(r"[\d.]+", str(error.value).partition("such as")[2])]
    assert named == [0.5, 1.0]
    for width in named:
        Supernet(model, (1.0, width))


@pytest.mark.parametrize("other", [torch.nn.Linear(2, 2), torch.nn.Module(), "a path"], ids=lambda o: type(o).__name__)
def test_other_models_are_refused(other):
    with pytest.raises(ModelError) as error:
        Supernet(other, WIDTHS)
    assert "UNet2DModel" in str(error.value) and "\n" not in str(error.value)


# --- the sandwich -----------------------------------------------------------------------------------------------------


def gradients(model):
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("changes", [{}, {"num_class_embeds": 10}], ids=["plain", "class-conditional"])
def test_a_sandwich_step_is_the_sum_of_three_independent_gradients(changes):
    model, diffusion = make(**changes), Diffusion(Process())
    supernet = Supernet(model, WIDTHS)
    labels = torch.tensor([1, 2, 3, 4]) if changes else None
    batch = Batch(torch.randn(4, 1, 8, 8), cond_of(labels))
    torch.manual_seed(5)
    for loss in sandwich_objective(supernet, diffusion.draw, SlimSpec(distill="none"))(batch):
        loss.backward()
    found = gradients(model)
    torch.manual_seed(5)
    middle = (0.75, 0.5)[int(torch.randint(2, (1,)))]
    separate, timesteps = [], []
    for width in (1.0, 0.25, middle):
        model.zero_grad()
        noisy, timestep, target = diffusion.draw(batch.clean)
        (asked(supernet.predict(width), noisy, timestep, labels) - target).square().mean().backward()
        timesteps.append(timestep)
        separate.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()])
    assert not torch.equal(timesteps[0], timesteps[1])  # the draws are independent
    for total, parts in zip(found, zip(*separate, strict=True), strict=True):
        assert torch.allclose(total, sum(parts), atol=1e-6)


class Spy(Supernet):
    """A supernet that writes down which widths are asked for and runs a cheap stand-in of the right shape."""

    def __init__(self, *args):
        super().__init__(*args)
        self.asked = []

    def predict(self, width, through=None):
        def stand_in(sample, timestep, cond, memo):
            self.asked.append(width)
            return sample * 0.0

        return stand_in


def test_the_middle_width_is_uniform_and_both_ends_are_in_every_step():
    spy = Spy(make(), WIDTHS)
    objective = sandwich_objective(spy, Diffusion(Process()).draw, SlimSpec(distill="none"))
    torch.manual_seed(0)
    for _ in range(2000):
        list(objective(Batch(torch.zeros(1, 1, 8, 8), {})))
    steps = [tuple(spy.asked[i : i + 3]) for i in range(0, 6000, 3)]
    assert all(step[:2] == (1.0, 0.25) for step in steps)
    counts = [sum(step[2] == w for step in steps) for w in (0.75, 0.5)]
    assert sum(counts) == 2000 and chisquare(counts).pvalue > 1e-3


def test_shared_noise_is_one_draw_and_own_noise_three():
    draws = []
    diffusion = Diffusion(Process())

    def draw(clean, generator, share):
        draws.append(diffusion.draw(clean, generator, share))
        return draws[-1]

    for shared, expected in ((True, 1), (False, 3)):
        draws.clear()
        objective = sandwich_objective(Spy(make(), WIDTHS), draw, SlimSpec(distill="none", shared_noise=shared))
        list(objective(Batch(torch.zeros(2, 1, 8, 8), {})))
        assert len(draws) == expected


def test_more_middle_widths_are_drawn_for_a_thicker_sandwich():
    spy = Spy(make(), WIDTHS)
    objective = sandwich_objective(spy, Diffusion(Process()).draw, SlimSpec(distill="none", sandwich=6))
    losses = list(objective(Batch(torch.zeros(1, 1, 8, 8), {})))
    assert len(losses) == 6 and spy.asked[:2] == [1.0, 0.25] and set(spy.asked[2:]) <= {0.75, 0.5}


@pytest.mark.parametrize(("widths", "asked"), [((1.0,), [1.0]), ((0.5, 1.0), [1.0, 0.5])])
def test_a_sandwich_without_middle_widths_has_its_ends_only(widths, asked):
    spy = Spy(make(), widths)
    objective = sandwich_objective(spy, Diffusion(Process()).draw, SlimSpec(widths=widths, distill="none"))
    assert len(list(objective(Batch(torch.zeros(1, 1, 8, 8), {})))) == len(asked)
    assert spy.asked == asked


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("distill", ["none", "widest", "dense"])
def test_the_dense_teacher_teaches_all_widths_and_the_widest_net_the_others(distill, shared):
    model, teacher_net, diffusion = make(), make(9), Diffusion(Process())
    supernet = Supernet(model, (1.0, 0.5))
    batch = Batch(torch.randn(4, 1, 8, 8), {})
    spec = SlimSpec(widths=(1.0, 0.5), distill=distill, shared_noise=shared)
    teacher = lambda x, t, *_: teacher_net(x, t).sample  # noqa: E731
    torch.manual_seed(3)
    losses = list(sandwich_objective(supernet, diffusion.draw, spec, teacher)(batch))
    torch.manual_seed(3)
    expected = []
    for width in (1.0, 0.5):
        if width == 1.0 or not shared:
            x, t, target = diffusion.draw(batch.clean)
        if distill == "dense" or (width != 1.0 and distill == "widest"):
            target = (model if distill == "widest" else teacher_net)(x, t).sample.detach()
        expected.append((asked(supernet.predict(width), x, t, None) - target).square().mean())
    for a, b in zip(losses, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-5)
    losses[1].backward()  # the teacher is a target: no gradient passes through it
    found = gradients(model)
    model.zero_grad()
    expected[1].backward()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, gradients(model), strict=True))
    assert all(p.grad is None for p in teacher_net.parameters())


@pytest.mark.parametrize("concat", ["aligned", "leading"])
def test_a_supernet_without_width_one_is_the_same_net_cut_to_its_widest(concat):
    dense = make(block_out_channels=(32, 64)).eval()
    spec = SlimSpec(widths=(0.75, 0.5, 0.25), concat=concat)
    whole, cut = supernet_of(dense, replace(spec, widths=(1.0, 0.75, 0.5, 0.25))), supernet_of(dense, spec)
    assert cut.widths == spec.widths and cut.own == 0.75
    assert cut.model.config.block_out_channels == (24, 48) and dense.config.block_out_channels == (32, 64)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        assert torch.allclose(asked(cut.predict(0.75), x, t, None), asked(whole.predict(0.75), x, t, None), atol=1e-5)
        for width in spec.widths:
            subnet = cut.subnet(width)
            assert subnet.config.block_out_channels == (32 * width, 64 * width)
            assert torch.allclose(subnet(x, t).sample, asked(cut.predict(width), x, t, None), atol=1e-5)


def test_a_supernet_of_one_width_trains_that_width():
    supernet = supernet_of(make(), SlimSpec(widths=(0.5,)))
    losses = list(
        sandwich_objective(supernet, Diffusion(Process()).draw, SlimSpec(widths=(0.5,), distill="none"))(
            Batch(torch.zeros(1, 1, 8, 8), {})
        )
    )
    assert len(losses) == 1 and supernet.model.config.block_out_channels[0] * 2 == make().config.block_out_channels[0]


@pytest.mark.slow
def test_after_a_short_training_the_whole_net_is_no_worse_than_the_narrowest_at_any_noise():
    model, diffusion = make(block_out_channels=(16, 16)), Diffusion(Process())
    supernet = Supernet(model, WIDTHS)
    objective = sandwich_objective(supernet, diffusion.draw, SlimSpec(distill="none"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    torch.manual_seed(0)
    bars = torch.full((16, 1, 8, 8), -1.0)  # every image is one bright column or row
    for i in range(8):
        bars[i, 0, :, i], bars[8 + i, 0, i] = 1.0, 1.0
    start, end = None, None
    for _ in range(60):
        optimizer.zero_grad()
        losses = []
        for loss in objective(Batch(bars, {})):
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        start, end = start or sum(losses), sum(losses)
    assert end < 0.5 * start
    clean = bars.repeat(4, 1, 1, 1)
    noise = torch.randn(clean.shape)
    with torch.no_grad():
        for low in (0, 250, 500, 750):
            t = torch.randint(low, low + 250, (len(clean),))
            noisy = diffusion.scheduler.add_noise(clean, noise, t)
            wide, narrow = ((asked(supernet.predict(w), noisy, t, None) - noise).square().mean() for w in (1.0, 0.25))
            assert wide <= narrow + 0.02, low
