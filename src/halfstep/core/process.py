"""The forward process: what a denoiser was trained to undo, read whole from a scheduler's config or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from halfstep.core.errors import HalfstepError, ModelError, RecipeError
from halfstep.core.typed import Bounds, build, shown

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

Beta = Annotated[float, Bounds(1e-6, 1)]  # a smaller one leaves 1 - beta = 1 in float32
Share = Annotated[float, Bounds(0, 1)]
Limit = Annotated[float, Bounds(1e-3, 1e6)]


@dataclass(frozen=True, kw_only=True)
class Process:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise, by betas, and what the denoiser predicts of it.

    Where it predicts a flow, the process is flow matching (rectified flow, arXiv 2209.03003): with s = t / timesteps,
    x_t = (1 - s) x_0 + s noise, the prediction is the velocity noise - x_0, and there are no betas, whatever their
    fields say.

    With `trained_betas`, `beta_start` and `beta_end` are their first and last. What stands from `clip_sample` on holds
    for every sampler that is put on it.
    """

    timesteps: Annotated[int, Bounds(1, 100_000), "how many"] = 1000
    beta_schedule: Annotated[
        Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"], "from the first beta to the last"
    ] = "linear"
    beta_start: Annotated[Beta, "the first beta"] = 1e-4
    beta_end: Annotated[Beta, "the last beta"] = 0.02
    trained_betas: Annotated[tuple[Beta, ...], Bounds(0, 100_000), "one for each timestep; none: the schedule's"] = ()
    rescale_betas_zero_snr: Annotated[bool, "move the last alpha_bar to 0 (arXiv 2305.08891)"] = False
    prediction: Annotated[
        Literal["epsilon", "v_prediction", "sample", "flow_prediction"], "what the denoiser predicts"
    ] = "epsilon"
    shift: Annotated[
        Limit, "of flow matching: noise level s becomes shift s / (1 + (shift - 1) s) (arXiv 2403.03206, eq. 23)"
    ] = 1.0
    clip_sample: Annotated[bool, "clamp the estimate of x_0"] = True
    clip_sample_range: Annotated[Limit, "to plus and minus this"] = 1.0
    thresholding: Annotated[bool, "clamp it to a quantile of its magnitudes, where a sampler can"] = False
    dynamic_thresholding_ratio: Annotated[Share, "which quantile"] = 0.995
    sample_max_value: Annotated[Limit, "that quantile at most"] = 1.0
    timestep_spacing: Annotated[
        Literal["own", "linspace", "leading", "trailing"], "which timesteps a sampler takes; own: as it likes"
    ] = "own"
    steps_offset: Annotated[int, Bounds(0, 100_000), "added to leading timesteps"] = 0
    set_alpha_to_one: Annotated[bool | None, "the last step's alpha_bar is 1; none: as the sampler likes"] = None

    def __post_init__(self) -> None:
        if self.trained_betas and len(self.trained_betas) != self.timesteps:
            raise RecipeError(
                got=f"{len(self.trained_betas)} trained betas",
                expected=f"{self.timesteps}, one for each timestep",
                where="the noise process",
                do="change the betas or the number of timesteps",
            )
        if self.steps_offset >= self.timesteps:
            raise RecipeError(
                got=f"a steps_offset of {self.steps_offset}",
                expected=f"below the {self.timesteps} timesteps",
                where="the noise process",
                do="lower it",
            )

    def __repr__(self) -> str:
        """Every field, but for a shift of 1: runs of before shifts know their process by this text."""
        told = (f.name for f in fields(self) if f.name != "shift" or self.shift != 1)
        return f"Process({', '.join(f'{name}={getattr(self, name)!r}' for name in told)})"

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any] | Process,
        *,
        where: object = "the noise scheduler",
        latent: bool = False,
        error: type[HalfstepError] = ModelError,
    ) -> Process:
        """The process of a diffusers scheduler's config, of any class in `BETA_SCHEDULERS`.

        `latent`: of a model on latents, whose samples are no pixels and are not clipped where the config says nothing.
        Flow matching is read too, of the classes in `FLOW_SCHEDULERS`. Raises `error` for a process of another kind
        (EDM, ...), for a learned variance, for a shift that hangs on the picture's size, and for keys and values that
        are not known, which diffusers would drop or trip over later.
        """
        if isinstance(config, Process):
            return config
        name = config.get("_class_name") or "DDPMScheduler"
        if isinstance(name, str) and _is_flow(name, config):
            return _flow_of(name, config, where, error)
        if not isinstance(name, str) or name not in BETA_SCHEDULERS:
            kind = next((kind for kind, classes in OTHER_PROCESSES.items() if name in classes), "")
            raise _refusal(f"{shown(name)}{kind and f' ({kind})'}", where, error)
        said = {key: value for key, value in config.items() if not key.startswith("_") and value is not None}
        _refuse_other_processes(said, where, error)
        betas = said.pop("trained_betas", ())
        if said.pop("predict_epsilon", True) is False:  # how diffusers said it until 0.10
            said.setdefault("prediction_type", "sample")
        if said.get("timestep_spacing") == BETA_SCHEDULERS[name]:
            del said["timestep_spacing"]  # every saved config holds its class's default, whether meant or not
        known = {_FIELDS.get(key, key): value for key, value in said.items() if key not in SAMPLER_KEYS}
        known["trained_betas"] = list(betas) if hasattr(betas, "__len__") and not isinstance(betas, str) else betas
        if latent:
            known.setdefault("clip_sample", False)
        do = "give the scheduler_config.json that the model was trained with"
        found: Process = build(cls, known, "", where, error=error, do=do)
        if found.trained_betas:  # a record with diffusers' defaults beside them would look like another process
            found = replace(found, beta_start=found.trained_betas[0], beta_end=found.trained_betas[-1])
        return found

    def config(self) -> dict[str, Any]:
        """What any diffusers scheduler takes over of the process: betas and prediction always, the rest where it says
        something. Of flow matching what DPM-Solver++ and UniPC take; flow matching's own classes call its shift
        "shift"."""
        if self.is_flow:
            told = {"num_train_timesteps": self.timesteps, "prediction_type": self.prediction}
            return told | {"use_flow_sigmas": True, "flow_shift": self.shift}
        kept = {_KEYS.get(f.name, f.name): getattr(self, f.name) for f in fields(self)}
        plain = {_KEYS.get(f.name, f.name): f.default for f in fields(self)}
        found = {key: value for key, value in kept.items() if key in _ALWAYS or value != plain[key]}
        return found | ({"trained_betas": list(self.trained_betas)} if self.trained_betas else {})

    @property
    def is_flow(self) -> bool:
        return self.prediction == "flow_prediction"

    def check(self) -> None:
        """Raise RecipeError as `scheduler` for betas; a flow leaves a signal until its last moment."""
        if not self.is_flow:
            self.scheduler()

    def scheduler(self) -> DDPMScheduler:
        """The scheduler of the training: its alphas_cumprod, add_noise and get_velocity.

        Raises RecipeError for betas under which no noise or no picture is left before the last timestep, and for flow
        matching, which has none.
        """
        if self.is_flow:
            raise RecipeError(
                got=f"{self}",
                expected="a process of betas",
                where="the noise process",
                do="flow matching is trained, sampled, corrected and searched; restoring, spectra, penalties and "
                "exact scales want betas",
            )
        from diffusers import DDPMScheduler  # here: recipes are values, and reading one needs no torch

        found = DDPMScheduler.from_config(self.config())
        levels = found.alphas_cumprod
        if not bool((levels[:-1] > 1e-20).all() and (levels[1:] < levels[:-1]).all() and levels[0] < 1):
            raise RecipeError(
                got=f"{self}: no signal is left after {int((levels > 1e-20).sum())} timesteps",
                expected="noise that grows and leaves a signal until the last timestep",
                where="the noise process",
                do="lower the betas or the number of timesteps",
            )
        return found

    def __str__(self) -> str:
        if self.is_flow:
            shifted = f", shift {self.shift:g}" if self.shift != 1 else ""
            return f"flow matching over {self.timesteps} timesteps{shifted}, predicts {self.prediction}"
        given = f"{self.timesteps} timesteps"
        given += " of trained betas" if self.trained_betas else f", {self.beta_schedule} betas"
        if not self.trained_betas and self.beta_schedule not in ("squaredcos_cap_v2", "laplace"):
            given += f" {self.beta_start:g} to {self.beta_end:g}"
        said = {
            "zero terminal SNR": self.rescale_betas_zero_snr,
            "thresholding": self.thresholding,
            f"{self.timestep_spacing} timesteps": self.timestep_spacing != "own",
        }
        return ", ".join([given, *(text for text, holds in said.items() if holds), f"predicts {self.prediction}"])


