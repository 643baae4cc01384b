"""Races. Oracles: known means, the count of images that were asked for, the interval's own coverage."""

from __future__ import annotations

import numpy as np
import pytest

from halfstep.search.race import parted, race


def losses_of(means, noise, asked):
    """Losses whose noise is common to all candidates but for a little of their own."""

    def losses(alive, first, last):
        asked.append((tuple(alive), last - first))
        common = np.random.default_rng(first).normal(size=last - first)
        own = [np.random.default_rng([first, one]).normal(size=last - first) for one in alive]
        return [means[one] + common + noise * mine for one, mine in zip(alive, own, strict=True)]

    return losses


@pytest.mark.parametrize("seed", range(5))
def test_the_best_wins_and_losers_cost_few_images(seed):
    means = np.random.default_rng(seed).permutation(20) * 0.3
    asked = []
    found = race(range(20), losses_of(means, 0.2, asked), (16, 64, 256), (8, 4, 2))
    assert found[0] == int(np.argmin(means)) and len(found) <= 2
    assert [images for _, images in asked] == [16, 48, 192]  # those of earlier rounds are not drawn again
    assert len(asked[0][0]) == 20 and len(asked[1][0]) <= 8 and len(asked[2][0]) <= 4


def test_who_cannot_be_told_apart_goes_on():
    assert sorted(race(range(3), losses_of([0, 0, 0], 1.0, []), (8, 32), (3, 3))) in ([0, 1, 2], [0, 1], [0, 2], [1, 2])
    assert race([4], losses_of({4: 1.0}, 0.1, []), (8,), (1,)) == [4]


def test_a_common_noise_far_above_the_differences_does_not_hide_them():
    """Unpaired, a difference of 0.05 in noise of 1 would want thousands of images."""
    assert race(range(2), losses_of([0.05, 0.0], 0.01, []), (16,), (2,)) == [1]


def test_equal_candidates_are_parted_as_seldom_as_the_interval_says():
    draw = np.random.default_rng(0)
    wrong = np.mean([parted(draw.normal(size=64)) for _ in range(2000)])
    assert 0.01 <= wrong <= 0.05  # one side of 95 %
    assert not parted(np.array([5.0]))


@pytest.mark.parametrize(("rounds", "keep"), [((8, 8), (2, 1)), ((16, 8), (2, 1)), ((8,), (2, 1))])
def test_rounds_that_do_not_rise_are_refused(rounds, keep):
    with pytest.raises(ValueError, match="rounds"):
        race(range(3), losses_of([0, 1, 2], 0.1, []), rounds, keep)
