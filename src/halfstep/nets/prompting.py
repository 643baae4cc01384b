"""Pipelines whose prompts become more than one encoder's hidden states: asked by their own `encode_prompt`.

Stable Diffusion XL, arXiv 2307.01952 (two encoders, pooled text, sizes and crops); Stable Diffusion 3, arXiv 2403.03206
(three, pooled text); PixArt, arXiv 2310.00426 and 2403.04692 (T5, its mask, in large models the picture's size). Any
other pipeline of text has one encoder, see `text.py`.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import diffusers
import torch
from diffusers.utils import is_bs4_available, is_ftfy_available

from halfstep.core.disk import read_json, read_record, write_json
from halfstep.core.errors import ModelError
from halfstep.core.typed import Bounds
from halfstep.core.watch import SILENT, Watch
from halfstep.data.latents import factor
from halfstep.data.prompts import NOTHING, Prompter, kept_tensors, require_short
from halfstep.nets.architectures import example_of
from halfstep.nets.content import fingerprint
from halfstep.nets.denoiser import eager, flattened, nested, sample_shape
from halfstep.nets.models import pipeline_folder
from halfstep.nets.text import FILE, load_encoder, load_text_encoder, require_length

ORIGIN = "text_pipeline.json"
"""In the folder of a step-aware pipeline: of which pipeline its text encoders are."""

Flat = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """How a pipeline of several encoders, or of one that is asked in its own way, makes a condition.

    `encoders`: role -> class of transformers; the tokenizer has the same role. `lengths`: role -> tokens, where that is
    the pipeline's and not the tokenizer's. `named(found, half)`: what `encode_prompt` returned, the conditional half
    (0) or the one on nothing (1), by the path of its name. `options`: of `encode_prompt`.
    """

    encoders: Mapping[str, str]
    named: Callable[[Sequence[torch.Tensor], int], Flat]
    lengths: Mapping[str, int]
    options: Callable[[], Mapping[str, Any]] = dict


def _sdxl(found: Sequence[torch.Tensor], half: int) -> Flat:
    return {"encoder_hidden_states": found[half], "added_cond_kwargs.text_embeds": found[2 + half]}


def _sd3(found: Sequence[torch.Tensor], half: int) -> Flat:
    return {"encoder_hidden_states": found[half], "pooled_projections": found[2 + half]}


def _pixart(found: Sequence[torch.Tensor], half: int) -> Flat:
    return {"encoder_hidden_states": found[2 * half], "encoder_attention_mask": found[2 * half + 1]}


def _cleaned() -> Mapping[str, Any]:
    """As the pipeline's own call has it, where the packages for it are there."""
    return {"clean_caption": is_bs4_available() and is_ftfy_available()}


CLIP, PROJECTED, T5 = "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"
FAMILIES: Mapping[str, Family] = {
    "StableDiffusionXLPipeline": Family({"text_encoder": CLIP, "text_encoder_2": PROJECTED}, _sdxl, {}),
    "StableDiffusion3Pipeline": Family(
        {"text_encoder": PROJECTED, "text_encoder_2": PROJECTED, "text_encoder_3": T5}, _sd3, {"text_encoder_3": 256}
    ),
    "PixArtAlphaPipeline": Family({"text_encoder": T5}, _pixart, {"text_encoder": 120}, _cleaned),
    "PixArtSigmaPipeline": Family({"text_encoder": T5}, _pixart, {"text_encoder": 300}, _cleaned),
}
"""By the class of the pipeline; the lengths are the defaults of their calls."""
OPTIONAL = ("text_encoder_3",)
"""Encoders that a pipeline may be stored without."""


@dataclass(frozen=True, kw_only=True)
class _Origin:
    """What `ORIGIN` holds: the pipeline's class, and what its config says of prompts."""

    pipeline: Annotated[str, Bounds(1, 200)]
    force_zeros_for_empty_prompt: bool = True
    format: Literal[1] = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class PipelineEncoder:
    """A `Prompter`: the encoders of a pipeline, asked as its own call asks them.

    family; pipe: with its encoders and the denoiser, whose config some ask for.  readers: tokenizers with the most
    tokens that each reads.  beside: what is the same for every picture, by the path of its name, each tensor [1, ...].
    """

    family: Family
    pipe: Any
    readers: Sequence[tuple[Any, int]]
    beside: Flat
    fingerprint: str

    def condition(
        self, prompts: Sequence[str], *, cut: bool = False, batch: int = 16, watch: Watch = SILENT
    ) -> dict[str, Any]:
        """See `Prompter`. A prompt is short enough where one of the encoders reads all of it, as stock has it."""
        prompts = list(prompts)
        read = require_short(self.readers, prompts, cut)

        def encoded() -> dict[str, torch.Tensor]:
            parts: list[Flat] = []
            with watch.stage("encode prompts", len(prompts)) as told:
                for begin in range(0, len(prompts), batch):
                    parts.append(self._asked(prompts[begin : begin + batch], 0))
                    told(min(begin + batch, len(prompts)))
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

        found = kept_tensors([self.fingerprint, read], encoded)
        return dict(nested(found | {name: one.repeat(len(prompts), 1) for name, one in self.beside.items()}))

    def nothing(self) -> dict[str, Any]:
        """The pipeline's own negative condition without a negative prompt, each tensor [1, ...]."""
        return dict(nested({**self._asked([NOTHING], 1), **self.beside}))

    def to(self, device: torch.device | str) -> PipelineEncoder:
        for role in self.family.encoders:
            if (net := getattr(self.pipe, role)) is not None:
                net.to(device)
        return self

    @torch.no_grad()
    def _asked(self, prompts: list[str], half: int) -> dict[str, torch.Tensor]:
        """One half of what `encode_prompt` gives, on the CPU."""
        takes = inspect.signature(self.pipe.encode_prompt).parameters
        more = {name: None for name in ("prompt_2", "prompt_3") if name in takes}
        given = {**more, **self.family.options(), "device": self.pipe.text_encoder.device}
        found = self.pipe.encode_prompt(prompts, do_classifier_free_guidance=half == 1, **given)
        return {name: one.cpu() for name, one in self.family.named(found, half).items()}


