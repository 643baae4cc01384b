"""Makes what comes with Halfstep under the word `fashion` (src/halfstep/assets/fashion_*), the same bytes every time.

    python benchmarks/bundle.py                                # images and features anew; minutes
    python benchmarks/bundle.py --bank runs/fashion16/supernet/pipeline    # and the bank, from another training

Images: 600 of each class of the training split and 100 of the test split, drawn by a fixed seed, decoded to 16x16 as
`load_images` does. Features: `halfstep features` on all 60,000. Bank: that of `halfstep compress slimmable --recipe
fashion16`, in fp16, its plan 50 DDIM steps of the dense net, which is the bank's reference.
"""

from __future__ import annotations

import halfstep.core.threads  # noqa: F401  # isort: skip (before torch)
import argparse
import shutil
from pathlib import Path

import numpy as np

from halfstep.app.measurement import features
from halfstep.app.terminal import RichWatch
from halfstep.core.bundled import FASHION_IMAGES, features_of, model_of
from halfstep.core.disk import write_atomic
from halfstep.core.recipe import SampleSpec
from halfstep.core.recipes import named
from halfstep.data.arrays import save_arrays
from halfstep.data.images import load_images
from halfstep.engine.sampling import reference_plan
from halfstep.engine.stepaware import StepAwarePipeline

SIZE, SEED = 16, 0
PER_CLASS = {"train": 600, "test": 100}


def write_images(source: str, watch: RichWatch) -> None:
    """The chosen pictures of both splits, in the order of their source."""
    arrays = {}
    for split, count in PER_CLASS.items():
        images = load_images(source, size=SIZE, channels=1, split=split, watch=watch)
        assert images.labels is not None, f"{source} has no labels"
        draw = np.random.default_rng(SEED)
        of_class = [np.flatnonzero(images.labels == k) for k in range(len(images.classes))]
        index = np.sort(np.concatenate([draw.choice(found, count, replace=False) for found in of_class]))
        arrays[f"{split}_images"] = np.array(images.pixels[index][:, 0])
        arrays[f"{split}_labels"] = images.labels[index].astype(np.uint8)
    write_atomic(FASHION_IMAGES, lambda file: save_arrays(file, arrays))


def write_features(source: str, work: Path, watch: RichWatch) -> None:
    trained = features(source, work / "features", named("default").edit([f"data.size={SIZE}"]), watch=watch)
    features_of("fashion").mkdir(exist_ok=True)
    for name in ("features.json", "features.safetensors"):
        shutil.copy(trained / name, features_of("fashion") / name)


def write_bank(source: Path) -> None:
    pipe = StepAwarePipeline.from_pretrained(source)
    plan = reference_plan(pipe.bank, pipe.process, SampleSpec(steps=50))
    pipe.bank.half()
    StepAwarePipeline(pipe.bank, plan).save_pretrained(model_of("fashion"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="idx:/usr/share/datasets/fashion-mnist")
    parser.add_argument("--bank", type=Path, help="a step-aware pipeline's folder; default: the bundled one stays")
    parser.add_argument("--work", type=Path, default=Path("runs/bundle"))
    args = parser.parse_args()
    watch = RichWatch()
    if args.bank:
        write_bank(args.bank)
    write_images(args.data, watch)
    write_features(args.data, args.work, watch)
    for folder in (model_of("fashion"), features_of("fashion"), FASHION_IMAGES.parent):
        files = [file for file in folder.rglob("*") if file.is_file()]
        print(f"{folder.name}: {sum(file.stat().st_size for file in files):,} bytes in {len(files)} files")


if __name__ == "__main__":
    main()
