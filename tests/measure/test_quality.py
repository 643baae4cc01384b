"""Quality numbers, against scipy, torchmetrics, closed forms, brute force, and known populations."""

from __future__ import annotations

import dataclasses
import json
import time
from contextlib import contextmanager

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance, poly_mmd

from halfstep.core.errors import DataError, HalfstepError, ModelError
from halfstep.core.watch import Watch
from halfstep.data.images import load_images
from halfstep.measure.features import (
    Extractor,
    FeatureNet,
    accuracy,
    extract,
    extractor_of,
    feature_net_for,
    raw_pixels,
    train_features,
)
from halfstep.measure.pretrained import load_features
from halfstep.measure.quality import (
    METRICS,
    Reference,
    compare,
    density_coverage,
    difference,
    distances,
    evaluate,
    floor,
    frechet_distance,
    kid,
    precision_recall,
    reference_stats,
)


class Identity(torch.nn.Module):
    num_features = 6

    def forward(self, x):
        return x


def draw(n, f=6, shift=0.0, seed=0):
    """Correlated Gaussian features [n, f]."""
    mix = np.random.default_rng(99).normal(size=(f, f)) / np.sqrt(f) + np.eye(f)
    return np.random.default_rng(seed).normal(size=(n, f)) @ mix + shift


def moments(x):
    return x.mean(0), np.cov(x, rowvar=False)


def reference_of(x, **changes):
    mu, cov = moments(x)
    known = {"n": len(x), "features_name": "net", "fingerprint": "real"}
    return dataclasses.replace(Reference(mu=mu, cov=cov, features=x.astype(np.float32), **known), **changes)


def standard(f):
    """A population known exactly: N(0, 1)."""
    few = np.zeros((2, f), np.float32)
    return Reference(mu=np.zeros(f), cov=np.eye(f), features=few, n=10**9, features_name="net", fingerprint="real")


# ---- Fréchet distance ----------------------------------------------------------------------------------------------


def test_frechet_distance_is_scipys():
    (mu1, cov1), (mu2, cov2) = moments(draw(500)), moments(draw(300, shift=0.3, seed=1) * 1.2)
    root = scipy.linalg.sqrtm(cov1 @ cov2).real
    expected = np.square(mu1 - mu2).sum() + np.trace(cov1 + cov2 - 2 * root)
    assert frechet_distance(mu1, cov1, mu2, cov2) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_is_torchmetrics():
    real, fake = draw(500), draw(300, shift=0.3, seed=1)
    metric = FrechetInceptionDistance(feature=Identity())
    metric.set_dtype(torch.float64)
    metric.update(torch.from_numpy(real), real=True)
    metric.update(torch.from_numpy(fake), real=False)
    assert frechet_distance(*moments(real), *moments(fake)) == pytest.approx(metric.compute().item(), rel=1e-6)


