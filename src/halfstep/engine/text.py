"""What a model that is conditional on text is drawn and trained under: prompts, or the captions of images."""

from __future__ import annotations

from pathlib import Path

from halfstep.core.errors import DataError
from halfstep.data.captions import read_captions
from halfstep.data.prompts import NOTHING, encode_prompts
from halfstep.engine.bank import Bank
from halfstep.engine.conditions import Conditions
from halfstep.nets.architectures import example_of
from halfstep.nets.denoiser import class_count
from halfstep.nets.text import load_text_encoder


def takes_text(bank: Bank) -> bool:
    """Whether the bank's reference is conditional on text. Raises ModelError for what is neither text nor class."""
    if class_count(bank.config):
        return False
    return "encoder_hidden_states" in example_of(bank[bank.reference], 1)


def with_text(bank: Bank, source: str | Path, guidance: float) -> Bank:
    """The bank with the condition on nothing, "", which its pipeline folder's text encoder gives, and guided so."""
    encoder = load_text_encoder(source, for_net=_masked(bank))
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
    return Conditions.of_prompts(load_text_encoder(source, for_net=_masked(bank)), found)


def _masked(bank: Bank) -> bool:
    """Whether the denoiser is told which tokens are padding."""
    return "encoder_attention_mask" in example_of(bank[bank.reference], 1)
