"""Runs that are killed at random moments end as if they had been left alone, and leave no temporary file."""

from __future__ import annotations

import os
import sys
import time

import pytest

from drills import COMMANDS, clock_turned, found_in, killed_until, prepared, ran, starved, unlike

if sys.platform != "linux":
    pytest.skip("forks", allow_module_level=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("drills"))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_is_killed_ends_as_if_it_had_been_left_alone(name, base):
    tally = killed_until(name, base, seed=0, kills=3, seconds=60)
    assert not tally.wrong and tally.ended


@pytest.mark.slow
def test_a_search_on_a_cluster_whose_driver_is_killed_ends_as_one_here_that_was_left_alone(base):
    pytest.importorskip("ray")
    tally = killed_until("tune", base, seed=1, kills=2, seconds=60, also=("--ray", "local"))
    assert not tally.wrong and tally.ended and tally.hurt


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(base):
    for name in ("train", "tune"):
        alone, turned = base / f"{name}-c" / "alone", base / f"{name}-c" / "turned"
        assert ran([*COMMANDS[name](base), "--out", str(alone)]) == 0
        assert ran([*COMMANDS[name](base), "--out", str(turned)], hurt=clock_turned(4e7)) == 0
        assert not unlike(found_in(turned), found_in(alone))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "tune", "sample", "export"])
def test_a_command_that_meets_a_full_disk_says_so_and_goes_on_with_room(name, base):
    try:
        tally = starved(name, base, seed=0, times=3)
    except OSError as error:
        pytest.skip(str(error))
    assert not tally.wrong and tally.hurt


@pytest.mark.skipif("HALFSTEP_DRILLS" not in os.environ, reason="make drills")
def test_commands_are_killed_for_a_while(base):
    """Every command in turns (or those of HALFSTEP_COMMANDS, parted by ";"), HALFSTEP_KILLS kills each time, from
    HALFSTEP_SEED on, for HALFSTEP_DRILLS seconds."""
    end, seed = time.monotonic() + float(os.environ["HALFSTEP_DRILLS"]), int(os.environ.get("HALFSTEP_SEED", "1000"))
    names = list(filter(None, os.environ.get("HALFSTEP_COMMANDS", "").split(";"))) or list(COMMANDS)
    kills, every = int(os.environ.get("HALFSTEP_KILLS", "20")), {name: [0, 0] for name in names}
    wrong = []
    while time.monotonic() < end:
        for name in names:
            tally = killed_until(name, base, seed, kills, end - time.monotonic())
            every[name][0] += tally.hurt
            every[name][1] += tally.ended
            wrong += [f"{name}, seed {seed}: {one}" for one in tally.wrong]
            print(
                f"{name:<22} seed {seed}: {tally.hurt} kills, {tally.ended} ends, {len(tally.wrong)} wrong", flush=True
            )
        seed += 1
    print(*(f"{name:<22} {hurt:>6} kills {ended:>6} ends" for name, (hurt, ended) in every.items()), sep="\n")
    assert not wrong, "\n".join(wrong)
