"""Films: how a few pictures come about, from noise to clean, as the sampling loop yields them; kept as films.npz."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from halfstep.core.errors import RunError
from halfstep.core.plan import StepPlan
from halfstep.data.arrays import read_arrays, save_arrays
from halfstep.data.classes import in_turn
from halfstep.data.latents import decode
from halfstep.data.pictures import to_uint8
from halfstep.engine.bank import Bank
from halfstep.engine.conditions import Conditions, cond_for
from halfstep.engine.sampling import image_generators, start_noise, to_images, trajectory
from halfstep.nets.denoiser import Cond, class_count

FILMED, FRAMES, DECODED = 4, 25, 9
"""Of a run's films: pictures that are followed, and frames of each at most, the noise with them; of latents fewer, as
each is decoded."""
SIDE = 128
"""Pixels of a frame's longer side at most; larger ones are kept smaller, by the mean."""
MOST_BYTES, MOST_LETTERS = 1 << 26, 300
"""Of all films of a run, unpacked; of what is told of a picture."""


@dataclass(frozen=True)
class Film:
    """Pictures of one noise under one plan. `frames`: uint8 [T, N, C, H, W], first the noise, last the finished
    pictures. By frame, [T]: the one of the `rows` that ran last (-1: none yet) of `of`, its `timesteps`, and the entry
    that `ran` there. Nothing of it hangs on how fast a machine is."""

    frames: np.ndarray
    rows: np.ndarray
    timesteps: np.ndarray
    ran: np.ndarray
    of: int


