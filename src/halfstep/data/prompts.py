"""Prompts through a text encoder, once: what a denoiser that is conditional on text takes, cached as latents are.

As in diffusers' pipelines, prompts are padded to one length, the condition is the encoder's last hidden state, and the
condition on nothing is that of the empty prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from halfstep.core import disk
from halfstep.core.errors import DataError, HalfstepError
from halfstep.core.sums import digest_of
from halfstep.core.typed import shown
from halfstep.core.watch import SILENT, Watch
from halfstep.data.arrays import cache_root, cached

NOTHING = ""
"""The prompt that says nothing, whose condition guidance moves away from."""


class Prompter(Protocol):
    """What makes the condition of prompts, by the names under which the denoiser takes it, float32 on the CPU.

    `condition(prompts, cut=False, watch=SILENT)`: each tensor [N, ...]; raises DataError for none and, unless they are
    to be `cut`, for one that is too long. `nothing()`: the condition on no prompt, each [1, ...]. `to(device)`: moves
    the nets.
    """

    def condition(self, prompts: Sequence[str], *, cut: bool = False, watch: Watch = SILENT) -> dict[str, Any]: ...

    def nothing(self) -> dict[str, Any]: ...

    def to(self, device: torch.device | str) -> Prompter: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class TextEncoder:
    """A text encoder of the transformers library, and how it is called: a `Prompter`.

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

    def condition(self, prompts: Sequence[str], *, cut: bool = False, watch: Watch = SILENT) -> dict[str, Any]:
        """As `encode_prompts`."""
        return encode_prompts(self, prompts, cut=cut, watch=watch)

    def nothing(self) -> dict[str, Any]:
        """The condition on the empty prompt."""
        return encode_prompts(self, [NOTHING])

    def to(self, device: torch.device | str) -> TextEncoder:
        self.net.to(device)
        return self


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
    states = cached(
        file, shape, "<f4", lambda row: _encoded(encoder, tokens, mask, range(row, len(tokens), batch), watch)
    )
    cond = {"encoder_hidden_states": torch.from_numpy(np.array(states))}
    return {**cond, "encoder_attention_mask": mask} if encoder.for_net else cond


def _tokens(encoder: TextEncoder, prompts: Sequence[str], cut: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask of padded prompts, int64 [N, tokens] both."""
    require_short([(encoder.tokenizer, encoder.tokens)], prompts, cut)
    read = encoder.tokenizer(
        list(prompts), padding="max_length", max_length=encoder.tokens, truncation=True, return_tensors="pt"
    )
    return read.input_ids, read.attention_mask


def require_short(readers: Sequence[tuple[Any, int]], prompts: Sequence[str], cut: bool) -> list[list[list[int]]]:
    """The tokens of every prompt, by reader, a tokenizer with the most tokens that it reads. Raises DataError for no
    prompts, and unless they are to be `cut` for the first one of which no reader reads the end."""
    if not prompts:
        raise DataError(got="no prompts", expected="at least one", where="prompts", do="give some")
    read = [[list(one) for one in tokenizer(list(prompts)).input_ids] for tokenizer, _ in readers]
    for k, prompt in enumerate(prompts):
        counts = [len(tokens[k]) for tokens in read]
        if not cut and all(count > most for count, (_, most) in zip(counts, readers, strict=True)):
            raise DataError(
                got=f"{shown(prompt)}, {max(counts)} tokens",
                expected=f"{max(most for _, most in readers)} at most, as the model was trained with",
                where="prompts",
                do="shorten it",
            )
    return read


def kept_tensors(content: Any, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tensors by name as `make` gives them, made once for this content (of JSON) and kept in the cache."""
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
    file = cache_root() / "prompts" / f"{key}.safetensors"
    found = _kept(file)
    if found is None:
        found = {name: one.contiguous() for name, one in make().items()}
        tensors = found
        disk.write_atomic(file, lambda path: save_file(tensors, path))
        disk.write_json(file.with_suffix(".json"), {"sha256": digest_of(file)})
    return found


def _kept(file: Path) -> dict[str, torch.Tensor] | None:
    """What `kept_tensors` wrote; None when it is absent, cut or changed."""
    try:
        record = disk.read_json(file.with_suffix(".json"), what="the digest of conditions", do="delete it")
        return load_file(file) if digest_of(file) == record.get("sha256") else None
    except (OSError, HalfstepError):
        return None


def _key(encoder: TextEncoder, tokens: torch.Tensor, mask: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{encoder.fingerprint} {encoder.masked} {list(tokens.shape)}".encode())
    digest.update(torch.stack([tokens, mask]).numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:32]


@torch.no_grad()
def _encoded(
    encoder: TextEncoder, tokens: torch.Tensor, mask: torch.Tensor, begins: range, watch: Watch
) -> Iterator[np.ndarray]:
    """float32 [batch, tokens, width], of the batches that begin so."""
    with watch.stage("encode prompts", len(tokens)) as told:
        for begin in begins:
            read, seen = (x[begin : begin + begins.step].to(encoder.net.device) for x in (tokens, mask))
            yield encoder.net(read, attention_mask=seen if encoder.masked else None)[0].float().cpu().numpy()
            told(min(begin + begins.step, len(tokens)))
