"""How good pictures are: Fréchet distance, KID, precision/recall, density/coverage, each with an interval.

Images become features through an `Extractor`; real images become a `Reference` once; `evaluate` compares the two and
`compare` says how much worse one set of generated images is than another. Features are float64 numpy [N, F] throughout.

A Fréchet distance is biased upward in small samples (roughly by a constant over n), and its covariance is singular
below F + 1 images: values compare only at equal n, and n should be several times F. Neither is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import nn

from halfstep.disk import write_atomic, write_json
from halfstep.errors import DataError, HalfstepError, ModelError
from halfstep.results import Quality

if TYPE_CHECKING:
    from halfstep.data import Images

METRICS = ("fd", "kid", "precision", "recall", "density", "coverage")
BUNDLED = Path(__file__).parent / "assets" / "digits_features"
KEPT_FEATURES = 5000  # real features a Reference keeps for the metrics that need points, not moments
CHUNK = 1024  # rows of a distance or kernel matrix held at a time

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
        least = {"channels": 1, "size": 8, "width": 1, "n_classes": 2, "n_features": 1}
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
        """[B, C, S, S] -> [B, n_features]."""
        wanted = (self.config["channels"], self.config["size"], self.config["size"])
        _require_shape(tuple(x.shape[1:]), wanted)
        return self.to_features(self.body(x).mean((2, 3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, S, S] -> logits [B, n_classes]."""
        return self.classify(self.features(x))

    @property
    def name(self) -> str:
        """Names the network in results: its data and 8 hex digits of its weights, so that a retrained one differs."""
        data = str(self.record["data"])
        return f"own:{Path(data.partition(':')[2] or data).name}-{_digest(self)[:8]}"

    @property
    def device(self) -> torch.device:
        return self.classify.weight.device

    def save(self, folder: Path) -> None:
        """Write `features.safetensors` and `features.json` (config, data, how trained), each whole or absent."""
        folder = Path(folder)
        state = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        write_atomic(folder / "features.safetensors", lambda temporary: save_file(state, temporary))
        write_json(folder / "features.json", {"config": self.config, "weights_sha256": _digest(self), **self.record})

    @classmethod
    def load(cls, folder: Path) -> FeatureNet:
        """Read what `save` wrote. Raises ModelError that names the file: missing, cut, or not belonging together."""
        path, weights = Path(folder) / "features.json", Path(folder) / "features.safetensors"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            digest = record.pop("weights_sha256")
            with torch.device("meta"):  # a config that lies about its size is given no memory
                net = cls(**record.pop("config"))
            net.record |= record
        except ModelError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _bad_file(path, error, "the record of a feature network") from error
        try:
            net.load_state_dict({key: value.float() for key, value in load_file(weights).items()}, assign=True)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise _bad_file(weights, error, "the weights of a feature network") from error
        if _digest(net) != digest:
            raise _bad_file(weights, f"weights that {path.name} does not describe", "the two files of one network")
        return net.eval()


