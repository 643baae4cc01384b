"""By which ranges an entry goes into eight bits: those that its layers see along its own trajectory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from halfstep.core.plan import StepPlan
from halfstep.core.watch import SILENT, Watch
from halfstep.engine.bank import Bank
from halfstep.engine.conditions import Conditions
from halfstep.engine.sampling import fewer_steps, sample_images
from halfstep.nets.int8 import Spans, watched

PICTURES, STEPS = 32, 20
"""Pictures that an entry is calibrated on, and the most rows of their trajectories."""


def calibrated(
    bank: Bank,
    plan: StepPlan,
    names: Iterable[str] = (),
    *,
    seed: int,
    conditions: Conditions | None = None,
    watch: Watch = SILENT,
) -> dict[str, Spans]:
    """The spans of entries that compute themselves (all, without `names`), by name: what `Bank.with_int8` takes.

    Each draws `PICTURES` of the seed, alone in every row of the plan's sampler in at most `STEPS` steps, guided as the
    plan is; over all its timesteps. PyTorch runs it, whatever runs it else. The same machine finds the same spans.
    """
    names = tuple(names) or bank.uncast
    bank = bank.only({bank.reference, *names})
    bank.set_runtimes(dict.fromkeys(bank.computed, "eager"), ())
    plan = replace(plan, prices=bank.prices())
    plan = fewer_steps(plan, min(STEPS, plan.sampler.steps))
    found: dict[str, Spans] = {}
    with watch.stage("calibration", len(names)) as told:
        for name in names:
            with watched(bank[name]) as spans:
                drawn = sample_images(
                    bank, plan.uniform(name), PICTURES, seed=seed, batch=PICTURES, conditions=conditions
                )
                for _ in drawn:
                    pass
            found[name] = spans
            told(len(found), name)
    return found
