"""Several processes that draw one run's images: this machine's own (`--processes`), and those of other machines, which
give the same command for the same folder.

The first holds the folder's lock, says in state/worker.json when there is something to do, and finishes; the others
only do parts of it (`core/parts.py`). Whoever dies loses the batch that it was at, which another draws.
"""

from __future__ import annotations

import halfstep.core.threads  # noqa: F401  # isort: skip (before torch)
import contextlib
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from halfstep import __version__
from halfstep.core import disk
from halfstep.core.errors import HalfstepError, RunError
from halfstep.core.lock import is_free
from halfstep.core.machine import apart, machine
from halfstep.core.parts import POLL, Parts
from halfstep.core.watch import Watch
from halfstep.engine.bank import Bank
from halfstep.engine.cluster import is_chosen
from halfstep.engine.device import default_device, side_by_side, use_device

SIGN = Path("state") / "worker.json"
"""What the first process of a run is, in its folder from when it can be helped."""


@dataclass(frozen=True, kw_only=True)
class Worker:
    """What draws: versions, kind of device and precision, which all workers of a run share; and the processor and its
    threads, on which the last digits of a picture hang."""

    halfstep: str
    torch: str
    diffusers: str
    device: str
    dtype: str
    cpu: str
    threads: int

    @classmethod
    def here(cls, dtype: str) -> Worker:
        told: Any = {name: machine()[name] for name in ("torch", "diffusers", "cpu", "threads")}
        return cls(halfstep=__version__, device=default_device().type, dtype=dtype, **told)

    @classmethod
    def first(cls, out: Path) -> Worker:
        return disk.read_record(out / SIGN, cls, what="what draws there", do="delete it")

    def unlike(self, other: Worker) -> dict[str, str]:
        """What differs, in words."""
        mine, theirs = asdict(self), asdict(other)
        return {name: f"{name} {mine[name]}, not {theirs[name]}" for name in mine if mine[name] != theirs[name]}


_PROCESSES: list[int] = []
"""How many of this machine draw, where that was said."""


def use_processes(count: int) -> None:
    """Draw from here on, in `sample` and `evaluate`, in so many processes of this machine of one thread each."""
    _PROCESSES[:] = [count]
    torch.set_num_threads(1)


def by_itself(images: int) -> None:
    """Let this process draw by itself, out of a launcher's group. Raises RunError for more processes than images."""
    apart()
    processes = sum(_PROCESSES)
    if processes > 1 and is_chosen():
        got, expected = "--processes beside --ray", "one of them: a cluster has processes of its own"
        raise RunError(got=got, expected=expected, where="--processes", do="leave one out")
    if processes > images:
        raise RunError(
            got=f"{processes} processes for {images} images",
            expected="an image for each",
            where="--processes",
            do=f"ask for at most {images}",
        )


def ready(out: Path, dtype: str, watch: Watch) -> None:
    """Say that this run, which this process opened, can be helped; and how those drew who began it, if otherwise."""
    here = Worker.here(dtype)
    if (out / SIGN).is_file() and (unlike := here.unlike(Worker.first(out))):
        watch.say(f"goes on with {'; '.join(unlike.values())}: the last digits of what is drawn now may differ")
    disk.write_json(out / SIGN, asdict(here))


def wait_until_ready(out: Path, dtype: str, watch: Watch) -> bool:
    """Whether another's run can be helped, as soon as that is known; False: its first process ended.

    Raises RunError where this process draws otherwise than the first.
    """
    while not (out / SIGN).is_file():
        if is_free(out) or not _parent_lives():
            return False
        time.sleep(POLL)
    unlike = Worker.here(dtype).unlike(Worker.first(out))
    told = [text for name, text in unlike.items() if name not in ("cpu", "threads")]
    if told:
        raise RunError(
            got=f"a worker with {'; '.join(told)}",
            expected="what the run's first process is",
            where=out,
            do="bring the same versions and kind of device, or choose another --out",
        )
    if unlike:
        watch.say(f"{'; '.join(unlike.values())}: the last digits of what is drawn here may differ")
    return True


def help_with(parts: Parts, watch: Watch) -> None:
    """Do parts of another's run until all are done. A process that another one started ends then, or with that one."""
    with watch.stage("help", len(parts.names)) as told:
        mine = parts.work(told, _parent_lives)
    watch.say(f"helped: {mine} of {len(parts.names)} batches were drawn here")


def finished_by_first(out: Path, file: Path) -> bool:
    """Wait for the last file of the run that was helped; False where its first process ended without it: this one may
    go on in its place. A process that another one started ends here."""
    if multiprocessing.parent_process() is not None:
        sys.exit()
    while not file.is_file():
        if is_free(out):
            return file.is_file()
        time.sleep(POLL)
    return True


def _parent_lives() -> bool:
    parent = multiprocessing.parent_process()
    return parent is None or parent.is_alive()


def lead(parts: Parts, told: Callable[[int], object], bank: Bank) -> None:
    """Have the parts of this process's own run done, by it and whoever helps: on a CPU batches side by side, as many as
    torch may use threads. Where a cluster was chosen, it is left to that."""
    if is_chosen():
        return
    workers = torch.get_num_threads() if bank.eager else 1
    with side_by_side(bank.device, workers) as executor:
        if executor is None:
            parts.work(told)
            return
        for one in [executor.submit(parts.work, told) for _ in range(workers)]:
            one.result()


@contextlib.contextmanager
def helpers(parts: Parts, watch: Watch, verb: Callable[..., object], **given: Any) -> Iterator[None]:
    """The other processes of this machine (`use_processes`) call a verb as it was called here, and so help its run; on
    a GPU each, where there are some. They end with it; one that fails is told, and the others do its work."""
    spawn, many, processes = multiprocessing.get_context("spawn"), len(parts.names), sum(_PROCESSES)
    if processes > many:
        watch.say(f"{many} batches for {processes} processes: the others are not started; a smaller --batch helps")
        processes = many
    started = [
        spawn.Process(target=_help, args=(verb, given, _device(rank)), daemon=True) for rank in range(1, processes)
    ]
    for one in started:
        one.start()
    try:
        yield
        for one in started:
            one.join(10)
    finally:
        for rank, one in enumerate(started, start=1):
            if one.exitcode:
                watch.say(f"worker {rank} ended with {one.exitcode}: the others did its work")
            one.terminate()
            one.join()


def _device(rank: int) -> str:
    here = default_device()
    return f"cuda:{((here.index or 0) + rank) % torch.cuda.device_count()}" if here.type == "cuda" else str(here)


def _help(verb: Callable[..., object], given: dict[str, Any], device: str) -> None:
    torch.set_num_threads(1)
    try:
        use_device(device)
        verb(**given)
    except HalfstepError as error:
        sys.stderr.write(f"error: worker: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:  # the first process says so
        sys.exit(130)
