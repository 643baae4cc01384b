"""Stable Diffusion's U-Net. Oracles: the plain call bit for bit, with all that diffusers' pipelines hand it; stock
diffusers on narrow configs; the wide layer's own parts with what the narrow one does not have put out."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from peft import LoraConfig

from halfstep.core.errors import ModelError
from halfstep.core.recipe import SparseSpec
from halfstep.engine.profiling import count_params, macs_by_kind
from halfstep.methods.slimmable import Supernet
from halfstep.methods.sparse import choose
from halfstep.nets.architectures import ARCHITECTURES, example_of, narrowed, skeleton, slices_for
from halfstep.nets.denoiser import Memo, predictor
from halfstep.nets.masks import Pattern
from halfstep.nets.models import empty_model
from halfstep.nets.reuse import Reused, cut_count, shallow, tapped
from halfstep.nets.slices import cut, cut_all
from halfstep.nets.unet_condition import narrow_config
from tiny import SDXL, cond_for_net, text_unet

FAMILY = ARCHITECTURES["UNet2DConditionModel"]
deep = partial(
    text_unet, block_out_channels=(16, 32, 32), layers_per_block=2, sample_size=16,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
)  # fmt: skip
NETS = {
    "as SD 1": deep,
    "as SD 2": partial(deep, attention_head_dim=(2, 4, 4), use_linear_projection=True, upcast_attention=True),
    "as SD XL": partial(text_unet, layers_per_block=2, **SDXL),
    "as LCM": partial(deep, time_cond_proj_dim=6),
    "classes": partial(text_unet, num_class_embeds=3),
    "projected classes": partial(text_unet, class_embed_type="projection", projection_class_embeddings_input_dim=5),
    "timesteps as classes": partial(text_unet, class_embed_type="timestep"),
    "embedded classes": partial(text_unet, class_embed_type="identity"),
    "pooled text": partial(
        text_unet, addition_embed_type="text", addition_embed_type_num_heads=2, time_embedding_act_fn="silu"
    ),
    "projected text": partial(text_unet, encoder_hid_dim_type="text_proj", encoder_hid_dim=7),
    "scale and shift": partial(deep, resnet_time_scale_shift="scale_shift", center_input_sample=True),
    "narrow middle": partial(deep, mid_block_type="UNetMidBlock2D", time_embedding_dim=24),
    "no middle": partial(text_unet, mid_block_type=None, only_cross_attention=True, conv_in_kernel=1),
    "layers by level": partial(deep, layers_per_block=(1, 2, 1), cross_attention_dim=(12, 12, 12)),
}


def inputs_of(model, size: int | tuple[int, int] | None = None, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    height, width = (size, size) if isinstance(size, int) else size or (model.config.sample_size,) * 2
    sample = torch.randn(2, model.config.in_channels, height, width, generator=draw)
    return sample, torch.tensor([3, 700]), cond_for_net(model, 2, seed)


def plain(model, sample, timestep, cond):
    """The plain call, which takes a T2I-Adapter's residuals out of their list."""
    fresh = {name: list(value) if isinstance(value, list) else value for name, value in cond.items()}
    return predictor(model)(sample, timestep, fresh, Memo())


@torch.no_grad()
def require_same(model, sample, timestep, cond):
    """Tapped and shallow passes on fresh features are the plain call, bit for bit, at every cut."""
    wanted = plain(model, sample, timestep, cond)
    found, kept = tapped(model, sample, timestep, cond, range(cut_count(model)))
    assert torch.equal(found, wanted) and set(kept) == set(range(cut_count(model)))
    for at, features in kept.items():
        assert torch.equal(shallow(model, sample, timestep, cond, at, features), wanted), at
    return wanted


def changes(model, inputs, **more):
    """Whether more keywords change the prediction; the cuts are the plain call's both ways."""
    sample, timestep, cond = inputs
    return not torch.equal(require_same(model, *inputs), require_same(model, sample, timestep, {**cond, **more}))


