"""A plan for so many milliseconds on this machine, and whether it kept them.

python examples/time_budget.py                              # the bundled model and its bank: a batch of 16 in 150 ms
python examples/time_budget.py 40ms runs/slim folder:PHOTOS runs/forty
"""

import json
import sys
from pathlib import Path

from halfstep import Recipe, tune
from halfstep.app.terminal import RichWatch


def main(
    budget: str = "150ms", model: str = "fashion", data: str = "fashion", out: str = "runs/timed", *edits: str
) -> None:
    # A budget is "150ms" for a batch, "0.1t" of the time of what you run today, "0.5" of its multiply-accumulates or
    # "300MMACs". Every entry is timed here first, so the plan of one machine is not that of another.
    recipe = Recipe().edit(["sample.timed=16", *edits])
    tune(model, data, Path(out), recipe, budget=budget, watch=RichWatch())

    rows = json.loads((Path(out) / "quality.json").read_text())["plans"]
    today, plan = next(iter(rows.values())), rows["plan"]
    print(f"asked: {budget}, predicted: {plan['predicted_ms']:.0f} ms, measured: {plan['wall_ms']:.0f} ms")
    print(f"today: {today['wall_ms']:.0f} ms; one picture alone: {plan['alone_ms']:.1f} ms")


if __name__ == "__main__":
    main(*sys.argv[1:])
