"""Your model and your pictures in; a cheaper pipeline, its plan and a report out.

python examples/bring_your_model.py                                   # the bundled digits model, minutes on a CPU
python examples/bring_your_model.py MODEL folder:PHOTOS runs/half     # a diffusers folder and pictures of yours
"""

import sys
from pathlib import Path

from halfstep import Recipe, StepAwarePipeline, StepPlan, optimize
from halfstep.app.terminal import RichWatch


def main(model: str = "digits", data: str = "digits", out: str = "runs/half", *edits: str) -> None:
    # Fine-tunes narrower widths of the model on the same weights, searches which of them runs at which step under which
    # sampler, for half of the multiply-accumulates, and measures the plan beside the model. Repeated, it goes on.
    recipe = Recipe().edit(["train.steps=2000", *edits])
    report = optimize(model, data, Path(out), recipe, budget=0.5, watch=RichWatch())

    print(StepPlan.load(Path(out) / "plan.json"))  # what runs in every row, and what it costs
    print(f"report: {report}")

    pipe = StepAwarePipeline.from_pretrained(f"{out}/pipeline")  # a diffusers pipeline like any other
    pipe(batch_size=4, seed=0).images[0].save(f"{out}/first.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
