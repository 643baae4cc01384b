"""How threads wait; the oracle is what the OpenMP library itself says it read when torch loaded it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("before", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "active"}, "ACTIVE")])
@pytest.mark.parametrize("door", ["halfstep.cli", "halfstep.__main__"])
def test_threads_wait_asleep_unless_the_user_said_otherwise(door, before, policy):
    inherited = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    code = f"import {door}, torch; torch.ones(1)"
    command = [sys.executable, "-c", code]
    environment = {**inherited, **before, "OMP_DISPLAY_ENV": "true"}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr
    assert f"OMP_WAIT_POLICY = '{policy}'" in told or f"OMP_WAIT_POLICY='{policy}'" in told


def test_a_setting_of_the_same_thing_by_another_name_is_the_users_word():
    inherited = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    code = "import os, halfstep.threads; print(os.environ.get('OMP_WAIT_POLICY'))"
    told = [
        subprocess.run(
            [sys.executable, "-c", code], env=inherited | more, capture_output=True, text=True
        ).stdout.strip()
        for more in ({}, {"GOMP_SPINCOUNT": "1000"}, {"KMP_BLOCKTIME": "1"})
    ]
    assert told == ["passive", "None", "None"]
