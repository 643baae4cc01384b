"""The search on all processors of this machine, or on a Ray cluster of yours: the same plan, sooner.

pip install "halfstep[ray]"
python examples/search_on_ray.py                                  # starts workers on this machine
python examples/search_on_ray.py auto runs/slim folder:PHOTOS     # joins the cluster that runs here
"""

import sys
from pathlib import Path

from halfstep import Recipe, StepPlan, tune
from halfstep.app.terminal import RichWatch
from halfstep.engine.cluster import use_cluster


def main(
    address: str = "local", model: str = "fashion", data: str = "fashion", out: str = "runs/on-ray", *edits: str
) -> None:
    watch = RichWatch()
    use_cluster(address, watch)  # from here on whatever is drawn side by side is drawn by its workers
    # A cluster takes more pictures for each plan: what is compared is then told apart better.
    recipe = Recipe().edit(["search.images=4096", *edits])
    report = tune(model, data, Path(out), recipe, budget=0.5, watch=watch)
    print(StepPlan.load(Path(out) / "plan.json"))
    print(f"report: {report}")


if __name__ == "__main__":
    main(*sys.argv[1:])
