"""What a model is, by content: a fingerprint of its weights and configs, whatever path and file it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch


def digest_tensors(tensors: Mapping[str, torch.Tensor], *texts: str) -> str:
    """SHA-256 as 64 hex digits of tensors by name: their names, dtypes, shapes and every bit, and of texts beside."""
    digest = hashlib.sha256("\0".join(texts).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"\0{name} {value.dtype} {list(value.shape)}\0".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(*parts: Any) -> str:
    """16 hex digits that change with any weight or setting of modules (None: absent), JSON-like records, and tensors in
    these.

    What diffusers notes beside a config (its own version, the folder) makes no difference.
    """
    return hashlib.sha256("".join(map(_digest, parts)).encode()).hexdigest()[:16]


def _digest(part: Any) -> str:
    if isinstance(part, torch.nn.Module):
        return digest_tensors(part.state_dict(), _text(getattr(part, "config", {})))
    return _text(part)


def _text(record: Any) -> str:
    if isinstance(record, Mapping):
        record = {str(name): value for name, value in record.items() if not str(name).startswith("_")}
    return json.dumps(record, sort_keys=True, default=_told)


def _told(value: Any) -> Any:
    """What a record tells of a value that is not JSON: class numbers as they are, of other tensors every bit."""
    if isinstance(value, torch.Tensor):
        return digest_tensors({"": value}) if value.is_floating_point() else value.tolist()
    return repr(value)
