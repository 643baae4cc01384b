"""Draw the pictures of an exported Halfstep plan with numpy and onnxruntime (or OpenVINO) alone: no PyTorch.

`halfstep export RUN --to onnx --out DIR` writes the folder: program.json (the rows: which graphs they call, and the
sampler as coefficients), a graph for each network that the plan calls, and SHA256SUMS. Image k of a seed begins with
the noise that the pipeline gives it: torch's own generator is made anew here, see `Noise`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

__version__ = "0.1.0"
FORMAT = 1
Array = np.ndarray
Run = Callable[[Mapping[str, Array], Sequence[str]], list[Array]]
"""(inputs by name, names of outputs) -> outputs"""
Memo = dict[tuple[str, str], list[tuple[float, Array]]]


class RunnerError(ValueError):
    """Something that was given does not fit: one line."""


# --------------------------------------------------------------------------------------------------------------- noise


class Noise:
    """The noise of image k of a seed, draw after draw, as the pipeline's `torch.Generator` on the CPU gives it.

    mt19937, 24 bits a uniform number, and Box-Muller on blocks of 16. The numbers agree with torch's but for the last
    bits of a logarithm, a sine and a cosine, which processors have of their own.
    """

    def __init__(self, seed: int, image: int):
        self._random = np.random.RandomState(((seed * 1_000_003 + image) % 2**63) & 0xFFFFFFFF)

    def draw(self, shape: Sequence[int]) -> Array:
        """Unit noise, float32, of 16 numbers or more."""
        size = int(np.prod(shape))
        if size < 16:
            raise RunnerError(f"noise: got a sample of {size} numbers, expected 16 or more; give the noise as a file")
        found = self._uniform(size)
        whole = size - size % 16
        found[:whole] = _normal(found[:whole])
        if size % 16:
            found[-16:] = _normal(self._uniform(16))
        return found.reshape(shape)

    def _uniform(self, count: int) -> Array:
        bits = self._random.randint(0, 2**32, size=count, dtype=np.uint32)
        return (bits & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2.0**-24)


def _normal(uniform: Array) -> Array:
    """Box-Muller: of each 16 numbers the first eight give radii, the others angles."""
    first, second = uniform.reshape(-1, 2, 8).swapaxes(0, 1)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - first))
    angle = np.float32(2 * np.pi) * second
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()


# ------------------------------------------------------------------------------------------------------------ networks


def onnxruntime_graph(file: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda inputs, names: session.run(list(names), dict(inputs))


def openvino_graph(file: Path, threads: int) -> Run:
    try:
        import openvino
    except ImportError:
        raise RunnerError("runtime: got no openvino, expected it installed; pip install openvino") from None
    config = {"INFERENCE_PRECISION_HINT": "f32"} | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
    model = openvino.Core().compile_model(str(file), "CPU", config)

    def run(inputs: Mapping[str, Array], names: Sequence[str]) -> list[Array]:
        found = model(dict(inputs))
        return [np.array(found[name]) for name in names]

    return run


RUNTIMES = {"onnxruntime": onnxruntime_graph, "openvino": openvino_graph}


@dataclass(frozen=True)
class Program:
    """An exported folder. `said`: its program.json."""

    folder: Path
    said: Mapping[str, Any]
    runtime: str = "onnxruntime"
    threads: int = 0

    @classmethod
    def open(cls, folder: str | Path, runtime: str = "", threads: int = 0) -> Program:
        """Read a folder whose files are those that were written. `runtime`: default: what it was exported for;
        `threads`: of a network, 0: the runtime's own choice. Raises RunnerError."""
        folder = Path(folder)
        require_whole(folder)
        said = json.loads((folder / "program.json").read_text())
        if said.get("format") != FORMAT:
            raise RunnerError(f"{folder}: got format {said.get('format')}, expected {FORMAT}; update halfstep-run")
        runtime = runtime or said["runtime"]
        if runtime == "onnxruntime" != said["runtime"]:
            raise RunnerError(f"{folder}: got graphs of OpenVINO, expected ONNX; export --to onnx")
        return cls(folder, said, runtime, threads)

    @property
    def shape(self) -> tuple[int, ...]:
        """[C, H, W] of a sample."""
        return tuple(self.said["sample"])

    @property
    def draws(self) -> int:
        """How many draws of noise an image takes, the first one that it begins with."""
        return 1 + sum(row["draws"] for row in self.said["rows"])

    @cached_property
    def graphs(self) -> dict[str, Run]:
        """The networks, loaded on first use of any."""
        load = RUNTIMES[self.runtime]
        return {name: load(self.folder / one["file"], self.threads) for name, one in self.said["graphs"].items()}

    @cached_property
    def null(self) -> dict[str, Array]:
        """The condition that stands for none, each array [1, ...]; {} where the model has none."""
        file = self.folder / "null.npz"
        return dict(np.load(file, allow_pickle=False)) if file.exists() else {}

    def conditions(
        self, classes: Sequence[str | int] = (), given: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """What images are drawn under, in turn, each array [P, ...]: `given`, or classes by name or number, all of
        them by default. Raises RunnerError."""
        needed, names = self.said["conditions"], self.said["classes"]
        if given is not None:
            if sorted(given) != sorted(needed):
                raise RunnerError(f"conditions: got {sorted(given)}, expected {sorted(needed)}; give these arrays")
            return {name: np.asarray(value) for name, value in given.items()}
        if needed not in ([], ["class_labels"]):
            raise RunnerError(f"conditions: got none, expected {', '.join(needed)}; give --conditions FILE.npz")
        count = self.said["class_count"]
        found = [names.index(one) if one in names else _number(one, count, names) for one in classes]
        return {"class_labels": np.array(found or range(count), dtype=np.int64)} if needed else {}

    def images(
        self, count: int, seed: int = 0, cond: Mapping[str, Array] | None = None, noise: Array | None = None,
        batch: int = 64,
    ) -> Iterator[Array]:  # fmt: skip
        """Images 0 … count - 1 of a seed, as batches [B, H, W, C] in [0, 1]. `noise`: in place of the seed's,
        [N, draws, C, H, W]. Raises RunnerError for pictures that are not finite."""
        cond = self.conditions() if cond is None else cond
        for first in range(0, count, batch):
            members = range(first, min(count, first + batch))
            part = {name: value[[k % len(value) for k in members]] for name, value in cond.items()}
            drawn = self._noise(members, seed) if noise is None else noise[members.start : members.stop]
            sample = trajectory(self, drawn.swapaxes(0, 1), part)
            if self.said["decoder"]:
                [sample] = self.graphs[self.said["decoder"]]({"sample": sample.astype(np.float32)}, ["images"])
            if not np.isfinite(sample).all():
                raise RunnerError(f"{self.folder}: got pictures that are not finite, expected numbers; export again")
            yield (np.clip(sample, -1, 1) / 2 + 0.5).transpose(0, 2, 3, 1)

    def _noise(self, members: Sequence[int], seed: int) -> Array:
        """[B, draws, C, H, W]"""
        each = [Noise(seed, k) for k in members]
        return np.stack([[one.draw(self.shape) for _ in range(self.draws)] for one in each])


def _number(told: str | int, count: int, names: Sequence[str]) -> int:
    text = str(told)
    if text.isdecimal() and int(text) < count:
        return int(text)
    known = ", ".join(names) if names else f"0 to {count - 1}" if count else "none: the model takes no classes"
    raise RunnerError(f"--classes: got {text[:80]!r}, expected {known}; name others")


def require_whole(folder: Path) -> None:
    """Raise RunnerError, which names a file, unless the folder's files are those that SHA256SUMS records."""
    try:
        lines = (folder / "SHA256SUMS").read_text().splitlines()
    except OSError:
        raise RunnerError(f"{folder}: got no SHA256SUMS, expected an exported folder; halfstep export") from None
    for digest, name in (line.split("  ", 1) for line in lines):
        file = folder / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            raise RunnerError(f"{file}: got other bytes than were written, expected its digest; copy the folder again")


# ---------------------------------------------------------------------------------------------------------- trajectory


def trajectory(program: Program, noise: Array, cond: Mapping[str, Array]) -> Array:
    """The sample [B, C, H, W] at the end, from noise [draws, B, C, H, W], the first of which it begins with."""
    said, memo = program.said, Memo()
    samples: list[Array] = [noise[0].astype(np.float64) * said["noise_scale"]]
    used: list[Array] = []
    clipped: list[Array] = []
    null = {name: np.repeat(value, noise.shape[1], axis=0) for name, value in program.null.items()} or cond
    for row in said["rows"]:
        inputs = samples[-1] * row["scale"]
        given = inputs.astype(np.float32)
        found = _called(program, row["own"], row["timestep"], given, cond, memo)
        if row["guide"] is not None:
            other = _called(program, row["guide"], row["timestep"], given, null, memo)
            found = other + row["weight"] * (found - other)
        used.append(_corrected(found.astype(np.float64), inputs, row["corrected"]))
        if row["estimate"] is not None:
            a, b = row["estimate"]
            clipped.append(np.clip(a * samples[-1] + b * used[-1], -said["limit"], said["limit"]))
        parts = (("samples", samples), ("predictions", used), ("noise", noise[1:]), ("clipped", clipped))
        samples.append(sum(weight * values[k] for name, values in parts for k, weight in row[name]))  # type: ignore[arg-type]
    return samples[-1]


def _called(
    program: Program, call: Mapping[str, Any], time: float, sample: Array, cond: Mapping[str, Array], memo: Memo
) -> Array:
    """What a network predicts of a sample, or what is left of it to compute from features of earlier rows."""
    inputs = {"sample": sample, "timestep": np.full(len(sample), time, np.float32), **cond}
    if call["takes"] is not None:
        features = forecast(memo[call["source"], call["takes"]], time, call["order"])
        if call["graph"] is None:
            return features
        return program.graphs[call["graph"]](inputs | {"features": features}, ["prediction"])[0]
    inner = [cut for cut in call["leaves"] if cut != "out"]
    prediction, *kept = program.graphs[call["graph"]](inputs, ["prediction", *(f"cut{cut}" for cut in inner)])
    for cut, features in [*zip(inner, kept, strict=True), *(("out", prediction) for c in call["leaves"] if c == "out")]:
        before = [one for one in memo.get((call["source"], cut), ()) if one[0] != time]
        memo[call["source"], cut] = [*before, (time, features)][-2:]
    return prediction


def forecast(known: Sequence[tuple[float, Array]], time: float, order: int) -> Array:
    """Features at `time`: the last ones, or a straight line through the last two."""
    now, features = known[-1]
    if order == 0 or len(known) == 1:
        return features
    before, others = known[-2]
    return (features + np.float32((time - now) / (now - before)) * (features - others)).astype(np.float32)


def _corrected(prediction: Array, inputs: Array, by: Mapping[str, float] | None) -> Array:
    """The prediction whose noise is scaled and soft-thresholded."""
    if by is None:
        return prediction
    noise = by["sample"] * inputs + by["prediction"] * prediction
    soft = noise - np.clip(noise, -by["threshold"], by["threshold"])
    return prediction + by["slope"] * (by["scale"] * soft - noise)


# -------------------------------------------------------------------------------------------------------- command line


def png(picture: Array) -> bytes:
    """A picture [H, W, 1 or 3] in [0, 1] as a PNG file."""
    height, width, channels = picture.shape
    if channels not in (1, 3):
        raise RunnerError(f"pictures: got {channels} channels, expected 1 or 3; write --out FILE.npy")
    pixels = to_uint8(picture).reshape(height, width * channels)
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels], axis=1).tobytes()
    head = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    told = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(told)