# --- cuts: every net, every keyword -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_calls_in_parts_are_the_plain_call_for_every_kind_of_net(name):
    model = NETS[name]()
    require_same(model, *inputs_of(model))
    sample, _, cond = inputs_of(model, seed=1)
    require_same(model, sample, torch.tensor(7), cond)


@pytest.mark.parametrize("size", [(16, 16), (9, 14), (13, 7), (5, 6)])
@pytest.mark.parametrize("name", ["as SD 1", "as SD XL"])
def test_sizes_without_halves_are_resampled_as_in_the_plain_call(name, size):
    model = NETS[name]()
    require_same(model, *inputs_of(model, size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_the_same_bits_too(dtype):
    model = NETS["as SD XL"]().to(dtype)
    sample, timestep, _ = inputs_of(model)
    cond = cond_for_net(model)
    halves = {"encoder_hidden_states": cond["encoder_hidden_states"].to(dtype)}
    halves["added_cond_kwargs"] = {name: one.to(dtype) for name, one in cond["added_cond_kwargs"].items()}
    require_same(model, sample.to(dtype), timestep, halves)


def test_masks_of_text_and_of_pixels_hide_what_they_hide():
    model = text_unet()
    text, pixels = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 1, 1, 1]]), torch.ones(2, 16)
    pixels[:, 5:9] = 0
    assert changes(model, inputs_of(model), encoder_attention_mask=text)
    assert changes(model, inputs_of(model), attention_mask=pixels)


@torch.no_grad()
@pytest.mark.parametrize("name", ["as SD 1", "as SD XL"])
def test_a_controlnet_adds_to_the_skips_of_its_own_call(name):
    model = NETS[name]()
    control = ControlNetModel.from_unet(model, conditioning_channels=3)
    for p in control.parameters():
        p.data += 0.05 * torch.randn_like(p)
    sample, timestep, cond = inputs_of(model)
    picture = torch.randn(2, 3, *(8 * side for side in sample.shape[-2:]))
    down, middle = control(sample, timestep, controlnet_cond=picture, **cond, return_dict=False)
    more = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    assert changes(model, (sample, timestep, cond), **more)
    _, kept = tapped(model, sample, timestep, {**cond, **more}, [0])
    other = [one + 1 for one in down]
    again = shallow(model, sample, timestep, {**cond, **more, "down_block_additional_residuals": other}, 0, kept[0])
    assert not torch.equal(again, plain(model, sample, timestep, {**cond, **more}))


@pytest.mark.parametrize("middle", [False, True])
def test_an_adapter_adds_behind_every_block_of_the_way_down_and_its_list_stays_whole(middle):
    model = deep()
    shapes = [(16, 16, 16), (32, 8, 8), (32, 4, 4)] + [(32, 4, 4)] * middle
    states = [torch.randn(2, *shape) for shape in shapes]
    assert changes(model, inputs_of(model), down_intrablock_additional_residuals=states)
    assert len(states) == len(shapes)
    plain_last = text_unet()  # its first block has no attention: the residual comes behind its downsampler
    states = [torch.randn(2, 16, 4, 4), torch.randn(2, 32, 4, 4)]
    assert changes(plain_last, inputs_of(plain_last), down_intrablock_additional_residuals=states)
    assert changes(plain_last, inputs_of(plain_last), down_block_additional_residuals=states)  # as until 0.20


def test_a_lora_has_the_scale_of_the_call_and_its_own_after():
    model = deep()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False))
    inputs = inputs_of(model)
    assert changes(model, inputs, cross_attention_kwargs={"scale": 0.3})
    assert changes(model, inputs, cross_attention_kwargs={"scale": 0.0})
    assert not changes(model, inputs, cross_attention_kwargs={})


