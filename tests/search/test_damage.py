"""The error table. Oracle: sampling every swapped plan from the start."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from halfstep.core.recipe import SampleSpec
from halfstep.engine.bank import Bank
from halfstep.engine.sampling import reference_plan, sample_images
from halfstep.search.damage import ErrorTable, error_table
from halfstep.search.space import Space
from tiny import unet


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpmsolver++", "heun"])
def test_error_table_equals_sampling_every_swapped_plan_from_the_start(scheduler):
    bank = Bank({"full": unet(0, (8, 8)), "small": unet(1, (4, 4))}, "full", "epsilon")
    plan = reference_plan(
        bank, DDPMScheduler().config, SampleSpec(scheduler=scheduler, steps=6), {"full": 2, "small": 1}
    )
    space = Space.of(plan, bank.names, 3)
    weights = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(3))

    def measure(before: torch.Tensor, after: torch.Tensor) -> float:
        return float(((after - before) * weights).mean())

    *_, (_, _, table) = error_table(bank, plan, space, measure, images=6, seed=5, batch=4)
    assert isinstance(table, ErrorTable)
    assert (table.local[:, 0] == 0).all() and (table.local[:, 1] > 0).all()
    base = torch.cat(list(sample_images(bank, plan, 6, seed=5, batch=4)))
    for k in range(3):
        genes = [0, 0, 0]
        genes[k] = 1
        swapped = plan.with_entries(space.expand(genes))
        direct = measure(base, torch.cat(list(sample_images(bank, swapped, 6, seed=5, batch=4))))
        assert table.damage[k, 1] == pytest.approx(direct, abs=1e-6)
    assert ErrorTable.from_json(table.to_json()).damage.tolist() == table.damage.tolist()
    assert np.allclose(table.costs("local", space.rows).sum(), table.local.sum())
