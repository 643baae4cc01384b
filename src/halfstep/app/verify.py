"""Whether the files of a pipeline or a run are those that were written: every digest that was recorded, compared."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from halfstep.core.errors import RunError
from halfstep.core.sums import Checked, State, compare, recorded_folders, write_sums
from halfstep.nets.content import digest_tensors
from halfstep.nets.weights import open_weights


def verify(folder: Path, *, accept: bool = False) -> list[Checked]:
    """Every file of the pipelines at and below `folder`, and every training state, beside what was written.

    `accept`: what lies in the pipelines now is recorded as right, after it was compared.
    Raises RunError for a folder that holds neither.
    """
    folder = Path(folder)
    places, states = list(recorded_folders(folder)), list(_states(folder))
    if not places and not states:
        raise RunError(
            got="no pipeline and no training state",
            expected="a pipeline or a run folder",
            where=folder,
            do="give the folder that train, compress, search or optimize wrote",
        )
    found = [
        Checked((place / one.file).relative_to(folder).as_posix(), one.state)
        for place in places
        for one in compare(place, renewing=accept)
    ]
    found += [Checked(file.relative_to(folder).as_posix(), _state(file)) for file in states]
    for place in places if accept else []:
        write_sums(place)
    return found


def _states(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders.sort()
        if Path(place).name == "state":
            yield from (Path(place, name) for name in sorted(names) if name.endswith(".safetensors"))


def _state(file: Path) -> State:
    """How a training state compares with the digest in its own metadata; other files of a state have none."""
    try:
        with open_weights(file, error=RunError) as opened:
            told = opened.metadata() or {}
            if "digest" not in told or "stamp" not in told:
                return "unrecorded"
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    except RunError:
        return "changed"  # or cut: no state that was written is unreadable
    texts = (told.get(name, "") for name in ("step", "ema_step", "stamp"))
    return "whole" if digest_tensors(tensors, *texts) == told["digest"] else "changed"