def moments(
    bank: Bank, plan: StepPlan, noise: torch.Tensor, generators: Sequence[torch.Generator], cond: Cond, most: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(row, pictures uint8 [N, C, H, W]): -1 and the noise, then the sample after each row, the last one the finished
    pictures. Of more rows than `most` frames can show, those between are thinned evenly.

    Samples of more than unit variance, as some samplers hold them, are scaled down to it to be seen; latents are
    decoded. Raises ModelError for finished pictures that are not finite.
    """
    kept = set(_thinned(len(plan.rows), most - 1))
    yield -1, _seen(bank, noise)
    for step in trajectory(bank, plan, noise, generators, cond):
        if step.row == len(plan.rows) - 1:
            yield step.row, to_uint8(to_images(bank, step.after))
        elif step.row in kept:
            yield step.row, _seen(bank, step.after)


def _thinned(count: int, most: int) -> list[int]:
    """At most so many of `count` rows, evenly, the last one always."""
    return [round(count * k / min(count, most)) - 1 for k in range(1, min(count, most) + 1)]


@torch.inference_mode()
def _seen(bank: Bank, sample: torch.Tensor) -> np.ndarray:
    """A sample on its way as pictures, uint8; what a VAE makes of noise need not be finite, and is grey then."""
    scaled = sample / sample.flatten(1).std(dim=1).clamp(min=1).view(-1, 1, 1, 1)
    return to_uint8((scaled if bank.vae is None else decode(bank.vae, scaled)).float().nan_to_num(0.0, 1.0, -1.0))


def film(bank: Bank, plan: StepPlan, *, seed: int, conditions: Conditions | None, count: int = FILMED) -> Film:
    """The first `count` pictures of a seed under a plan, one after another: what runs the bank is settled for one."""
    most = FRAMES if bank.vae is None else DECODED
    drawn: list[list[np.ndarray]] = []
    rows: list[int] = []
    for k in range(count):
        generators = image_generators(seed, k, 1)
        noise, cond = start_noise(bank, generators), cond_for(bank, k, 1, conditions)
        found = list(moments(bank, plan, noise, generators, cond, most))
        rows = [row for row, _ in found]
        drawn.append([_smaller(pictures[0]) for _, pictures in found])
    return Film(
        frames=np.stack(drawn, axis=1),
        rows=np.array(rows),
        timesteps=np.array([plan.rows[max(row, 0)].timestep for row in rows]),
        ran=np.array(["" if row < 0 else plan.rows[row].entry for row in rows]),
        of=len(plan.rows),
    )


def _smaller(picture: np.ndarray) -> np.ndarray:
    """A picture uint8 [C, H, W] of at most `SIDE` pixels a side: blocks of whole pixels by their mean."""
    by = -(-max(picture.shape[1:]) // SIDE)
    channels, height, width = picture.shape[0], picture.shape[1] // by, picture.shape[2] // by
    blocks = picture[:, : height * by, : width * by].reshape(channels, height, by, width, by)
    return blocks.mean(axis=(2, 4)).round().astype(np.uint8) if by > 1 else picture


def pictured(bank: Bank, conditions: Conditions | None, count: int) -> tuple[str, ...]:
    """What each of the first `count` pictures of a seed is of: its prompt, its class; "" where nothing is asked for."""
    classes = class_count(bank.config)
    if conditions is None and not classes:
        return ("",) * count
    labels = tuple(range(classes or 0)) if conditions is None else conditions.labels
    told = () if conditions is None else conditions.told
    found = []
    for k in range(count):
        if conditions is not None and told:
            found.append(told[in_turn(conditions.order, k)])
        elif labels:
            label = in_turn(labels, k)
            found.append(bank.classes[label] if bank.classes else f"class {label}")
        else:
            found.append("")
    return tuple(one[:MOST_LETTERS] for one in found)


# ------------------------------------------------------------------------------------------------------------- on disk

_ARRAYS = ("frames", "rows", "timesteps", "ran")


def save_films(path: Path, films: Mapping[str, Film], told: Sequence[str]) -> None:
    """Films by the name of their plan, and what each picture is of."""
    arrays = {f"{name}|{kind}": getattr(one, kind) for name, one in films.items() for kind in _ARRAYS}
    arrays |= {f"{name}|of": np.array([one.of]) for name, one in films.items()}
    save_arrays(path, arrays | {"pictured": np.array(told, dtype=f"<U{MOST_LETTERS}")})


def read_films(file: Path, do: str) -> tuple[dict[str, Film], tuple[str, ...]]:
    """What `save_films` wrote. Raises RunError for anything else."""
    what = "films, uint8 [frames, pictures, channels, height, width] with what ran before each"
    found = read_arrays(file, MOST_BYTES, what=what, do=do)
    told = found.pop("pictured", np.zeros(0))
    names = dict.fromkeys(key.rpartition("|")[0] for key in found)
    try:
        films = {name: _film_of({kind: found[f"{name}|{kind}"] for kind in (*_ARRAYS, "of")}) for name in names}
    except (KeyError, ValueError) as error:
        raise RunError(got=f"a film that is not whole ({error})", expected=what, where=file, do=do) from error
    shapes = {one.frames.shape[1:] for one in films.values()}
    if len(shapes) != 1 or told.dtype.kind != "U" or told.shape != next(iter(shapes))[:1]:
        raise RunError(got="films of several shapes, or of none", expected=what, where=file, do=do)
    return films, tuple(str(one)[:MOST_LETTERS] for one in told)


def _film_of(arrays: dict[str, np.ndarray]) -> Film:
    """Raises ValueError."""
    frames, rows, timesteps, ran = (arrays[kind] for kind in _ARRAYS)
    of, shape = arrays["of"], frames.shape
    is_whole = (
        frames.dtype == np.uint8
        and len(shape) == 5
        and shape[0] > 1
        and shape[2] in (1, 3)
        and 0 not in shape
        and {one.shape for one in (rows, timesteps, ran)} == {shape[:1]}
        and (rows.dtype.kind, timesteps.dtype.kind, ran.dtype.kind) == ("i", "f", "U")
        and of.shape == (1,)
        and of.dtype.kind == "i"
    )
    if not is_whole or not _is_in_order(rows, int(of[0])) or not np.isfinite(timesteps).all():
        raise ValueError(f"frames {frames.dtype} {list(shape)}")
    return Film(frames, rows, timesteps, ran, int(of[0]))


def _is_in_order(rows: np.ndarray, of: int) -> bool:
    """Whether frames go from the noise to the last row."""
    return bool((np.diff(rows) > 0).all()) and rows[0] == -1 and rows[-1] == of - 1
