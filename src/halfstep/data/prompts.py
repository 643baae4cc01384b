"""Prompts through a text encoder, once: what a denoiser that is conditional on text takes, cached as latents are.

As in diffusers' pipelines, prompts are padded to one length, the condition is the encoder's last hidden state, and the
condition on nothing is that of the empty prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from halfstep.core.errors import DataError
from halfstep.core.typed import shown
from halfstep.core.watch import SILENT, Watch
from halfstep.data.arrays import open_array, open_cached, write_cached
from halfstep.data.images import cache_root

NOTHING = ""
"""The prompt that says nothing, whose condition guidance moves away from."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TextEncoder:
    """A text encoder of the transformers library, and how it is called.

    tokenizer, net: as `AutoTokenizer` and the model's class read them.  tokens: the length to which prompts are padded,
    with the tokens that mark begin and end.  masked: the net is told which tokens are padding.  for_net: so is the
    denoiser (PixArt), by "encoder_attention_mask".  fingerprint: 16 hex digits of the weights.
    """

    tokenizer: Any
    net: Any
    tokens: int
    masked: bool
    for_net: bool = False
    fingerprint: str


def encode_prompts(
    encoder: TextEncoder, prompts: Sequence[str], *, cut: bool = False, batch: int = 64, watch: Watch = SILENT
) -> dict[str, torch.Tensor]:
    """The condition on each prompt: "encoder_hidden_states" float32 [N, tokens, width], where the denoiser takes it
    also "encoder_attention_mask", 1 for words and 0 for padding, int64 [N, tokens].

    cut: prompts longer than `tokens` lose their end, as in diffusers' pipelines; otherwise DataError names the first.
    """
    tokens, mask = _tokens(encoder, prompts, cut)
    file = cache_root() / "prompts" / f"{_key(encoder, tokens, mask)}.npy"
    shape = (len(prompts), encoder.tokens, encoder.net.config.hidden_size)
    states = open_cached(file, shape, "<f4")
    if states is None:
        write_cached(file, shape, "<f4", _encoded(encoder, tokens, mask, batch, watch))
        states = open_array(file)
    cond = {"encoder_hidden_states": torch.from_numpy(np.array(states))}
    return {**cond, "encoder_attention_mask": mask} if encoder.for_net else cond


def _tokens(encoder: TextEncoder, prompts: Sequence[str], cut: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask of padded prompts, int64 [N, tokens] both."""
    if not prompts:
        raise DataError(got="no prompts", expected="at least one", where="prompts", do="give some")
    if not cut:
        for prompt, found in zip(prompts, encoder.tokenizer(list(prompts)).input_ids, strict=True):
            if len(found) > encoder.tokens:
                raise DataError(
                    got=f"{shown(prompt)}, {len(found)} tokens",
                    expected=f"{encoder.tokens} at most, as the model was trained with",
                    where="prompts",
                    do="shorten it",
                )
    read = encoder.tokenizer(
        list(prompts), padding="max_length", max_length=encoder.tokens, truncation=True, return_tensors="pt"
    )
    return read.input_ids, read.attention_mask


def _key(encoder: TextEncoder, tokens: torch.Tensor, mask: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{encoder.fingerprint} {encoder.masked} {list(tokens.shape)}".encode())
    digest.update(torch.stack([tokens, mask]).numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:32]


@torch.no_grad()
def _encoded(
    encoder: TextEncoder, tokens: torch.Tensor, mask: torch.Tensor, batch: int, watch: Watch
) -> Iterator[np.ndarray]:
    """float32 [batch, tokens, width], batch by batch."""
    with watch.stage("encode prompts", len(tokens)) as told:
        for begin in range(0, len(tokens), batch):
            read, seen = (x[begin : begin + batch].to(encoder.net.device) for x in (tokens, mask))
            yield encoder.net(read, attention_mask=seen if encoder.masked else None)[0].float().cpu().numpy()
            told(min(begin + batch, len(tokens)))