@given(st.lists(st.tuples(*[st.floats(0, 9), st.floats(0, 9), st.floats(-5, 5)]), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_frechet_distance_of_diagonal_gaussians(rows):
    s1, s2, shift = np.array(rows).T
    closed = (shift**2 + (s1 - s2) ** 2).sum()
    distance = frechet_distance(np.zeros(len(rows)), np.diag(s1**2), shift, np.diag(s2**2))
    assert distance == pytest.approx(closed, rel=1e-7, abs=1e-7)


def test_frechet_distance_to_itself_is_zero_and_it_is_symmetric():
    one, two = moments(draw(100)), moments(draw(100, seed=1) * 2)
    assert frechet_distance(*one, *one) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(*one, *two) == pytest.approx(frechet_distance(*two, *one), rel=1e-9)


def test_frechet_distance_survives_fewer_images_than_features():
    few = moments(draw(10, f=40))
    assert frechet_distance(*few, *few) == pytest.approx(0, abs=1e-4)
    assert frechet_distance(*few, *moments(draw(12, f=40, shift=1.0, seed=1))) > 1


# ---- KID and neighbours --------------------------------------------------------------------------------------------


def test_kid_is_torchmetrics():
    real, fake = draw(120), draw(120, shift=0.2, seed=1)
    expected = poly_mmd(torch.from_numpy(real), torch.from_numpy(fake)).item()
    assert kid(fake, real) == pytest.approx(expected, rel=1e-9)
    metric = KernelInceptionDistance(feature=Identity(), subsets=1, subset_size=120)
    metric.update(torch.from_numpy(real), real=True)
    metric.update(torch.from_numpy(fake), real=False)
    assert kid(fake, real) == pytest.approx(metric.compute()[0].item(), rel=1e-4)


def test_kid_by_hand_with_unequal_counts_and_several_chunks(monkeypatch):
    monkeypatch.setattr("halfstep.measure.quality.CHUNK", 7)
    x, y = draw(20), draw(33, seed=1)
    k = lambda a, b: (a @ b / 6 + 1) ** 3  # noqa: E731
    within = lambda z: np.mean([k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j])  # noqa: E731
    expected = within(x) + within(y) - 2 * np.mean([k(a, b) for a in x for b in y])
    assert kid(x, y) == pytest.approx(expected, rel=1e-9)


def brute_force(real, fake, k):
    far = lambda a, b: float(np.sqrt(((a - b) ** 2).sum()))  # noqa: E731
    radius = lambda i, points: sorted(far(points[i], p) for j, p in enumerate(points) if j != i)[k - 1]  # noqa: E731
    r_real = [radius(i, real) for i in range(len(real))]
    r_fake = [radius(i, fake) for i in range(len(fake))]
    inside = [[far(r, f) <= radius_r for r, radius_r in zip(real, r_real, strict=True)] for f in fake]
    precision = sum(any(row) for row in inside) / len(fake)
    recall = sum(any(far(r, f) <= b for f, b in zip(fake, r_fake, strict=True)) for r in real) / len(real)
    density = sum(sum(row) for row in inside) / (k * len(fake))
    coverage = sum(any(row[j] for row in inside) for j in range(len(real))) / len(real)
    return precision, recall, density, coverage


@pytest.mark.parametrize("k", [1, 3, 5])
def test_neighbour_metrics_are_brute_force(k, monkeypatch):
    monkeypatch.setattr("halfstep.measure.quality.CHUNK", 7)
    real, fake = draw(30, f=3), draw(24, f=3, shift=0.7, seed=1)
    expected = brute_force(real, fake, k)
    assert min(expected) > 0 and min(expected[0], expected[1], expected[3]) < 1, "an oracle that could tell"
    assert (*precision_recall(real, fake, k), *density_coverage(real, fake, k)) == pytest.approx(expected)


def test_neighbour_metrics_at_their_ends():
    real = draw(50)
    assert precision_recall(real, real + 1e4) == (0, 0)
    assert density_coverage(real, real + 1e4) == (0, 0)
    assert precision_recall(real, real) == (1, 1)
    assert density_coverage(real, real)[1] == 1


# ---- intervals -----------------------------------------------------------------------------------------------------


def test_evaluate_gives_the_plain_values_and_labels_them():
    real, fake = draw(80), draw(70, shift=0.3, seed=1)
    reference = reference_of(real)
    results = evaluate(fake, reference, seed=3, n_boot=20)
    kept = reference.features.astype(np.float64)
    plain = [kid(fake, kept), *precision_recall(kept, fake), *density_coverage(kept, fake)]
    assert list(results) == list(METRICS)
    assert results["fd"].raw == pytest.approx(frechet_distance(*moments(real), *moments(fake)), rel=1e-9)
    assert [q.value for q in results.values()][1:] == pytest.approx(plain, rel=1e-9)
    for metric, q in results.items():
        assert q.low <= q.value <= q.high
        assert (q.metric, q.n, q.features, q.reference, q.seed) == (metric, 70, "net", "real", 3)
    assert evaluate(fake, reference, seed=3, n_boot=20) == results
    assert list(evaluate(fake, reference, seed=3, metrics=("kid",), n_boot=20)) == ["kid"]


def test_a_resample_has_the_distance_of_the_images_it_repeats():
    from halfstep.measure.quality import _fd_of, _resamples

    x, reference = draw(60), reference_of(draw(90, seed=1))
    weights = _resamples(60, 4, seed=0)
    assert (weights.sum(1) == 60).all() and (weights[0] == 1).all()
    plain = [frechet_distance(reference.mu, reference.cov, *moments(np.repeat(x, w.astype(int), 0))) for w in weights]
    assert _fd_of(x, reference.mu, reference.cov, weights) == pytest.approx(plain, rel=1e-9)


def test_fd_interval_covers_the_truth():
    shift, reference = 0.5, standard(4)  # the true distance is 4 * 0.5^2 = 1
    hits = 0
    for seed in range(60):
        x = np.random.default_rng(seed).normal(size=(400, 4)) + shift
        q = evaluate(x, reference, seed=seed, metrics=("fd",), n_boot=100)["fd"]
        hits += q.low <= 1.0 <= q.high
    assert hits >= 48, f"{hits} of 60"


def test_kid_interval_covers_the_truth_and_shrinks_like_a_root():
    real = np.random.default_rng(1000).normal(size=(400, 4))
    truth = kid(np.random.default_rng(1001).normal(size=(6000, 4)) + 0.5, real)  # against these very reals
    hits, widths = 0, {}
    for n in (100, 400):
        for seed in range(30):
            x = np.random.default_rng(seed).normal(size=(n, 4)) + 0.5
            q = evaluate(x, reference_of(real), seed=seed, metrics=("kid",), n_boot=100)["kid"]
            hits += q.low <= truth <= q.high
            widths[n] = widths.get(n, 0) + (q.high - q.low) / 30
    assert hits >= 48, f"{hits} of 60"
    assert widths[100] / widths[400] == pytest.approx(2, rel=0.25)


def test_precision_interval_is_the_binomial_one():
    real, fake = draw(300, f=2), draw(400, f=2, shift=1.5, seed=1)
    q = evaluate(fake, reference_of(real), seed=0, metrics=("precision",), n_boot=2000)["precision"]
    half = 1.96 * np.sqrt(q.value * (1 - q.value) / 400)
    assert 0.2 < q.value < 0.95
    assert (q.high - q.low) / 2 == pytest.approx(half, rel=0.1)


# ---- calibration on the shipped features' spectrum ------------------------------------------------------------------


@pytest.fixture(scope="module")
def spectrum(tmp_path_factory):
    """The digits' 1,500 real features on their ten largest axes (the others hold a thousandth of the spread)."""
    images = load_images("digits", size=8, channels=1, cache=tmp_path_factory.mktemp("cache"))
    seen = reference_stats(load_features("digits"), images, cache=None)
    axes = np.linalg.eigh(seen.cov)[1][:, ::-1][:, :10]
    x = (seen.features - seen.mu) @ axes
    return dataclasses.replace(reference_of(x), cov=np.cov(x, rowvar=False, ddof=0))


def shrunk_by(factor):
    return lambda x, rng: x * (1 - factor)


def noisy_by(factor):
    return lambda x, rng: x + factor * x.std(0) * rng.normal(size=x.shape)


def coverage(real, model_a, model_b, n, trials, n_boot):
    """Shares of trials without an interval that misses a's distance, the difference, the ratio; and the number of
    ratios told."""
    x, true = real.features.astype(float), []
    for model in (model_a, model_b):
        y = model(np.tile(x, (100, 1)), np.random.default_rng(1))
        true.append(frechet_distance(y.mean(0), np.cov(y, rowvar=False, ddof=0), real.mu, real.cov))
    hits, least = {"value": [], "difference": [], "share": []}, floor(real, n).high
    ratio = true[1] / true[0] - 1 if true[0] > 1e-9 else np.inf
    for seed in range(trials):
        rng = np.random.default_rng(seed + 100)
        drawn = x[rng.integers(len(x), size=n)]
        a, b = (distances(model(drawn, rng), real, n_boot=n_boot, seed=seed) for model in (model_a, model_b))
        change = difference(a, b, real, least)
        hits["value"].append(bool(a.interval[0] <= true[0] <= a.interval[1]))
        hits["difference"].append(bool(change.low <= true[1] - true[0] <= change.high))
        if change.share is not None:
            hits["share"].append(bool(change.relative_low <= ratio <= change.relative_high))
    return {name: 1 - found.count(False) / trials for name, found in hits.items()}, len(hits["share"])


CASES = {
    "at the floor": (noisy_by(0.0), noisy_by(0.1), False),
    "near it": (shrunk_by(0.02), noisy_by(0.15), False),
    "off it": (shrunk_by(0.1), shrunk_by(0.12), True),
}


@pytest.mark.parametrize("case", CASES)
def test_intervals_cover_the_truth_on_the_shipped_spectrum(case, spectrum):
    a, b, told = CASES[case]
    found, shares = coverage(spectrum, a, b, 512, 20, 60)
    assert min(found.values()) >= 0.8, found
    assert shares == 20 if told else shares <= 1  # at the floor a percentage would be one of noise


@pytest.mark.slow
@pytest.mark.parametrize("n", [512, 2048])
@pytest.mark.parametrize("case", CASES)
def test_intervals_are_calibrated_on_the_shipped_spectrum(case, n, spectrum):
    a, b, _ = CASES[case]
    found, _ = coverage(spectrum, a, b, n, 100, 200)
    assert min(found.values()) >= 0.88, found


def test_a_corrected_distance_has_no_bias_where_the_raw_one_is_nothing_else(spectrum):
    x, rng = spectrum.features.astype(float), np.random.default_rng(0)
    perfect = [distances(x[rng.integers(len(x), size=512)], spectrum, n_boot=60, seed=s) for s in range(25)]
    raw, corrected = (np.array([getattr(one, name) for one in perfect]) for name in ("raw", "value"))
    error = corrected.std() / 5
    assert raw.mean() > 5 * error and abs(corrected.mean()) < 3 * error
    least = floor(spectrum, 512)
    assert least.raw == pytest.approx(raw.mean(), rel=0.25) and least.fresh == pytest.approx(
        least.raw * (1 + 512 / 1500)
    )
    assert np.mean(corrected <= least.high) >= 0.8
    q = evaluate(x[:400], spectrum, seed=0, metrics=("fd",), n_boot=60)["fd"]
    assert q.raw > q.value >= 0 and q.low >= 0


# ---- paired comparison ---------------------------------------------------------------------------------------------


def test_paired_interval_is_narrower_than_the_unpaired_one():
    a, reference = draw(400, shift=0.3), reference_of(draw(2000, seed=1))
    b = a + np.random.default_rng(2).normal(size=a.shape) * 0.1
    paired = compare(a, b, reference, n_boot=200)
    scrambled = compare(a, b[np.random.default_rng(3).permutation(400)], reference, n_boot=200)
    assert scrambled.value == pytest.approx(paired.value, abs=(scrambled.high - scrambled.low) / 4)
    assert paired.high - paired.low < (scrambled.high - scrambled.low) / 3
    assert paired.low <= paired.value <= paired.high
    assert paired.value == pytest.approx(paired.fd_b - paired.fd_a)


def test_paired_interval_covers_the_true_difference():
    reference, hits = standard(4), 0
    for seed in range(60):
        a = np.random.default_rng(seed).normal(size=(300, 4)) + 0.5  # distance 1
        difference = compare(a, a + 0.05, reference, n_boot=100, seed=seed)  # distance 4 * 0.55^2 = 1.21
        hits += difference.low <= 0.21 <= difference.high
    assert hits >= 48, f"{hits} of 60"


def test_held_follows_the_upper_end_and_the_tolerance():
    a, reference = draw(300, shift=0.5), reference_of(draw(500, seed=1))
    same = compare(a, a, reference, n_boot=20)
    assert (same.value, same.low, same.high) == (0, 0, 0) and same.held(0.0)
    worse = compare(a, a + 0.1, reference, n_boot=50)
    assert worse.share == pytest.approx(worse.value / worse.fd_a) and worse.low > 0
    assert not worse.held(worse.share) and worse.held(worse.relative_high + 1e-9)
    assert worse.verdict(worse.relative_low - 1e-9) == "not held" and worse.verdict(worse.share) == "not decided"
    better = compare(a, a - 0.1, reference, n_boot=50)
    assert better.high < 0 and better.held(0.0)
    assert json.loads(json.dumps(worse.to_json()))["relative_high"] == worse.relative_high


def test_fewer_than_four_images_per_feature_decide_nothing():
    reference = reference_of(draw(500, seed=1))
    for n, verdict in ((23, "not decided"), (24, "not held")):
        a = draw(n, shift=0.5)
        assert compare(a, a + 3.0, reference, n_boot=50).verdict(0.05) == verdict


def test_within_the_floor_a_change_is_held_against_a_hundredth_of_the_spread_and_no_share_is_told():
    real = draw(3000, seed=1)
    reference, a = reference_of(real), real[:1500]
    change = compare(a, a + 0.01, reference, n_boot=100)
    assert change.share is None and change.relative_high is None and "%" not in str(change)
    assert reference.scale == pytest.approx(np.trace(reference.cov) / 100)
    assert change.held(change.high / reference.scale + 1e-9) and not change.held(change.high / reference.scale - 1e-9)
    assert "NaN" not in json.dumps(change.to_json())


def test_so_many_images_as_it_says_decide_it():
    reference = reference_of(draw(4000, seed=1))

    def change(n):
        a = draw(n, shift=0.6, seed=2)
        return compare(a, a + 0.02, reference, n_boot=200)

    few = change(200)
    tolerance = few.share + 0.6 * (few.relative_high - few.share)
    assert few.verdict(tolerance) == "not decided"
    wanted = few.decided_by(tolerance)
    assert 200 < wanted < 1000  # (1 / 0.6) squared times as many
    more = change(2 * wanted)  # of another sample the change is another, too
    assert more.verdict(tolerance) != "not decided"
    assert dataclasses.replace(few, share=tolerance).decided_by(tolerance) is None


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_unfit_features_are_refused():
    reference = reference_of(draw(50))
    bad = draw(20)
    bad[3, 2] = np.nan
    for features, error in ((bad, DataError), (draw(1), DataError), (draw(20, f=5), ModelError), (bad[0], ModelError)):
        with pytest.raises(error):
            evaluate(features, reference, seed=0)
        with pytest.raises(error):
            compare(features, draw(20), reference)
    with pytest.raises(DataError, match="21 and 20"):
        compare(draw(21), draw(20), reference)
    with pytest.raises(DataError):
        evaluate(draw(5), reference, seed=0, metrics=("recall",))  # the fifth neighbour needs six
    with pytest.raises(HalfstepError, match="fid"):
        evaluate(draw(20), reference, seed=0, metrics=("fid",))
    with pytest.raises(HalfstepError, match="n_boot"):
        evaluate(draw(20), reference, seed=0, n_boot=0)
    with pytest.raises(DataError):
        frechet_distance(np.full(2, np.nan), np.eye(2), np.zeros(2), np.eye(2))


def test_features_of_another_network_are_refused():
    with pytest.raises(ModelError, match="other"):
        evaluate(draw(20), reference_of(draw(50)), seed=0, features_name="other")
    with pytest.raises(ModelError, match="other"):
        compare(draw(20), draw(20), reference_of(draw(50)), features_name="other")


# ---- feature networks ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return load_images("digits", cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def trained(digits):
    """A net trained on 400 digits, its last record, and the seconds it took."""
    few = digits.subset(400)
    net, start = feature_net_for(few, width=24), time.process_time()
    records = list(train_features(net, few, steps=250, batch=64))
    return net, few, records, time.process_time() - start


def test_training_learns_the_digits(trained, digits):
    net, few, records, seconds = trained
    assert len(records) == 250 and records[-1].step == 250 and records[-1].loss < records[0].loss / 3
    assert accuracy(net, few) > 0.9 and net.record["accuracy"] == accuracy(net, few)
    assert accuracy(net, digits) > 0.8
    assert seconds < 15


def test_training_is_deterministic(digits):
    def run(seed):
        net = feature_net_for(digits, width=8, seed=0)
        return [r.loss for r in train_features(net, digits, steps=4, batch=16, seed=seed)], net.name

    assert run(0) == run(0) != run(1)


def test_the_global_random_state_is_left_alone(digits):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    list(train_features(feature_net_for(digits, width=8), digits, steps=1, batch=8))
    assert torch.equal(torch.rand(1), expected)


def test_rotations_are_learnt_without_labels(digits):
    few = dataclasses.replace(digits.subset(300), labels=None, classes=())
    net = feature_net_for(few, width=16)
    list(train_features(net, few, steps=250, batch=64, augment=False))  # shifts make 8x8 rotations slow to learn
    assert net.config["n_classes"] == 4 and accuracy(net, few) > 0.7  # a guess is right one time in four


@pytest.mark.parametrize("size", [8, 9, 28, 33, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_size_gives_features(size, channels):
    net = FeatureNet(channels=channels, size=size, width=8, n_classes=3, n_features=10)
    x = torch.rand(2, channels, size, size) * 2 - 1
    assert net.features(x).shape == (2, 10) and net(x).shape == (2, 3)


def test_a_saved_net_comes_back_bit_exact(trained, tmp_path):
    net, few, *_ = trained
    net.save(tmp_path)
    again, x = FeatureNet.load(tmp_path), few.batch(slice(0, 9))
    assert torch.equal(net.features(x), again.features(x)) and torch.equal(net(x), again(x))
    assert (again.name, again.record, again.config) == (net.name, net.record, net.config)
    assert net.name.startswith("own:digits-") and not again.training
    assert sorted(p.name for p in tmp_path.iterdir()) == ["features.json", "features.safetensors"]
    assert load_features(str(tmp_path)).name == load_features(f"file:{tmp_path}").name == net.name
    assert load_features("digits", bundled=tmp_path).name == net.name


def test_raw_pixels_are_the_pixels_and_only_of_tiny_pictures():
    images = load_images("digits", size=8, channels=1)
    found = extract(raw_pixels(images), [images.batch(slice(0, 40)), images.batch(slice(40, 50))])
    assert np.allclose(found, images.pixels[:50].reshape(50, 64) / 127.5 - 1, atol=1e-6)
    assert raw_pixels(images).name == "pixels:1x8x8"
    with pytest.raises(ModelError, match="at most 1,024"):
        raw_pixels(dataclasses.replace(images, pixels=images.pixels.repeat(5, 2).repeat(5, 3)))


def test_another_training_has_another_name(trained):
    net, few, *_ = trained
    assert feature_net_for(few, width=24).name != net.name


@pytest.mark.parametrize("keep", [0, 7, 1000, 0.9])
def test_cut_weights_are_refused_by_name(trained, tmp_path, keep):
    trained[0].save(tmp_path)
    path = tmp_path / "features.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(ModelError, match=r"features\.safetensors"):
        FeatureNet.load(tmp_path)


def test_changed_or_foreign_files_are_refused_by_name(trained, tmp_path):
    trained[0].save(tmp_path)
    weights, record = tmp_path / "features.safetensors", tmp_path / "features.json"
    whole, text = weights.read_bytes(), record.read_text()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ModelError, match=r"features\.safetensors"):
        FeatureNet.load(tmp_path)
    weights.write_bytes(whole)
    for broken in (text[:40], "[]", "{}", text.replace('"width": 24', '"width": 16'), text.replace("24", "-1")):
        record.write_text(broken)
        with pytest.raises(ModelError):
            FeatureNet.load(tmp_path)
    weights.unlink()
    record.write_text(text)
    with pytest.raises(ModelError, match=r"features\.safetensors: got no such file"):
        FeatureNet.load(tmp_path)


def test_images_that_do_not_fit_the_net_are_refused(trained, digits):
    net, few, *_ = trained
    for shape in ((2, 3, 8, 8), (2, 1, 16, 16)):
        with pytest.raises(DataError):
            extract(extractor_of(net), [torch.zeros(shape)])
    other = FeatureNet(channels=3, size=8, width=8, n_classes=10)
    with pytest.raises(DataError):
        next(train_features(other, few))
    with pytest.raises(ModelError, match="10"):
        next(train_features(FeatureNet(channels=1, size=8, width=8, n_classes=4), few))
    for config in ({"size": 7}, {"width": 0}, {"n_classes": 1}, {"width": True}):
        with pytest.raises(ModelError):
            FeatureNet(**{"channels": 1, "size": 8, "n_classes": 10, **config})


# ---- extraction and the reference ----------------------------------------------------------------------------------

mean_and_spread = Extractor("mean and spread", 2, lambda x: torch.stack([x.mean((1, 2, 3)), x.std((1, 2, 3))], 1))


def test_extract_is_ordered_and_independent_of_the_batches(digits):
    x = digits.batch(slice(0, 50))
    whole = extract(mean_and_spread, [x])
    assert whole.dtype == np.float64 and whole.shape == (50, 2)
    assert np.allclose(whole, extract(mean_and_spread, (x[i : i + 7] for i in range(0, 50, 7))), atol=1e-6)
    assert np.allclose(whole[:, 0], x.numpy().mean((1, 2, 3)), atol=1e-6)


def test_extract_refuses_what_is_no_picture():
    nan = torch.full((1, 1, 8, 8), torch.nan)
    for batches in ([nan], [torch.ones(1, 1, 8, 8) * 255], [torch.zeros(1, 1, 8, 8, dtype=torch.uint8)], []):
        with pytest.raises(DataError):
            extract(mean_and_spread, batches)
    with pytest.raises(DataError, match="NaN"):
        extract(Extractor("broken", 1, lambda x: x[:, 0, 0, :1] / 0), [torch.zeros(2, 1, 8, 8)])


def test_reference_holds_the_moments_of_the_images(digits):
    reference = reference_stats(mean_and_spread, digits, cache=None)
    x = digits.pixels.reshape(len(digits), -1) / 127.5 - 1
    assert reference.mu[0] == pytest.approx(x.mean(), abs=1e-6)
    assert reference.cov == pytest.approx(np.cov(x.mean(1), x.std(1, ddof=1)), abs=1e-6)
    assert reference.n == len(reference.features) == 1500 and reference.features.dtype == np.float32
    assert (reference.features_name, reference.fingerprint) == ("mean and spread", digits.fingerprint)


def test_reference_cache_is_used_and_a_cut_one_is_computed_again(digits, tmp_path):
    calls = []

    def counted(x):
        calls.append(len(x))
        return mean_and_spread.fn(x)

    extractor = Extractor("counted", 2, counted)
    same = lambda a, b: all(np.array_equal(getattr(a, k), getattr(b, k)) for k in vars(a))  # noqa: E731
    first = reference_stats(extractor, digits, cache=tmp_path)
    seen = sum(calls)
    assert seen == 1500 and same(first, reference_stats(extractor, digits, cache=tmp_path)) and sum(calls) == seen
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", whole[:-1]):
        path.write_bytes(broken)
        assert same(first, reference_stats(extractor, digits, cache=tmp_path))
        assert same(first, reference_stats(extractor, digits, cache=tmp_path)), "the new file is whole"
    assert sum(calls) == 4 * seen


def test_features_of_many_real_pictures_are_no_silence(digits, tmp_path):
    """ImageNet's features of 60,000 pictures take ten minutes of a core."""

    heard = []

    class Ear(Watch):
        @contextmanager
        def stage(self, name, total):
            yield lambda done, note="": heard.append((name, done, total))

    for _ in range(2):  # the second time they are there
        reference_stats(mean_and_spread, digits, cache=tmp_path, watch=Ear())
    what = "features of the real pictures"
    assert heard == [(what, done, 1500) for done in (256, 512, 768, 1024, 1280, 1500)]


def test_the_cache_tells_networks_images_and_limits_apart(digits, tmp_path):
    few = reference_stats(mean_and_spread, digits, cache=tmp_path, limit=100)
    other = Extractor("halved", 2, lambda x: mean_and_spread.fn(x) / 2)
    all_of_them = reference_stats(mean_and_spread, digits, cache=tmp_path)
    assert few.n == 100 and few.fingerprint != all_of_them.fingerprint == digits.fingerprint
    assert reference_stats(other, digits, cache=tmp_path).mu == pytest.approx(all_of_them.mu / 2)
    assert reference_stats(mean_and_spread, digits.subset(50), cache=tmp_path).n == 50
    assert len(list(tmp_path.iterdir())) == 4
    assert reference_stats(mean_and_spread, digits, cache=tmp_path, limit=9999).n == 1500
    with pytest.raises(DataError):
        reference_stats(mean_and_spread, digits, cache=tmp_path, limit=1)


def test_the_whole_way_tells_noisier_digits_from_cleaner_ones(trained, digits):
    net, *_ = trained
    extractor = extractor_of(net)
    reference = reference_stats(extractor, digits, cache=None, limit=800)
    x, noise = digits.batch(slice(0, 300)), torch.randn(300, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    clean, noisy = (extract(extractor, [(x + s * noise).clamp(-1, 1)]) for s in (0.1, 0.3))
    assert not compare(clean, noisy, reference, n_boot=100).held(0.05)
    assert compare(noisy, clean, reference, n_boot=100).held(0.0)
