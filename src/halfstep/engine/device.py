"""Where to run: the device of accelerate's choice, or one by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

import torch

from halfstep.core.errors import ModelError
from halfstep.core.machine import this_process
from halfstep.engine.cluster import on_cluster


def default_device() -> torch.device:
    """The device that accelerate takes here: a GPU where there is one."""
    return this_process().device


def device_named(name: str) -> torch.device:
    """The device of this machine that torch calls so, e.g. "cuda:1". Raises ModelError."""
    try:
        found = torch.zeros(1, device=name)
        found.item()  # of "meta", which holds no numbers, there is none
        return found.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            got=f"{name!r}",
            expected="a device of this machine, such as cpu",
            where="--device",
            do=f"leave it out to run on {default_device()}",
        ) from error


def use_device(name: str) -> None:
    """Run everything from here on where torch names it, e.g. "cuda:1". Raises ModelError (see `device_named`)."""
    place, here = device_named(name), this_process()
    if here.num_processes > 1:
        raise ModelError(
            got=f"{name!r} for {here.num_processes} processes",
            expected="a device for each",
            where="--device",
            do="leave it out: the launcher places them",
        )
    here.device = place
    if place.type == "cuda":
        torch.cuda.set_device(place)


@contextlib.contextmanager
def side_by_side(device: torch.device, workers: int | None = None) -> Iterator[Executor | None]:
    """Where work can be done side by side: a cluster, where one was chosen; else threads, one for each that torch may
    use (or `workers`), each then with one of its own: of small networks two single threads get through more than one
    pair. None on an accelerator, which one feeds."""
    with on_cluster(device) as cluster:
        if cluster is not None:
            yield cluster
            return
    threads = torch.get_num_threads()
    workers = workers or threads
    if device.type != "cpu" or workers < 2:
        yield None
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers) as executor:
            try:
                yield executor
            except BaseException:  # Ctrl-C, say: what waits its turn is not waited for
                executor.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)
