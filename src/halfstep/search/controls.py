"""Controls: the plans of equal MACs that a found one must beat."""

from __future__ import annotations

from halfstep.core.plan import StepPlan
from halfstep.engine.sampling import fewer_steps
from halfstep.search.driver import Found
from halfstep.search.space import random_plans


def controls_of(plan: StepPlan, found: Found) -> dict[str, StepPlan]:
    """The controls at equal MACs: one width everywhere, a random plan, and fewer steps of the reference `plan`. One
    that is the reference or the found plan itself is left out: it would stand beside itself."""
    space, macs, base, known = found.space, found.plan.macs, found.base, (plan.rows, found.plan.rows)
    plans = {f"uniform {space.entries[genes[0]]}": genes for genes in space.uniform_within(macs)[:1]}
    controls = {name: base.with_entries(space.expand(genes)) for name, genes in plans.items()}
    for genes in random_plans(space, macs, 2, seed=11, slack=0.05):
        one = base.with_entries(space.expand(genes))
        if one.rows not in known:
            controls.setdefault("random plan", one)
    steps = max(1, round(plan.sampler.steps * macs / plan.macs))
    controls[f"{steps} steps of the reference"] = fewer_steps(plan, steps)
    return {name: one for name, one in controls.items() if one.rows not in known}
