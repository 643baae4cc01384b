"""How good pictures are: Fréchet distance, KID, precision/recall, density/coverage, each with an interval.

Images become features through an `Extractor`; real images become a `Reference` once; `evaluate` compares the two and
`compare` says how much worse one set of generated images is than another. Features are float64 numpy [N, F] throughout.

A Fréchet distance is biased upward in small samples (roughly by a constant over n): what is reported is corrected by
the bootstrap, 2 * value - mean of the resamples, and stands beside its floor, what n perfect draws from the real images
score. Below four images per feature nothing is decided. The distance is the one to these real images: the bootstrap
resamples generated ones only, so that no independence of the two sets is supposed (a model has seen its training set).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.numpy import save_file as save_arrays
from threadpoolctl import ThreadpoolController

from halfstep.core.disk import write_atomic
from halfstep.core.errors import DataError, HalfstepError, ModelError
from halfstep.core.results import Difference, Floor, Quality
from halfstep.core.watch import SILENT, Told, Watch
from halfstep.measure.features import Extractor, extract, finite, slices_of
from halfstep.nets.content import digest_tensors
from halfstep.nets.weights import open_weights

if TYPE_CHECKING:
    from halfstep.data.images import Images

METRICS = ("fd", "kid", "precision", "recall", "density", "coverage")
KEPT_FEATURES = 5000  # real features a Reference keeps for the metrics that need points, not moments
PER_FEATURE = 4  # images per feature below which a Fréchet distance decides nothing
NEIGHBOURS = 5  # around an image, for precision, recall, density and coverage
SMALL = 512  # features up to which numpy's products run on one thread: more spin longer than they help
CHUNK = 1024  # rows of a distance or kernel matrix held at a time

# ---- distances between two sets of features ------------------------------------------------------------------------


def frechet_distance(mu1: np.ndarray, cov1: np.ndarray, mu2: np.ndarray, cov2: np.ndarray) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians; mu [F], cov [F, F] (arXiv 1706.08500, eq. 6).

    tr((S1 S2)^1/2) is taken as tr((S1^1/2 S2 S1^1/2)^1/2): symmetric, so that singular covariances give no complex
    or exploding root. Rounding below zero is cut off. Raises: DataError for NaN.
    """
    mu1, cov1, mu2, cov2 = (finite(np.asarray(a, dtype=np.float64)) for a in (mu1, cov1, mu2, cov2))
    root = _root(cov1)
    cross = 2 * _trace_of_root(root @ cov2 @ root)
    return max(0.0, float(np.square(mu1 - mu2).sum() + np.trace(cov1) + np.trace(cov2) - cross))


