"""Hostile inputs at the command line: each ends with exit code 2 and one line, soon, in bounded memory.

A refused command leaves no file in its `--out`, so that the corrected one is not refused in its turn.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import traceback
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_mutations import EDITS, Stop, build_bank, build_before, build_optimized, net

from caged import Hung, caged, limits
from halfstep.app import cli, verbs
from halfstep.app.options import Common
from halfstep.core.errors import HalfstepError
from halfstep.core.sums import FILE as SUMS
from halfstep.core.sums import write_sums


def seal(home: Path) -> None:
    """Write the digests anew: whoever ships a hostile pipeline ships digests that fit it."""
    for file in home.rglob(SUMS):
        write_sums(file.parent)


Change = Callable[[Path], object]
"""What makes a good folder (`bank`, `before`, `dense`, `run`, `half`) hostile."""


def some(table: Mapping[str, object]) -> list:
    """The cases of a table by name: one in eight always runs, all of them in CI."""
    return [pytest.param(name, marks=[] if i % 8 == 0 else pytest.mark.slow) for i, name in enumerate(table)]


def halfstep(*words: str) -> tuple[int, str]:
    """The command line in this process: exit code and everything that it printed."""
    told = io.StringIO()
    code: Any = 0
    before = sys.argv
    sys.argv = ["halfstep", *words]
    cli.console.file = cli.notes.file = told
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            cli.main()
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        sys.argv = before
    return code, told.getvalue()


def refusal(words: list[str], out: Path | None = None) -> str:
    """ "" where a command is refused as it must be, else what it did."""
    try:
        with limits():
            code, told = halfstep(*words)
    except Hung:
        return "hung: " + "".join(traceback.format_exc().splitlines(True)[-6:])
    except BaseException as error:
        lines = [line.strip() for line in traceback.format_exc().splitlines() if "halfstep/" in line][-2:]
        return f"{type(error).__name__}: {str(error)[:200]} ({'; '.join(lines)})"
    if code != 2:
        return f"exit {code}: {told[-300:]}"
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    usage = "Usage: " in told
    if "Traceback" in told or (len(errors) != 1 and not usage):
        return f"not one line: {told[-600:]}"
    if errors and (len(errors[0]) > 1500 or not errors[0].isprintable()):
        return f"a line of {len(errors[0])} characters: {errors[0][:200]!r}"
    if errors and not told.rstrip().endswith(errors[0]):
        return f"more after the line: {told[-300:]}"
    left = [str(f.relative_to(out)) for f in out.rglob("*") if not f.is_dir()] if out and out.is_dir() else []
    return f"left behind: {left}" if left else ""


def require_refusal(words: list[str], out: Path | None = None) -> None:
    found = caged([0], lambda _: refusal(words, out))[0]
    told = "the process died" if found is None else found
    assert not told, f"{told}  <-  halfstep {' '.join(words)[:300]}"


# ------------------------------------------------------------------------------------------------------ good folders


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """Folders as they should be: `bank`, `before` (as format 1 had one), `dense`, `half` (a training that was stopped),
    `pictures`."""
    home = tmp_path_factory.mktemp("good")
    os.environ["HALFSTEP_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    build_bank(home / "bank")
    build_before(home / "before")
    DDPMPipeline(net(), DDPMScheduler()).save_pretrained(home / "dense")
    with contextlib.suppress(KeyboardInterrupt):
        verbs.train(
            "digits", home / "half", Common(edits=EDITS.split()).recipe_for("digits", dense=True), watch=Stop(2)
        )
    (home / "pictures").mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(home / "pictures" / f"{i}.png")
    return home


@pytest.fixture
def place(good, tmp_path, monkeypatch) -> Path:
    """A copy of the good folders, to be made hostile; the working folder of the command."""
    home = tmp_path / "home"
    shutil.copytree(good, home)
    monkeypatch.chdir(home)
    return home


def edited(file: str, **changes: Any) -> Change:
    """Fields of a JSON file replaced; a value of ... drops the field."""

    def change(home: Path) -> None:
        record = json.loads((home / file).read_text())
        record |= changes
        text = json.dumps({k: v for k, v in record.items() if v is not ...})
        (home / file).write_text(text)

    return change


def written(file: str, content: str | bytes) -> Change:
    def change(home: Path) -> None:
        path = home / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def piped(file: str) -> Change:
    def change(home: Path) -> None:
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).unlink(missing_ok=True)
        os.mkfifo(home / file)

    return change


# --------------------------------------------------------------------------------------------------------------- data


def zeros_gz(count: int) -> bytes:
    """Zeros as gzip, in members of 64 MiB that are compressed once: a bomb of gigabytes in milliseconds."""
    one = gzip.compress(bytes(1 << 26), 1)
    return one * (count >> 26)


def idx_bomb(home: Path) -> None:
    count = 8 << 30
    head = struct.pack(">IIII", 0x803, count >> 20, 1024, 1024)
    folder = home / "bomb"
    folder.mkdir()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(head) + zeros_gz(count))


def idx_lie(home: Path) -> None:
    (home / "bomb").mkdir()
    head = struct.pack(">IIII", 0x803, 2**32 - 1, 2**32 - 1, 2**32 - 1)
    (home / "bomb" / "train-images-idx3-ubyte").write_bytes(head + bytes(64))


def npz_bomb(home: Path) -> None:
    """A member of 8 GB of zeros, and a header that says so."""
    head = io.BytesIO()
    shape = (8 << 10, 1024, 1024)
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": shape})
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = packer.compress(head.getvalue()) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(1 << 26)) + packer.flush(zlib.Z_FULL_FLUSH)
    body = first + block * 128 + packer.flush()
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("images.npy", body)  # stored: then the entry is told to be deflated
    raw = bytearray(whole.getvalue())
    size = len(head.getvalue()) + (8 << 30)
    for mark, method, sizes in ((b"PK\x03\x04", 8, 18), (b"PK\x01\x02", 10, 20)):
        at = raw.rindex(mark) if mark == b"PK\x01\x02" else raw.index(mark)
        raw[at + method : at + method + 2] = struct.pack("<H", 8)
        raw[at + sizes : at + sizes + 8] = struct.pack("<II", len(body), min(size, 2**32 - 2))
    (home / "bomb.npz").write_bytes(raw)


def npz_lie(home: Path) -> None:
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 3, 256, 256)})
    with zipfile.ZipFile(home / "lie.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", head.getvalue() + bytes(64))


def npz_objects(home: Path) -> None:
    np.savez(home / "objects.npz", images=np.array([{"a": 1}] * 4, dtype=object))


def tar_bomb(home: Path) -> None:
    """One text file of 64 GB between the pictures."""
    member = tarfile.TarInfo("readme.txt")
    member.size = 64 << 30
    head = member.tobuf(tarfile.GNU_FORMAT)
    (home / "bomb.tar.gz").write_bytes(gzip.compress(head) + zeros_gz(64 << 30))


def tar_of_a_bomb(home: Path) -> None:
    with tarfile.open(home / "bomb.tar", "w") as tar:
        content = png_of(60_000, 60_000)
        member = tarfile.TarInfo("a.png")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header claims a size and whose pixels are missing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def bad_name(home: Path) -> None:
    (home / "odd").mkdir()
    good = (home / "pictures" / "0.png").read_bytes()
    with open(os.fsencode(home / "odd") + b"/\xff\xfe.png", "wb") as file:
        file.write(good[: len(good) // 2])


def loop(home: Path) -> None:
    (home / "pictures" / "again").symlink_to("..")


TRAIN = ["train", "--out", "out", "--set", "train.steps=1", "--set", "train.batch=2", "--set", "model.channels=8,16"]
TRAIN += ["--set", "model.groups=4", "--set", "model.head_dim=8"]
DATA: dict[str, tuple[Change, str]] = {
    "an idx file of 8 GB of zeros in gzip": (idx_bomb, "idx:bomb"),
    "an idx header that claims 2**96 bytes": (idx_lie, "idx:bomb"),
    "a pipe as idx file": (piped("bomb/train-images-idx3-ubyte"), "idx:bomb"),
    "an npz of 8 GB of zeros": (npz_bomb, "npz:bomb.npz"),
    "an npz header that claims 200 GB": (npz_lie, "npz:lie.npz"),
    "an npz of objects": (npz_objects, "npz:objects.npz"),
    "a pipe as npz": (piped("x.npz"), "npz:x.npz"),
    "a tar.gz of 64 GB": (tar_bomb, "tar:bomb.tar.gz"),
    "a tar with a picture of 3.6 gigapixels": (tar_of_a_bomb, "tar:bomb.tar"),
    "a pipe as tar": (piped("x.tar"), "tar:x.tar"),
    "a picture of 3.6 gigapixels": (written("pictures/x.png", png_of(60_000, 60_000)), "folder:pictures"),
    "a picture of 2**31 pixels a side": (written("pictures/x.png", png_of(2**31 - 1, 2**31 - 1)), "folder:pictures"),
    "a picture of no pixels": (written("pictures/x.png", png_of(0, 0)), "folder:pictures"),
    "a pipe in a picture folder": (piped("pictures/x.png"), "folder:pictures"),
    "a pipe beside pictures": (piped("pictures/notes"), "folder:pictures"),
    "a loop of links": (loop, "folder:pictures"),
    "a cut picture whose name is no UTF-8": (bad_name, "folder:odd"),
    "a path with a NUL": (lambda home: None, "folder:a\0b"),
    "a path of 5,000 characters": (lambda home: None, "folder:" + "x" * 5000),
    "an npz path of 5,000 characters": (lambda home: None, "npz:" + "x" * 5000),
    "a tar path with a NUL": (lambda home: None, "tar:a\0b"),
    "an idx path with a NUL": (lambda home: None, "idx:a\0b"),
    "a scheme that is none": (lambda home: None, "ftp:x"),
    "no source": (lambda home: None, ""),
    "/dev/zero as npz": (lambda home: None, "npz:/dev/zero"),
    "/dev/zero as tar": (lambda home: None, "tar:/dev/zero"),
}


@pytest.mark.parametrize("name", some(DATA))
def test_hostile_data_is_refused(name, place):
    change, source = DATA[name]
    change(place)
    require_refusal([*TRAIN, "--data", source, "--set", "data.size=8"], place / "out")


# ------------------------------------------------------------------------------------------------------------- models


def weights_header(file: str, **fields: Any) -> Change:
    """The header of a safetensors file with other tensors, the weights as they are."""

    def change(home: Path) -> None:
        content = (home / file).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length]) | fields
        raw = json.dumps(header).encode()
        (home / file).write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + length :])

    return change


def long_header(file: str) -> Change:
    def change(home: Path) -> None:
        (home / file).write_bytes((90 << 20).to_bytes(8, "little") + b"{")
        os.truncate(home / file, (90 << 20) + 4096)

    return change


def spaces_header(file: str) -> Change:
    """90 MB of tensors of no elements: a header that is valid."""

    def change(home: Path) -> None:
        one = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        raw = json.dumps({f"{i:060d}": one for i in range(600_000)}).encode()
        (home / file).write_bytes(len(raw).to_bytes(8, "little") + raw)

    return change


def slices_of(change: Callable[[dict], object], entry: str = "w0.50") -> Change:
    def changed(home: Path) -> None:
        for top, name in (("bank", "entry.json"), ("before", "slices.json")):
            file = home / top / "bank" / entry / name
            record = json.loads(file.read_text())
            change(record["weights"] if top == "bank" else record)
            file.write_text(json.dumps(record))

    return changed


def mask_of(change: Callable[[dict], object]) -> Change:
    def changed(home: Path) -> None:
        for top, name in (("bank", "entry.json"), ("before", "mask.json")):
            file = home / top / "bank" / "2of4" / name
            record = json.loads(file.read_text())
            change(record["masking"] if top == "bank" else record)
            file.write_text(json.dumps(record))

    return changed


def pieces(value: Any) -> Change:
    def change(record: dict) -> None:
        name = next(iter(record["slices"]))
        record["slices"][name] = value

    return slices_of(change)


def entry_named(name: str) -> Change:
    """The entry w0.50 under another name, in bank.json and plan.json."""

    def change(home: Path) -> None:
        for file in ("bank/bank.json", "plan.json"):
            path = home / "bank" / file
            path.write_text(path.read_text().replace('"w0.50"', json.dumps(name)))

    return change


def many_entries(home: Path) -> None:
    record = json.loads((home / "bank/bank/bank.json").read_text())
    record["entries"] += [f"e{i}" for i in range(100_000)]
    (home / "bank/bank/bank.json").write_text(json.dumps(record))


def many_rows(home: Path) -> None:
    record = json.loads((home / "bank/plan.json").read_text())
    record["rows"] *= 500_000
    (home / "bank/plan.json").write_text(json.dumps(record))


def sampled(name: str, steps: int, **config: Any) -> Change:
    return edited("bank/plan.json", sampler={"name": name, "config": config, "steps": steps})


UNET, SCHEDULER = "dense/unet/config.json", "dense/scheduler/scheduler_config.json"
WEIGHTS = "dense/unet/diffusion_pytorch_model.safetensors"
FULL = "bank/bank/full/config.json"
DENSE, BANK = (
    ["profile", "--repeats", "1", "--model", "dense"],
    ["sample", "--count", "1", "--out", "out", "--model", "bank"],
)
NOISE = ["spectrum", "--images", "4", "--timestep", "5", "--data", "digits", "--out", "out", "--model", "dense"]
TENSOR = {"dtype": "F32", "shape": [10**11], "data_offsets": [0, 4 * 10**11]}
MODELS: dict[str, tuple[Change, list[str]]] = {
    "channels of a million": (edited(UNET, block_out_channels=[1000000, 1000000]), DENSE),
    "ten thousand levels": (edited(UNET, block_out_channels=[8] * 10_000), DENSE),
    "a million layers": (edited(UNET, layers_per_block=10**6), DENSE),
    "10**12 layers": (edited(UNET, layers_per_block=10**12), DENSE),
    "a billion classes": (edited(UNET, num_class_embeds=10**9), DENSE),
    "negative classes": (edited(UNET, num_class_embeds=-3), DENSE),
    "a sample size of a million": (edited(UNET, sample_size=10**6), DENSE),
    "a sample size of [10**6, 3]": (edited(UNET, sample_size=[10**6, 3]), DENSE),
    "a sample size of zero": (edited(UNET, sample_size=0), DENSE),
    "a sample size that is a text": (edited(UNET, sample_size="large"), DENSE),
    "no sample size": (edited(UNET, sample_size=None), DENSE),
    "10**9 input channels": (edited(UNET, in_channels=10**9), DENSE),
    "10**12 training timesteps": (edited(SCHEDULER, num_train_timesteps=10**12), NOISE),
    "no training timesteps": (edited(SCHEDULER, num_train_timesteps=0), NOISE),
    "-5 training timesteps": (edited(SCHEDULER, num_train_timesteps=-5), NOISE),
    "a million trained betas": (edited(SCHEDULER, trained_betas=[0.1] * 10**6), NOISE),
    "a scheduler config that is a list": (written(SCHEDULER, "[1, 2]"), NOISE),
    "a scheduler config that is no JSON": (written(SCHEDULER, "{"), NOISE),
    "a config 100,000 deep": (written(UNET, "[" * 100_000 + "]" * 100_000), DENSE),
    "a config with an integer of 5,000 digits": (written(UNET, '{"_class_name": ' + "9" * 5000 + "}"), DENSE),
    "a config that is no UTF-8": (written(UNET, b'{"a": "\xff"}'), DENSE),
    "a config that is a pipe": (piped(UNET), DENSE),
    "weights that are a pipe": (piped(WEIGHTS), DENSE),
    "a safetensors header of 90 MB, a hole": (long_header(WEIGHTS), DENSE),
    "a safetensors header of 600,000 tensors": (spaces_header(WEIGHTS), DENSE),
    "a tensor of 400 GB": (weights_header(WEIGHTS, **{"conv_in.weight": TENSOR}), DENSE),
    "weights that are a Git LFS pointer": (written(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"), DENSE),
    "a bank of 100,000 entries": (many_entries, BANK),
    "a bank whose entries are a text": (edited("bank/bank/bank.json", entries="full"), BANK),
    "a bank whose entries are numbers": (edited("bank/bank/bank.json", entries=[1, 2]), BANK),
    "a bank without entries": (edited("bank/bank/bank.json", entries=[]), BANK),
    "a bank that names an entry twice": (edited("bank/bank/bank.json", entries=["full", "full"]), BANK),
    "a bank that is an empty object": (written("bank/bank/bank.json", "{}"), BANK),
    "a bank of a later format": (edited("bank/bank/bank.json", format=99), BANK),
    "an entry ..": (entry_named(".."), BANK),
    "an entry ../../stolen": (entry_named("../../stolen"), BANK),
    "an absolute entry": (entry_named("/tmp/stolen"), BANK),
    "an entry with a NUL": (entry_named("a\0b"), BANK),
    "an entry of 5,000 characters": (entry_named("x" * 5000), BANK),
    "an entry without a name": (entry_named(""), BANK),
    "an entry of a line break": (entry_named("a\nb"), BANK),
    "an entry that is another's folder": (entry_named("2of4"), BANK),
    "slices of themselves": (slices_of(lambda r: r.update(of="w0.50")), BANK),
    "slices of an unknown entry": (slices_of(lambda r: r.update(of="nowhere")), BANK),
    "slices of a list": (slices_of(lambda r: r.update(of=["full"])), BANK),
    "slices that are empty": (slices_of(lambda r: r.update(slices={})), BANK),
    "slices that are a list": (slices_of(lambda r: r.update(slices=[1])), BANK),
    "pieces out of range": (pieces([[[0, 10**9]]]), BANK),
    "pieces from a negative place": (pieces([[[-4, 8]]]), BANK),
    "pieces of no length": (pieces([[[0, 0]]]), BANK),
    "no pieces": (pieces([[]]), BANK),
    "more dimensions than the tensor": (pieces([[[0, 8]]] * 9), BANK),
    "pieces of texts": (pieces([[["a", "b"]]]), BANK),
    "a piece repeated 10**6 times": (pieces([[[0, 8]] * 10**6]), BANK),
    "a mask of unknown weights": (mask_of(lambda r: r.update(names=["nothing.weight"])), BANK),
    "a mask of no weights": (mask_of(lambda r: r.update(names=[])), BANK),
    "a mask 999:1": (mask_of(lambda r: r.update(pattern="999:1")), BANK),
    "a mask that is a number": (mask_of(lambda r: r.update(pattern=3)), BANK),
    "an entry of no kind": (edited("bank/bank/full/entry.json", weights={}), BANK),
    "an entry of an unknown kind": (edited("bank/bank/full/entry.json", weights={"kind": "os.system"}), BANK),
    "an entry whose kind is a list": (edited("bank/bank/full/entry.json", weights={"kind": ["own"]}), BANK),
    "an entry whose weights are a text": (edited("bank/bank/full/entry.json", weights="own"), BANK),
    "an entry with a foreign field": (edited("bank/bank/full/entry.json", script="x"), BANK),
    "weights of their own, of another": (
        edited("bank/bank/full/entry.json", weights={"kind": "own", "of": "w1.00"}),
        BANK,
    ),
    "an entry of a later format": (edited("bank/bank/full/entry.json", format=2), BANK),
    "an entry that is a pipe": (piped("bank/bank/full/entry.json"), BANK),
    "a plan of 1,500,000 rows": (many_rows, BANK),
    "a plan of no rows": (edited("bank/plan.json", rows=[]), BANK),
    "a plan of 10**9 steps": (sampled("DDIMScheduler", 10**9), BANK),
    "a plan of -1 steps": (sampled("DDIMScheduler", -1), BANK),
    "a plan whose scheduler is a function": (sampled("logging", 3), BANK),
    "a plan whose scheduler is a model": (sampled("UNet2DModel", 3), BANK),
    "a plan whose reference costs nothing": (
        edited("bank/plan.json", prices={n: {"macs": 0} for n in ("full", "w1.00", "w0.50", "2:4")}),
        BANK,
    ),
    "a plan whose scheduler's training had 10**12 steps": (
        sampled("DDIMScheduler", 3, num_train_timesteps=10**12),
        BANK,
    ),
    "an index that is a list": (written("bank/model_index.json", "[]"), BANK),
    "a reference of a million channels": (edited(FULL, block_out_channels=[10**6, 10**6]), BANK),
}


@pytest.mark.parametrize("name", some(MODELS))
def test_hostile_models_are_refused(name, place):
    change, words = MODELS[name]
    change(place)
    seal(place)
    require_refusal(words, place / "out")


LINKS = ("slices ", "pieces ", "no pieces", "more dimensions", "a piece ", "a mask ")


@pytest.mark.parametrize("name", some({name: MODELS[name] for name in MODELS if name.startswith(LINKS)}))
def test_hostile_links_and_masks_of_a_bank_of_before_are_refused_too(name, place):
    MODELS[name][0](place)
    seal(place)
    require_refusal([*BANK[:-1], "before"], place / "out")


# -------------------------------------------------------------------------------------------------- runs and pictures


def state_with(step: str | None, cut: bool = False) -> Change:
    def change(home: Path) -> None:
        file = home / "half" / "state" / "train.safetensors"
        with safe_open(file, "pt") as opened:
            meta = dict(opened.metadata())
        meta = {k: v for k, v in meta.items() if k != "step"} | ({} if step is None else {"step": step})
        tensors = load_file(file)
        if cut:
            tensors = {k: v[..., :1].clone() if v.ndim else v for k, v in tensors.items()}
        save_file(tensors, file, metadata=meta)

    return change


RESUMED = ["train", "--data", "digits", "--out", "half", *(word for edit in EDITS.split() for word in ("--set", edit))]
STATE = "half/state/train.safetensors"
DENOISE = ["denoise", "--model", "dense", "--out", "out", "--image"]
RESUMES: dict[str, tuple[Change, list[str]]] = {
    "a state at step -5": (state_with("-5"), RESUMED),
    "a state at step 10**30": (state_with("1" + "0" * 30), RESUMED),
    "a state at step 1.5": (state_with("1.5"), RESUMED),
    "a state without a step": (state_with(None), RESUMED),
    "a state of another shape": (state_with("1", cut=True), RESUMED),
    "a state with a header of 90 MB": (long_header(STATE), RESUMED),
    "a state that is a pipe": (piped(STATE), RESUMED),
    "a state that is empty": (written(STATE, ""), RESUMED),
    "a recipe.json that is a list": (written("half/recipe.json", "[]"), RESUMED),
    "a recipe.json 100,000 deep": (written("half/recipe.json", '{"a":' * 10**5 + "1" + "}" * 10**5), RESUMED),
    "a recipe.json that is empty": (written("half/recipe.json", "{}"), RESUMED),
    "a recipe.json whose inputs are a list": (edited("half/recipe.json", inputs=[1]), RESUMED),
    "a recipe.json that is no UTF-8": (written("half/recipe.json", b"\xff{}"), RESUMED),
    "a recipe.json that is a pipe": (piped("half/recipe.json"), RESUMED),
}
PICTURES: dict[str, tuple[Change, list[str]]] = {
    "a decompression bomb": (written("x.png", png_of(60_000, 60_000)), [*DENOISE, "x.png"]),
    "a picture of 2**31 pixels a side": (written("x.png", png_of(2**31 - 1, 2**31 - 1)), [*DENOISE, "x.png"]),
    "a pipe": (piped("x.png"), [*DENOISE, "x.png"]),
    "a folder": (lambda home: None, [*DENOISE, "pictures"]),
    "no such picture": (lambda home: None, [*DENOISE, "nothing.png"]),
    "a text": (written("x.png", "hello"), [*DENOISE, "x.png"]),
    "an empty file": (written("x.png", ""), [*DENOISE, "x.png"]),
    "/dev/zero": (lambda home: None, [*DENOISE, "/dev/zero"]),
    "a name with a NUL": (lambda home: None, [*DENOISE, "a\0b.png"]),
    "a name of 5,000 characters": (lambda home: None, [*DENOISE, "x" * 5000]),
}


@pytest.mark.parametrize("name", some(RESUMES))
def test_hostile_states_are_refused(name, place):
    change, words = RESUMES[name]
    change(place)
    require_refusal(words)


@pytest.mark.parametrize("name", some(PICTURES))
def test_hostile_pictures_are_refused(name, place):
    change, words = PICTURES[name]
    change(place)
    require_refusal(words, place / "out")


def npz_with(kind: str) -> Change:
    def change(home: Path) -> None:
        file = home / "pictures.npz"
        with np.load(file) as loaded:
            arrays: dict[str, Any] = {name: loaded[name] for name in loaded.files}
        if kind == "objects":
            arrays["plan"] = np.array([{"a": 1}], dtype=object)
        elif kind == "missing":
            del arrays["plan"]
        elif kind == "flat":
            arrays["plan"] = arrays["plan"].reshape(-1)
        elif kind == "none":
            arrays["plan"] = arrays["plan"][:0]
        elif kind == "floats":
            arrays["plan"] = arrays["plan"] / 7.0
        np.savez(file, **arrays)

    return change


def cut(file: str, share: float) -> Change:
    def change(home: Path) -> None:
        content = (home / file).read_bytes()
        (home / file).write_bytes(content[: int(len(content) * share)])

    return change


def bomb_of_pictures(home: Path) -> None:
    npz_bomb(home)
    (home / "bomb.npz").rename(home / "pictures.npz")


REPORTS: dict[str, Change] = {
    "pictures cut": cut("pictures.npz", 0.5),
    "pictures empty": written("pictures.npz", ""),
    "pictures that are objects": npz_with("objects"),
    "no pictures of the plan": npz_with("missing"),
    "pictures of one dimension": npz_with("flat"),
    "pictures of no pictures": npz_with("none"),
    "pictures that are a bomb": bomb_of_pictures,
    "pictures that are a pipe": piped("pictures.npz"),
    "films cut": cut("films.npz", 0.5),
    "films empty": written("films.npz", ""),
    "films that are a pipe": piped("films.npz"),
    "a quality of no plans": edited("quality.json", plans={}),
    "a quality that is a list": edited("quality.json", plans=[1]),
    "a quality 100,000 deep": written("quality.json", '{"a":' * 10**5 + "1" + "}" * 10**5),
    "costs that are empty": written("cost.json", "{}"),
    "costs that are numbers": written("cost.json", '{"full": 3}'),
    "costs with a foreign field": written("cost.json", '{"full": {"macs": 1, "params": 1, "x": 1}}'),
    "errors that are empty": written("errors.json", "{}"),
    "errors of texts": edited("errors.json", local="x"),
    "a search of numbers": written("scores.jsonl", "1\n2\n"),
    "a search that is no UTF-8": written("scores.jsonl", b'{"stage": "\xff"}\n'),
    "a search of other records": written("scores.jsonl", '{"a": 1}\n'),
    "a log of numbers": written("log.jsonl", "1\n2\n"),
    "a log that is no UTF-8": written("log.jsonl", b'{"tag": "\xff", "step": 1, "loss": 1}\n'),
    "a recipe without a recipe": written("recipe.json", "{}"),
    "a plan that is a pipe": piped("plan.json"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("finished")
    os.environ["HALFSTEP_DENSE"] = str(home / "dense")
    (home / "run").mkdir()
    build_optimized(home / "run")
    return home / "run"


@pytest.mark.slow
@pytest.mark.parametrize("name", REPORTS)
def test_reports_of_hostile_runs_are_refused(name, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    REPORTS[name](tmp_path / "run")
    require_refusal(["report", str(tmp_path / "run")])


# ------------------------------------------------------------------------------------------------ options and edits

SOME = ["--model", "dense", "--data", "digits", "--out", "out"]
_OPTIONS: list[list[str]] = [
    ["sample", "--model", "bank", "--out", "out", "--count", "1000000000000"],
    ["sample", "--model", "bank", "--out", "out", "--count", "0"],
    ["sample", "--model", "bank", "--out", "out", "--count", "-1"],
    ["sample", "--model", "bank", "--out", "out", "--count", "nan"],
    ["sample", "--model", "bank", "--out", "out", "--batch", "0"],
    ["sample", "--model", "bank", "--out", "out", "--count", "1", "--seed", "1" + "0" * 30],
    ["sample", "--model", "bank", "--out", "a\0b"],
    ["sample", "--model", "bank", "--out", "x" * 5000],
    ["sample", "--model", "a\0b", "--out", "out"],
    ["sample", "--model", "x" * 5000, "--out", "out"],
    ["sample", "--model", "/dev/zero", "--out", "out"],
    ["sample", "--model", "", "--out", "out"],
    ["profile", "--model", "dense", "--batch", "1000000000000"],
    ["profile", "--model", "dense", "--repeats", "1000000000000"],
    ["profile", "--model", "dense", "--batch", "0"],
    ["compare", "dense", "dense@ddim:" + "9" * 5000, *SOME[2:]],
    ["compare", "dense", "x" * 5000, *SOME[2:]],
    ["compare", "dense@\x1b[31m:5", *SOME[2:]],
    ["compare", "a\0b", *SOME[2:]],
    ["spectrum", *SOME, "--timestep", "-1"],
    ["spectrum", *SOME, "--timestep", "1000"],
    ["spectrum", *SOME, "--timestep", "1000000000000000000000"],
    ["spectrum", *SOME, "--images", "0"],
    ["denoise", "--model", "dense", "--out", "out", "--image", "pictures/0.png", "--steps", "1000000000"],
    ["denoise", "--model", "dense", "--out", "out", "--image", "pictures/0.png", "--steps", "0"],
    ["denoise", "--model", "dense", "--out", "out", "--image", "pictures/0.png", "--noise", "nan"],
    ["denoise", "--model", "dense", "--out", "out", "--image", "pictures/0.png", "--noise", "-1"],
    ["denoise", "--model", "dense", "--out", "out", "--image", "pictures/0.png", "--noise", "1e999"],
    ["denoise", "--model", "dense", "--out", "out", "--image", "pictures/0.png", "--seed", "1" + "0" * 30],
    *(["optimize", *SOME, "--budget", value] for value in ("nan", "inf", "-1", "0", "1e999", "1.5", "x", "1e-30")),
    *(["optimize", *SOME, "--max-loss", value] for value in ("nan", "-1", "x", "inf")),
    ["optimize", *SOME],
    ["optimize", *SOME, "--budget", "0.5", "--max-loss", "0.1"],
    ["search", "--model", "dense", "--data", "digits", "--out", "out", "--budget", "nan"],
    ["search", "--model", "bank", "--data", "digits", "--out", "out", "--budget", "nan"],
    ["shrink", *SOME, "--steps", "1000000000"],
    ["shrink", *SOME, "--steps", "0"],
    ["compress", "sparse", *SOME, "--pattern", "999:1"],
    ["compress", "sparse", *SOME, "--pattern", "2:" + "4" * 5000],
    ["compress", "sparse", *SOME, "--pattern", ""],
    ["compress", "spectral", "--model", "dense", *SOME[2:], "--reduction", "nan"],
    ["compress", "spectral", "--model", "dense", *SOME[2:], "--reduction", "1e999"],
    ["compress", "spectral", "--model", "dense", *SOME[2:], "--reduction", "1e300"],
    ["compress", "regularized", *SOME, "--steps", "1000000000000"],
    ["report", "nowhere"],
    ["report", "pictures"],
    ["train", "--data", "digits", "--out", "pictures"],
    ["train", "--data", "digits", "--out", "pictures/0.png"],
    ["train", "--data", "digits", "--out", "/proc/nowhere"],
    ["train", "--data", "digits", "--out", "out", "--recipe", "x" * 5000],
    ["train", "--data", "digits", "--out", "out", "--recipe", "../digits"],
    ["features", "--data", "digits", "--out", "out", "--set", "eval.feature_steps=0"],
]
OPTIONS = {" ".join(words)[:80].replace("\0", "NUL"): words for words in _OPTIONS}
EDITED = """
train.steps=1000000000000000000000000000000 train.steps=-1 train.steps=0 train.steps=nan train.steps=1e999 train.steps=
train.steps=1.5 train.batch=1000000000000 train.batch=-4 train.lr=nan train.lr=1e999 train.lr=-1 train.lr=0
train.warmup=-1 train.clip_norm=nan train.ema_decay=2 train.ema_decay=nan train.precision=fp4 train.tracker=x
train.log_every=0 train.save_every=-1 train.schedule=none
seed=-1 seed=100000000000000000000000000000000 seed=nan seed=1e3
model.channels=1000000,1000000 model.channels=0,0 model.channels=-8,8 model.channels= model.channels=8,x
model.channels=nan model.layers=1000000000 model.layers=0 model.head_dim=0 model.groups=7 model.groups=0
model.dropout=nan model.dropout=2 model.kind=mlp model.config=/dev/zero model.config=/nowhere model.config=pictures
model.vae=/nowhere model.attention=maybe,maybe model.attention=true model.patch=0
noise.timesteps=1000000000000 noise.timesteps=-1 noise.timesteps=0 noise.beta_start=nan noise.beta_end=2
noise.beta_start=-1 noise.prediction=x noise.beta_schedule=x
data.size=1000000000 data.size=0 data.size=-8 data.size=7 data.channels=2 data.channels=1000000 data.flip=maybe
sample.steps=0 sample.steps=1001 sample.steps=1000000000000000000000000000000 sample.scheduler=x sample.batch=-1
nothing=1 train=1 train.=1 .steps=1 =1 train.steps train..steps=1 __class__=1 train.__class__=1
""".split()  # noqa: SIM905


@pytest.mark.parametrize("name", some(OPTIONS))
def test_hostile_options_are_refused(name, place):
    words = OPTIONS[name]
    out = place / "out" if "out" in words else None
    require_refusal(words, out)


@pytest.mark.slow
def test_hostile_edits_of_a_recipe_are_refused(place):
    """One child for all of them: a table of a hundred."""
    names = [*EDITED, "name=a\0b", "model.channels=" + "8," * 100_000 + "8", "slim.widths=" + "0.5," * 10_000 + "1"]
    names += ["model.config=a\0b", "model.config=" + "x" * 5000, "train.steps=" + "9" * 5000, "x" * 5000 + "=1"]

    def tried(edit: str) -> str:
        shutil.rmtree(place / "out", ignore_errors=True)
        return refusal([*TRAIN, "--data", "digits", "--set", edit], place / "out")

    found = caged(names, tried)
    wrong = [
        f"--set {edit[:80]!r}: {'the process died' if one is None else one}"
        for edit, one in zip(names, found, strict=True)
        if one != ""
    ]
    assert not wrong, f"{len(wrong)} of {len(names)}\n" + "\n".join(wrong)


def test_an_error_is_one_printable_line_whatever_it_quotes():
    for value in ("x" * 10**6, "a\nb", "a\0b", "\x1b[2Jgone", "\udcff", 10**5000, "[bold]", ["\n"] * 10**5):
        told = str(HalfstepError(got=value, expected=value, where=value, do="mend it"))
        assert told.isprintable() and len(told) < 1500 and told.endswith("; mend it")


TWICE: dict[str, tuple[list[str], list[str]]] = {
    "classes without labels": ([*TRAIN, "--data", "folder:pictures", "--set", "model.class_conditional=true"], TRAIN),
    "a size that cannot be halved": ([*TRAIN, "--data", "folder:pictures", "--set", "data.size=7"], TRAIN),
    "another model's channels": (
        [*TRAIN, "--data", "folder:pictures", "--set", "data.channels=3", "--model", "dense"],
        TRAIN,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TWICE)
def test_a_refused_command_does_not_refuse_the_corrected_one(name, place):
    wrong, right = TWICE[name]
    require_refusal(wrong, place / "out")
    code, told = caged([0], lambda _: halfstep(*right, "--data", "folder:pictures"))[0]
    assert code == 0, told


# ------------------------------------------------------------------------------------------------- as a real process


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a million layers", "slices of themselves"])
def test_a_process_ends_with_two_and_one_line_on_standard_error(name, place):
    change, words = MODELS[name]
    change(place)
    seal(place)
    done = subprocess.run(
        [sys.executable, "-c", "from halfstep.app.cli import main; main()", *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert re.match(r"error: .*: got .*, expected .*; ", line)