_FIELDS = {"num_train_timesteps": "timesteps", "prediction_type": "prediction"}
_KEYS = {name: key for key, name in _FIELDS.items()}
_ALWAYS = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "prediction_type",
    "clip_sample",
    "clip_sample_range",
)

BETA_SCHEDULERS = {
    **dict.fromkeys(
        (
            "DDIMParallelScheduler",
            "DDIMScheduler",
            "DDPMParallelScheduler",
            "DDPMScheduler",
            "LCMScheduler",
            "PNDMScheduler",
            "TCDScheduler",
        ),
        "leading",
    ),
    **dict.fromkeys(
        (
            "DEISMultistepScheduler",
            "DPMSolverMultistepScheduler",
            "DPMSolverSDEScheduler",
            "DPMSolverSinglestepScheduler",
            "EulerAncestralDiscreteScheduler",
            "EulerDiscreteScheduler",
            "HeunDiscreteScheduler",
            "KDPM2AncestralDiscreteScheduler",
            "KDPM2DiscreteScheduler",
            "LMSDiscreteScheduler",
            "SASolverScheduler",
            "UniPCMultistepScheduler",
        ),
        "linspace",
    ),
}
"""The diffusers schedulers whose config describes a process of betas, and the spacing that each defaults to."""

FLOW_SCHEDULERS = {
    "FlowMatchEulerDiscreteScheduler": "shift",
    "FlowMatchHeunDiscreteScheduler": "shift",
    "DPMSolverMultistepScheduler": "flow_shift",
    "UniPCMultistepScheduler": "flow_shift",
}
"""The diffusers schedulers of flow matching, and the key that each has for its shift; the last two where they say
`use_flow_sigmas` with the prediction "flow_prediction"."""