def to_uint8(pictures: Array) -> Array:
    return np.rint(pictures * 255).astype(np.uint8)


def _write(batches: Iterator[Array], out: Path) -> None:
    if out.suffix == ".npy":
        out.parent.mkdir(parents=True, exist_ok=True)
        np.save(out, np.concatenate(list(batches)))
        return
    out.mkdir(parents=True, exist_ok=True)
    done = 0
    for pictures in batches:
        for picture in pictures:
            (out / f"{done:06d}.png").write_bytes(png(picture))
            done += 1


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser("halfstep-run", description="Draw the pictures of an exported Halfstep plan.")
    parser.add_argument("folder", help="what `halfstep export` wrote")
    parser.add_argument("--count", type=int, default=16, help="how many images (16)")
    parser.add_argument("--out", type=Path, default=Path("pictures"), help="a folder of PNGs, or FILE.npy (pictures)")
    parser.add_argument("--seed", type=int, default=0, help="image k depends on the seed and k alone (0)")
    parser.add_argument("--classes", nargs="*", default=(), help="names or numbers, drawn in turn (all)")
    parser.add_argument("--conditions", help="FILE.npz of what the networks take beside, each array [P, ...]")
    parser.add_argument("--noise", help="FILE.npy [N, draws, C, H, W] in place of the seed's")
    parser.add_argument("--batch", type=int, default=64, help="images at a time (64); not what they are")
    parser.add_argument("--threads", type=int, default=0, help="of a network (the runtime's choice)")
    parser.add_argument("--runtime", choices=sorted(RUNTIMES), default="", help="what runs the graphs")
    return parser.parse_args()


def _draw(asked: argparse.Namespace) -> None:
    program = Program.open(asked.folder, asked.runtime, asked.threads)
    given = None if asked.conditions is None else dict(np.load(asked.conditions, allow_pickle=False))
    cond = program.conditions(asked.classes, given)
    if min(asked.count, asked.batch) < 1:
        raise RunnerError(f"--count, --batch: got {min(asked.count, asked.batch)}, expected 1 or more; draw some")
    noise = None
    if asked.noise is not None:
        noise, wanted = np.load(asked.noise, allow_pickle=False), (program.draws, *program.shape)
        if noise.shape[1:] != wanted or len(noise) < asked.count:
            expected = f"[{asked.count} or more, {', '.join(map(str, wanted))}]"
            raise RunnerError(f"{asked.noise}: got noise of {list(noise.shape)}, expected {expected}; give that")
    _write(program.images(asked.count, asked.seed, cond, noise, asked.batch), asked.out)


def main() -> None:
    """The command: errors are one line and exit code 2."""
    try:
        _draw(_asked())
    except (RunnerError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
