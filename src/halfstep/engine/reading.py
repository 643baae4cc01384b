"""What a verb read, in a line for the pictures and one for the model: said at the beginning, recorded with the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from halfstep.core.process import Process
from halfstep.data.classes import listed
from halfstep.data.latents import shape_for
from halfstep.engine.bank import Bank
from halfstep.nets.architectures import example_of
from halfstep.nets.denoiser import class_count
from halfstep.nets.fit import Fitted

_MODES = {1: "grey", 3: "RGB"}


def about_images(fitted: Fitted) -> str:
    """Pictures in a line: how many, sizes as they came and as they are, channels, classes with counts, how labels were
    matched, what was left out and why."""
    images, matched = fitted
    now = f"{images.size}x{images.size} {_MODES.get(images.channels, f'of {images.channels} channels')}"
    came = list(dict.fromkeys(f"{width}x{height}" for width, height in images.sizes))
    made = f"{' to '.join(came)} made {now}" if came and came != [f"{images.size}x{images.size}"] else now
    parts = [f"{len(images):,} pictures of {images.name}: {made}"]
    if images.labels is None:
        parts.append("no classes")
    else:
        counted = zip(images.classes, images.counts, strict=True)
        parts.append(f"{len(images.classes)} classes ({listed(f'{name}: {count:,}' for name, count in counted)})")
    parts += [matched] if matched else []
    parts.append(f"left out: {listed(images.left_out)}" if images.left_out else "nothing left out")
    return "; ".join(parts)


def about_model(
    source: str | None,
    net: Any,
    process: Process | None,
    vae: Any = None,
    classes: Sequence[str] = (),
    entries: int = 1,
) -> str:
    """A model (of a bank, its reference; without a source, a fresh one) in a line: class and parameters, what it takes,
    its classes, its forward process."""
    channels, size = shape_for(net.config, vae)
    parts = [f"{type(net).__name__} of {source}" if source else f"a fresh {type(net).__name__}"]
    parts[0] += f": {sum(p.numel() for p in net.parameters()):,} parameters"
    if entries > 1:
        parts[0] += f", the reference of {entries} entries"
    taken = f"{size}x{size} {_MODES.get(channels, f'of {channels} channels')}"
    parts.append(taken if vae is None else f"latents of {taken}")
    count = class_count(net.config)
    names = f" ({listed(classes)})" if classes else ", not named"
    unnamed = "conditional on text" if "encoder_hidden_states" in example_of(net, 1) else "unconditional"
    parts.append(f"{count} classes{names}" if count else unnamed)
    return "; ".join([*parts, *([f"noise: {process}"] if process else [])])


def about_bank(source: str, bank: Bank, process: Process | None = None) -> str:
    """A bank in a line, by its reference."""
    return about_model(source, bank[bank.reference], process, bank.vae, bank.classes, len(bank))
