"""Workers on many machines, as an executor: a Ray cluster that the user started, or a local one (extra "ray").

What is `Held` (a bank, what draws and judges by it) is shipped once to each node and opened once in each worker; a task
names it, and carries only what differs: a plan and a few numbers. A task whose worker dies is run again elsewhere, so
that a kill costs what was in flight; one that kills every worker is an error and not a wait for ever. What comes back
does not hang on who did it or when: callers ask in rounds, in an order of their own, and a picture hangs on its seed
and number alone.

Between machines things travel as pickles, which run code: Ray is for machines that are one's own, and trust each other.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import pickle
import platform
import socket
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any

import torch

from halfstep.core.errors import HalfstepError, RunError
from halfstep.core.machine import cpu_name, this_process
from halfstep.core.watch import SILENT, Watch

LOCAL = "local"
ANSWER = 5.0
"""Seconds in which an address has to answer."""
RETRIES = 5
"""How often a task is run again whose worker died: killed, out of memory, or gone with its node."""
_WHERE = "--ray"


class Held:
    """What every worker holds: shipped once to a node, and then only named."""


class Cluster(Executor):
    """Tasks on Ray's workers, one processor each (one GPU, where `device` is one), as futures.

    `ray`: the module, connected. Objects that are `Held` may not change after a task has named them.
    """

    def __init__(self, ray: Any, device: torch.device):
        self.ray, self.token = ray, uuid.uuid4().hex
        self.refs: dict[str, Any] = {}
        self.names: dict[int, tuple[str, Held]] = {}
        needs = {"num_cpus": 1} | ({"num_gpus": 1} if device.type == "cuda" else {})
        # Ray tries a task again when its worker or node dies, and not when it raises
        self.task = ray.remote(**needs, max_retries=RETRIES, retry_exceptions=False)(_run)
        self.versions = versions()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """As `Executor.submit`. What the function raises its future raises."""
        call = self._packed((fn, args, kwargs))
        return _told(self.task.remote(self.token, self.versions, self.refs, call).future())

    def survey(self, watch: Watch = SILENT) -> None:
        """Look at every node: raise RunError for one that has other versions than this machine, or no Halfstep, and
        say where the processor is another, whose pictures may differ in their last bits."""
        where = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        nodes = [node for node in self.ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
        asked = {
            node["NodeManagerAddress"]: self.task.options(scheduling_strategy=where(node["NodeID"], soft=False)).remote(
                self.token, self.versions, {}, pickle.dumps((cpu_name, (), {}))
            )
            for node in nodes
        }
        found = {address: _told(one.future()).result() for address, one in asked.items()}
        cores = int(sum(node["Resources"]["CPU"] for node in nodes))
        watch.say(f"Ray: {cores} workers on {len(nodes)} node{'s' if len(nodes) != 1 else ''}")
        for address, name in found.items():
            if name != cpu_name():
                watch.say(f"{address} has another processor ({name}): its pictures may differ in their last bits")

    def _packed(self, what: Any) -> bytes:
        """A pickle in which what is held is named. Shipped before, if this is the first time."""
        written = io.BytesIO()
        _Pickler(written, self._name).dump(what)
        return written.getvalue()

    def _name(self, one: Held) -> str:
        if id(one) not in self.names:
            inside = io.BytesIO()
            _Pickler(inside, self._name, root=one).dump(one)
            name = f"{type(one).__name__}-{len(self.names)}"
            self.refs = {**self.refs, name: self.ray.put(inside.getvalue())}
            self.names[id(one)] = name, one  # kept alive: another object could have its id
        return self.names[id(one)][0]


class _Pickler(pickle.Pickler):
    """Names what is held, but for `root`, which it writes."""

    def __init__(self, file: Any, name: Callable[[Held], str], root: Held | None = None):
        super().__init__(file)
        self.name, self.root = name, root

    def persistent_id(self, one: Any) -> str | None:
        return self.name(one) if isinstance(one, Held) and one is not self.root else None


class _Unpickler(pickle.Unpickler):
    """Finds what is held by its name: in this worker, or on its node."""

    def __init__(self, content: bytes, refs: dict[str, Any]):
        super().__init__(io.BytesIO(content))
        self.refs = refs

    def persistent_load(self, name: Any) -> Held:
        if name not in _OPENED:
            import ray

            _OPENED[name] = _Unpickler(ray.get(self.refs[name]), self.refs).load()
        return _OPENED[name]


_OPENED: dict[str, Held] = {}
"""What this worker holds, by name, of the cluster whose token stands in `_TOKEN`: another one's is let go."""
_TOKEN: list[str] = []


