"""A plan under your own text-to-image pipeline, whose loop, LoRA and callbacks stay what they are.

python examples/attach_to_stable_diffusion.py stable-diffusion-v1-5 "a red shoe"     # a folder of diffusers
"""

import sys
import time

import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler

from halfstep import attached, plan_for


def main(folder: str, prompt: str, out: str = "shoe", steps: str = "25") -> None:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)

    # The first rows whole; then one in three computes everything and the others reuse its deep features; towards the
    # end guidance is left out. `halfstep tune --pipeline FOLDER --prompts FILE` searches such a plan.
    count = int(steps)
    early = [["full"] * 3, *[["full", "full~0", "full~0"]] * ((count * 3 // 5) // 3)]
    plan = plan_for(pipe, count, phrases=[*early, ["full|"]], guidance=7.5, sampler=pipe.scheduler)
    print(plan)

    for name, under in (("stock", None), ("plan", plan)):
        generator, begun = torch.Generator().manual_seed(0), time.perf_counter()
        if under is None:
            image = pipe(prompt, num_inference_steps=count, guidance_scale=7.5, generator=generator).images[0]
        else:
            with attached(pipe, under):
                image = pipe(prompt, num_inference_steps=count, guidance_scale=7.5, generator=generator).images[0]
        image.save(f"{out}-{name}.png")
        print(f"{name}: {time.perf_counter() - begun:.1f} s, {out}-{name}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
