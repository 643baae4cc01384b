"""What a model that is conditional on text is drawn and trained under: prompts, or the captions of images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from halfstep.core.errors import DataError, ModelError
from halfstep.data.captions import read_captions
from halfstep.data.images import Images
from halfstep.data.latents import Latents
from halfstep.data.prompts import NOTHING, encode_prompts
from halfstep.engine.bank import Bank
from halfstep.engine.conditions import Conditions
from halfstep.nets.architectures import example_of
from halfstep.nets.content import fingerprint
from halfstep.nets.denoiser import Cond, class_count, joined, picked
from halfstep.nets.text import load_text_encoder


def takes_text(bank: Bank) -> bool:
    """Whether the bank's reference is conditional on text. Raises ModelError for what is neither text nor class."""
    if class_count(bank.config):
        return False
    return "encoder_hidden_states" in example_of(bank[bank.reference], 1)


def with_text(bank: Bank, source: str | Path, guidance: float) -> Bank:
    """The bank guided so, with the condition on nothing: its own, or that of "" by its pipeline folder's text encoder.

    Raises ModelError for a model that takes more than one encoder's hidden states (Stable Diffusion XL and later).
    """
    if bank.null is not None:
        return bank.with_null(bank.null, guidance)
    more = set(example_of(bank[bank.reference], 1)) - {"encoder_hidden_states", "encoder_attention_mask"}
    if more:
        raise ModelError(
            got=f"a model that takes {', '.join(sorted(more))} beside its text",
            expected="the hidden states of one text encoder",
            where=source,
            do="make a plan with halfstep.plan_for and attach it to its pipeline",
        )
    encoder = load_text_encoder(source, for_net=takes_mask(bank))
    return bank.with_null(encode_prompts(encoder, [NOTHING]), guidance)


def conditions_of(bank: Bank, source: str | Path, prompts: str, data: str | None) -> Conditions:
    """What images are drawn under: the prompts of a file, `prompts:FILE`, or where there are none the captions of the
    images, in an order whose every beginning has their mix.

    Raises DataError where there are neither, and as `read_captions`.
    """
    if not prompts and data is None:
        got, do = "no prompts", "write --prompts FILE, one prompt a line, or give images with captions"
        raise DataError(got=got, expected="some: the model is conditional on text", where="--prompts", do=do)
    found = read_captions(f"prompts:{prompts}") if prompts else read_captions(str(data)).mixed()
    return Conditions.of_prompts(load_text_encoder(source, for_net=takes_mask(bank)), found)


@dataclass(frozen=True, kw_only=True, eq=False)
class Captioned:
    """Images or latents that a net of text is trained on, for the training loop what they are themselves.

    `table`: the different conditions, [P, ...], and after them the one on nothing, which takes the place of a share
    `dropped`, so that the net can be guided (arXiv 2207.12598, algorithm 1). `order`: int64 [N], which one each image
    has. `fingerprint`: of images and texts.
    """

    images: Images | Latents
    table: Cond
    order: torch.Tensor
    dropped: float
    fingerprint: str

    def __len__(self) -> int:
        return len(self.images)

    def batch(
        self, index: torch.Tensor, *, flip: torch.Tensor | None = None, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """As of the images, [B, ...]."""
        return self.images.batch(index, flip=flip, generator=generator)

    def batch_cond(self, index: torch.Tensor, choices: torch.Generator) -> Cond:
        """The conditions of these images, int64 [B], some of them dropped."""
        dropped = torch.rand(len(index), generator=choices) < self.dropped
        return picked(self.table, torch.where(dropped, int(self.order.max()) + 1, self.order[index]))


def captioned(images: Images | Latents, bank: Bank, source: str | Path, data: str, dropped: float) -> Captioned:
    """Images with their own captions. Raises DataError where some or all have none."""
    found = read_captions(data)
    if len(found) != len(images):
        got, expected = f"{len(found)} captions", f"{len(images)}, one for each image"
        raise DataError(got=got, expected=expected, where=data, do="caption all of them")
    known = Conditions.of_prompts(load_text_encoder(source, for_net=takes_mask(bank)), found)
    assert bank.null is not None, "a bank of text has one"
    return Captioned(
        images=images,
        table=joined(known.table, bank.null),
        order=torch.tensor(known.order),
        dropped=dropped,
        fingerprint=fingerprint(images.fingerprint, known.content, bank.null, {"dropped": dropped}),
    )


def takes_mask(bank: Bank) -> bool:
    """Whether the denoiser is told which tokens are padding."""
    return "encoder_attention_mask" in example_of(bank[bank.reference], 1)
