"""Run a command in several processes of this machine that train together, as `accelerate launch` does over machines:
what one process says stands in one line, and when one fails the others end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

from halfstep.core.errors import RunError
from halfstep.core.machine import launched

_GRACE = 10.0
"""Seconds that processes have to end by themselves, after one failed."""


def launch(count: int, device: str = "") -> int:
    """Run this very command in `count` processes, and return its exit code: the first process's, or that of whichever
    failed. The first one speaks; of another is told what it failed with.

    device: "cpu", or "" for a GPU each where there are some. Raises RunError for more processes than GPUs.
    """
    import torch

    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    if 0 < gpus < count:
        raise RunError(
            got=f"{count} processes",
            expected=f"at most {gpus}, one for each GPU",
            where="--processes",
            do="ask for fewer, or say --device cpu",
        )
    shared = _environment(count, gpus)
    command = [sys.executable, "-m", "halfstep", *sys.argv[1:]]
    before = signal.signal(signal.SIGTERM, _stop)
    with tempfile.TemporaryFile("w+") as told:
        processes = [_start(command, shared, rank, told if rank else None) for rank in range(count)]
        try:
            return _wait(processes, told)
        finally:
            signal.signal(signal.SIGTERM, before)
            _end(processes)


def _environment(count: int, gpus: int) -> dict[str, str]:
    """What accelerate reads in the environment, and threads that do not take each other's core."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    if not gpus:
        shared["ACCELERATE_USE_CPU"] = "true"
    return {"OMP_NUM_THREADS": str(max(1, cores // count))} | os.environ | shared


def _start(command: Sequence[str], shared: Mapping[str, str], rank: int, told: IO[str] | None) -> Any:
    env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    return subprocess.Popen(command, env=env, stdout=None if told is None else subprocess.DEVNULL, stderr=told)


def _wait(processes: Sequence[Any], told: IO[str]) -> int:
    """Until all ended well, or one did not: its exit code."""
    while (codes := [one.poll() for one in processes]) and None in codes and not any(codes):
        time.sleep(0.05)
    failed = next((rank for rank, code in enumerate(codes) if code), None)
    if failed is None:
        return 0
    if failed and codes[0] is None:  # it may be about to say the same
        processes[0].terminate() if codes[failed] < 0 else _patiently(processes[0])
    if failed and processes[0].returncode != codes[failed]:
        told.seek(0)
        lines = told.read().strip().splitlines() or [f"process {failed} ended with {codes[failed]}"]
        sys.stderr.write(lines[-1] + "\n")
    return codes[failed] if codes[failed] > 0 else 1


def _patiently(process: Any) -> None:
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.terminate()


def _end(processes: Sequence[Any]) -> None:
    for one in processes:
        if one.poll() is None:
            one.terminate()
    for one in processes:
        try:
            one.wait(_GRACE)
        except subprocess.TimeoutExpired:
            one.kill()
            one.wait()


def _stop(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def require_as_launched(count: int) -> None:
    """Raise RunError where a process was launched as one of another number than the command asks for."""
    if launched() not in (1, count):
        raise RunError(
            got=f"{count} processes under a launcher of {launched()}",
            expected="one number",
            where="--processes",
            do="leave it out: the launcher says how many",
        )
