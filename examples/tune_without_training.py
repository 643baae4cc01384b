"""Nothing is trained: a sampler, steps, spacing, features reused between steps, and corrections, found in minutes.

python examples/tune_without_training.py                                    # the bundled model
python examples/tune_without_training.py MODEL folder:PHOTOS runs/tuned     # a diffusers folder of yours
"""

import json
import sys
from pathlib import Path

from halfstep import Recipe, tune
from halfstep.app.terminal import RichWatch


def main(model: str = "fashion", data: str = "fashion", out: str = "runs/tuned", *edits: str) -> None:
    # search.reuse=0 lets rows take the deep features of rows before them, at the outermost cut. Without a budget it is
    # the cheapest plan whose quality is no worse than today's within 5 %.
    recipe = Recipe().edit(["search.reuse=0", *edits])
    report = tune(model, data, Path(out), recipe, watch=RichWatch())

    found = json.loads((Path(out) / "quality.json").read_text())
    for name, row in found["plans"].items():
        fd = row["quality"]["fd"]
        interval = f"[{fd['low']:.2f}, {fd['high']:.2f}]"
        print(f"{name:<16} {row['wall_ms']:>9,.0f} ms  FD {fd['value']:.2f} {interval}  {row['verdict']}")
    print(f"report: {report}")


if __name__ == "__main__":
    main(*sys.argv[1:])