def test_an_ip_adapter_reads_its_picture_beside_the_text():
    model = text_unet()
    model.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(6, 12, 2)])
    model.register_to_config(encoder_hid_dim_type="ip_image_proj")
    model.set_attn_processor(
        {
            name: IPAdapterAttnProcessor2_0(32, 12, (2,)) if "attn2" in name else AttnProcessor2_0()
            for name in model.attn_processors
        }
    )
    sample, timestep = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    cond = {"encoder_hidden_states": torch.randn(2, 5, 12)}
    first, second = ({**cond, "added_cond_kwargs": {"image_embeds": [torch.randn(2, 1, 6)]}} for _ in range(2))
    with_one, with_other = (require_same(model, sample, timestep, one) for one in (first, second))
    assert not torch.equal(with_one, with_other)


@pytest.mark.parametrize("kind", ["text_image", "image"])
def test_conditions_on_images_are_carried_through(kind):
    model = text_unet(addition_embed_type=kind, encoder_hid_dim=12, encoder_hid_dim_type="image_proj")
    added = {"image_embeds": torch.randn(2, 12), "text_embeds": torch.randn(2, 12)}
    cond = {"encoder_hidden_states": torch.randn(2, 5, 12), "added_cond_kwargs": added}
    require_same(model, torch.randn(2, 1, 8, 8), torch.tensor([3, 700]), cond)
    with pytest.raises(ModelError, match=f"'(image_proj|{kind})'"):
        example_of(model, 1)


@torch.no_grad()
def test_a_reuse_row_takes_the_condition_of_its_call():
    model = NETS["as SD XL"]()
    sample, timestep, cond = inputs_of(model)
    reused = Reused(model, 1, 0, sample, timestep, cond)
    assert torch.equal(reused(sample, timestep, **cond, return_dict=False)[0], plain(model, sample, timestep, cond))
    other = inputs_of(model, seed=1)[2]
    assert not torch.equal(reused(sample, timestep, **other)[0], plain(model, sample, timestep, cond))


def test_what_is_not_understood_is_refused_by_its_name():
    model = text_unet()
    inputs = inputs_of(model)
    with pytest.raises(ModelError, match="GLIGEN"):
        tapped(model, *inputs[:2], {**inputs[2], "cross_attention_kwargs": {"gligen": {}}}, [0])
    with pytest.raises(ModelError, match="a condition 'captions'"):
        tapped(model, *inputs[:2], {**inputs[2], "captions": torch.ones(1)}, [0])
    with pytest.raises(ModelError, match="no encoder_hidden_states"):
        tapped(model, *inputs[:2], {}, [0])
    model.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with pytest.raises(ModelError, match="FreeU"):
        shallow(model, *inputs, 0, torch.ones(1))
    model.disable_freeu()
    require_same(model, *inputs)


@pytest.mark.parametrize(
    "place, kind",
    [("down_block_types", "SimpleCrossAttnDownBlock2D"), ("up_block_types", "ResnetUpsampleBlock2D")],
)
def test_a_block_that_is_not_known_is_refused_by_its_name(place, kind):
    other = {"down_block_types": "DownBlock2D", "up_block_types": "UpBlock2D"}[place]
    types = (kind, other) if place == "up_block_types" else (other, kind)
    model = text_unet(**{place: types}, attention_head_dim=8)
    with pytest.raises(ModelError, match=f"a {kind}, expected one of Cross.* in {place[:-6]}s"):
        cut_count(model)
    with pytest.raises(ModelError, match=kind):
        narrow_config(model.config, 0.5)


