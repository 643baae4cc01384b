"""The noise of stages. Oracles: the numbers that seed 0 always had, and the seeds that torch's generators report."""

from __future__ import annotations

import itertools

from halfstep.core.seeds import MAX_SEED, STAGES, Stage, stage_seed
from halfstep.engine.sampling import image_generators

DRAWN = list(itertools.product(range(100), Stage))
SEEDS_OF_ZERO = {"TABLE": 1, "SEARCH": 2, "REPORT": 3, "FINALS": 5, "STEPS": 6}


def test_no_stage_of_a_run_draws_another_run_s_noise():
    assert len({stage_seed(*pair) for pair in DRAWN}) == len(DRAWN)
    assert all(0 < stage < STAGES for stage in Stage)


def test_the_stages_of_seed_zero_are_what_they_were():
    assert {stage.name: stage_seed(0, stage) for stage in Stage} == SEEDS_OF_ZERO


def test_a_million_pictures_of_a_stage_share_no_noise_with_another_stage_s():
    """Pictures of a seed are numbered on from a seed of their own: the last of one must not reach the next one's."""
    starts = sorted(image_generators(stage_seed(*pair), 0, 1)[0].initial_seed() for pair in DRAWN)
    assert min(b - a for a, b in itertools.pairwise(starts)) > 1_000_000


def test_up_to_the_largest_seed_no_two_runs_share_noise_and_the_next_one_shares_that_of_seed_zero():
    """Generators know 63 bits of a seed, and an image's is an odd multiple of its stage's."""

    def starts(seed: int) -> list[int]:
        return [image_generators(stage_seed(seed, stage), 0, 1)[0].initial_seed() for stage in Stage]

    drawn = [start for seed in (0, 1, MAX_SEED // 2, MAX_SEED - 1, MAX_SEED) for start in starts(seed)]
    assert len(set(drawn)) == len(drawn) and all(0 <= start < 2**63 for start in drawn)
    assert starts(MAX_SEED + 1) == starts(0)
