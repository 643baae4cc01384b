"""Oracles: stock diffusers writing and reading the same folders; files that ask for more than they hold."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import time
from functools import partial

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file

from halfstep.core.errors import ModelError
from halfstep.nets.files import INDEX, WEIGHTS
from halfstep.nets.models import build_model, load_denoiser, load_model, load_vae
from halfstep.nets.weights import MAX_HEADER, open_weights
from tiny import SDXL, text_unet, unet

net = partial(unet, channels=(8, 8), attend=True)


def rewrite(folder, edit):
    """Store `edit` of the weights in their place."""
    tensors = load_file(folder / WEIGHTS)
    save_file(edit({name: value.clone() for name, value in tensors.items()}), folder / WEIGHTS, {"format": "pt"})


def same(one, two) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def refusal(folder) -> str:
    with pytest.raises(ModelError) as error:
        load_model(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


# --- what stock diffusers opens ---------------------------------------------------------------------------------------

OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def of_2022(name: str) -> str:
    for new, old in OLD.items():
        name = name.replace(f".{new}.", f".{old}.")
    return name


def test_attention_under_its_names_of_2022_is_loaded_as_diffusers_loads_it(tmp_path):
    model = net()
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: {of_2022(name): value for name, value in weights.items()})
    assert any(".query." in name for name in load_file(tmp_path / WEIGHTS))
    assert same(load_model(tmp_path), model) and same(UNet2DModel.from_pretrained(tmp_path), model)


def test_shards_are_joined(tmp_path):
    model = net()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 and not (tmp_path / WEIGHTS).exists()
    assert same(load_model(tmp_path), model)


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "10KB"}])
def test_a_variant_is_loaded_as_diffusers_loads_it(shards, tmp_path):
    plain, half = net(1), net(2).half()
    half.save_pretrained(tmp_path, variant="fp16", **shards)
    with pytest.warns(UserWarning, match="only variant, fp16"):
        assert same(load_model(tmp_path), half.float())
    plain.save_pretrained(tmp_path / "plain", **shards)
    for file in (tmp_path / "plain").iterdir():  # a save into the same folder would clear the other's shards away
        file.replace(tmp_path / file.name)
    assert same(load_model(tmp_path), plain)
    kept = load_model(tmp_path, variant="fp16", dtype=None)
    stock = UNet2DModel.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    assert kept.dtype == torch.float16 and same(kept, stock)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_precision_is_kept_or_converted_as_asked(dtype, tmp_path):
    model = net().to(dtype)
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path).dtype == torch.float32 and same(load_model(tmp_path), model.float())
    assert load_model(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load_denoiser(tmp_path, dtype=None)[0].dtype == dtype
    rewrite(tmp_path, lambda weights: weights | {"conv_in.bias": weights["conv_in.bias"].float()})
    assert load_model(tmp_path, dtype=None).dtype == torch.float32  # of several the one that holds them all


TEXT = {
    "as SD 1": {},
    "as SD XL": SDXL,
    "as SSD-1B": {
        "transformer_layers_per_block": ((1,), (0, 2)),
        "reverse_transformer_layers_per_block": ((2, 1, 0), (1, 1, 1)),
        "layers_per_block": (1, 2),
        "mid_block_type": "UNetMidBlock2D",
    },
}


@pytest.mark.parametrize("name", TEXT)
def test_stable_diffusions_net_is_loaded_from_its_pipeline(name, tmp_path):
    model = text_unet(**TEXT[name])
    model.save_pretrained(tmp_path / "unet", max_shard_size="100KB")
    DDIMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "scheduler")
    loaded, noise = load_denoiser(tmp_path)
    assert type(loaded) is type(model) and same(loaded, model) and noise["prediction_type"] == "v_prediction"


def test_a_config_of_a_million_transformers_is_refused_before_one_is_built(tmp_path):
    for layers in (10**6, [[10**6], [1]], [[[1]]], -1):
        config = {**text_unet().config, "_class_name": "UNet2DConditionModel", "transformer_layers_per_block": layers}
        with pytest.raises(ModelError, match="transformer_layers_per_block"):
            build_model(config, where="here")


def test_loading_leaves_the_random_numbers_and_the_config_alone(tmp_path):
    model = net()
    model.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    loaded = load_model(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert "_name_or_path" not in loaded.config  # a save would write this machine's path down
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()


# --- what is refused by name ------------------------------------------------------------------------------------------


def test_of_two_variants_one_has_to_be_asked_for(tmp_path):
    for variant in ("fp16", "non_ema"):
        net().save_pretrained(tmp_path, variant=variant)
    assert "only the variants fp16, non_ema" in refusal(tmp_path) and "variant='fp16'" in refusal(tmp_path)
    with pytest.raises(ModelError, match=r"expected diffusion_pytorch_model\.ema\.safetensors"):
        load_model(tmp_path, variant="ema")
    assert same(load_model(tmp_path, variant="non_ema"), net())


def test_the_prefix_of_torch_compile_is_told(tmp_path):
    net().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: {f"_orig_mod.{name}": value for name, value in weights.items()})
    assert "_orig_mod.conv_in" in refusal(tmp_path) and "torch.compile" in refusal(tmp_path)


def test_a_pruned_tensor_is_named_with_both_shapes(tmp_path):
    net().save_pretrained(tmp_path)
    pruned = "mid_block.resnets.0.conv1.weight"
    rewrite(tmp_path, lambda weights: weights | {pruned: weights[pruned][:4].clone()})
    assert pruned in refusal(tmp_path) and "4x8x3x3" in refusal(tmp_path) and "8x8x3x3" in refusal(tmp_path)


def test_missing_and_foreign_tensors_are_named(tmp_path):
    net().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: weights | {"more.weight": torch.zeros(2)})
    assert "more.weight" in refusal(tmp_path)
    rewrite(tmp_path, lambda weights: {n: v for n, v in weights.items() if n not in ("conv_in.bias", "more.weight")})
    assert "conv_in.bias" in refusal(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value, tmp_path):
    net().save_pretrained(tmp_path / "net")
    rewrite(tmp_path / "net", lambda weights: weights | {"conv_out.bias": torch.full((1,), value)})
    assert "conv_out.bias" in refusal(tmp_path / "net")
    AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=2).save_pretrained(tmp_path / "vae")
    rewrite(tmp_path / "vae", lambda w: w | {"quant_conv.bias": torch.full_like(w["quant_conv.bias"], value)})
    with pytest.raises(ModelError, match="quant_conv"):
        load_vae(tmp_path)


def test_weights_of_whole_numbers_are_refused(tmp_path):
    net().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: weights | {"conv_in.bias": torch.ones(8, dtype=torch.int32)})
    assert "I32" in refusal(tmp_path)


BAD_INDICES = {
    "no map": {"metadata": {}},
    "no metadata": {"weight_map": {"conv_in.bias": WEIGHTS}},
    "a map of numbers": {"metadata": {}, "weight_map": {"conv_in.bias": 3}},
    "a shard elsewhere": {"metadata": {}, "weight_map": {"conv_in.bias": f"../{WEIGHTS}"}},
    "a shard that is no safetensors": {"metadata": {}, "weight_map": {"conv_in.bias": "config.json"}},
    "a shard that is missing": {"metadata": {}, "weight_map": {"conv_in.bias": "other.safetensors"}},
}


@pytest.mark.parametrize("how", BAD_INDICES)
def test_a_broken_index_of_shards_is_refused(how, tmp_path):
    net().save_pretrained(tmp_path / "m" / "x")
    for file in (tmp_path / "m" / "x").iterdir():
        file.rename(tmp_path / "m" / file.name)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / "m" / WEIGHTS).read_bytes())
    (tmp_path / "m" / INDEX).write_text(json.dumps(BAD_INDICES[how]))
    assert INDEX in refusal(tmp_path / "m")


# --- what asks for too much -------------------------------------------------------------------------------------------

HUGE = {
    "channels": {"block_out_channels": [10**6, 10**6]},
    "channels of no network": {"block_out_channels": [60000, 60000], "norm_num_groups": 4},
    "levels": {"block_out_channels": [8] * 100, "down_block_types": ["DownBlock2D"] * 100},
    "layers": {"layers_per_block": 10**6},
    "classes": {"num_class_embeds": 10**12},
    "sample size": {"sample_size": 10**7},
    "two sides": {"sample_size": [8192, 8192], "in_channels": 4},
    "training timesteps": {"time_embedding_type": "learned", "num_train_timesteps": 10**12},
    "negative": {"layers_per_block": -3},
    "a text": {"layers_per_block": "2"},
    "a number for a text": {"act_fn": 3},
    "true for a number": {"norm_num_groups": True},
    "a number for true": {"center_input_sample": 1},
    "a field of no class": {"norm_num_grouqs": 4},
    "nested": {"block_out_channels": [[8], [8]]},
    "no size": {"sample_size": None},
    "quantized": {"quantization_config": {"quant_method": "bitsandbytes"}},
}


@pytest.mark.parametrize("how", HUGE)
def test_a_config_is_priced_before_anything_is_built(how, tmp_path):
    net().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | HUGE[how]
    (tmp_path / "config.json").write_text(json.dumps(config))
    begun = time.process_time()
    assert "config" in refusal(tmp_path)
    with pytest.raises(ModelError):
        build_model(config, where="recipe")
    assert time.process_time() - begun < 5  # a bound on work, not a speed: ten million layers take hours


def test_configs_of_the_hub_are_taken():
    """google/ddpm-cifar10-32's, which leaves fields out and has a null where there is a number today."""
    config = {
        "_class_name": "UNet2DModel",
        "_diffusers_version": "0.0.4",
        "act_fn": "silu",
        "attention_head_dim": None,
        "block_out_channels": [8, 8],
        "center_input_sample": False,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "in_channels": 3,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-06,
        "norm_num_groups": 4,
        "out_channels": 3,
        "sample_size": 32,
        "time_embedding_type": "positional",
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    }
    assert build_model(config, where="test").config.freq_shift == 1


