"""A compression method of your own: a net of half the channels that learns the model's predictions.

A method turns a model into a bank of stand-ins. What trains it, resumes it, searches it and reports it is there.

    python examples/new_method.py                          # the bundled digits model
    python examples/new_method.py MODEL folder:PHOTOS runs/mine
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from halfstep import Recipe
from halfstep.app import verbs
from halfstep.app.terminal import RichWatch
from halfstep.core.seeds import seeded
from halfstep.engine.subject import Subject
from halfstep.nets.denoiser import Memo, predictor
from halfstep.training.draft import Draft, teacher_of
from halfstep.training.train import Batch, Diffusion


def draft(subject: Subject, recipe: Recipe) -> Draft:
    teacher, config = subject.dense, dict(subject.dense.config)
    config["block_out_channels"] = tuple(channels // 2 for channels in config["block_out_channels"])
    with seeded(recipe.seed):
        student = type(teacher).from_config(config)

    def objective(state):
        taught, ours, draw = predictor(teacher_of(subject)), predictor(student), Diffusion(recipe.noise).draw

        def step(batch: Batch) -> Iterator[torch.Tensor]:
            noisy, timestep, _ = draw(batch.clean, batch.generator, batch.share)
            with torch.no_grad():
                lesson = taught(noisy, timestep, batch.cond, Memo())
            yield F.mse_loss(ours(noisy, timestep, batch.cond, Memo()), lesson)

        return step

    def bank_of(net):
        return subject.bank_of({"full": teacher, "half": net}, "full")

    return Draft(method="half", tag="half", net=student, bank_of=bank_of, objective=objective, main="half")


def main(model: str = "digits", data: str = "digits", out: str = "runs/mine", *edits: str) -> None:
    verbs.METHODS["half"] = draft
    recipe = Recipe().edit(["train.steps=2000", *edits])
    print(f"report: {verbs.compress('half', model, data, Path(out), recipe, watch=RichWatch())}")


if __name__ == "__main__":
    main(*sys.argv[1:])
