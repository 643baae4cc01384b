"""Commands that are killed, starved of disk or have their clock turned, and gone on with until they end.

Each command runs in a forked child: it begins where everything is imported, so that a kill at a random moment hits the
work and not the imports. Oracle: the same command, left alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from halfstep.app import cli
from halfstep.engine.device import use_device

SMALL = """
model.channels=8,16 model.groups=4 model.head_dim=8 data.size=8 data.channels=1 train.steps=12 train.batch=8
train.warmup=0 train.save_every=2 train.log_every=1 train.sample_every=4 slim.widths=0.5 sample.steps=4 sample.batch=8
sample.layout=contiguous search.images=16 search.error_images=4 search.fit=3 search.genes=2 search.finalists=2
search.final_images=16 search.race=4 search.arms=1 eval.images=16 eval.features=digits eval.bootstrap=4 eval.free=false
eval.repeats=1 sample.timed=8 sparse.least=1 sparse.schedule=switch continuous.base=8
"""

TIMED = ("us", "ms", "wall", "seconds", "repeats", "machine", "since", "threads", "load")
"""Parts of the names of what a machine takes for its work, and no two runs share."""
UNLIKE = (".lock", ".holder.json", "recipe.json", "prices.json", "cost.json", "report.html", "README.md")
"""Files that tell of time and machine; that they are there is compared."""
LEFT = ("halfstep-tmp", "halfstep-old", ".tmp-", ".part")


def words(*command: str, edits: bool = True) -> list[str]:
    return [*command, *(word for edit in SMALL.split() for word in ("--set", edit))] if edits else list(command)


COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "train": lambda base: words("train", "--data", "digits"),
    "compress slimmable": lambda base: words("compress", "slimmable", "--model", f"{base}/dense", "--data", "digits"),
    "compress sparse": lambda base: words("compress", "sparse", "--model", f"{base}/dense", "--data", "digits"),
    "compress spectral": lambda base: words("compress", "spectral", "--model", f"{base}/dense", "--data", "digits"),
    "compress continuous": lambda base: words("compress", "continuous", "--data", "digits"),
    "tune": lambda base: words("tune", "--model", f"{base}/slim", "--data", "digits", "--budget", "0.5"),
    "optimize": lambda base: words("optimize", "--model", f"{base}/dense", "--data", "digits", "--budget", "0.5"),
    "sample": lambda base: words("sample", "--model", f"{base}/slim", "--count", "24", "--batch", "4", edits=False),
    "export": lambda base: words("export", f"{base}/dense", "--steps", "3", "--to", "diffusers", edits=False),
}


@dataclass
class Tally:
    """Of one command: how often it was hurt, how often it was gone on with to its end, and what was wrong then."""

    hurt: int = 0
    ended: int = 0
    wrong: list[str] = field(default_factory=list)

    def take(self, code: int, out: Path, wanted: dict[str, object]) -> None:
        """A run that came to an end."""
        self.ended += 1
        told = said_by(["--out", str(out)]).read_text()[-300:]
        self.wrong += [f"it ended with {code}: {told}"] if code else unlike(found_in(out), wanted)


def prepared(base: Path) -> Path:
    """The models that the commands begin from, a trained net and a supernet of it; made and searched in this process,
    so that children begin with everything imported."""
    for name, command in (("dense", "train"), ("slim", "compress slimmable"), ("tuned", "tune")):
        code = said_of([*COMMANDS[command](base), "--out", str(base / name)])
        assert code == 0, said_by(["--out", str(base / name)]).read_text()
    return base


def ran(
    command: list[str],
    kill_after: float | None = None,
    hurt: Callable[[], object] | None = None,
    fresh: bool = False,
) -> int:
    """The exit code of a command in a child, -9 where it was killed after so many seconds. `hurt`: what is done to the
    child's world before it begins. `fresh`: in an interpreter of its own, for Ray, which hangs in a fork of a process
    that has used it. What it says goes into a file beside the run folder."""
    child = _begun(command) if fresh else os.fork()
    if child == 0:
        _be(command, hurt)
    begun, status = time.monotonic(), None
    try:
        while kill_after is None or time.monotonic() - begun < kill_after:
            done, found = os.waitpid(child, os.WNOHANG)
            if done:
                status = found
                break
            time.sleep(0.002)
    finally:  # a test that is cut off leaves no child behind
        if status is None:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status)


def _begun(command: list[str]) -> int:
    """The process of a command that was begun in a new interpreter."""
    (said := said_by(command)).parent.mkdir(parents=True, exist_ok=True)
    to_file = (os.POSIX_SPAWN_OPEN, 1, str(said), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    words, world = [sys.executable, "-m", "halfstep", *command], {**os.environ, "OMP_NUM_THREADS": "1"}
    return os.posix_spawn(sys.executable, words, world, file_actions=[to_file, (os.POSIX_SPAWN_DUP2, 1, 2)])


def _be(command: list[str], hurt: Callable[[], object] | None) -> None:
    """The command line, in a child, to its end."""
    code: int = 1
    try:
        if hurt:
            hurt()
        code = said_of(command)
    finally:
        os._exit(code)


def said_of(command: list[str]) -> int:
    """The exit code of a command in this process; what it says goes into a file beside its run folder."""
    torch.set_num_threads(1)  # OpenMP's threads do not live through a fork
    use_device("cpu")
    said_by(command).parent.mkdir(parents=True, exist_ok=True)
    with said_by(command).open("w") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        before, sys.argv = sys.argv, ["halfstep", *command]
        try:
            cli.main()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 0
        except BaseException:
            traceback.print_exc()
            return 1
        finally:
            sys.argv = before
    return 0


def said_by(command: list[str]) -> Path:
    """Where what a command says goes: beside its run folder, but not on its disk."""
    out = Path(command[command.index("--out") + 1])
    return out.parent.parent / f"{out.parent.name}-{out.name}.said"


# -------------------------------------------------------------------------------------------------------- what is there


def found_in(out: Path) -> dict[str, object]:
    """What a run left, by name, without what a machine takes for its work."""
    return dict(_found(out))


def _found(out: Path) -> Iterator[tuple[str, object]]:
    for file in sorted(out.rglob("*")):
        name = str(file.relative_to(out))
        if not file.is_file() or file.name in (".lock", ".holder.json"):
            continue
        if file.name in UNLIKE or name.startswith("figures") or "/figures/" in name or file.name == "SHA256SUMS":
            yield name, None
        elif file.suffix in (".json", ".jsonl"):
            lines = [file.read_text()] if file.suffix == ".json" else file.read_text().splitlines()
            yield name, [_untimed(json.loads(line)) for line in lines]
        elif file.suffix == ".npz":
            with zipfile.ZipFile(file) as packed:
                yield name, {one.filename: one.CRC for one in packed.infolist()}
        elif file.suffix == ".safetensors":  # its header has no order
            with safe_open(file, "np") as opened:
                yield name, [opened.metadata(), *((key, opened.get_tensor(key).tobytes()) for key in opened.keys())]  # noqa: SIM118
        else:
            yield name, file.read_bytes()


def _untimed(record: Any) -> Any:
    if isinstance(record, dict):
        return {key: _untimed(one) for key, one in record.items() if not any(part in key for part in TIMED)}
    return [_untimed(one) for one in record] if isinstance(record, list) else record


def unlike(found: dict[str, object], wanted: dict[str, object]) -> list[str]:
    """What is other than it should be, in words."""
    return [
        *(f"{name} is left" for name in found if any(part in name for part in LEFT)),
        *(f"{name} is missing" for name in wanted if name not in found),
        *(f"{name} is there" for name in found if name not in wanted),
        *(f"{name} differs" for name in wanted if name in found and found[name] != wanted[name]),
    ]


# --------------------------------------------------------------------------------------------------------------- drills


def killed_until(name: str, base: Path, seed: int, kills: int, seconds: float, also: Sequence[str] = ()) -> Tally:
    """A command killed at random moments of what it has left to do, again and again, until so many kills are done (or
    one, and so many `seconds` are past, of which none is spent on what it takes when left alone); every time that it
    ends, what it left is compared, and it begins anew. `also`: words of the killed command alone, which are to make no
    difference; it runs in interpreters of its own then."""
    draw, tally, place = random.Random(f"{name}-{seed}"), Tally(), base / f"{name.replace(' ', '-')}-{seed}"
    alone, out = place / "alone", place / "killed"
    command = COMMANDS[name](base)
    begun = time.monotonic()
    code = ran([*command, "--out", str(alone)])
    whole = time.monotonic() - begun
    if code:
        tally.wrong.append(f"left alone it ended with {code}: {said_by([*command, '--out', str(alone)]).read_text()}")
        return tally
    wanted = found_in(alone)
    if also:  # these words have a time of their own
        begun = time.monotonic()
        ran([*command, *also, "--out", str(out)], fresh=True)
        whole = time.monotonic() - begun
        shutil.rmtree(out)
    end = time.monotonic() + seconds
    while tally.hurt < kills and (time.monotonic() < end or not tally.hurt):
        code = ran([*command, *also, "--out", str(out)], draw.uniform(0, 1.15 * whole), fresh=bool(also))
        if code == -signal.SIGKILL:
            tally.hurt += 1
            continue
        tally.take(code, out, wanted)
        shutil.rmtree(out)
    if out.exists() or not tally.ended:  # a kill before the first write leaves nothing, and is to be gone on from too
        tally.take(ran([*command, *also, "--out", str(out)], fresh=bool(also)), out, wanted)
    shutil.rmtree(place)
    return tally


def clock_turned(jump: float) -> Callable[[], None]:
    """Has the wall clock jump by up to so many seconds at every look at it."""

    def turn() -> None:
        real, draw = time.time, random.Random(0)
        time.time = lambda: real() + draw.uniform(-jump, jump)

    return turn


def starved(name: str, base: Path, seed: int, times: int) -> Tally:
    """A command on disks that are too small, by a different measure each time: it ends in one line that says so, or
    whole; given room it goes on to what it leaves where there is enough. Raises OSError where nothing can be
    mounted."""
    draw, tally, disk = random.Random(f"{name}-{seed}"), Tally(), base / f"disk-{name.replace(' ', '-')}-{seed}"
    command, alone = COMMANDS[name](base), base / f"room-{name.replace(' ', '-')}-{seed}"
    assert ran([*command, "--out", str(alone)]) == 0
    wanted = found_in(alone)
    whole = sum(file.stat().st_size for file in alone.rglob("*") if file.is_file())
    disk.mkdir()
    for _ in range(times):
        mounted(disk, f"size={4096 * (2 + int(draw.uniform(0, 1.2 * whole) / 4096))}")
        try:
            code, out = ran([*command, "--out", str(disk / "run")]), disk / "run"
            if code not in (0, 2):
                tally.wrong.append(f"it ended with {code}: {said_by(['--out', str(out)]).read_text()[-500:]}")
            tally.hurt += code == 2
            mounted(disk, f"remount,size={16 * whole}")
            tally.take(ran([*command, "--out", str(out)]), out, wanted)
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    return tally


def mounted(place: Path, how: str) -> None:
    """A disk in memory. Raises OSError where that is not allowed."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(place)], capture_output=True).returncode:
        raise OSError("no disk in memory can be mounted here")