@pytest.mark.parametrize("length", [MAX_HEADER + 1, 90 << 20, 2**63])
def test_a_long_header_is_refused_before_it_is_read(length, tmp_path):
    file = tmp_path / "long.safetensors"
    with file.open("wb") as handle:
        handle.write(struct.pack("<Q", length))
        handle.truncate(200 << 20)  # a sparse file: it takes no room
    with pytest.raises(ModelError, match=r"long\.safetensors.*header"), open_weights(file):
        pass


def test_tensors_beyond_the_file_are_refused(tmp_path):
    header = json.dumps({"x": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}).encode()
    file = tmp_path / "beyond.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
    with pytest.raises(ModelError, match=r"beyond\.safetensors"), open_weights(file):
        pass


def test_a_pipe_in_the_place_of_weights_does_not_hang(tmp_path):
    net().save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    os.mkfifo(tmp_path / WEIGHTS)
    assert refusal(tmp_path)
    with pytest.raises(ModelError, match="regular"), open_weights(tmp_path / WEIGHTS):
        pass


def test_json_that_breaks_readers_is_refused(tmp_path):
    net().save_pretrained(tmp_path)
    for text in (
        "[" * 100_000,
        '{"in_channels": ' + "9" * 5000 + "}",
        '{"norm_eps": NaN}',
        "{}",
        '{"_class_name": []}',
    ):
        (tmp_path / "config.json").write_text(text)
        assert refusal(tmp_path)


