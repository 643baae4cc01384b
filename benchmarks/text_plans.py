"""The joint plans of the text-to-image model of Fashion-MNIST, for `benchmarks/text.py`: what `halfstep tune` does,
once for several budgets of time.

    python benchmarks/text_plans.py            # benchmarks/text-plans.json; resumes

Prices are processor time of one thread, so that other work beside it does not count.
"""

from __future__ import annotations

import halfstep.core.threads  # noqa: F401  # isort: skip (before torch)
import argparse
import json
import os
import time
from pathlib import Path

import torch

from fashion import DATA
from halfstep.app.searching import Ground, place_of
from halfstep.app.subject import open_subject
from halfstep.app.terminal import RichWatch
from halfstep.core import disk
from halfstep.core.plan import StepPlan
from halfstep.core.recipe import Recipe
from halfstep.core.recipes import named
from halfstep.engine.pricing import PriceBook
from halfstep.search.joint import Question, search_joint

HERE = Path(os.path.relpath(Path(__file__).parent))
MODEL, PROMPTS = HERE / "models" / "fashion-text-supernet", HERE / "fashion-prompts.jsonl"
JUDGE = HERE / "models" / "fashion32-features"
PLANS = HERE / "text-plans.json"
GUIDANCE = 3.0
"""What the model draws best with (`text_model.py --stage measure`)."""
BATCH = 64
SHARES = (0.2, 0.12, 0.08, 0.05, 0.035)
"""Budgets, as parts of the time of fifty guided steps."""
SETTINGS = (
    *("sample.steps=50", f"sample.guidance={GUIDANCE:g}", f"sample.batch={BATCH}", f"data.prompts={PROMPTS}"),
    *(f"eval.features=file:{JUDGE}", "eval.bootstrap=100", "search.reuse=0,out", "search.images=256"),
    *("search.error_images=8", "search.fit=12", "search.genes=4", "search.arms=1", "search.race=16"),
    *("search.finalists=2", "search.final_images=512"),
)


def ground_of(model: Path, edits: list[str], work: Path) -> Ground:
    """What the search stands on, with processor time as prices."""
    recipe: Recipe = named("fashion32").edit([*SETTINGS, *edits])
    subject = open_subject(str(model), DATA, recipe, watch=RichWatch())
    bank = subject.stand_ins
    dense = [name for name, entry in bank.entries.items() if entry.masking is None]  # a mask saves no time here
    bank = bank.only(dense).with_reuse([place_of(cut) for cut in recipe.search.reuse])
    ground = Ground(subject, bank, work, RichWatch())
    file = work / "prices.json"
    ground.__dict__["prices"] = PriceBook(ground.book.judge.bank, BATCH, file, clock=time.process_time)
    return ground


def found_plans(ground: Ground) -> dict[str, StepPlan]:
    """For every budget the plan and its controls, by name, and what a search calls the best free."""
    today, us = ground.today, ground.today.whole.us
    assert us is not None, "its prices are times"
    question = Question("us", tuple(round(1000 * share * us) for share in SHARES))
    with ground.side_by_side(1):
        free, among = ground.free, ground.families
        answers = search_joint(ground.track, ground.book, ground.stock, among, today, question, ground.recipe)
    plans = {"best free of the search": free.plan}
    for one in answers:
        share = SHARES[question.limits.index(one.limit)]
        named_so = {"joint": one.plan, **one.controls}
        plans |= {f"{name}, {share:g}t": plan for name, plan in named_so.items()}
    return plans


def known_plans() -> dict[str, StepPlan]:
    """Those of the file; none without it."""
    known = json.loads(PLANS.read_text()) if PLANS.is_file() else {}
    return {name: StepPlan.from_json(record) for name, record in known.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--set", action="append", default=[], help="edit the recipe, as halfstep's --set")
    parser.add_argument("--work", type=Path, default=Path("runs/text/search"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    plans = found_plans(ground_of(args.model, args.set, args.work))
    disk.write_json(PLANS, {name: plan.to_json() for name, plan in plans.items()})
    for name, plan in plans.items():
        print(f"{name}: {plan}\n")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