def feature_net_for(images: Images, *, width: int = 32, n_features: int = 64, seed: int = 0) -> FeatureNet:
    """An untrained net that fits the images: one class per label, or four rotations where there are no labels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
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
        index = torch.randint(len(images), (batch,), generator=generator)
        x = images.batch(index)
        if augment:
            x = _shift(x, 1 if images.size < 16 else 2, generator)
        if _by_rotation(images):
            target = torch.randint(4, (batch,), generator=generator)
            x = torch.stack([x.rot90(turn, (2, 3)) for turn in range(4)], 1)[torch.arange(batch), target]
        else:
            target = _labels(images, index)
        logits, target = net(x.to(net.device)), target.to(net.device)
        loss = F.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield FeatureRecord(step, loss.item(), (logits.argmax(1) == target).float().mean().item())
    net.eval()
    net.record["accuracy"] = accuracy(net, images if test is None else test)


@torch.no_grad()
def accuracy(net: FeatureNet, images: Images) -> float:
    """Share of right answers, 0..1: labels, or rotations (all four of every image) where there are no labels."""
    _require_fit(net, images)
    right = total = 0
    for index in _slices(len(images)):
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


def _slices(n: int, size: int = 256) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _shift(x: torch.Tensor, most: int, generator: torch.Generator) -> torch.Tensor:
    """Move each image by up to `most` pixels each way; what was at the edge is repeated. [B, C, S, S] -> same."""
    n, channels, side, _ = x.shape
    offset = torch.randint(2 * most + 1, (2, n, 1), generator=generator) + torch.arange(side)
    padded = F.pad(x, (most,) * 4, mode="replicate")
    image, channel = torch.arange(n)[:, None, None, None], torch.arange(channels)[:, None, None]
    return padded[image, channel, offset[0][:, None, :, None], offset[1][:, None, None, :]]


def _digest(net: nn.Module) -> str:
    """SHA-256 of the weights, whatever file they came in."""
    digest = hashlib.sha256()
    for key, value in sorted(net.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _bad_file(path: Path, error: object, expected: str) -> ModelError:
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


# ---- feature networks by name --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extractor:
    """name: goes into every result.  fn: float32 [B, C, H, W] in [-1, 1] -> [B, n_features]."""

    name: str
    n_features: int
    fn: Callable[[torch.Tensor], torch.Tensor]


def load_features(source: str, *, bundled: Path | None = None, device: str = "cpu") -> Extractor:
    """A feature network by name.

    source: "digits" (comes with Halfstep; `bundled` is its folder), "file:DIR" or a folder that FeatureNet.save wrote,
        "inception:FILE" (safetensors of torchvision's inception_v3; needs torchvision), "dinov2" or "dinov2:DIR"
        (needs transformers; without DIR it may be fetched from the hub).
    Raises: ModelError.
    """
    kind, _, place = str(source).partition(":")
    if kind == "inception":
        return _inception(place, device)
    if kind == "dinov2":
        return _dinov2(place or "facebook/dinov2-base", device)
    if kind == "digits" and not place:
        return extractor_of(FeatureNet.load(bundled or BUNDLED).to(device))
    folder = Path(place if kind == "file" and place else str(source)).expanduser()
    if not folder.is_dir():
        expected = "digits, file:DIR, inception:FILE, dinov2 or a folder"
        raise ModelError(got=repr(str(source)), expected=expected, where="features", do="name one of these")
    return extractor_of(FeatureNet.load(folder).to(device))


def extractor_of(net: FeatureNet) -> Extractor:
    """The extractor of a trained net; its name is that of the weights as they are now."""
    return Extractor(net.name, net.config["n_features"], lambda x: net.features(x.to(net.device)))


def _extra(module: str, purpose: str) -> ModuleType:
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        got = f"no usable {package} ({error})"
        do = f"pip install {package} to match torch, or train features of your own (`halfstep features`)"
        raise ModelError(got=got, expected=f"{package}, which {purpose} needs", where="features", do=do) from error


def _resized(x: torch.Tensor, size: int) -> torch.Tensor:
    """Grey becomes three equal channels; bilinear with antialias, as aliasing distorts the distance (2104.11222)."""
    x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)


def _inception(place: str, device: str) -> Extractor:
    if not place:
        do = "convert torchvision's inception_v3 weights to safetensors and name the file"
        raise ModelError(got="'inception'", expected="inception:FILE", where="features", do=do)
    models = _extra("torchvision.models", "inception")
    with torch.device("meta"):
        net = models.inception_v3(weights=None, transform_input=False, aux_logits=False, init_weights=False)
    net.fc = nn.Identity()  # what is left ends in pool3
    try:
        state = {key: v for key, v in load_file(place).items() if not key.startswith(("fc.", "AuxLogits."))}
        net.load_state_dict(state, assign=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise _bad_file(Path(place), error, "safetensors of torchvision's inception_v3") from error
    net = net.float().eval().to(device)  # these weights take pixels in [-1, 1] as they are
    return Extractor(f"inception-{_digest(net)[:8]}", 2048, lambda x: net(_resized(x.to(device), 299)))


def _dinov2(place: str, device: str) -> Extractor:
    transformers = _extra("transformers", "dinov2")
    try:
        net = transformers.AutoModel.from_pretrained(place, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError, SafetensorError) as error:
        raise _bad_file(Path(place), error, "a DINOv2 model in safetensors") from error
    net = net.float().eval().to(device)
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def class_token(x: torch.Tensor) -> torch.Tensor:
        return net((_resized(x.to(device), 224) / 2 + 0.5 - mean) / std).last_hidden_state[:, 0]

    return Extractor(f"dinov2-{_digest(net)[:8]}", net.config.hidden_size, class_token)


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
    return _finite(np.concatenate(parts, dtype=np.float64))


# ---- distances between two sets of features ------------------------------------------------------------------------


def frechet_distance(mu1: np.ndarray, cov1: np.ndarray, mu2: np.ndarray, cov2: np.ndarray) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians; mu [F], cov [F, F] (arXiv 1706.08500, eq. 6).

    tr((S1 S2)^1/2) is taken as tr((S1^1/2 S2 S1^1/2)^1/2): symmetric, so that singular covariances give no complex
    or exploding root. Rounding below zero is cut off. Raises: DataError for NaN.
    """
    mu1, cov1, mu2, cov2 = (_finite(np.asarray(a, dtype=np.float64)) for a in (mu1, cov1, mu2, cov2))
    root = _root(cov1)
    cross = 2 * _trace_of_root(root @ cov2 @ root)
    return max(0.0, float(np.square(mu1 - mu2).sum() + np.trace(cov1) + np.trace(cov2) - cross))


def kid(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared MMD with kernel (x.y / F + 1)^3 over all pairs (arXiv 1801.01401); can be below zero."""
    return float(_kid_of(_features(x), _features(y), np.ones((1, len(x))))[0])


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 5) -> tuple[float, float]:
    """Share of fakes inside the reals' k-nearest-neighbour balls, and of reals inside the fakes' (arXiv 1904.06991)."""
    found = _neighbours(real, fake, k)
    return float(found["precision"].mean()), float(found["recall"].mean())


def density_coverage(real: np.ndarray, fake: np.ndarray, k: int = 5) -> tuple[float, float]:
    """Mean number of real balls around a fake, over k, and share of real balls that hold a fake (arXiv 2002.09797).

    The balls are closed, as in precision_recall; the authors' code has open ones, which differs in exact ties only.
    """
    found = _neighbours(real, fake, k)
    return float(found["density"].mean()), float(found["coverage"].mean())


def _finite(array: np.ndarray) -> np.ndarray:
    if not np.isfinite(array).all():
        do = "check the generated images and the feature network"
        raise DataError(got="NaN or infinity", expected="finite numbers", where="features", do=do)
    return array


def _features(x: np.ndarray, n_features: int | None = None, least: int = 2) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or (n_features is not None and x.shape[1] != n_features):
        got, expected = f"an array {list(x.shape)}", f"[N, {n_features or 'F'}]"
        raise ModelError(got=got, expected=expected, where="features", do="use one feature network for all images")
    if len(x) < least:
        raise DataError(got=f"{len(x)} images", expected=f"at least {least}", where="features", do="sample more")
    return _finite(x)


def _root(cov: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(cov)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def _trace_of_root(cov: np.ndarray) -> float:
    return float(np.sqrt(np.linalg.eigvalsh(cov).clip(0)).sum())


def _fd_of(x: np.ndarray, mu: np.ndarray, cov: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Fréchet distances to N(mu, cov) of resamples of x [n, F]; weights [R, n] are counts, each row sums to n -> [R].

    One matrix product and one eigvalsh per resample: 3 ms at n = 4096, F = 64, but about a second at F = 2048.
    """
    n, centre, root = len(x), x.mean(0), _root(cov)
    x = x - centre  # against cancellation in the moments below
    y, norms = x @ root, np.square(x).sum(1)
    distances = np.empty(len(weights))
    for i, w in enumerate(weights):
        shift = w @ x / n
        scaled = y * np.sqrt(w)[:, None]
        inner = (scaled.T @ scaled - n * np.outer(shift @ root, shift @ root)) / (n - 1)
        spread = (w @ norms - n * shift @ shift) / (n - 1)
        distances[i] = np.square(centre + shift - mu).sum() + np.trace(cov) + spread - 2 * _trace_of_root(inner)
    return distances


def _kid_of(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """KID of resamples of x [n, F] against y [m, F]; weights [R, n] -> [R].

    Pairs of an image with itself are left out of a resample too: they would make every resample look too alike.
    Exact on all n; cost R n^2, chunked, which is below a second for R = 200, n = 4096.
    """
    kernel = lambda a, b: (a @ b.T / x.shape[1] + 1) ** 3  # noqa: E731
    m, within, to_y, among_y = len(y), 0.0, np.empty(len(x)), 0.0
    for rows in _slices(len(x), CHUNK):
        block = kernel(x, x[rows])
        block[np.arange(rows.start, rows.stop), np.arange(rows.stop - rows.start)] = 0
        within = within + ((weights @ block) * weights[:, rows]).sum(1)
        to_y[rows] = kernel(x[rows], y).mean(1)
    for rows in _slices(m, CHUNK):
        among_y += kernel(y[rows], y).sum()
    among_y -= ((np.square(y).sum(1) / x.shape[1] + 1) ** 3).sum()
    total = weights.sum(1)
    return within / (total**2 - np.square(weights).sum(1)) + among_y / (m * (m - 1)) - 2 * weights @ to_y / total


def _neighbours(real: np.ndarray, fake: np.ndarray, k: int) -> dict[str, np.ndarray]:
    """Per image: is a fake in a real ball (precision), in how many over k (density); per real the other way round."""
    real = _features(real, least=k + 1)
    fake = _features(fake, real.shape[1], least=k + 1)
    centre = real.mean(0)  # against cancellation in cdist
    reals, fakes = torch.from_numpy(real - centre), torch.from_numpy(fake - centre)
    real_radius, fake_radius = _radii(reals, k), _radii(fakes, k)
    counts, (recall, coverage) = [], torch.zeros(2, len(reals), dtype=torch.bool)
    for rows in _slices(len(fakes), CHUNK):
        distance = torch.cdist(fakes[rows], reals)
        inside = distance <= real_radius
        counts.append(inside.sum(1).double())
        coverage |= inside.any(0)
        recall |= (distance <= fake_radius[rows, None]).any(0)
    count = torch.cat(counts)
    found = {"precision": count > 0, "density": count / k, "recall": recall, "coverage": coverage}
    return {name: values.double().numpy() for name, values in found.items()}


def _radii(x: torch.Tensor, k: int) -> torch.Tensor:
    """Distance to the k-th nearest other point."""
    parts = []
    for rows in _slices(len(x), CHUNK):
        distance = torch.cdist(x[rows], x)
        distance[torch.arange(len(distance)), torch.arange(rows.start, rows.stop)] = torch.inf
        parts.append(distance.kthvalue(k, dim=1).values)
    return torch.cat(parts)


# ---- real images, measured once ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """Real images as a feature network sees them.

    mu: float64 [F].  cov: float64 [F, F], over n - 1.  features: float32 [at most 5000, F], for KID and the neighbours.
    n: images behind mu and cov.  features_name, fingerprint: of the network and of the images.
    """

    mu: np.ndarray
    cov: np.ndarray
    features: np.ndarray
    n: int
    features_name: str
    fingerprint: str


def reference_stats(extractor: Extractor, images: Images, *, cache: Path | None, limit: int | None = None) -> Reference:
    """The reference of `images`, from the folder `cache` where the same network has seen the same images before.

    limit: use that many images, drawn once and for all (they may lie sorted by class); the fingerprint then says so.
    A cache file that is cut or holds something else is computed again. Raises: DataError.
    """
    n = len(images) if limit is None else min(max(limit, 0), len(images))
    fingerprint = images.fingerprint if n == len(images) else f"{images.fingerprint}[{n}]"
    key = hashlib.sha256(f"{fingerprint} {extractor.name} {KEPT_FEATURES}".encode()).hexdigest()[:24]
    path = None if cache is None else Path(cache) / f"reference-{key}.safetensors"
    found = None if path is None else _open_reference(path, extractor, fingerprint)
    if found is not None:
        return found
    index = np.random.default_rng(0).permutation(len(images))[:n]
    features = _features(extract(extractor, (images.batch(index[rows]) for rows in _slices(len(index)))))
    reference = Reference(
        mu=features.mean(0),
        cov=np.atleast_2d(np.cov(features, rowvar=False)),
        features=features[:KEPT_FEATURES].astype(np.float32),  # index is shuffled: the first are a fair draw
        n=len(features),
        features_name=extractor.name,
        fingerprint=fingerprint,
    )
    if path is not None:
        arrays = {key: np.ascontiguousarray(getattr(reference, key)) for key in ("mu", "cov", "features")}
        about = {"n": str(reference.n), "features_name": extractor.name, "fingerprint": fingerprint}
        write_atomic(path, lambda temporary: save_arrays(arrays, temporary, about))
    return reference


def _open_reference(path: Path, extractor: Extractor, fingerprint: str) -> Reference | None:
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata()
            arrays = {key: file.get_tensor(key) for key in ("mu", "cov", "features")}
        found = Reference(**arrays, n=int(about.pop("n")), **about)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError):
        return None
    f, features = extractor.n_features, found.features
    fits = found.mu.shape == (f,) and found.cov.shape == (f, f) and features.shape == (len(features), f)
    mine = (found.features_name, found.fingerprint) == (extractor.name, fingerprint)
    return found if fits and mine else None


# ---- verdicts ------------------------------------------------------------------------------------------------------


def evaluate(
    features: np.ndarray,
    reference: Reference,
    *,
    seed: int,
    metrics: Sequence[str] = METRICS,
    n_boot: int = 200,
    k: int = 5,
    features_name: str | None = None,
) -> dict[str, Quality]:
    """Quality of generated images by metric: the value on all of them and a 95 % bootstrap interval.

    features: [n, F] of the generated images.  features_name: their network, checked against the reference's if given.
    Fréchet distance and KID: the images are resampled. A resample has fewer distinct images, which moves the distance
    itself (upward), so the interval is the value plus the quantiles of (resample - mean of the resamples).
    Precision, density: what each generated image scored is resampled. Recall, coverage: what each real image scored is,
    since those belong to the generated set as a whole; the interval then tells the noise of the finite reference.
    KID and the neighbour metrics use the reference's kept features only, which is what their n_reference counts.
    Raises: DataError (NaN, or fewer than 2, or for neighbours k + 1, images), ModelError (another network).
    """
    x = _matching(features, reference, features_name)
    if unknown := [metric for metric in metrics if metric not in METRICS]:
        got, expected = f"metric {unknown[0]!r}", f"of {', '.join(METRICS)}"
        raise HalfstepError(got=got, expected=expected, where="evaluate", do="name one of these")
    real, found = reference.features.astype(np.float64), {}
    weights = _resamples(len(x), n_boot, seed)
    if set(metrics) - {"fd", "kid"}:
        found = _neighbours(real, x, k)
    results = {}
    for metric in metrics:
        if metric == "fd":
            value, low, high = _interval(_fd_of(x, reference.mu, reference.cov, weights))
        elif metric == "kid":
            value, low, high = _interval(_kid_of(x, real, weights))
        else:
            scores = found[metric]
            rows = weights if len(scores) == len(x) else _resamples(len(scores), n_boot, seed)
            value, low, high = _interval(rows @ scores / len(scores), biased=False)
        results[metric] = Quality(
            metric=metric,
            value=value,
            low=low,
            high=high,
            n=len(x),
            n_reference=reference.n if metric == "fd" else len(real),
            features=reference.features_name,
            reference=reference.fingerprint,
            seed=seed,
        )
    return results


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much larger (worse) the Fréchet distance of b is than that of a, with a paired 95 % interval."""

    value: float
    low: float
    high: float
    fd_a: float
    fd_b: float
    n: int
    features: str
    reference: str
    seed: int

    @property
    def share(self) -> float:
        """The difference as a share of a's distance: 0.05 is 5 % worse."""
        return self._share_of(self.value)

    @property
    def relative_low(self) -> float:
        return self._share_of(self.low)

    @property
    def relative_high(self) -> float:
        return self._share_of(self.high)

    def held(self, tolerance: float) -> bool:
        """Whether the whole interval lies within a loss of `tolerance`, a share of a's distance."""
        return self.high <= tolerance * self.fd_a

    def _share_of(self, difference: float) -> float:
        return difference / self.fd_a if self.fd_a > 0 else math.nan  # a is the reference itself

    def __str__(self) -> str:
        return f"{self.share:+.1%} [{self.relative_low:+.1%}, {self.relative_high:+.1%}]"

    def to_json(self) -> dict[str, object]:
        shares = {"share": self.share, "relative_low": self.relative_low, "relative_high": self.relative_high}
        return dataclasses.asdict(self) | shares


def compare(
    features_a: np.ndarray,
    features_b: np.ndarray,
    reference: Reference,
    *,
    n_boot: int = 500,
    seed: int = 0,
    features_name: str | None = None,
) -> Difference:
    """FD(b) - FD(a) for images of the same seeds: row i of both [n, F] comes from the same noise.

    Each resample takes the same rows of both, so that what the shared noise does to both cancels in the difference.
    features_name: network of both, checked against the reference's if given.
    Raises: DataError (unequal n, NaN, fewer than 2), ModelError (another network).
    """
    a, b = (_matching(features, reference, features_name) for features in (features_a, features_b))
    if len(a) != len(b):
        do = "generate both sets from the same seeds"
        raise DataError(got=f"{len(a)} and {len(b)} images", expected="as many of both", where="compare", do=do)
    weights = _resamples(len(a), n_boot, seed)
    of_a, of_b = (_fd_of(x, reference.mu, reference.cov, weights) for x in (a, b))
    value, low, high = _interval(of_b - of_a)
    return Difference(
        value=value,
        low=low,
        high=high,
        fd_a=float(of_a[0]),
        fd_b=float(of_b[0]),
        n=len(a),
        features=reference.features_name,
        reference=reference.fingerprint,
        seed=seed,
    )


def _matching(features: np.ndarray, reference: Reference, features_name: str | None) -> np.ndarray:
    if features_name is not None and features_name != reference.features_name:
        do = "extract both with one feature network"
        raise ModelError(got=features_name, expected=reference.features_name, where="features", do=do)
    return _features(features, len(reference.mu))


def _resamples(n: int, n_boot: int, seed: int) -> np.ndarray:
    """float64 [1 + n_boot, n]: the sample itself (all ones), then how often each resample holds each image."""
    if n_boot < 2:
        raise HalfstepError(got=f"n_boot {n_boot}", expected="at least 2", where="bootstrap", do="take about 200")
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_boot)
    return np.concatenate([np.ones((1, n)), draws])


def _interval(statistics: np.ndarray, *, biased: bool = True) -> tuple[float, float, float]:
    """(value, low, high) of [value, resamples...]; `biased` resamples are moved so that their mean is the value."""
    value, resampled = statistics[0], statistics[1:]
    low, high = np.quantile(resampled, (0.025, 0.975)) + (value - resampled.mean() if biased else 0.0)
    return float(value), float(low), float(high)
