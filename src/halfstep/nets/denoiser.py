"""The only door to a network: every part calls it as a plain function of (sample, timestep, condition, memo).

Inside of networks a batch is `x.shape[0]` and not `len(x)`, which is a constant to what traces them for other runtimes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from halfstep.core.errors import ModelError
from halfstep.core.share import Share

Model = TypeVar("Model", bound=nn.Module)

Cond = Mapping[str, Any]
"""What a prediction is conditional on, by the keyword under which diffusers' networks take it: tensors [B, ...], alone
or in mappings and lists, and plain numbers beside. {}, "class_labels" int64 [B], "encoder_hidden_states" [B, tokens,
dim] with its "encoder_attention_mask" [B, tokens], "added_cond_kwargs" of "text_embeds" [B, dim] and "time_ids" [B, 6],
"pooled_projections" [B, dim], "guidance" [B] …"""

Kept = tuple[tuple[float, torch.Tensor], ...]
"""Features of the last calls at different timesteps, each with its timestep, the newest last."""

Memo = dict[tuple[str, str], Kept]
"""What the calls of one trajectory leave for the later ones, by (entry, cut), see `reuse.py`; each trajectory, and each
call outside of one, has its own."""

Predict = Callable[[torch.Tensor, torch.Tensor, Cond, Memo], torch.Tensor]
"""(sample [B,C,H,W], timestep [B] or of no axes, condition, memo) -> prediction [B,C,H,W]"""

Draw = Callable[[torch.Tensor, torch.Generator, Share | None], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""(clean [B,C,H,W], random numbers, of which images) -> (noisy sample [B,C,H,W], timestep [B], target [B,C,H,W])"""


def predictor(model: Callable[..., Any], weights: Callable[[], Mapping[str, torch.Tensor]] | None = None) -> Predict:
    """A diffusers denoiser as a function: its prediction alone, without a learned variance beside it.

    `weights` is asked at every call for the weights to run the module with in place of its own (gradients reach them).
    """

    # of diffusers' transformers the text comes second, and each sample has a timestep; its U-Nets take one for all
    each = hasattr(eager(model) if isinstance(model, nn.Module) else model, "transformer_blocks")

    def arguments(sample: torch.Tensor, timestep: torch.Tensor, cond: Cond) -> tuple[tuple, dict[str, Any]]:
        if each:
            return (sample,), {"timestep": per_sample(timestep, sample.shape[0]), **cond, "return_dict": False}
        return (sample, timestep), {**cond, "return_dict": False}

    def predict(sample: torch.Tensor, timestep: torch.Tensor, cond: Cond, memo: Memo) -> torch.Tensor:
        placed, named = arguments(sample, timestep, cond)
        return prediction_of(model(*placed, **named)[0], sample)

    def predict_with(sample: torch.Tensor, timestep: torch.Tensor, cond: Cond, memo: Memo) -> torch.Tensor:
        assert weights is not None and isinstance(model, nn.Module)
        placed, named = arguments(sample, timestep, cond)
        return prediction_of(torch.func.functional_call(model, dict(weights()), placed, named)[0], sample)

    return predict if weights is None else predict_with


def per_sample(timestep: torch.Tensor | float, count: int) -> torch.Tensor:
    """A timestep of no axes for each of `count` samples; [B] as it is."""
    timestep = torch.as_tensor(timestep)
    return timestep.expand(count) if timestep.ndim == 0 else timestep


