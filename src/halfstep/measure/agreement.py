"""Whether pictures show what was asked for: a classifier of the data looks at pictures drawn under captions or classes.

For a model of a few classes this is what a CLIP score is for one of everything. The classifier is a feature network
of ours (`halfstep features`), trained on the labels of the data; its accuracy on real pictures is the ceiling.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from halfstep.core.errors import DataError, ModelError
from halfstep.measure.features import FeatureNet

Z = 1.959963984540054
"""Of a 95 % interval."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The share of pictures that a classifier takes for the class they were asked to be, with a 95 % interval (Wilson).

    by_class: the share of each class that was asked for.  ceiling: the classifier's accuracy on the pictures that it
    was tested with; None where nobody tested it.  classifier: its name; shares of different ones are not compared.
    """

    share: float
    low: float
    high: float
    n: int
    by_class: dict[int, float]
    ceiling: float | None
    classifier: str

    def __str__(self) -> str:
        return f"{self.share:.1%} [{self.low:.1%}, {self.high:.1%}]"

    def to_json(self) -> dict[str, object]:
        return asdict(self) | {"by_class": {str(label): share for label, share in self.by_class.items()}}


@torch.no_grad()
def matches(net: FeatureNet, batches: Iterable[torch.Tensor], asked: np.ndarray) -> np.ndarray:
    """For every picture whether its class is the one asked for, bool [N].

    batches: float32 [B, C, S, S] in [-1, 1], in the order of `asked`, the class numbers int64 [N].
    Raises ModelError for a network that knows no classes, DataError for another number of pictures, or classes that the
    network does not have.
    """
    trained: Any = net.record.get("trained") or {}
    if trained.get("by_rotation"):
        got, do = "a network that tells rotations apart", "train features on labelled pictures (`halfstep features`)"
        raise ModelError(got=got, expected="a classifier", where=net.name, do=do)
    seen = [net.features(x.clamp(-1, 1)).cpu().numpy() for x in batches]
    return matching(net, np.concatenate(seen) if seen else np.zeros((0, net.config["n_features"])), asked)


@torch.no_grad()
def matching(net: FeatureNet, features: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The same of pictures by their features [N, F], which the network gave. Raises DataError as `matches`."""
    given = torch.from_numpy(np.asarray(features, dtype=np.float32)).to(net.device)
    found, asked = net.classify(given).argmax(1).cpu().numpy(), np.asarray(asked, dtype=np.int64)
    if len(found) != len(asked) or len(found) == 0:
        got, expected = f"{len(found)} pictures for {len(asked)} classes", "one picture for each, at least one"
        raise DataError(got=got, expected=expected, where="agreement", do="draw as many pictures as were asked for")
    count = net.config["n_classes"]
    if not 0 <= asked.min() <= asked.max() < count:
        got = f"class numbers from {asked.min()} to {asked.max()}"
        raise DataError(got=got, expected=f"0 to {count - 1}", where=net.name, do="use the data's own classifier")
    return found == asked


def agreement(net: FeatureNet, found: np.ndarray, asked: np.ndarray) -> Agreement:
    """The share of `matches` with its interval. found: bool [N].  asked: int64 [N]."""
    share, n = float(found.mean()), len(found)
    low, high = wilson(share, n)
    ceiling: Any = net.record.get("accuracy")
    return Agreement(
        share=share,
        low=low,
        high=high,
        n=n,
        by_class={int(label): float(found[asked == label].mean()) for label in np.unique(asked)},
        ceiling=ceiling,
        classifier=net.name,
    )


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of n, which stays within 0 and 1 and is sound at both ends."""
    centre, spread = share + Z**2 / (2 * n), Z * (share * (1 - share) / n + Z**2 / (4 * n**2)) ** 0.5
    return max(0.0, (centre - spread) / (1 + Z**2 / n)), min(1.0, (centre + spread) / (1 + Z**2 / n))


def gained(before: np.ndarray, after: np.ndarray) -> tuple[float, float, float]:
    """How much larger the share of `after` is than that of `before`, with a 95 % interval: (value, low, high).

    Both bool [N], of the same noise and captions: only pictures that changed sides count. The interval is Agresti and
    Min's (2005), Wald's after half a picture is added to each of the four cells. Raises DataError for unequal counts.
    """
    if before.shape != after.shape or before.size == 0:
        got, do = f"{before.size} and {after.size} pictures", "draw both from the same seeds"
        raise DataError(got=got, expected="as many of both", where="agreement", do=do)
    n, won, lost = len(before), int((after & ~before).sum()), int((before & ~after).sum())
    centre = (won - lost) / (n + 2)
    spread = Z * max(0.0, won + lost + 1 - (won - lost) ** 2 / (n + 2)) ** 0.5 / (n + 2)
    return (won - lost) / n, centre - spread, centre + spread