def load_prompter(source: str | Path, net: Any, vae: Any = None) -> Prompter:
    """What makes conditions of prompts for a denoiser `net`, from its pipeline's folder.

    `vae`: the pipeline's, which says how many pixels a latent has. Raises ModelError as `load_text_encoder`, and where
    the denoiser takes other parts than the pipeline's prompts make, by their names.
    """
    folder = pipeline_folder(source)
    origin, wanted = _origin_of(folder), dict(flattened(example_of(net, 1)))
    if origin is None:
        found: Prompter = load_text_encoder(folder, for_net="encoder_attention_mask" in wanted)
    else:
        found = _of_family(folder, origin, eager(net), _beside(net.config, vae, set(wanted)))
    given = dict(flattened(found.nothing()))
    if _widths(given) != _widths(wanted):
        raise ModelError(
            got=f"a {type(eager(net)).__name__} that takes {_told(wanted)}",
            expected=f"{_told(given)}, as the text encoders of its pipeline give",
            where=source,
            do=f"bring a whole {', '.join(FAMILIES)} or StableDiffusionPipeline, or plan it with halfstep.plan_for",
        )
    return found


def copy_text_encoder(source: str | Path, folder: Path) -> None:
    """Copy a pipeline's text encoders and tokenizers, or the record that names them, into another's folder."""
    source = pipeline_folder(source)
    for role in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        for name in (role, role.replace("text_encoder", "tokenizer")):
            if (source / name).is_dir():
                shutil.copytree(source / name, folder / name)
    if (source / FILE).is_file():
        shutil.copyfile(source / FILE, folder / FILE)
    if (origin := _origin_of(source)) is not None:
        write_json(folder / ORIGIN, asdict(origin))


def _origin_of(folder: Path) -> _Origin | None:
    """Of which of `FAMILIES` the encoders in a folder are; None: of none of them."""
    do = "copy the whole pipeline"
    if (folder / ORIGIN).is_file():
        found = read_record(folder / ORIGIN, _Origin, what="whose text encoders these are", do=do, error=ModelError)
    elif (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json", what="a pipeline", do=do, error=ModelError)
        zeros = index.get("force_zeros_for_empty_prompt", True)
        found = _Origin(pipeline=str(index.get("_class_name")), force_zeros_for_empty_prompt=zeros is True)
    else:
        return None
    return found if found.pipeline in FAMILIES else None


def _of_family(folder: Path, origin: _Origin, net: Any, beside: Flat) -> PipelineEncoder:
    family, kind = FAMILIES[origin.pipeline], getattr(diffusers, origin.pipeline)
    takes = inspect.signature(kind.__init__).parameters
    parts: dict[str, Any] = dict.fromkeys(
        name for name, one in takes.items() if name != "self" and one.default is inspect.Parameter.empty
    )
    readers = []
    for role, name in family.encoders.items():
        place, tokenizer = folder / role, role.replace("text_encoder", "tokenizer")
        if not (place / "config.json").is_file() and role in OPTIONAL:
            continue
        parts[tokenizer], parts[role] = load_encoder(folder / tokenizer, place, name)
        length = family.lengths.get(role, parts[tokenizer].model_max_length)
        require_length(length, parts[role], folder / tokenizer)
        readers.append((parts[tokenizer], length))
    own = {name: value for name, value in asdict(origin).items() if name in takes}
    if "add_watermarker" in takes:
        own["add_watermarker"] = False  # of pictures, which it draws none of
    pipe = kind(**parts | {"unet" if "unet" in takes else "transformer": net} | own)
    nets = [parts[role] for role in family.encoders if parts[role] is not None]
    content = fingerprint(*nets, {**asdict(origin), **family.options(), "lengths": [n for _, n in readers]})
    return PipelineEncoder(family=family, pipe=pipe, readers=readers, beside=beside, fingerprint=content)


def _beside(config: Mapping[str, Any], vae: Any, wanted: set[str]) -> Flat:
    """What a denoiser is told of a picture of its own size, uncropped, as its pipeline's call says it by default."""
    height, width = (float(side * (1 if vae is None else factor(vae))) for side in sample_shape(config)[2:])
    known = {
        "added_cond_kwargs.time_ids": [height, width, 0.0, 0.0, height, width],
        "added_cond_kwargs.resolution": [height, width],
        "added_cond_kwargs.aspect_ratio": [height / width],
    }
    return {name: torch.tensor([one]) for name, one in known.items() if name in wanted}


def _widths(cond: Flat) -> dict[str, int]:
    """How many numbers each part has; of a mask, whose last axis is the text's, 0."""
    return {name: 0 if "mask" in name else one.shape[-1] for name, one in cond.items()}


def _told(cond: Flat) -> str:
    return ", ".join(f"{name} of {wide}" if wide else name for name, wide in sorted(_widths(cond).items()))