def prediction_of(output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """What a network's output [B, C or 2C, ...] predicts of a sample [B, C, ...]: of a learned variance (Improved DDPM,
    arXiv 2102.09672) the first half, the mean; the other is read by ancestral samplers only, which are refused."""
    return output.chunk(2, dim=1)[0] if output.shape[1] == 2 * sample.shape[1] else output


def cond_of(labels: torch.Tensor | None) -> Cond:
    """The condition on classes, int64 [B]; on nothing for None."""
    return {} if labels is None else {"class_labels": labels}


def class_example(config: Mapping[str, Any], batch: int, tokens: int | None = None) -> Cond:
    """A condition on classes for `batch` samples, where the config asks for them: "class_labels", [B] integers, or what
    the net embeds in their place, [B, size]; {} where it does not. `tokens`: of a text, which there is none of here."""
    kind, count = config.get("class_embed_type"), config.get("num_class_embeds")
    if kind in ("identity", "projection", "simple_projection"):
        given = config.get("time_embedding_dim") or 4 * config["block_out_channels"][0]
        size = given if kind == "identity" else config["projection_class_embeddings_input_dim"]
        return cond_of(torch.zeros(batch, size))
    return cond_of(None if kind is None and count is None else torch.zeros(batch, dtype=torch.long))


def cond_to(cond: Cond, device: torch.device | str, dtype: torch.dtype | None = None) -> Cond:
    """The same condition on a device; where a dtype is given, all of it that is no integers in that."""

    def moved(one: torch.Tensor) -> torch.Tensor:
        return one.to(device, dtype if one.is_floating_point() else None)

    return {name: changed(value, moved) for name, value in cond.items()}


def flattened(cond: Cond, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Its tensors by the path of their names, "added_cond_kwargs.time_ids", contiguous and on the CPU."""
    for name, value in cond.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value.detach().cpu().contiguous()


def nested(flat: Mapping[str, torch.Tensor]) -> Cond:
    """The condition of tensors by path, see `flattened`."""
    found: dict[str, Any] = {}
    for path, value in flat.items():
        *outer, name = path.split(".")
        place = found
        for one in outer:
            place = place.setdefault(one, {})
        place[name] = value
    return found


def picked(cond: Cond, rows: torch.Tensor) -> Cond:
    """The condition of these samples, int64 [N], of those that it holds."""
    return {name: changed(value, lambda one: one[rows.to(one.device)]) for name, value in cond.items()}


def joined(one: Cond, other: Cond) -> Cond:
    """The condition of one batch and of another after it. Raises ModelError where they are of different kinds."""
    if one.keys() != other.keys():
        got, expected = f"a condition on {', '.join(other) or 'nothing'}", f"one on {', '.join(one) or 'nothing'}"
        raise ModelError(got=got, expected=expected, where="condition", do="give both the same parts")

    def both(a: Any, b: Any) -> Any:
        return joined(a, b) if isinstance(a, Mapping) else torch.cat([a, b])

    return {name: both(value, other[name]) for name, value in one.items()}


def repeated(cond: Cond, count: int) -> Cond:
    """The condition of one sample, each tensor [1, ...], for `count` of them."""
    return {name: changed(value, lambda one: one.expand(count, *one.shape[1:])) for name, value in cond.items()}


def changed(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same with every tensor in it changed, in mappings and sequences."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: changed(one, change) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(changed(one, change) for one in value)
    return value


def clean_and_noise(
    prediction: torch.Tensor, sample: torch.Tensor, level: torch.Tensor, prediction_type: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both parts of sample = sqrt(level) clean + sqrt(1 - level) noise, as a prediction of any type has them; of flow
    matching those of sample = level clean + (1 - level) noise.

    prediction, sample: [B, ...].  level: alphas_cumprod, or one minus flow matching's noise level, a number or [B].
    Raises ModelError for an unknown type.
    """
    level = level.to(sample).reshape(-1, *[1] * (sample.ndim - 1))
    if prediction_type == "flow_prediction":  # noise - clean
        return sample - (1 - level) * prediction, sample + level * prediction
    signal, rest = level.sqrt(), (1 - level).sqrt()
    match prediction_type:
        case "epsilon":
            return (sample - rest * prediction) / signal, prediction
        case "sample":
            return prediction, (sample - signal * prediction) / rest
        case "v_prediction":
            return signal * sample - rest * prediction, signal * prediction + rest * sample
    expected = "epsilon, sample, v_prediction or flow_prediction"
    raise ModelError(got=prediction_type, expected=expected, where="prediction type", do="bring a model of these")


def soft(value: torch.Tensor, threshold: float | torch.Tensor) -> torch.Tensor:
    """sign(v) * max(|v| - threshold, 0); threshold >= 0, a number or broadcast against v."""
    limit = torch.as_tensor(threshold, dtype=value.dtype, device=value.device)
    return value - value.clamp(-limit, limit)


def corrected(
    prediction: torch.Tensor, scale: float | torch.Tensor = 1.0, threshold: float | torch.Tensor = 0.0
) -> torch.Tensor:
    """scale * soft(prediction, threshold), for a prediction of the noise; (1, 0) changes nothing.

    A threshold is what an l1 penalty of r = 2 * threshold trains a perfect denoiser to put out (see
    `methods/regularized.py`).
    """
    return scale * soft(prediction, threshold)


def corrected_as(
    prediction_type: str,
    prediction: torch.Tensor,
    sample: torch.Tensor,
    level: torch.Tensor,
    scale: float = 1.0,
    threshold: float = 0.0,
) -> torch.Tensor:
    """The prediction of any type whose noise is the corrected one, for the same sample.

    level: as `clean_and_noise` has it, a number; at 0 (zero terminal SNR, the start of a flow) the sample is the noise,
    and nothing that is predicted corrects it.  Raises ModelError.
    """
    if prediction_type == "epsilon":
        return corrected(prediction, scale, threshold)
    if level == 0:
        return prediction
    noise = clean_and_noise(prediction, sample, level, prediction_type)[1]
    signal, rest = level.to(sample).sqrt(), (1 - level.to(sample)).sqrt()
    slopes = {"v_prediction": 1 / signal, "sample": -rest / signal, "flow_prediction": 1 / level.to(sample)}
    slope = slopes[prediction_type]  # of the prediction by the noise
    return prediction + slope * (corrected(noise, scale, threshold) - noise)


def eager(model: nn.Module) -> Any:
    """The model inside the wrapper that torch.compile puts around it; any other model itself."""
    return getattr(model, "_orig_mod", model)


def copy_of(model: Model) -> Model:
    """A second model with the same class, config, weights and device; of a compiled model, of what it wraps."""
    model = eager(model)
    kind: Any = type(model)
    copy = kind.from_config(dict(model.config)).to(model.device)  # type: ignore[arg-type]
    copy.load_state_dict(model.state_dict())
    return copy.train(model.training)


def sample_shape(config: Mapping[str, Any], count: int = 1) -> tuple[int, int, int, int]:
    """[B, C, H, W] of `count` samples that a denoiser with this config takes. Raises ModelError for one of any size."""
    size = config.get("sample_size")
    if size is None:
        raise ModelError(
            got="a model without a sample_size",
            expected="the side of its samples, or two sides",
            where="the model's config",
            do="put a plan of halfstep.plan_for under its own pipeline, which packs pictures of any size into tokens",
        )
    height, width = (size, size) if isinstance(size, int) else size
    return count, config["in_channels"], height, width


def class_count(config: Mapping[str, Any]) -> int:
    """How many classes a denoiser with this config is conditional on; 0: none.

    Raises ModelError for a conditioning that is no class number.
    """
    if config.get("norm_type") == "ada_norm_zero":  # DiT, which has no other name for its classes
        return config["num_embeds_ada_norm"]
    kind, count = config.get("class_embed_type"), config.get("num_class_embeds")
    if kind is not None or count == 0:
        raise ModelError(
            got=f"class_embed_type {kind!r}" if kind is not None else "0 classes",
            expected="no classes, or num_class_embeds of them without a class_embed_type",
            where="the model's config",
            do="bring a model that is conditional on class numbers, or on nothing",
        )
    return count or 0


def require_config(holds: bool, got: str, expected: str, where: str) -> None:
    """Raise ModelError for a config that builds no model."""
    if not holds:
        raise ModelError(got=got, expected=expected, where=where, do="change the model's config")


def require_same_shape(config: Mapping[str, Any], where: object) -> None:
    """Raise ModelError unless a denoiser puts out what it takes in: its prediction, and at most a learned variance of
    the same size beside it (`prediction_of`)."""
    wanted = config.get("in_channels")
    given = config.get("out_channels") or wanted  # DiT: as it takes in, where it says nothing
    if given not in (wanted, 2 * (wanted or 0)):
        raise ModelError(
            got=f"{given} channels out",
            expected=f"{wanted}, as it takes in, or twice as many, a learned variance beside the prediction",
            where=where,
            do="bring a model that predicts one picture from one picture",
        )


def require_labels(labels: torch.Tensor | None, config: Any, where: str) -> None:
    """Raise ModelError unless there are labels exactly when the model has classes."""
    if (labels is None) != (config.num_class_embeds is None):
        raise ModelError(
            got="no class labels" if labels is None else "class labels",
            expected="labels exactly when the model has num_class_embeds",
            where=where,
            do="give or leave out class_labels",
        )
