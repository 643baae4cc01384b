"""Work in a forked child with bounded memory and time, for what it opens may take the process along."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from halfstep.engine.device import use_device

CPU_SECONDS, WALL_SECONDS, MEMORY = 10, 20, 3 << 30


class Hung(BaseException):
    """More seconds of computing or of waiting than a case may take."""


def caged(items: Sequence[Any], work: Callable[[Any], Any]) -> list[Any]:
    """`work(item)` of every item, as JSON, in one child as long as it lives; None where the child died or fell silent.

    Inside of `work`, `limits()` raises Hung in time; a child that does not even hear that is killed.
    """
    found: list[Any] = []
    while len(found) < len(items):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                os.close(reader)
                _tell(items[len(found) :], work, writer)
            os._exit(0)
        os.close(writer)
        ended = _listen(reader, child)
        found += ended
        if len(found) < len(items):
            found.append(None)
    return found


def _tell(items: Sequence[Any], work: Callable[[Any], Any], writer: int) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not live through a fork
    use_device("cpu")  # nor does CUDA
    warnings.simplefilter("ignore")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    with os.fdopen(writer, "w") as out:
        for item in items:
            out.write(json.dumps(work(item)) + "\n")
            out.flush()


def _listen(reader: int, child: int) -> list[Any]:
    found = []
    with os.fdopen(reader) as lines:
        while True:
            if not select.select([reader], [], [], 8 * WALL_SECONDS)[0]:
                os.kill(child, signal.SIGKILL)
            line = lines.readline()
            if not line:
                break
            found.append(json.loads(line))
    os.waitpid(child, 0)
    return found


@contextlib.contextmanager
def limits(patience: float = 1) -> Iterator[None]:
    """Raise Hung after seconds of computing or of waiting."""

    def ring(*_: object) -> None:
        raise Hung

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, CPU_SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, WALL_SECONDS))
    for kind, which, seconds in timers:
        signal.signal(kind, ring)
        signal.setitimer(which, patience * seconds, 1)  # again every second: a handler's exception may be swallowed
    try:
        yield
    finally:
        for _, which, _ in timers:
            signal.setitimer(which, 0)
