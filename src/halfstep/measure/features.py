"""Features of pictures: a small classifier of our own trained on the data at hand, raw pixels, extraction."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from halfstep.core.disk import read_json, write_atomic, write_json
from halfstep.core.errors import DataError, DivergedError, ModelError
from halfstep.core.seeds import seeded
from halfstep.nets.weights import open_weights

if TYPE_CHECKING:
    from halfstep.data.images import Images

SMALLEST = 8  # the side of the smallest images that a feature network takes

# ---- a feature network of our own ----------------------------------------------------------------------------------


class FeatureNet(nn.Module):
    """A small classifier whose last hidden layer serves as features.

    Input: float32 [B, channels, size, size] in [-1, 1], size >= 8. Strided convolutions down to 4x4 or smaller, global
    average pool, a linear layer without activation to `n_features` (Gaussian-like, which the Fréchet distance assumes
    and a ReLU's output is not), a linear classifier.
    Raises: ModelError for a config that makes no network, DataError for images of another shape.
    """

    def __init__(self, *, channels: int, size: int, width: int = 32, n_classes: int, n_features: int = 64):
        super().__init__()
        self.config = {
            "channels": channels,
            "size": size,
            "width": width,
            "n_classes": n_classes,
            "n_features": n_features,
        }
        least = {"channels": 1, "size": SMALLEST, "width": 1, "n_classes": 2, "n_features": 1}
        for key, value in self.config.items():
            if type(value) is not int or not least[key] <= value <= 1 << 16:
                expected = f"a whole number from {least[key]}"
                raise ModelError(got=f"{key} {value!r}", expected=expected, where="feature network", do="change it")
        layers = [*_conv(channels, width, 1)]
        now, side = width, size
        while side > 4:
            after = min(2 * now, 4 * width)
            layers += [*_conv(now, after, 2), *_conv(after, after, 1)]
            now, side = after, (side + 1) // 2
        self.body = nn.Sequential(*layers)
        self.to_features = nn.Linear(now, n_features)
        self.classify = nn.Linear(n_features, n_classes)
        self.record: dict[str, object] = {"data": "untrained", "fingerprint": None, "accuracy": None, "trained": None}

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, S, S], wherever it lies -> [B, n_features]."""
        wanted = (self.config["channels"], self.config["size"], self.config["size"])
        _require_shape(tuple(x.shape[1:]), wanted)
        return self.to_features(self.body(x.to(self.device)).mean((2, 3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, S, S] -> logits [B, n_classes]."""
        return self.classify(self.features(x))

    @property
    def name(self) -> str:
        """Names the network in results: its data and 8 hex digits of its weights, so that a retrained one differs."""
        data = str(self.record["data"])
        last = Path(data.partition(":")[2] or data).name[:80]
        return f"own:{''.join(c if c.isprintable() else '?' for c in last)}-{weights_digest(self)[:8]}"

    @property
    def device(self) -> torch.device:
        return self.classify.weight.device

    def save(self, folder: Path) -> None:
        """Write `features.safetensors` and `features.json` (config, data, how trained), each whole or absent."""
        folder = Path(folder)
        state = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        write_atomic(folder / "features.safetensors", lambda temporary: save_file(state, temporary))
        record = {"config": self.config, "weights_sha256": weights_digest(self), **self.record}
        write_json(folder / "features.json", record)

    @classmethod
    def load(cls, folder: Path) -> FeatureNet:
        """Read what `save` wrote. Raises ModelError that names the file: missing, cut, or not belonging together."""
        path, weights = Path(folder) / "features.json", Path(folder) / "features.safetensors"
        do = "run `halfstep features` or name another folder"
        record = read_json(path, what="the record of a feature network", do=do, error=ModelError)
        try:
            digest = record.pop("weights_sha256")
            with torch.device("meta"):  # a config that lies about its size is given no memory
                net = cls(**record.pop("config"))
            net.record |= record
        except ModelError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise bad_file(path, error, "the record of a feature network") from error
        try:
            net.load_state_dict({name: value.float() for name, value in stored_tensors(weights).items()}, assign=True)
        except RuntimeError as error:
            raise bad_file(weights, error, "the weights of a feature network") from error
        if weights_digest(net) != digest:
            raise bad_file(weights, f"weights that {path.name} does not describe", "the two files of one network")
        return net.eval()


def feature_net_for(images: Images, *, width: int = 32, n_features: int = 64, seed: int = 0) -> FeatureNet:
    """An untrained net that fits the images: one class per label, or four rotations where there are no labels.

    Raises ModelError for images that are too small.
    """
    if images.size < SMALLEST:
        raise ModelError(
            got=f"images of {images.size}x{images.size}",
            expected=f"{SMALLEST}x{SMALLEST} or larger, for a feature network",
            where=images.name,
            do=f"write --set eval.features=pixels, or --set data.size={SMALLEST} where the model's size is free",
        )
    with seeded(seed):
        n_classes = 4 if _by_rotation(images) else len(images.classes)
        return FeatureNet(
            channels=images.channels, size=images.size, width=width, n_classes=n_classes, n_features=n_features
        )


@dataclass(frozen=True)
class FeatureRecord:
    """One step of feature training: cross-entropy and share of right answers on that batch."""

    step: int
    loss: float
    accuracy: float


def train_features(
    net: FeatureNet,
    images: Images,
    *,
    test: Images | None = None,
    steps: int = 1500,
    batch: int = 128,
    lr: float = 2e-3,
    seed: int = 0,
    augment: bool = True,
) -> Iterator[FeatureRecord]:
    """Train `net` in place and yield a record per step: by labels, or by telling rotations apart (arXiv 1803.07728).

    augment: random shifts of 1 pixel (2 from 16x16 on), edges repeated.
    All randomness comes from `seed`: on CPU, equal arguments give equal weights. When the generator is exhausted,
    `net.record` holds the accuracy on `test`, or on `images` without it.
    Raises: DataError for images of another shape than the net, ModelError for another number of classes.
    """
    _require_fit(net, images)
    trained = {
        "steps": steps,
        "batch": batch,
        "lr": lr,
        "seed": seed,
        "augment": augment,
        "by_rotation": _by_rotation(images),
    }
    net.record = {"data": images.name, "fingerprint": images.fingerprint, "accuracy": None, "trained": trained}
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    net.train()
    for step in range(1, steps + 1):
        x, target = _drawn(images, batch, augment, generator)
        logits, target = net(x.to(net.device)), target.to(net.device)
        loss = F.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if not math.isfinite(loss.item()):
            raise DivergedError(
                got=f"a loss of {loss.item()} at step {step}",
                expected="a finite number",
                where=f"features of {images.name}",
                do="choose --set eval.features=pixels, or another network",
            )
        yield FeatureRecord(step, loss.item(), (logits.argmax(1) == target).float().mean().item())
    net.eval()
    net.record["accuracy"] = accuracy(net, images if test is None else test)


def _drawn(images: Images, batch: int, augment: bool, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """One batch of a feature training: images [B, C, S, S] and what is to be told of them, labels or rotations [B]."""
    index = torch.randint(len(images), (batch,), generator=generator)
    x = images.batch(index)
    if augment:
        x = _shift(x, 1 if images.size < 16 else 2, generator)
    if not _by_rotation(images):
        return x, _labels(images, index)
    target = torch.randint(4, (batch,), generator=generator)
    return torch.stack([x.rot90(turn, (2, 3)) for turn in range(4)], 1)[torch.arange(batch), target], target


@torch.no_grad()
def accuracy(net: FeatureNet, images: Images) -> float:
    """Share of right answers, 0..1: labels, or rotations (all four of every image) where there are no labels."""
    _require_fit(net, images)
    right = total = 0
    for index in slices_of(len(images)):
        x = images.batch(index).to(net.device)
        if _by_rotation(images):
            pairs = [(x.rot90(turn, (2, 3)), torch.full((len(x),), turn)) for turn in range(4)]
        else:
            pairs = [(x, _labels(images, index))]
        for inputs, target in pairs:
            right += (net(inputs).argmax(1).cpu() == target).sum().item()
            total += len(target)
    return right / total


def _conv(c_in: int, c_out: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.GroupNorm(math.gcd(8, c_out), c_out), nn.SiLU()


def _by_rotation(images: Images) -> bool:
    return images.labels is None or len(images.classes) < 2


def _labels(images: Images, index: torch.Tensor | slice) -> torch.Tensor:
    labels = images.batch_labels(index)
    assert labels is not None, "_by_rotation was asked first"
    return labels


def slices_of(n: int, size: int = 256) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _shift(x: torch.Tensor, most: int, generator: torch.Generator) -> torch.Tensor:
    """Move each image by up to `most` pixels each way; what was at the edge is repeated. [B, C, S, S] -> same."""
    n, channels, side, _ = x.shape
    offset = torch.randint(2 * most + 1, (2, n, 1), generator=generator) + torch.arange(side)
    padded = F.pad(x, (most,) * 4, mode="replicate")
    image, channel = torch.arange(n)[:, None, None, None], torch.arange(channels)[:, None, None]
    return padded[image, channel, offset[0][:, None, :, None], offset[1][:, None, None, :]]


def weights_digest(net: nn.Module) -> str:
    """SHA-256 of the weights, whatever file they came in."""
    digest = hashlib.sha256()
    for key, value in sorted(net.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def stored_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file. Raises ModelError."""
    do = "run `halfstep features` or name another folder"
    with open_weights(file, what="the weights of a feature network", do=do) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)


def bad_file(path: Path, error: object, expected: str) -> ModelError:
    got = "no such file" if isinstance(error, FileNotFoundError) else f"an unusable one ({error})"
    return ModelError(got=got, expected=expected, where=path, do="run `halfstep features` or name another folder")


def _require_shape(got: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if got != wanted:
        do = "use a feature network trained at this size and these channels"
        raise DataError(got=f"images {list(got)}", expected=f"{list(wanted)}", where="feature network", do=do)


def _require_fit(net: FeatureNet, images: Images) -> None:
    _require_shape((images.channels, images.size), (net.config["channels"], net.config["size"]))
    n_classes, expected = net.config["n_classes"], 4 if _by_rotation(images) else len(images.classes)
    if n_classes != expected:
        do = "build the net with feature_net_for(images)"
        raise ModelError(got=f"{n_classes} outputs", expected=f"{expected}", where="feature network", do=do)


# ---- extractors --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extractor:
    """name: goes into every result.  fn: float32 [B, C, H, W] in [-1, 1] -> [B, n_features], which can be pickled.
    classifier: the net whose features these are, where it was trained to tell classes."""

    name: str
    n_features: int
    fn: Callable[[torch.Tensor], torch.Tensor]
    classifier: FeatureNet | None = None


def extractor_of(net: FeatureNet) -> Extractor:
    """The extractor of a trained net; its name is that of the weights as they are now."""
    trained: Any = net.record.get("trained") or {"by_rotation": True}
    return Extractor(net.name, net.config["n_features"], net.features, None if trained.get("by_rotation") else net)


def raw_pixels(images: Images) -> Extractor:
    """No network: the C * S * S pixels of tiny pictures are the features, as in toys of the literature.

    Raises ModelError above 1,024 of them: a covariance would want tens of thousands of pictures.
    """
    count = images.channels * images.size**2
    if count > 1024:
        got, expected = f"pictures of {count:,} numbers", "at most 1,024 (32x32 grey, 16x16 in colour)"
        raise ModelError(got=got, expected=expected, where="eval.features=pixels", do="use --set eval.features=own")
    return Extractor(
        f"pixels:{images.channels}x{images.size}x{images.size}", count, partial(torch.flatten, start_dim=1)
    )


@torch.no_grad()
def extract(extractor: Extractor, batches: Iterable[torch.Tensor]) -> np.ndarray:
    """Features of batches [B, C, H, W] in [-1, 1], in order: float64 [N, F]. The images are not kept.

    Raises: DataError for integer or out-of-range pixels, NaN, no images, or images the network does not take.
    """
    parts = []
    for x in batches:
        if x.ndim != 4 or not x.is_floating_point() or not x.abs().max() <= 1.001:  # "not <=" also catches NaN
            low, high = x.min().item(), x.max().item()
            got, do = f"{x.dtype} {list(x.shape)} from {low:.3g} to {high:.3g}", "scale or clamp the images"
            raise DataError(got=got, expected="floats [B, C, H, W] in [-1, 1]", where="images", do=do)
        parts.append(extractor.fn(x.float()).float().cpu().numpy())
    if not parts:
        raise DataError(got="no images", expected="at least one", where="images", do="give some")
    return finite(np.concatenate(parts, dtype=np.float64))


def finite(array: np.ndarray) -> np.ndarray:
    if not np.isfinite(array).all():
        do = "check the generated images and the feature network"
        raise DataError(got="NaN or infinity", expected="finite numbers", where="features", do=do)
    return array
