"""A bank small enough for a test, and its files as they are and as the version before wrote them."""

from __future__ import annotations

import json
from functools import partial

from halfstep.engine.bank import Bank
from halfstep.engine.entry import Cut, Entry
from halfstep.methods.slimmable import Supernet, width_name
from tiny import unet

net = partial(unet, channels=(16, 16))


def slim_bank() -> Bank:
    supernet = Supernet(net(1), (1.0, 0.5, 0.25))
    entries = {"full": net(0), "w1.00": Entry(supernet.subnet(1.0))}
    entries |= {width_name(w): Entry(supernet.subnet(w), Cut("w1.00", s)) for w, s in supernet.slices.items()}
    return Bank(entries, "full", "epsilon")


def weights_of(bank: Bank) -> dict:
    return {name: entry.weights for name, entry in bank.entries.items()}


WEIGHTS = "diffusion_pytorch_model.safetensors"


def as_before(bank):
    """The saved bank as format 1 had it: slices.json and mask.json in the place of entry.json."""
    edit_record(bank / "bank.json", lambda r: {**r, "format": 1})
    for file in bank.glob("*/entry.json"):
        record = json.loads(file.read_text())
        file.unlink()
        if record["weights"]["kind"] != "own":
            link = {"of": record["weights"]["of"], "slices": record["weights"].get("slices")}
            file.with_name("slices.json").write_text(json.dumps(link))
        if "masking" in record:
            file.with_name("mask.json").write_text(json.dumps(record["masking"]))


FORMATS = [1, 2]


def in_format(number, bank):
    if number == 1:
        as_before(bank)
    return bank


def edit_link(edit):
    """A change of what says that w0.50 follows from the widest."""

    def change(folder):
        if (folder / "bank.json").read_text().find('"format": 1') > 0:
            edit_record(folder / "w0.50" / "slices.json", edit)
        else:
            edit_record(folder / "w0.50" / "entry.json", lambda r: {**r, "weights": {**edit(r["weights"])}})

    return change


def edit_record(file, edit):
    record = json.loads(file.read_text())
    file.write_text(json.dumps(edit(record)))
