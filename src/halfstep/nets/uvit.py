"""U-ViT: a plain vision transformer with U-Net's long skips, as a diffusers model. SparseDM's backbone.

Paper: All are Worth Words: A ViT Backbone for Diffusion Models, Bao et al., CVPR 2023, arXiv 2209.12152.

Implemented: everything is a token (time, class, patches); `depth // 2` blocks in, one in the middle, as many out, each
of these joined with its partner's output by a linear layer over the concatenation; a linear layer back to patches and
a final 3x3 convolution. Parameter names and the order of the tokens are the released code's, so that its weights load.

What differs: nothing in the function. Attention runs through torch's `scaled_dot_product_attention`; `timestep` is
diffusers' (0 to 999), which the released code's 999 t is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from halfstep.core.errors import ModelError
from halfstep.core.recipe import ModelSpec
from halfstep.nets.channels import Free, between, outputs
from halfstep.nets.denoiser import Cond, require_config, require_labels
from halfstep.nets.slices import Pieces, nearest_frequencies


class UViT2DModel(ModelMixin, ConfigMixin):
    """sample [B, in_channels, S, S], timestep (a number, 0-dim or [B]), class_labels int [B] -> .sample [B, out, S, S].

    `embed_dim`: width D of every token; `depth`: blocks without the middle one, even; `num_heads`: divides D.
    `mlp_time_embed`: a two-layer MLP on the sinusoid. `num_class_embeds`: a class token from that many embeddings.
    Raises ModelError for sizes that make no patches, no heads or no symmetric depth.
    There are as many parameters as fields of the config, because diffusers' `register_to_config` makes it from them.
    Published sizes: S (512, 12, 8), M (768, 16, 12), L (1024, 20, 16), as (embed_dim, depth, num_heads).
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (diffusers' own way to say it)

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        patch_size: int = 2,
        embed_dim: int = 512,
        depth: int = 12,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        mlp_time_embed: bool = False,
        num_class_embeds: int | None = None,
    ):
        super().__init__()
        require = partial(require_config, where="UViT2DModel")
        require(sample_size % patch_size == 0, f"size {sample_size}", f"a multiple of the patch size {patch_size}")
        require(embed_dim % num_heads == 0, f"{embed_dim} channels", f"a multiple of {num_heads} heads")
        require(embed_dim % 2 == 0, f"{embed_dim} channels", "an even number, for sines and cosines")
        require(depth % 2 == 0 and depth > 0, f"depth {depth}", "an even number above 0")
        self.gradient_checkpointing = False
        tokens = (sample_size // patch_size) ** 2
        self.extras = 1 if num_class_embeds is None else 2
        self.patch_embed = PatchEmbed(in_channels, embed_dim, patch_size)
        self.time_embed = (
            nn.Sequential(nn.Linear(embed_dim, 4 * embed_dim), nn.SiLU(), nn.Linear(4 * embed_dim, embed_dim))
            if mlp_time_embed
            else nn.Identity()
        )
        if num_class_embeds is not None:
            self.label_emb = nn.Embedding(num_class_embeds, embed_dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + tokens, embed_dim))
        made: dict[str, Any] = {"dim": embed_dim, "heads": num_heads, "mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias}
        self.in_blocks = nn.ModuleList(Block(**made) for _ in range(depth // 2))
        self.mid_block = Block(**made)
        self.out_blocks = nn.ModuleList(Block(**made, skip=True) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(embed_dim)
        self.decoder_pred = nn.Linear(embed_dim, patch_size**2 * out_channels)
        self.final_layer = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(_init)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        x = self.tokens(sample, timestep, class_labels)
        skips = []
        for block in self.in_blocks:
            x = self._run(block, x)
            skips.append(x)
        x = self._run(self.mid_block, x)
        for block in self.out_blocks:
            x = self._run(block, x, skips.pop())
        out = self.picture(x)
        return UNet2DOutput(sample=out) if return_dict else (out,)

    def tokens(
        self, sample: torch.Tensor, timestep: torch.Tensor | float, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the first block takes, [B, L, D]: class, time, patches, each with its place."""
        config: Any = self.config
        require_labels(class_labels, config, where="UViT2DModel")
        steps = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        time = get_timestep_embedding(steps, config.embed_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        tokens = [self.time_embed(time.to(sample.dtype))[:, None]]
        if class_labels is not None:
            tokens.insert(0, self.label_emb(class_labels)[:, None])
        return torch.cat([*tokens, self.patch_embed(sample)], dim=1) + self.pos_embed

    def picture(self, x: torch.Tensor) -> torch.Tensor:
        """What the last block's tokens [B, L, D] predict, [B, out, S, S]."""
        config: Any = self.config
        x = self.decoder_pred(self.norm(x))[:, self.extras :]
        return self.final_layer(_unpatch(x, config.patch_size, config.out_channels))

    def _run(self, block: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)


class PatchEmbed(nn.Module):
    """[B, C, S, S] -> [B, (S / patch)^2, D]."""

    def __init__(self, channels: int, dim: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """A pre-norm transformer block; with `skip`, a linear layer joins the partner's tokens first. [B, L, D] -> same."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, qkv_bias: bool, skip: bool = False):
        super().__init__()
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = SelfAttention(dim, heads, qkv_bias), Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: torch.Tensor, partner: torch.Tensor | None = None) -> torch.Tensor:
        if self.skip_linear is not None and partner is not None:
            x = self.skip_linear(torch.cat([x, partner], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SelfAttention(nn.Module):
    """Multi-head self-attention, [B, L, D] -> [B, L, D]."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, length, dim = x.shape
        q, k, v = self.qkv(x).view(b, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, length, dim))


class Mlp(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def _unpatch(x: torch.Tensor, patch: int, channels: int) -> torch.Tensor:
    """[B, L, patch * patch * channels] -> [B, channels, S, S]; inside a token the channel runs fastest."""
    side = round(x.shape[1] ** 0.5)
    x = x.view(x.shape[0], side, side, patch, patch, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], channels, side * patch, side * patch)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def fresh_config(spec: ModelSpec, size: int, channels: int, classes: int | None, timesteps: int) -> dict[str, Any]:
    """The config of a fresh U-ViT for images [channels, size, size]. It has no table of the `timesteps`."""
    return {
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels,
        "patch_size": spec.patch,
        "embed_dim": spec.channels[0],
        "depth": spec.layers,
        "num_heads": max(1, spec.channels[0] // spec.head_dim),
        "num_class_embeds": classes,
    }


# -------------------------------------------------------------------------------- narrower versions (see slimmable.py)


def narrow_config(config: Mapping[str, Any], width: float) -> dict[str, Any]:
    """The config at `width` in (0, 1]: fewer heads of the same size, so fewer channels, and a narrower MLP.

    Raises ModelError when the width gives no whole heads.
    """
    heads = config["num_heads"]
    kept = round(heads * width, 2)
    if kept != int(kept) or kept < 1:
        raise ModelError(
            got=f"{heads} heads x {width:g} = {kept:g}",
            expected="a whole number of heads",
            where="slim.widths",
            do=f"choose multiples of 1/{heads}",
        )
    narrow = {key: value for key, value in config.items() if not key.startswith("_")}
    return narrow | {"num_heads": int(kept), "embed_dim": config["embed_dim"] // heads * int(kept)}


def slice_exceptions(
    config: Mapping[str, Any], narrow: Mapping[str, Any], names: Iterable[str], concat: str
) -> Iterator[tuple[str, int, Pieces]]:
    """The dimensions of the slim weights that are no plain prefix, as (parameter, dimension, pieces)."""
    full, slim = config["embed_dim"], narrow["embed_dim"]
    for name in names:
        if ".qkv." in name:  # queries, keys and values are stacked
            yield name, 0, ((0, slim), (full, slim), (2 * full, slim))
        if name.endswith("skip_linear.weight") and concat == "aligned":  # own tokens beside the partner's
            yield name, 1, ((0, slim), (full, slim))
        if name == "time_embed.0.weight":  # the narrow net's own sinusoid: columns of nearest frequency
            yield name, 1, nearest_frequencies(full // 2, slim // 2)


def free_channels(model: UViT2DModel) -> Iterator[Free]:
    """All channels of free order, one by one; apply an order before asking for the next."""
    for module in model.modules():
        if isinstance(module, Mlp):
            yield between(module.fc1, module.fc2)
        elif isinstance(module, SelfAttention):
            yield from _inside_attention(module)


def _inside_attention(attn: SelfAttention) -> Iterator[Free]:
    dim, heads = len(attn.proj.weight), attn.heads
    value = attn.qkv.weight[2 * dim :].norm(dim=1) * attn.proj.weight.norm(dim=0)
    moves = (*((p, at, 3) for p, at, _ in outputs(attn.qkv)), (attn.proj.weight, 1, 1))
    yield Free(value.view(heads, -1).sum(1), moves, block=dim // heads)


# --------------------------------------------------------------------------------------------------- features to reuse
# DeepCache's idea (arXiv 2312.00858) on U-ViT's long skips. Cut c: the tokens that enter the block out which joins
# those of in_blocks[c], before it does. Learning-to-Cache (arXiv 2406.01733) leaves 47 % of U-ViT-H's layers out.


def cut_count(model: UViT2DModel) -> int:
    """One cut for every long skip."""
    return len(model.out_blocks)


def tapped(
    model: UViT2DModel, sample: torch.Tensor, timestep: torch.Tensor, cond: Cond, cuts: Collection[int]
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """The plain call, bit for bit, and the features at the cuts; see `architectures.Cuts`."""
    x = model.tokens(sample, timestep, **cond)
    skips = []
    for block in model.in_blocks:
        x = block(x)
        skips.append(x)
    x = model.mid_block(x)
    kept = {}
    for block in model.out_blocks:
        if len(skips) - 1 in cuts:
            kept[len(skips) - 1] = x
        x = block(x, skips.pop())
    return model.picture(x), kept


def shallow(
    model: UViT2DModel, sample: torch.Tensor, timestep: torch.Tensor, cond: Cond, cut: int, features: torch.Tensor
) -> torch.Tensor:
    """The blocks in up to in_blocks[cut], and their partners out."""
    x = model.tokens(sample, timestep, **cond)
    skips = []
    for block in model.in_blocks[: cut + 1]:
        x = block(x)
        skips.append(x)
    x = features
    for block in model.out_blocks[-(cut + 1) :]:
        x = block(x, skips.pop())
    return model.picture(x)
