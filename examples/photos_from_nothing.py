"""From a folder of photos to a model of them, a cheaper plan for it, and new pictures.

python examples/photos_from_nothing.py folder:PHOTOS runs/photos     # hours on a CPU, minutes on a GPU
"""

import sys
from pathlib import Path

from halfstep import Recipe, sample, train, tune
from halfstep.app.terminal import RichWatch


def main(data: str = "digits", out: str = "runs/photos", *edits: str) -> None:
    # Every picture is cropped to its largest square and resampled. What is killed goes on where it was.
    recipe = Recipe().edit(["data.size=32", "train.steps=20000", *edits])
    watch, home = RichWatch(), Path(out)
    dense = train(data, home / "dense", recipe, watch=watch)  # a stock diffusers pipeline
    print(f"grid while it learns: {home / 'dense' / 'samples.png'}")

    tune(str(dense), data, home / "tuned", recipe, watch=watch)
    grid = sample(str(home / "tuned"), home / "pictures", recipe, count=16, watch=watch)
    print(f"new pictures: {grid}")


if __name__ == "__main__":
    main(*sys.argv[1:])