_FLOW_KEYS = {
    "base_image_seq_len", "base_shift", "max_image_seq_len", "max_shift", "shift_terminal", "stochastic_sampling",
}  # fmt: skip
"""Of flow matching's own classes: what shifts by the picture's size, where that is asked for, and how one walks."""

OTHER_PROCESSES = {
    "flow matching of another kind": (
        "FlowMapEulerDiscreteScheduler",
        "FlowMatchLCMScheduler",
        "HeliosDMDScheduler",
        "HeliosScheduler",
        "LTXEulerAncestralRFScheduler",
        "PiflowScheduler",
    ),
    "EDM's noise levels": (
        "CosineDPMSolverMultistepScheduler",
        "EDMDPMSolverMultistepScheduler",
        "EDMEulerScheduler",
    ),
    "variance exploding": ("KarrasVeScheduler", "ScoreSdeVeScheduler"),
    "sub-VP": ("ScoreSdeVpScheduler",),
    "consistency": ("CMStochasticIterativeScheduler", "SCMScheduler"),
    "discrete tokens": ("AmusedScheduler", "VQDiffusionScheduler"),
    "betas of its own": (
        "CogVideoXDDIMScheduler",
        "CogVideoXDPMScheduler",
        "DDPMWuerstchenScheduler",
        "IPNDMScheduler",
        "UnCLIPScheduler",
    ),
    "from a picture to noise": ("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"),
    "inpainting": ("RePaintScheduler",),
}
"""Schedulers that are known and refused, by what they are; any other class that is not in `BETA_SCHEDULERS` is, too."""

