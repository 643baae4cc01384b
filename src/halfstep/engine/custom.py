"""A saved step-aware pipeline for diffusers' own loader, which is given this file's path as `custom_pipeline`.

    from halfstep.engine import custom
    DiffusionPipeline.from_pretrained(folder, custom_pipeline=custom.__file__, ...)

diffusers runs a copy of this file, for which it asks to be told that the code is trusted; it loads the parts that the
index names and makes the one pipeline class here of them. `StepAwarePipeline.from_pretrained(folder)` does the same.
"""

from __future__ import annotations

from typing import ClassVar

from diffusers import AutoencoderKL, SchedulerMixin

from halfstep.engine import stepaware  # the module: a second class by name here would be one too many
from halfstep.engine.bank import Bank


class StepAwarePipeline(stepaware.StepAwarePipeline):
    """As its base; its constructor takes the parts of the folder that the bank was read from."""

    _optional_components: ClassVar[list[str]] = ["vae"]

    def __init__(self, bank: Bank, scheduler: SchedulerMixin, vae: AutoencoderKL | None = None):
        super().__init__(*stepaware.read_beside(bank, None if vae is None else vae.eval().requires_grad_(False)))