def kid(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared MMD with kernel (x.y / F + 1)^3 over all pairs (arXiv 1801.01401); can be below zero."""
    return float(_kid_of(_features(x), _features(y), np.ones((1, len(x))))[0])


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of fakes inside the reals' k-nearest-neighbour balls, and of reals inside the fakes' (arXiv 1904.06991)."""
    found = _neighbours(real, fake, k)
    return float(found["precision"].mean()), float(found["recall"].mean())


def density_coverage(real: np.ndarray, fake: np.ndarray, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Mean number of real balls around a fake, over k, and share of real balls that hold a fake (arXiv 2002.09797).

    The balls are closed, as in precision_recall; the authors' code has open ones, which differs in exact ties only.
    """
    found = _neighbours(real, fake, k)
    return float(found["density"].mean()), float(found["coverage"].mean())


def _features(x: np.ndarray, n_features: int | None = None, least: int = 2) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or (n_features is not None and x.shape[1] != n_features):
        got, expected = f"an array {list(x.shape)}", f"[N, {n_features or 'F'}]"
        raise ModelError(got=got, expected=expected, where="features", do="use one feature network for all images")
    if len(x) < least:
        raise DataError(got=f"{len(x)} images", expected=f"at least {least}", where="features", do="sample more")
    return finite(x)


def _root(cov: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(cov)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def _trace_of_root(cov: np.ndarray) -> float:
    return float(np.sqrt(np.linalg.eigvalsh(cov).clip(0)).sum())


@functools.cache
def _blas() -> Any:
    """The libraries of numpy's products that are loaded; looked for once, which takes milliseconds."""
    return ThreadpoolController().select(user_api="blas")


def _threads_for(x: np.ndarray) -> Any:
    """A context in which products of features [N, F] run on as many threads as they gain by."""
    return _blas().limit(limits=1 if x.shape[1] <= SMALL else torch.get_num_threads())


def _fd_of(x: np.ndarray, mu: np.ndarray, cov: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Fréchet distances to N(mu, cov) of resamples of x [N, F]; weights [R, N] are counts, rows sum to one n -> [R].

    One matrix product and one eigvalsh per resample: 3 ms at n = 4096, F = 64, but about a second at F = 2048.
    """
    with _threads_for(x):
        n, centre, root = float(weights[0].sum()), x.mean(0), _root(cov)
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
    with _threads_for(x):
        kernel = lambda a, b: (a @ b.T / x.shape[1] + 1) ** 3  # noqa: E731
        m, within, to_y, among_y = len(y), 0.0, np.empty(len(x)), 0.0
        for rows in slices_of(len(x), CHUNK):
            block = kernel(x, x[rows])
            block[np.arange(rows.start, rows.stop), np.arange(rows.stop - rows.start)] = 0
            within = within + ((weights @ block) * weights[:, rows]).sum(1)
            to_y[rows] = kernel(x[rows], y).mean(1)
        for rows in slices_of(m, CHUNK):
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
    for rows in slices_of(len(fakes), CHUNK):
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
    for rows in slices_of(len(x), CHUNK):
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

    @property
    def scale(self) -> float:
        """A hundredth of the data's spread (trace of cov): what a change is held against where no share can be told.

        One constant picture at the mean scores the whole spread; a good model's distance is about a hundredth of it.
        """
        return float(np.trace(self.cov)) / 100

    @property
    def least(self) -> int:
        """Images below which nothing is decided: four per feature."""
        return PER_FEATURE * len(self.mu)


def reference_stats(
    extractor: Extractor, images: Images, *, cache: Path | None, limit: int | None = None, watch: Watch = SILENT
) -> Reference:
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
    with watch.stage("features of the real pictures", len(index)) as told:
        features = _features(extract(extractor, _told_batches(images, index, told)))
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
        about["digest"] = _digest(arrays)
        write_atomic(path, lambda temporary: save_arrays(arrays, temporary, about))
    return reference


def _told_batches(images: Images, index: np.ndarray, told: Told) -> Iterator[torch.Tensor]:
    """The pictures of `index`, batch by batch; told is how many were taken."""
    for rows in slices_of(len(index)):
        yield images.batch(index[rows])
        told(rows.stop)


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    return digest_tensors({name: torch.from_numpy(array) for name, array in arrays.items()})


def _open_reference(path: Path, extractor: Extractor, fingerprint: str) -> Reference | None:
    try:
        with open_weights(path, framework="numpy") as file:
            about = file.metadata()
            arrays = {key: file.get_tensor(key) for key in ("mu", "cov", "features")}
        if about.pop("digest") != _digest(arrays):
            return None
        found = Reference(**arrays, n=int(about.pop("n")), **about)
    except (ValueError, KeyError, TypeError, AttributeError):  # an error of ours is a ValueError
        return None
    f, features = extractor.n_features, found.features
    fits = found.mu.shape == (f,) and found.cov.shape == (f, f) and features.shape == (len(features), f)
    mine = (found.features_name, found.fingerprint) == (extractor.name, fingerprint)
    return found if fits and mine else None


# ---- verdicts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Distances:
    """The Fréchet distance of n generated images to a reference: as measured (`raw`), and of resamples [R], corrected.

    A resample is to the sample what the sample is to the model, so the mean of the resamples lies as far above `raw` as
    `raw` above the truth; both are moved down by that much.
    """

    raw: float
    resamples: np.ndarray
    n: int
    seed: int

    @property
    def value(self) -> float:
        """Corrected for bias; of a perfect model about zero, so that it can come out below."""
        return float(self.resamples.mean())

    @property
    def interval(self) -> tuple[float, float]:
        return _quantiles(self.resamples)


def distances(
    features: np.ndarray, reference: Reference, *, n_boot: int, seed: int, features_name: str | None = None
) -> Distances:
    """The distance of images [n, F] with its resamples: the same rows for the same n, n_boot and seed.

    Raises: DataError (NaN, or fewer than 2 images), ModelError (another network).
    """
    x = _matching(features, reference, features_name)
    raw, *resamples = _fd_of(x, reference.mu, reference.cov, _resamples(len(x), n_boot, seed))
    bias = np.mean(resamples) - raw
    return Distances(float(raw), np.array(resamples) - 2 * bias, len(x), seed)


def floor(reference: Reference, n: int, *, seed: int = 0, n_boot: int = 100) -> Floor:
    """The floor of n images, by drawing from the reference's kept features."""
    real = reference.features.astype(np.float64)
    draws = np.random.default_rng(seed).multinomial(n, np.full(len(real), 1 / len(real)), size=n_boot).astype(float)
    found = _fd_of(real, real.mean(0), np.atleast_2d(np.cov(real, rowvar=False)), draws)
    raw = float(found.mean())
    high = float(np.quantile(found, 0.95)) - raw
    return Floor(raw=raw, high=high, fresh=raw * (1 + n / reference.n))


def evaluate(
    features: np.ndarray,
    reference: Reference,
    *,
    seed: int,
    metrics: Sequence[str] = METRICS,
    n_boot: int = 200,
    k: int = NEIGHBOURS,
    features_name: str | None = None,
    fd: Distances | None = None,
) -> dict[str, Quality]:
    """Quality of generated images by metric: the value on all of them and a 95 % bootstrap interval.

    features: [n, F] of the generated images.  features_name: their network, checked against the reference's if given.
    fd: their distances, where they are known already.
    Fréchet distance: corrected for bias (see `Distances`), cut off at zero; `raw` is what was measured. KID: unbiased;
    a resample has fewer distinct images, so its interval is moved to have the value as its mean.
    Precision, density: what each generated image scored is resampled. Recall, coverage: what each real image scored is,
    since those belong to the generated set as a whole; the interval then tells the noise of the finite reference.
    KID and the neighbour metrics use the reference's kept features only, which is what their n_reference counts.
    Raises: DataError (NaN, or fewer than 2, or for neighbours k + 1, images), ModelError (another network).
    """
    x = _matching(features, reference, features_name)
    _require_known(metrics)
    real = reference.features.astype(np.float64)
    weights = _resamples(len(x), n_boot, seed)
    scores = _neighbours(real, x, k) if set(metrics) - {"fd", "kid"} else {}
    results = {}
    for metric in metrics:
        raw, n_reference = None, len(real)
        if metric == "fd":
            fd = fd or distances(x, reference, n_boot=n_boot, seed=seed)
            raw, n_reference, (value, low, high) = fd.raw, reference.n, (max(0.0, e) for e in (fd.value, *fd.interval))
        elif metric == "kid":
            value, low, high = _interval(_kid_of(x, real, weights))
        else:
            value, low, high = _interval_of_scores(scores[metric], weights, seed)
        results[metric] = Quality(
            metric=metric,
            value=value,
            low=low,
            high=high,
            n=len(x),
            n_reference=n_reference,
            features=reference.features_name,
            reference=reference.fingerprint,
            seed=seed,
            raw=raw,
        )
    return results


def _require_known(metrics: Sequence[str]) -> None:
    if unknown := [metric for metric in metrics if metric not in METRICS]:
        got, expected = f"metric {unknown[0]!r}", f"of {', '.join(METRICS)}"
        raise HalfstepError(got=got, expected=expected, where="evaluate", do="name one of these")


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
    a, b = (
        distances(features, reference, n_boot=n_boot, seed=seed, features_name=features_name)
        for features in (features_a, features_b)
    )
    return difference(a, b, reference, floor(reference, a.n).high)


def difference(a: Distances, b: Distances, reference: Reference, least_told: float) -> Difference:
    """`compare` of distances with equal resamples; a ratio is told where a's distance lies above `least_told`."""
    if (a.n, a.seed) != (b.n, b.seed):
        do = "generate both sets from the same seeds"
        raise DataError(got=f"{a.n} and {b.n} images", expected="as many of both", where="compare", do=do)
    low, high = _quantiles(b.resamples - a.resamples)
    share = relative_low = relative_high = None
    if a.value > least_told and np.quantile(a.resamples, 0.01, method="lower") > 0:
        share = b.value / a.value - 1
        ratios = np.divide(b.resamples, a.resamples, out=np.full(len(a.resamples), np.inf), where=a.resamples > 0)
        relative_low, relative_high = (end - 1 for end in _quantiles(ratios))
    return Difference(
        value=b.value - a.value,
        low=low,
        high=high,
        share=share,
        relative_low=relative_low,
        relative_high=relative_high,
        fd_a=a.value,
        fd_b=b.value,
        scale=reference.scale,
        least=reference.least,
        n=a.n,
        features=reference.features_name,
        reference=reference.fingerprint,
        seed=a.seed,
    )


def _quantiles(resamples: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(resamples, (0.025, 0.975))
    return float(low), float(high)


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


def _interval_of_scores(scores: np.ndarray, weights: np.ndarray, seed: int) -> tuple[float, float, float]:
    """(mean, low, high) of scores per image: generated ones, which `weights` [1 + R, n] resample, or real ones."""
    rows = weights if len(scores) == weights.shape[1] else _resamples(len(scores), len(weights) - 1, seed)
    return _interval(rows @ scores / len(scores), biased=False)
