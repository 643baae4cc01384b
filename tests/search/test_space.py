"""What a search may choose."""

from __future__ import annotations

import pytest

from halfstep.core.errors import PlanError
from toy import toy


@pytest.mark.parametrize("budget", [0.0, -1.0, 1.01, 0.01, float("nan")])
def test_impossible_budgets_are_refused(budget):
    space, _ = toy(10)
    with pytest.raises(PlanError) as error:
        space.require_budget(budget)
    assert "\n" not in str(error.value)
