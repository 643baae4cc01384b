"""U-ViT. Oracles: published MACs, the released layout, a hand-written attention, the narrow nets' own forward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from halfstep.core.errors import ModelError
from halfstep.core.process import Process
from halfstep.core.recipe import SlimSpec
from halfstep.engine.profiling import count_macs, macs_by_kind
from halfstep.methods.slimmable import Supernet, sandwich_objective, supernet_of
from halfstep.nets.architectures import sort_channels
from halfstep.nets.denoiser import Memo, cond_of
from halfstep.nets.uvit import UViT2DModel
from halfstep.training.train import Batch, Diffusion
from tiny import uvit


def make(seed: int = 0, **config) -> UViT2DModel:
    model = uvit(seed, **config)
    for name, value in model.named_parameters():  # biases and norms start at 0 and 1, which hides mistakes
        if value.dim() == 1:
            torch.nn.init.normal_(value, mean=float(".norm" in name), std=0.2)
    return model


@pytest.mark.parametrize(
    ("config", "gmacs"),
    [
        ({"sample_size": 32}, 11.32),
        ({"sample_size": 64, "patch_size": 4}, 11.33),
        ({"sample_size": 32, "in_channels": 4, "out_channels": 4, "embed_dim": 1024, "depth": 20, "num_heads": 16,
          "num_class_embeds": 1001}, 73.59),
    ],
)  # fmt: skip
def test_published_sizes_cost_what_the_specification_says(config, gmacs):
    with torch.device("meta"):
        model = UViT2DModel(**config)
    kinds = macs_by_kind(model)
    assert (kinds["conv"] + kinds["linear"]) / 1e9 == pytest.approx(gmacs, rel=0.01)


def test_attention_is_softmax_of_scaled_products():
    attn = make().mid_block.attn
    x = torch.randn(2, 5, 32)
    q, k, v = (part.view(2, 5, 4, 8).transpose(1, 2) for part in attn.qkv(x).chunk(3, dim=-1))
    weights = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
    assert torch.allclose(attn(x), attn.proj((weights @ v).transpose(1, 2).reshape(2, 5, 32)), atol=1e-6)


def test_patches_come_back_to_their_places():
    model = make(patch_size=2)
    with torch.no_grad():
        model.decoder_pred.weight.zero_()
        model.decoder_pred.bias.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))  # (row, column) of the patch
        model.final_layer.weight.zero_()
        model.final_layer.weight[0, 0, 1, 1] = 1
        model.final_layer.bias.zero_()
        out = model(torch.randn(1, 1, 8, 8), 3).sample
    assert torch.equal(out[0, 0], torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat(4, 4))


@pytest.mark.parametrize("timestep", [7, 7.0, torch.tensor(7), torch.tensor([7, 7])])
def test_a_timestep_may_be_a_number_or_a_tensor(timestep):
    model, x = make(), torch.randn(2, 1, 8, 8)
    assert torch.equal(model(x, timestep).sample, model(x, torch.tensor([7.0, 7.0])).sample)
    assert not torch.allclose(model(x, timestep).sample, model(x, 8).sample)


def test_labels_are_a_token_and_are_asked_for():
    model, x = make(num_class_embeds=3), torch.randn(2, 1, 8, 8)
    assert model.pos_embed.shape == (1, 2 + 16, 32)
    a, b = (model(x, 5, torch.tensor([c, c])).sample for c in (0, 1))
    assert not torch.allclose(a, b)
    with pytest.raises(ModelError, match="labels"):
        model(x, 5)
    with pytest.raises(ModelError, match="labels"):
        make()(x, 5, torch.tensor([0, 0]))


def test_save_and_load_and_gradient_checkpointing_change_nothing(tmp_path):
    model, x = make(mlp_time_embed=True), torch.randn(1, 1, 8, 8)
    model.save_pretrained(tmp_path)
    again = UViT2DModel.from_pretrained(tmp_path)
    assert torch.equal(again(x, 9).sample, model(x, 9).sample)
    model.enable_gradient_checkpointing()
    model.train()(x, 9).sample.sum().backward()
    again.train()(x, 9).sample.sum().backward()
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)


@pytest.mark.parametrize(
    "config", [{"patch_size": 3}, {"embed_dim": 30}, {"depth": 3}, {"depth": 0}, {"embed_dim": 9, "num_heads": 3}]
)
def test_sizes_that_do_not_fit_are_refused(config):
    with pytest.raises(ModelError, match="change the model's config"):
        make(**config)


# --- narrower versions ------------------------------------------------------------------------------------------------

CONFIGS = [{}, {"mlp_time_embed": True, "qkv_bias": True}, {"num_class_embeds": 3, "depth": 4}]


@pytest.mark.parametrize("concat", ["aligned", "leading"])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_subnet_computes_what_the_supernet_computes(config, concat):
    model = make(**config)
    supernet = Supernet(model, (1.0, 0.75, 0.5, 0.25), concat)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    labels = torch.tensor([0, 2]) if "num_class_embeds" in config else None
    cond = cond_of(labels)
    for width in supernet.widths:
        subnet = supernet.subnet(width)
        assert type(subnet) is UViT2DModel and subnet.config.embed_dim == 32 * width
        assert torch.allclose(subnet(x, t, **cond).sample, supernet.predict(width)(x, t, cond, Memo()), atol=1e-5)
    assert count_macs(supernet.subnet(0.5)) < 0.4 * count_macs(model)


def test_heads_and_skips_are_cut_where_they_belong():
    model = make()
    half = Supernet(model, (1.0, 0.5)).subnet(0.5)
    qkv, skip = model.mid_block.attn.qkv.weight, model.out_blocks[0].skip_linear.weight
    assert torch.equal(half.mid_block.attn.qkv.weight, torch.cat([qkv[:16], qkv[32:48], qkv[64:80]])[:, :16])
    assert torch.equal(half.out_blocks[0].skip_linear.weight, torch.cat([skip[:16, :16], skip[:16, 32:48]], dim=1))
    leading = Supernet(model, (1.0, 0.5), "leading").subnet(0.5)
    assert torch.equal(leading.out_blocks[0].skip_linear.weight, skip[:16, :32])


@pytest.mark.parametrize("config", CONFIGS)
def test_sorting_keeps_the_function_and_puts_large_units_first(config):
    model = make(**config)
    model = model if "num_class_embeds" not in config else make(**(config | {"num_class_embeds": None}))
    x = torch.randn(2, 1, 8, 8)
    ordered = sort_channels(model)
    assert torch.allclose(ordered(x, 40).sample, model(x, 40).sample, atol=1e-5)
    mlp = ordered.mid_block.mlp
    score = mlp.fc1.weight.norm(dim=1) * mlp.fc2.weight.norm(dim=0)
    assert (score.diff() <= 0).all() and not torch.equal(mlp.fc1.weight, model.mid_block.mlp.fc1.weight)


def test_the_sandwich_trains_it():
    supernet = supernet_of(make(), SlimSpec(widths=(1.0, 0.5)))
    objective = sandwich_objective(supernet, Diffusion(Process()).draw, SlimSpec(widths=(1.0, 0.5), distill="none"))
    for loss in objective(Batch(torch.zeros(2, 1, 8, 8), {})):
        loss.backward()
    assert all(p.grad is not None and F.relu(p.grad).isfinite().all() for p in supernet.model.parameters())


def test_widths_without_whole_heads_are_refused():
    with pytest.raises(ModelError, match="multiples of 1/4"):
        Supernet(make(), (1.0, 0.6))
