"""What a model that is conditional on text is drawn and trained under: prompts, or the captions of images."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from halfstep.core.errors import DataError
from halfstep.core.share import Share
from halfstep.data.captions import read_captions
from halfstep.data.images import Images
from halfstep.data.latents import Latents
from halfstep.data.prompts import Prompter
from halfstep.engine.bank import Bank
from halfstep.engine.conditions import Conditions
from halfstep.nets.architectures import example_of
from halfstep.nets.content import fingerprint
from halfstep.nets.denoiser import Cond, class_count, joined, picked


def takes_text(bank: Bank) -> bool:
    """Whether the bank's reference is conditional on text. Raises ModelError for what is neither text nor class."""
    if class_count(bank.config):
        return False
    return "encoder_hidden_states" in example_of(bank[bank.reference], 1)


def with_text(bank: Bank, prompter: Prompter, guidance: float) -> Bank:
    """The bank guided so, with the condition on nothing: its own, or the one that its pipeline has without a prompt."""
    return bank.with_null(prompter.nothing() if bank.null is None else bank.null, guidance)


def conditions_of(prompter: Prompter, prompts: str, data: str | None) -> Conditions:
    """What images are drawn under: the prompts of a file, `prompts:FILE`, or where there are none the captions of the
    images, in an order whose every beginning has their mix.

    Raises DataError where there are neither, and as `read_captions`.
    """
    if not prompts and data is None:
        got, do = "no prompts", "write --prompts FILE, one prompt a line, or give images with captions"
        raise DataError(got=got, expected="some: the model is conditional on text", where="--prompts", do=do)
    found = read_captions(f"prompts:{prompts}") if prompts else read_captions(str(data)).mixed()
    return Conditions.of_prompts(prompter, found)


@dataclass(frozen=True, kw_only=True, eq=False)
class Captioned:
    """Images or latents that a net of text is trained on, for the training loop what they are themselves.

    `table`: the different conditions, [P, ...], and after them the one on nothing, which takes the place of a share
    `dropped`, so that the net can be guided (arXiv 2207.12598, algorithm 1). `order`: int64 [N], which one each image
    has. `nothing`: the row of the last. `fingerprint`: of images and texts.
    """

    images: Images | Latents
    table: Cond
    order: torch.Tensor
    nothing: int
    dropped: float
    fingerprint: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def buffer(self) -> int:
        """As of the images."""
        return self.images.buffer

    def coming(self, indices: Iterable[torch.Tensor]) -> Iterator[tuple[torch.Tensor, Captioned]]:
        """As of `Images`: for each index images that hold these, with their captions."""
        mine, theirs = itertools.tee(indices)
        coming: Iterator[tuple[torch.Tensor, Images | Latents]] = self.images.coming(theirs)
        for asked, (index, images) in zip(mine, coming, strict=True):
            moved = images is not self.images
            yield index, replace(self, images=images, order=self.order[asked]) if moved else self

    def batch(
        self,
        index: torch.Tensor,
        *,
        flip: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        share: Share | None = None,
    ) -> torch.Tensor:
        """As of the images, [B, ...]."""
        return self.images.batch(index, flip=flip, generator=generator, share=share)

    def batch_cond(self, index: torch.Tensor, choices: torch.Generator, share: Share | None = None) -> Cond:
        """The conditions of these images, int64 [B], some of them dropped."""
        drawn = torch.rand(share.whole if share else len(index), generator=choices)
        dropped = (share.of(drawn) if share else drawn) < self.dropped
        return picked(self.table, torch.where(dropped, self.nothing, self.order[index]))


def captioned(images: Images | Latents, prompter: Prompter, null: Cond, data: str, dropped: float) -> Captioned:
    """Images with their own captions, and the condition on nothing. Raises DataError where some or all have none."""
    found = read_captions(data)
    if len(found) != len(images):
        got, expected = f"{len(found)} captions", f"{len(images)}, one for each image"
        raise DataError(got=got, expected=expected, where=data, do="caption all of them")
    known = Conditions.of_prompts(prompter, found)
    return Captioned(
        images=images,
        table=joined(known.table, null),
        order=torch.tensor(known.order),
        nothing=max(known.order) + 1,
        dropped=dropped,
        fingerprint=fingerprint(images.fingerprint, known.content, null, {"dropped": dropped}),
    )
