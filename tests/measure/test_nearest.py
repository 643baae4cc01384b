"""Nearest images. Oracles: every distance written out, images that are the pictures themselves."""

from __future__ import annotations

import numpy as np
import pytest

from halfstep.data.images import Images
from halfstep.measure import nearest
from halfstep.measure.features import Extractor, extract, raw_pixels
from halfstep.measure.nearest import nearest_images


@pytest.fixture(scope="module")
def images() -> Images:
    pixels = np.random.default_rng(0).integers(0, 255, (50, 1, 8, 8), dtype=np.uint8)
    return Images(name="noise", pixels=pixels, labels=None, classes=(), fingerprint="noise")


@pytest.mark.parametrize("chunk", [7, 1024])
def test_the_nearest_image_is_the_least_of_all_distances(images, chunk, monkeypatch):
    monkeypatch.setattr(nearest, "CHUNK", chunk)
    halves = Extractor("halves", 2, lambda x: x.flatten(2).mean(-1).repeat(1, 2) * x.new_tensor([1.0, 2.0]))
    for extractor in (raw_pixels(images), halves):
        seen = np.random.default_rng(1).normal(size=(9, extractor.n_features))
        real = extract(extractor, [images.batch(slice(None))])
        apart = np.sqrt(np.square(seen[:, None] - real[None]).sum(-1))
        found = nearest_images(extractor, seen, images)
        np.testing.assert_allclose(found.distance, apart.min(1), rtol=1e-12)
        assert found.number.tolist() == apart.argmin(1).tolist()


def test_an_image_of_the_data_is_nearest_to_itself_at_distance_0_and_without_itself_to_another(images):
    extractor, chosen = raw_pixels(images), np.array([49, 0, 7])
    seen = extract(extractor, [images.batch(chosen)])
    itself = nearest_images(extractor, seen, images)
    assert itself.number.tolist() == chosen.tolist() and not itself.distance.any()
    other = nearest_images(extractor, seen, images, own=chosen)
    real = extract(extractor, [images.batch(slice(None))])
    apart = np.linalg.norm(real[chosen][:, None] - real[None], axis=-1)
    apart[np.arange(3), chosen] = np.inf
    np.testing.assert_allclose(other.distance, apart.min(1))
    assert other.number.tolist() == apart.argmin(1).tolist()


def test_it_tells_how_many_images_were_looked_at(images, monkeypatch):
    monkeypatch.setattr(nearest, "CHUNK", 20)
    told: list[int] = []
    nearest_images(raw_pixels(images), np.zeros((1, 64)), images, told=told.append)
    assert told == [20, 40, 50]
