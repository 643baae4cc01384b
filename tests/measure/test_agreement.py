"""Agreement of pictures with what was asked for; oracles: scipy's Wilson interval, coverage of drawn shares, and a net
whose classes are plain to see."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from halfstep.core.errors import HalfstepError
from halfstep.data.images import Images
from halfstep.engine.bank import Bank
from halfstep.measure.agreement import agreement, gained, matches, wilson
from halfstep.measure.features import extractor_of, feature_net_for, train_features
from halfstep.measure.judge import Judge
from halfstep.measure.quality import extract
from tiny import unet


def stripes(n: int, seed: int = 0, labels: bool = True) -> Images:
    """Stripes across and upright: the class is plain."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 2, n)
    across = np.broadcast_to(np.arange(8)[:, None] % 2 * 150, (8, 8))
    pixels = np.where(kinds[:, None, None, None], across, across.T) + rng.integers(0, 90, (n, 1, 8, 8))
    pixels = pixels.astype(np.uint8)
    return Images(
        name="stripes",
        pixels=pixels,
        labels=kinds if labels else None,
        classes=("upright", "across") if labels else (),
        fingerprint="0" * 16,
    )


@pytest.fixture(scope="module")
def net():
    images = stripes(256)
    found = feature_net_for(images, width=4, n_features=8)
    for _ in train_features(found, images, test=stripes(64, seed=1), steps=150, batch=32, lr=1e-2):
        pass
    return found


def test_pictures_of_the_class_that_was_asked_for_agree_and_others_do_not(net):
    images = stripes(60, seed=2)
    batches = [images.batch(slice(k, k + 25)) for k in (0, 25, 50)]
    asked = images.labels.copy()
    asked[:15] = 1 - asked[:15]
    found = matches(net, batches, asked)
    assert not found[:15].any() and found[15:].all()
    told = agreement(net, found, asked)
    assert told.share == 0.75 and told.n == 60 and told.ceiling == net.record["accuracy"] == 1
    assert told.by_class == {k: pytest.approx(found[asked == k].mean()) for k in (0, 1)}
    assert json.loads(json.dumps(told.to_json()))["share"] == 0.75
    assert str(told).startswith("75.0% [62")


@pytest.mark.parametrize("right, n", [(0, 10), (7, 10), (10, 10), (930, 1000)])
def test_the_interval_is_wilsons(right, n):
    oracle = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert wilson(right / n, n) == pytest.approx((oracle.low, oracle.high))


def test_the_interval_of_paired_shares_covers_the_truth_in_95_of_100_and_is_narrower_than_that_of_unpaired():
    rng, n, hits, widths = np.random.default_rng(0), 400, 0, []
    for _ in range(1000):
        u = rng.random(n)
        before, after = u < 0.90, np.where(rng.random(n) < 0.05, rng.random(n) < 0.3, u < 0.90)
        value, low, high = gained(before, after)
        assert value == pytest.approx(after.mean() - before.mean())
        hits += low <= 0.05 * (0.3 - 0.90) <= high
        widths.append(high - low)
    assert 0.93 < hits / 1000 < 0.975
    assert np.mean(widths) < 2 * 1.96 * (2 * 0.9 * 0.1 / n) ** 0.5
    same = np.ones(100, bool)
    assert gained(same, same)[0] == 0 and gained(same, same)[1] > -0.05


def test_what_gives_no_agreement_is_refused(net):
    images = stripes(8)
    with pytest.raises(HalfstepError, match="8 pictures for 7 classes"):
        matches(net, [images.batch(slice(None))], np.zeros(7, np.int64))
    with pytest.raises(HalfstepError, match="0 pictures"):
        matches(net, [], np.zeros(0, np.int64))
    with pytest.raises(HalfstepError, match="class numbers from 0 to 2, expected 0 to 1"):
        matches(net, [images.batch(slice(None))], np.array([0, 1, 2, 0, 0, 0, 0, 0]))
    blind = feature_net_for(stripes(8, labels=False), width=4)
    for _ in train_features(blind, stripes(8, labels=False), steps=1, batch=4):
        pass
    with pytest.raises(HalfstepError, match="tells rotations apart"):
        matches(blind, [images.batch(slice(None))], images.labels)
    with pytest.raises(HalfstepError, match="1 and 2 pictures"):
        gained(np.ones(1, bool), np.ones(2, bool))
    assert torch.is_grad_enabled()


def test_a_judge_tells_how_many_pictures_are_what_was_asked_for(net):
    """Oracle: the classifier's own answers to real pictures in the order that was asked for."""
    images = stripes(256)
    bank = Bank({"full": unet(num_class_embeds=2)}, "full", "epsilon")
    judge = Judge(bank, images, extractor_of(net), cache=None, batch=64)
    asked = np.array([judge.conditions.labels[k % 256] for k in range(300)])
    shown = images.batch(np.array([np.flatnonzero(images.labels == c)[k % 64] for k, c in enumerate(asked)]))
    shown[:30] = shown[:30].transpose(2, 3).clone()  # the other class
    features = extract(judge.extractor, [shown])
    found = judge.quality(features, judge.distances(features, 0, 20))["agreement"]
    with torch.no_grad():
        right = (net(shown).argmax(1).numpy() == asked).mean()
    assert found.value == right < 0.95 and (found.low, found.high) == wilson(right, 300)
    other = replace(images, fingerprint="1" * 16)
    assert Judge(bank, other, extractor_of(net), cache=None, batch=64).asked == ()