def test_a_stock_pipeline_of_dpm_solver_is_read(tmp_path):
    """diffusers writes its "not clipped" as -Infinity, which is no JSON."""
    DDPMPipeline(net(), DPMSolverMultistepScheduler()).save_pretrained(tmp_path)
    assert "-Infinity" in (tmp_path / "scheduler" / "scheduler_config.json").read_text()
    assert load_denoiser(tmp_path)[1]["lambda_min_clipped"] == -math.inf
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace("-Infinity", "NaN"))
    with pytest.raises(ModelError, match="NaN"):
        load_denoiser(tmp_path)


def test_the_bundled_model_loads():
    model, noise = load_denoiser("digits")
    assert model.dtype == torch.float32 and noise["num_train_timesteps"] == 1000


def test_a_slip_in_a_bundled_name_is_answered_with_it_and_a_path_is_not():
    with pytest.raises(ModelError, match=r"digits, fashion\); did you mean fashion\?"):
        load_denoiser("fashon")
    with pytest.raises(ModelError, match="check --model"):
        load_denoiser("/nowhere/runs/half")


def test_a_denoiser_comes_from_a_pipeline_a_model_folder_or_a_run(tmp_path):
    model, scheduler = net(3), DDPMScheduler(prediction_type="v_prediction")
    DDPMPipeline(model, scheduler).save_pretrained(tmp_path / "run" / "pipeline")
    model.save_pretrained(tmp_path / "bare")
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    for place, kind in (
        ("run", "v_prediction"),
        ("run/pipeline", "v_prediction"),
        ("run/pipeline/unet", "v_prediction"),
        ("bare", "epsilon"),
    ):
        for source in (tmp_path / place, str(tmp_path / place)):
            loaded, noise = load_denoiser(source)
            with torch.no_grad():
                assert torch.equal(loaded(x, t).sample, model(x, t).sample)
            assert noise["prediction_type"] == kind and not loaded.training


