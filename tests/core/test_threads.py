"""How threads wait; the oracle is what the OpenMP library itself says it read when it was loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
OPENMP = sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.so*"))


def told_by(code: str, **environment: str) -> str:
    """Both outputs of a fresh interpreter that runs the code, in an environment that says nothing else of waiting."""
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=clean | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
    ).stdout


@pytest.mark.skipif(not OPENMP, reason="this torch has no OpenMP library of its own to ask")
@pytest.mark.parametrize("door", ["halfstep.app.cli", "halfstep.__main__"])
@pytest.mark.parametrize(
    ("before", "read"),
    [
        ({}, ("OMP_WAIT_POLICY='PASSIVE'", "GOMP_SPINCOUNT='1000'")),
        ({"OMP_WAIT_POLICY": "active"}, ("OMP_WAIT_POLICY='ACTIVE'",)),
    ],
)
def test_threads_wait_asleep_unless_the_user_said_otherwise(door, before, read):
    code = f"import sys, {door}; assert 'torch' not in sys.modules; import ctypes; ctypes.CDLL({str(OPENMP[0])!r})"
    told = told_by(code, OMP_DISPLAY_ENV="verbose", **before).replace(" ", "")
    assert all(one in told for one in read), told


@pytest.mark.parametrize(("before", "threads"), [({}, 1), ({"OPENBLAS_NUM_THREADS": "2"}, 2)])
def test_numpy_s_own_threads_are_one_unless_the_user_said_otherwise(before, threads):
    """Oracle: what the library says that it uses."""
    code = "import halfstep.app.cli, numpy, threadpoolctl as t; numpy.ones((9, 9)) @ numpy.ones((9, 9)); "
    code += "print([one['num_threads'] for one in t.threadpool_info() if one['internal_api'] == 'openblas'])"
    environment = {"OMP_NUM_THREADS": "", "OPENBLAS_NUM_THREADS": ""}
    told = told_by(
        f"import os; [os.environ.pop(n) for n in {list(environment)} if not os.environ[n]]; {code}",
        **environment | before,
    )
    assert set(eval(told)) <= {min(threads, os.cpu_count() or 1)}


def test_a_setting_of_the_same_thing_by_another_name_is_the_users_word():
    code = "import os, halfstep.core.threads; print(os.environ.get('OMP_WAIT_POLICY'))"
    assert [told_by(code, **{name: "1"} if name else {}).strip() for name in ("", *SETTINGS[1:])] == [
        "passive",
        "None",
        "None",
        "None",
    ]