def _run(token: str, wanted: dict[str, str], refs: dict[str, Any], call: bytes) -> Any:
    """In a worker: what a task is, with one thread."""
    if [token] != _TOKEN:
        _require_versions(wanted)
        _OPENED.clear()
        _TOKEN[:] = [token]
        torch.set_num_threads(1)
    fn, args, kwargs = _Unpickler(call, refs).load()
    return fn(*args, **kwargs)


def versions() -> dict[str, str]:
    """Of what a picture hangs on."""
    packages = ("halfstep", "torch", "diffusers", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def _require_versions(wanted: dict[str, str]) -> None:
    here = versions()
    other = [f"{name} {here[name]}" for name in wanted if here[name] != wanted[name]]
    if other:
        expected = ", ".join(f"{name} {wanted[name]}" for name in wanted if here[name] != wanted[name])
        where = f"worker on {socket.gethostname()}"
        raise RunError(got=", ".join(other), expected=f"{expected}, as here", where=where, do="install the same there")


def _told(future: Future) -> Future:
    """The same future, but that an error of ours comes out as it was raised, and Ray's own as one line."""
    plain: Future = Future()

    def done(one: Future) -> None:
        error = one.exception()
        if error is None:
            plain.set_result(one.result())
        else:
            cause = getattr(error, "cause", None)
            plain.set_exception(cause if isinstance(cause, HalfstepError) else _lost(error))

    future.add_done_callback(done)
    return plain


def _lost(error: BaseException) -> BaseException:
    """One line of what Ray says where a worker could not run; what the task itself raised otherwise."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, ModuleNotFoundError) and "halfstep" in str(cause):
        return RunError(got=cause, expected="Halfstep on every node", where=_WHERE, do="install it there")
    if cause is not None:
        return cause
    told = " ".join(str(error).split())
    return RunError(got=f"{type(error).__name__}: {told}", expected="a worker", where=_WHERE, do="see `ray status`")


# ---------------------------------------------------------------------------------------------------------- connecting

_CHOSEN: list[tuple[str, Watch]] = []


def use_cluster(address: str, watch: Watch = SILENT) -> None:
    """Have all that is drawn and measured side by side from here on run on a Ray cluster: "local", one for this machine
    alone; "auto", the one that runs on this machine; "HOST:PORT" or "ray://HOST:PORT". Raises RunError where the extra
    is not installed, nothing answers there, or a node has other versions."""
    if this_process().num_processes > 1:
        got, do = f"{address!r} for {this_process().num_processes} processes", "launch one process, or leave --ray out"
        raise RunError(got=got, expected="one process, which asks the cluster", where=_WHERE, do=do)
    connected(address)
    _CHOSEN[:] = [(address, watch)]


def is_chosen() -> bool:
    """Whether a cluster was chosen."""
    return bool(_CHOSEN)


@contextlib.contextmanager
def on_cluster(device: torch.device) -> Iterator[Executor | None]:
    """The chosen cluster as an executor; None where none was chosen."""
    if not _CHOSEN:
        yield None
        return
    [(address, watch)] = _CHOSEN
    cluster, threads = Cluster(connected(address), device), torch.get_num_threads()
    cluster.survey(watch)
    torch.set_num_threads(1)
    try:
        yield cluster
    finally:
        torch.set_num_threads(threads)


def connected(address: str) -> Any:
    """The module `ray`, connected. Raises RunError."""
    if importlib.util.find_spec("ray") is None:
        do = "pip install 'halfstep[ray]'"
        raise RunError(got="no Ray", expected="it installed", where=_WHERE, do=do)
    if address != LOCAL:
        _require_answer(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would call home
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # its own later default, of which it warns
    os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))  # those for want of memory are counted by themselves
    import ray

    if ray.is_initialized():
        return ray
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        # "local": without it Ray would join a cluster that happens to run here
        ray.init("local", num_cpus=cores, include_dashboard=False, **quiet)
        return ray
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
        raise _no_cluster(address, error) from error
    return ray


def _require_answer(address: str) -> None:
    """Raise RunError for what is no address, and where nobody listens: Ray would wait for a minute."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        expected = f"{LOCAL}, auto, HOST:PORT or ray://HOST:PORT"
        raise RunError(got=repr(address), expected=expected, where=_WHERE, do="see `ray status`")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER).close()
    except OSError as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> RunError:
    told = next(iter(str(error).strip().splitlines()), type(error).__name__)
    do = f"start one with `ray start --head`, or take --ray {LOCAL}"
    return RunError(got=f"no Ray cluster at {address} ({told})", expected="one that answers", where=_WHERE, do=do)