def test_half_precision_weights_are_loaded_as_float32(tmp_path):
    net(3).half().save_pretrained(tmp_path / "half")
    loaded, _ = load_denoiser(tmp_path / "half")
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.conv_in.weight, net(3).conv_in.weight.half().float())


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def cut_file(folder, keep):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])


def empty(folder):
    for file in folder.iterdir():
        file.unlink()


def foreign(folder):
    empty(folder)
    AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=2).save_pretrained(folder)


BROKEN = {
    "missing": shutil.rmtree,
    "empty": empty,
    "foreign class": foreign,
    "class of no library": lambda f: edit_config(f, _class_name="os.system"),
    "no class": lambda f: edit_config(f, _class_name=None),
    "weights without the tail": lambda f: cut_file(f, -1000),
    "weights without a whole header": lambda f: cut_file(f, 100),
    "empty weights": lambda f: cut_file(f, 0),
    "weights of another shape": lambda f: edit_config(f, block_out_channels=[32, 32]),
    "weights of another depth": lambda f: edit_config(f, layers_per_block=2),
    "no weights": lambda f: (f / WEIGHTS).unlink(),
    "pickled weights only": lambda f: (f / WEIGHTS).rename(f / "diffusion_pytorch_model.bin"),
    "config that is no JSON": lambda f: (f / "config.json").write_text("{ not json"),
    "config that is binary": lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
    "config that is a list": lambda f: (f / "config.json").write_text("[]"),
    "config that is a folder": lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
    "no config": lambda f: (f / "config.json").unlink(),
    "groups that do not divide": lambda f: edit_config(f, norm_num_groups=7),
    "no groups": lambda f: edit_config(f, norm_num_groups=0),
    "unknown blocks": lambda f: edit_config(f, down_block_types=["Nope", "Nope"]),
    "channels that are no list": lambda f: edit_config(f, block_out_channels="wide"),
}


@pytest.mark.parametrize("place", ["model", "pipeline"])
@pytest.mark.parametrize("how", BROKEN)
def test_broken_model_folders_are_refused_in_one_line_that_names_them(how, place, tmp_path):
    whole = tmp_path / "whole"
    if place == "pipeline":
        DDPMPipeline(net(), DDPMScheduler()).save_pretrained(whole)
        inner = whole / "unet"
        if how == "missing":
            BROKEN[how](whole)
        else:
            BROKEN[how](inner)
    else:
        net().save_pretrained(whole)
        BROKEN[how](whole)
    with pytest.raises(ModelError) as error:
        load_denoiser(whole)
    assert str(whole) in str(error.value) and "\n" not in str(error.value)


def test_a_pickle_is_named_and_never_opened(tmp_path):
    net().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / WEIGHTS).unlink()
    trap = b"cos\nsystem\n(S'touch " + str(tmp_path / "sprung").encode() + b"'\ntR."
    (tmp_path / "m" / "diffusion_pytorch_model.bin").write_bytes(trap)
    with pytest.raises(ModelError, match="pickle"):
        load_denoiser(tmp_path / "m")
    assert not (tmp_path / "sprung").exists()


def test_a_file_is_not_a_model_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError) as error:
        load_denoiser(tmp_path / "model.safetensors")
    assert str(tmp_path / "model.safetensors") in str(error.value)
