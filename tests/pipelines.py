"""Stock diffusers pipelines with tiny random weights, of their real classes, made without a network."""

from __future__ import annotations

import functools
import string
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LDMTextToImagePipeline,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.utils import BaseOutput

WIDE, TEXT = 32, 16
"""Pixels of a side, and numbers of a token."""
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""Those of Stable Diffusion."""


def seeded(make: Any) -> Any:
    """Made from the same random numbers each time; no weight is trivial: gates and last layers begin at 0."""

    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = make(*args, **kwargs).eval()
            for p in model.parameters():
                p.data += 0.05 * torch.randn_like(p)
        return model

    return made


# ---------------------------------------------------------------------------------------------------------------- parts


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    letters = [*string.ascii_lowercase, *(f"{a}</w>" for a in string.ascii_lowercase)]
    vocab = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((a, -3.0) for a in string.ascii_lowercase)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=77)


@seeded
def clip(projection: int | None = None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=54, hidden_size=TEXT, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, projection_dim=projection or TEXT, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)


@seeded
def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=30, d_model=TEXT, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


@seeded
def vae(channels: int = 4, **config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=2, latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **config,
    )  # fmt: skip


def painted(colours: int) -> dict[str, int]:
    """The config of a VAE of pictures with so many channels."""
    return {"in_channels": colours, "out_channels": colours}


@seeded
def text_unet(**config: Any) -> UNet2DConditionModel:
    small = {
        "sample_size": WIDE // 2, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": TEXT,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 4,
    }  # fmt: skip
    return UNet2DConditionModel(**(small | config))


# ------------------------------------------------------------------------------------------------------------ pipelines


def stable_diffusion(kind: Any = StableDiffusionPipeline, scheduler: Any = None, **parts: Any) -> Any:
    given = {
        "vae": vae(), "text_encoder": clip(), "tokenizer": clip_tokenizer(), "unet": text_unet(),
        "scheduler": scheduler or PNDMScheduler(skip_prk_steps=True, steps_offset=1, **BETAS), "safety_checker": None,
        "feature_extractor": None, "requires_safety_checker": False,
    }  # fmt: skip
    return quiet(kind(**(given | parts)))


CONDITIONAL_FIRST = {"dit": 0}
"""Pipelines whose doubled batch begins with its conditional half."""


@dataclass
class Output(BaseOutput):
    """What a denoiser puts out."""

    sample: torch.Tensor


def half_of(value: Any, batch: int, half: int) -> Any:
    """Half of what a denoiser is given, by images."""
    if isinstance(value, torch.Tensor):
        return value.chunk(2)[half] if value.ndim and len(value) == batch else value
    if isinstance(value, dict):
        return {key: half_of(one, batch, half) for key, one in value.items()}
    return [half_of(one, batch, half) for one in value] if isinstance(value, list | tuple) else value


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def img2img() -> Any:
    return stable_diffusion(StableDiffusionImg2ImgPipeline, DDIMScheduler(steps_offset=1, clip_sample=False, **BETAS))


def inpaint() -> Any:
    return stable_diffusion(StableDiffusionInpaintPipeline, unet=text_unet(in_channels=9))


def controlnet() -> Any:
    net = seeded(ControlNetModel)(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=TEXT,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4,
        conditioning_embedding_out_channels=(4, 8),
    )  # fmt: skip
    return stable_diffusion(StableDiffusionControlNetPipeline, controlnet=net)


def sdxl(colours: int = 3, **config: Any) -> Any:
    unet = text_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time", addition_time_embed_dim=4, cross_attention_dim=2 * TEXT,
        projection_class_embeddings_input_dim=6 * 4 + TEXT, use_linear_projection=True, **config,
    )  # fmt: skip
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False, **BETAS)
    parts = (vae(**painted(colours)), clip(), clip(TEXT), clip_tokenizer(), clip_tokenizer(), unet, scheduler)
    return quiet(StableDiffusionXLPipeline(*parts, add_watermarker=False))


def dit() -> Any:
    net = seeded(DiTTransformer2DModel)(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3, sample_size=8,
        num_embeds_ada_norm=1000,
    )  # fmt: skip
    return quiet(DiTPipeline(net, vae(), DDIMScheduler(clip_sample=False)))


def pixart(colours: int = 3, **config: Any) -> Any:
    small = {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 3,
        "sample_size": 8, "cross_attention_dim": 16, "caption_channels": TEXT, "num_embeds_ada_norm": 1000,
    }  # fmt: skip
    net = seeded(PixArtTransformer2DModel)(**small | config)
    return quiet(PixArtAlphaPipeline(t5_tokenizer(), t5(), vae(**painted(colours)), net, DPMSolverMultistepScheduler()))


def sd3(colours: int = 3, **config: Any) -> Any:
    small = {
        "sample_size": WIDE // 2, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": 2 * TEXT, "caption_projection_dim": 16,
        "pooled_projection_dim": 2 * TEXT, "pos_embed_max_size": 16,
    }  # fmt: skip
    net, images = seeded(SD3Transformer2DModel)(**small | config), vae(shift_factor=0.1, **painted(colours))
    scheduler, texts = FlowMatchEulerDiscreteScheduler(shift=3.0), (clip(TEXT), clip_tokenizer())
    return quiet(StableDiffusion3Pipeline(net, scheduler, images, *texts, *texts, None, None))


def flux() -> Any:
    net = seeded(FluxTransformer2DModel)(
        in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=TEXT, pooled_projection_dim=TEXT, axes_dims_rope=(2, 2, 4), guidance_embeds=True,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    parts = (vae(shift_factor=0.1), clip(), clip_tokenizer(), t5(), t5_tokenizer(), net)
    return quiet(FluxPipeline(scheduler, *parts))


def ddpm() -> Any:
    net = seeded(UNet2DModel)(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    return quiet(DDPMPipeline(net, DDPMScheduler()))


def ldm() -> Any:
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    config = LDMBertConfig(
        vocab_size=54, encoder_layers=1, encoder_ffn_dim=16, encoder_attention_heads=2, head_dim=8, d_model=TEXT
    )
    parts = (vae(), seeded(LDMBertModel)(config), clip_tokenizer(), text_unet())
    return quiet(LDMTextToImagePipeline(*parts, DDIMScheduler(clip_sample=False, **BETAS)))


# ------------------------------------------------------------------------------------------------------------- adapters


def ip_adapter(unet):
    """Random weights of an IP-Adapter, as its files have them."""
    draw, text = torch.Generator().manual_seed(0), unet.config.cross_attention_dim
    inner = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
    sizes = [unet.get_submodule(name).inner_dim for name in inner]
    halves = {f"{2 * i + 1}.to_{part}_ip.weight": torch.randn(size, text, generator=draw)
              for i, size in enumerate(sizes) for part in "kv"}  # fmt: skip
    proj = {"proj.weight": torch.randn(4 * text, 8, generator=draw), "proj.bias": torch.zeros(4 * text),
            "norm.weight": torch.ones(text), "norm.bias": torch.zeros(text)}  # fmt: skip
    return {"image_proj": proj, "ip_adapter": halves}