# --- widths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_a_width_of_the_supernet_is_a_net_of_its_own_config(name):
    model = NETS[name]()
    supernet = Supernet(model, (1.0, 0.5))
    subnet, inputs = supernet.subnet(0.5), inputs_of(model)
    wanted = supernet.predict(0.5)(*inputs, Memo())
    assert torch.allclose(plain(subnet, *inputs), wanted, atol=1e-5)
    require_same(subnet, *inputs)
    assert list(subnet.config["block_out_channels"]) == [c // 2 for c in model.config["block_out_channels"]]


@torch.no_grad()
def test_stock_diffusers_opens_a_width(tmp_path):
    model = NETS["as SD XL"]()
    subnet, inputs = Supernet(model, (1.0, 0.5)).subnet(0.5), inputs_of(model)
    subnet.save_pretrained(tmp_path)
    stock = UNet2DConditionModel.from_pretrained(tmp_path)
    assert torch.equal(plain(stock, *inputs), plain(subnet, *inputs))


both = partial(text_unet, down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2)


@pytest.mark.parametrize("heads, narrow", [(2, 1), ((1, 4), (1, 2)), ((16, 2), (8, 1)), (1, 1)])
def test_heads_are_fewer_where_they_stay_whole_else_narrower(heads, narrow):
    found = narrow_config(both(attention_head_dim=heads).config, 0.5)
    without = narrow_config(dict(text_unet().config) | {"attention_head_dim": (3, 2)}, 0.5)
    assert without["attention_head_dim"] == (3, 1)  # nobody reads what a level without attention has
    assert found["attention_head_dim"] == narrow and found["cross_attention_dim"] == 12


def test_a_width_without_whole_heads_or_groups_is_refused():
    with pytest.raises(ModelError, match=r"32 channels x 0.5625 = 18 for 4 heads"):
        narrow_config(text_unet(block_out_channels=(32, 32), norm_num_groups=2, attention_head_dim=4).config, 0.5625)
    with pytest.raises(ModelError, match="norm groups"):
        narrow_config(text_unet().config, 0.3)


@pytest.mark.parametrize("name, value", [("attention_type", "gated"), ("class_embeddings_concat", True)])
def test_a_part_whose_slices_are_not_known_is_refused_by_its_name(name, value):
    with pytest.raises(ModelError, match=f"{name} '?{value}"):
        narrow_config(dict(text_unet().config) | {name: value}, 0.5)


def parts_at_half(model, path: str):
    """A module of the net and of its half."""
    half = FAMILY.kind.from_config(narrowed(FAMILY, model.config, 0.5)).eval()
    half.load_state_dict(cut_all(model.state_dict(), slices_for(FAMILY, model.config, 0.5)))
    return model.get_submodule(path), half.get_submodule(path)


@torch.no_grad()
def test_a_narrow_feed_forward_layer_is_the_wide_one_with_the_other_units_put_out():
    """Oracle: GEGLU(x) = (x V) * gelu(x W); a unit whose way out is zero is not there."""
    wide, narrow = parts_at_half(text_unet(), "mid_block.attentions.0.transformer_blocks.0.ff")
    x = torch.randn(2, 5, 16)
    silenced = wide.net[2].weight.clone()
    silenced[:, silenced.shape[1] // 2 :] = 0
    wide.net[2].weight.data = silenced
    wanted = wide(torch.cat([x, torch.zeros_like(x)], dim=-1))[..., :16]
    assert torch.allclose(narrow(x), wanted, atol=1e-5)


@pytest.mark.parametrize("heads, kept, part", [(4, 2, 8), (32, 16, 1), (1, 1, 16)])
@pytest.mark.parametrize("which", ["attn1", "attn2"])
@torch.no_grad()
def test_narrow_attention_is_the_wide_one_with_the_other_heads_put_out(which, heads, kept, part):
    """Oracle: softmax(q k / sqrt(d)) v by hand, over the channels that stay of the wide layer."""
    model = text_unet(attention_head_dim=(1, heads))
    wide, narrow = parts_at_half(model, f"mid_block.attentions.0.transformer_blocks.0.{which}")
    x = torch.randn(2, 5, 16)
    text = torch.randn(2, 7, 12) if which == "attn2" else x
    size = 32 // heads
    stay = torch.tensor([head * size + i for head in range(kept) for i in range(part)])
    q, k, v = (
        torch.einsum("btc,oc->bto", given, layer.weight[stay][:, slice(0, given.shape[-1])]).unflatten(-1, (kept, part))
        for given, layer in ((x, wide.to_q), (text, wide.to_k), (text, wide.to_v))
    )
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / part**0.5
    mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
    wanted = mixed @ wide.to_out[0].weight[:16][:, stay].T + wide.to_out[0].bias[:16]
    assert torch.allclose(narrow(x, encoder_hidden_states=text if which == "attn2" else None), wanted, atol=1e-5)


def test_rows_that_meet_the_frequencies_follow_them():
    """What LCM's guidance embedding puts out is added to sines and cosines: its rows are those of the same columns."""
    model = NETS["as LCM"]()
    pieces = slices_for(FAMILY, model.config, 0.5)
    rows = torch.arange(16)[:, None]
    first = cut(rows.T, (((0, 1),), pieces["time_embedding.linear_1.weight"][1]))
    second = cut(rows, (pieces["time_embedding.cond_proj.weight"][0], ((0, 1),)))
    assert first.flatten().tolist() == second.flatten().tolist() != list(range(8))


# --- examples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_an_example_is_what_the_net_can_be_called_with(name):
    model = NETS[name]()
    for tokens in (None, 9):
        cond = example_of(model, 3, tokens)
        assert cond["encoder_hidden_states"].shape[:2] == (3, tokens or 77)
        assert model(torch.randn(3, 1, 8, 8), 5, **cond).sample.shape == (3, 1, 8, 8)
    built = empty_model({**model.config, "_class_name": FAMILY.name}, where="here")
    assert model.config.items() <= built.config.items()


def test_the_examples_of_stable_diffusion_xl_and_its_refiner_have_their_published_sizes():
    base = {"cross_attention_dim": 2048, "addition_embed_type": "text_time", "addition_time_embed_dim": 256}
    cond = FAMILY.example({**base, "projection_class_embeddings_input_dim": 2816}, 1, None)
    assert cond["encoder_hidden_states"].shape == (1, 77, 2048)
    assert cond["added_cond_kwargs"]["text_embeds"].shape == (1, 1280)
    assert cond["added_cond_kwargs"]["time_ids"].shape == (1, 6)


SDS: dict[str, dict] = {
    "SD 1.5": {"sample_size": 64, "cross_attention_dim": 768},
    "SD 2.1": {
        "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "SD XL": {
        "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "name, parameters, macs, half",
    [
        ("SD 1.5", 859_520_964, 338.75e9, 4),  # MACs of layers alone, as DeepCache and BK-SDM count them
        ("SD 2.1", 865_910_724, None, (5, 5, 10, 10)),
        ("SD XL", 2_567_463_684, 5.98e12 / 2, (5, 5, 10)),
    ],
)
def test_the_published_nets_have_their_published_costs_and_a_half(name, parameters, macs, half):
    model = skeleton(FAMILY, SDS[name])
    assert count_params(model) == parameters
    if macs:
        counts = macs_by_kind(model)
        assert counts["conv"] + counts["linear"] == pytest.approx(macs, rel=0.002)
    assert narrowed(FAMILY, model.config, 0.5)["attention_head_dim"] == half
    assert cut_count(model) == {"SD XL": 9}.get(name, 12)


def test_masks_choose_the_bulk_of_the_net_with_what_reads_the_text():
    choices = {c.layer: c.why for c in choose(NETS["as SD XL"](), SparseSpec(least=1), [Pattern.parse("2:4")])}
    block = "mid_block.attentions.0.transformer_blocks.0"
    masked = (f"{block}.attn2.to_k", f"{block}.ff.net.0.proj", f"{block}.attn1.to_q", "mid_block.resnets.0.conv1")
    assert {choices[name] for name in masked} == {"masked"}
    embeddings = ("time_embedding.linear_2", "add_embedding.linear_1", "mid_block.resnets.0.time_emb_proj")
    assert {choices[name] for name in embeddings} == {"time or class embedding"}
