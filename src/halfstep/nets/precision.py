"""A net in half precision, as a denoiser of samples of any."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from halfstep.core.machine import cpu_has
from halfstep.nets.denoiser import Cond, Memo, cond_to, eager, predictor

Precision = Literal["bf16", "fp16"]
DTYPES: Mapping[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Cast(nn.Module):
    """A copy of a net in another precision, its config with it. Samples and conditions are cast to it, the prediction
    back: what a trajectory holds keeps its own. Wherever it is moved, its weights stay what they are."""

    def __init__(self, model: nn.Module, precision: Precision):
        super().__init__()
        self.precision, self.dtype = precision, DTYPES[precision]
        self.model = _in(copy.deepcopy(eager(model)), self.dtype)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def given(self, sample: torch.Tensor, cond: Cond) -> tuple[torch.Tensor, Cond]:
        """A call's sample and condition as the net takes them."""
        return sample.to(self.dtype), cond_to(cond, sample.device, self.dtype)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True, **cond: Any
    ) -> tuple[torch.Tensor]:
        """The prediction alone, in the sample's precision; `cond`: whatever keywords the net takes."""
        given, named = self.given(sample, cond)
        found = predictor(self.model)(given, timestep, named, Memo())
        return (found.to(sample.dtype),)

    def _apply(self, fn: Any, recurse: bool = True) -> Cast:
        super()._apply(fn, recurse)
        _in(self.model, self.dtype)
        return self


def _in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return nn.Module.to(model, dtype)  # not diffusers' own, which warns of modules that there are none of


def precisions_for(device: torch.device) -> list[Precision]:
    """The half precisions that a device computes in, not only holds: on a CPU those of its instructions."""
    if device.type == "cuda":
        return ["bf16", "fp16"] if torch.cuda.is_bf16_supported(including_emulation=False) else ["fp16"]
    if device.type == "cpu":
        return ["bf16"] if cpu_has("avx512_bf16", "amx_bf16", "bf16") else []
    return ["fp16"] if device.type == "mps" else []
