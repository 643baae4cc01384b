"""A finished run as a model of the hub: its pipeline, a model card made from its files, and its pictures.

Nothing is sent but by `push`, and that when it is asked to.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from halfstep.core import disk
from halfstep.core.errors import RunError
from halfstep.core.plan import StepPlan
from halfstep.core.recipe import RunRecord
from halfstep.core.results import read_comparison
from halfstep.core.sums import require_whole
from halfstep.report.page import markdown
from halfstep.report.tables import plans_table
from halfstep.report.words import summary

AGAIN = "repeat the command that began the run, which finishes it"


def card_of(run: Path) -> str:
    """README.md of a run's model: what was measured, as its report tells it, what runs at each step, how to load it,
    and the licence of the model that it was made of, where that one's folder says one.

    Raises RunError for a run that was not finished or not measured.
    """
    run = Path(run)
    record = read_comparison(run / "quality.json", AGAIN)
    plan, said = StepPlan.load(run / "plan.json"), RunRecord.load(run).inputs
    base = str(said.get("model") or "")
    licence = _licence(base)
    head = {"library_name": "diffusers", "tags": ["halfstep", "diffusion"], **({"license": licence} if licence else {})}
    pictures = "\n\n![The reference's pictures above the plan's](samples.png)" if (run / "samples.png").exists() else ""
    where = f"Made by `halfstep {said.get('verb', 'optimize')}` of {base or 'images alone'}"
    parts = (
        f"---\n{_yaml(head)}\n---",
        "# A step-aware pipeline",
        summary(record, plan) + pictures,
        markdown(plans_table(record)),
        f"## What runs at each step\n\n```\n{plan}\n```",
        _LOADING,
        f"## Where it is from\n\n{where} with {said.get('data') or 'no images'}. {_about_licence(licence)}",
    )
    return "\n\n".join(parts) + "\n"


_LOADING = """## How to load it

`pip install halfstep`, then

```python
from huggingface_hub import snapshot_download
from halfstep import StepAwarePipeline

pipe = StepAwarePipeline.from_pretrained(snapshot_download("OWNER/NAME"))
pipe(batch_size=4, seed=0).images
```

Without PyTorch: `halfstep export FOLDER --to onnx --out DIR`, then `halfstep-run DIR`."""


def _about_licence(licence: str) -> str:
    if licence:
        return f"Licence of the model that it was made of: {licence}."
    return "The model that it was made of says no licence: ask its owner before you pass this one on."


def push(run: Path, to: str, *, private: bool = True, folder: Path | None = None) -> str:
    """Send a run's pipeline, card and pictures to the hub as `to`, OWNER/NAME; returns where it is.

    folder: write what would be sent there instead, and send nothing.  Raises RunError for a run without a measured
    pipeline, for a folder that is there, and where the hub cannot be reached or refuses.
    """
    run = Path(run)
    card, pipeline = card_of(run).replace("OWNER/NAME", to), run / "pipeline"
    if not (pipeline / "model_index.json").is_file():
        raise RunError(got="no pipeline", expected="a run that wrote one", where=run, do=AGAIN)
    require_whole(pipeline)

    def write(place: Path) -> None:
        shutil.copytree(pipeline, place)
        (place / "README.md").write_text(card)
        if (run / "samples.png").exists():
            shutil.copy(run / "samples.png", place)

    if folder is not None:
        if folder.exists():
            raise RunError(got="a folder that is there", expected="a new one", where=folder, do="choose another")
        disk.write_atomic(folder, write)
        return str(folder)
    _require_online(to)
    with tempfile.TemporaryDirectory() as place:
        write(staged := Path(place) / "model")
        return _sent(staged, to, private)


def _require_online(to: str) -> None:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise _unreachable(to, "HF_HUB_OFFLINE is set")


def _sent(folder: Path, to: str, private: bool) -> str:
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        place = api.create_repo(to, private=private, exist_ok=True)
        api.upload_folder(repo_id=to, folder_path=folder)
    except Exception as error:  # of whichever client the library uses
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise _unreachable(to, told[0]) from error
    return str(place)


def _unreachable(to: str, why: str) -> RunError:
    do = "connect and log in (`hf auth login`), or write a folder with --folder"
    return RunError(got=why, expected="a hub that takes it", where=f"push to {to}", do=do)


def _licence(base: str) -> str:
    """What the card in a model's folder says; "" where there is none."""
    file = Path(base) / "README.md"
    if not base or not file.is_file():
        return ""
    from huggingface_hub import ModelCard

    try:
        return str(ModelCard.load(file).data.get("license") or "")
    except Exception:  # whatever a stranger's file trips its reader with
        return ""


def _yaml(record: dict[str, Any]) -> str:
    """Words and lists of words, each as JSON has it, which YAML reads."""
    return "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in record.items())
