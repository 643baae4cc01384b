"""Conditions: what every image of a seed is drawn under, as one value; image k's depends on k alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from halfstep.core.errors import ModelError
from halfstep.data.captions import Captions
from halfstep.data.classes import in_turn, spread
from halfstep.data.prompts import Prompter
from halfstep.engine.bank import Bank
from halfstep.nets.architectures import example_of
from halfstep.nets.content import fingerprint
from halfstep.nets.denoiser import Cond, class_count, cond_of, cond_to, picked


@dataclass(frozen=True)
class Conditions:
    """Conditions in a table, and which of them image k has: row order[k % len(order)].

    `table`: as a network takes them, each tensor [P, ...], one row for each different condition. `told`: what each row
    says, the names of classes or prompts, where that is known. `labels`: the class number of each in `order`, where
    that is known.
    """

    table: Cond = field(repr=False)
    order: tuple[int, ...] = field(repr=False)
    told: tuple[str, ...] = ()
    labels: tuple[int, ...] = field(default=(), repr=False)

    @classmethod
    def of_classes(cls, numbers: Sequence[int] | np.ndarray) -> Conditions:
        """Images whose classes are these numbers, one after another and then again from the first."""
        labels = np.asarray(numbers, dtype=np.int64)
        kinds, order = np.unique(labels, return_inverse=True)
        return cls(cond_of(torch.from_numpy(kinds)), tuple(order.tolist()), labels=tuple(labels.tolist()))

    @classmethod
    def of_prompts(cls, prompter: Prompter, captions: Captions, *, cut: bool = False) -> Conditions:
        """Images that show what these captions say, image k the caption of k; each different text is encoded once."""
        labels = () if captions.labels is None else tuple(captions.labels.tolist())
        return cls(prompter.condition(captions.texts, cut=cut), tuple(captions.order.tolist()), captions.texts, labels)

    @property
    def content(self) -> dict[str, Any]:
        """What a fingerprint is made of."""
        return {"told": self.told, "order": self.order, "table": fingerprint(self.table)}

    def at(self, first: int, count: int) -> Cond:
        """The condition of images first … first + count - 1, each tensor [count, ...]."""
        rows = torch.tensor([in_turn(self.order, k) for k in range(first, first + count)])
        return picked(self.table, rows)


def mix_of(labels: np.ndarray | None, config: Mapping[str, object]) -> Conditions | None:
    """The classes of generated images in the mix that data with these labels has, whose every beginning has it too;
    None for a net without classes, or data without labels."""
    return Conditions.of_classes(spread(labels)) if labels is not None and class_count(config) else None


def cond_for(bank: Bank, first: int, count: int, conditions: Conditions | None = None) -> Cond:
    """The condition of images first … first + count - 1, where the bank is. Without `conditions` its classes in turn,
    and {} for an unconditional bank. Raises ModelError for one that takes what is no class."""
    if conditions is None:
        classes = class_count(bank.config)
        conditions = Conditions.of_classes(range(classes)) if classes else None
        more = [name for name in example_of(bank[bank.reference], 1) if name != "class_labels"]
        if more:
            expected = f"{' and '.join(more)} for every image"
            raise ModelError(got="no conditions", expected=expected, where="the model's calls", do="give prompts")
    return {} if conditions is None else cond_to(conditions.at(first, count), bank.device, bank.dtype)
