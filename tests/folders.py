"""Folders that runs meet: of somebody else, and what is in them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tiny import recipes

tiny = recipes("""
model.channels=4,4 model.groups=2 model.head_dim=2 data.size=8 data.channels=1 train.steps=2 train.batch=4
train.warmup=0 train.sample_every=0 eval.feature_steps=2
""")


def listing(root: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in root.rglob("*")}


def home_in(tmp_path: Path) -> Path:
    """A folder of somebody else's, with names that look like left-overs of ours."""
    folder = tmp_path / "home"
    (folder / "deep").mkdir(parents=True)
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = (
        "letter.txt",
        f".notes.{dead.pid}.tmp",
        f"deep/.x.{dead.pid}.old",
        f".y.{dead.pid}.halfstep-tmp",
        "000000.png",
    )
    for name in names:
        (folder / name).write_text("mine")
    return folder