SAMPLER_KEYS = frozenset(
    {
        "algorithm_type",
        "corrector_order",
        "disable_corrector",
        "euler_at_final",
        "final_sigmas_type",
        "flow_shift",
        "interpolation_type",
        "lambda_min_clipped",
        "lower_order_final",
        "noise_sampler_seed",
        "original_inference_steps",
        "predict_x0",
        "predictor_order",
        "sigma_max",
        "sigma_min",
        "skip_prk_steps",
        "solver_order",
        "solver_p",
        "solver_type",
        "tau_func",
        "tensor_format",
        "time_shift_type",
        "timestep_scaling",
        "timestep_type",
        "timestep_values",
        "use_beta_sigmas",
        "use_dynamic_shifting",
        "use_exponential_sigmas",
        "use_flow_sigmas",
        "use_karras_sigmas",
        "use_lu_lambdas",
        "variance_type",
    }
)
"""Keys that say how one sampler walks and nothing about the process, and those of diffusers' first versions."""


def _is_flow(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's config speaks of flow matching, and its class can."""
    return FLOW_SCHEDULERS.get(name) == "shift" or (
        name in FLOW_SCHEDULERS
        and config.get("use_flow_sigmas") is True
        and config.get("prediction_type") == "flow_prediction"
    )


def _flow_of(name: str, config: Mapping[str, Any], where: object, error: type[HalfstepError]) -> Process:
    """The process of such a config. Raises `error` for a shift by the picture's size, and for what no flow here has."""
    said = {key: value for key, value in config.items() if not key.startswith("_") and value is not None}
    if said.get("use_dynamic_shifting"):
        raise error(
            got="use_dynamic_shifting, a shift that hangs on the picture's size",
            expected="one shift for all pictures",
            where=where,
            do="say use_dynamic_shifting false and shift exp(mu), mu as the pipeline has it for your size",
        )
    for key in ("invert_sigmas", "thresholding"):
        if said.pop(key, False):
            expected = "noise levels from 1 to 0, and no clamped estimates"
            raise error(got=f"{key} of flow matching", expected=expected, where=where, do="bring another scheduler")
    if FLOW_SCHEDULERS[name] == "shift":
        said = {key: value for key, value in said.items() if key not in _FLOW_KEYS}
    else:  # classes of betas, which say all that these have beside
        plain = {
            *("beta_schedule", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr"),
            *("dynamic_thresholding_ratio", "sample_max_value", "timestep_spacing", "steps_offset"),
        }
        said = {"shift": said.get("flow_shift", 1.0)} | {key: one for key, one in said.items() if key not in plain}
    other = {"prediction_type", *SAMPLER_KEYS}
    known = {_FIELDS.get(key, key): value for key, value in said.items() if key not in other}
    do = "give the scheduler_config.json that the model was trained with"
    if strange := set(known) - {"timesteps", "shift"}:
        got, expected = f"{shown(min(strange))} of flow matching", "num_train_timesteps and a shift"
        raise error(got=got, expected=expected, where=where, do=do)
    known |= {"prediction": "flow_prediction", "clip_sample": False}
    return build(Process, known, "", where, error=error, do=do)


def _refuse_other_processes(said: Mapping[str, Any], where: object, error: type[HalfstepError]) -> None:
    """Keys of known classes that make another process of them."""
    if said.get("use_flow_sigmas") or said.get("prediction_type") in ("flow_prediction", "flow"):
        raise _refusal("flow matching under a scheduler of betas", where, error)
    if said.get("timestep_type", "discrete") != "discrete":
        raise _refusal("continuous timesteps (EDM's noise levels)", where, error)
    if str(said.get("variance_type", "")).startswith("learned"):
        raise error(
            got=f"variance_type {said['variance_type']!r}",
            expected="a fixed variance: of what a denoiser puts out, the prediction alone is read",
            where=where,
            do='say variance_type "fixed_small", or take DDIM or another sampler that needs none',
        )


def _refusal(got: str, where: object, error: type[HalfstepError]) -> HalfstepError:
    expected = "a process of betas (DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler, ...) or flow matching"
    return error(got=got, expected=expected, where=where, do="bring a model that was trained with one of these")
