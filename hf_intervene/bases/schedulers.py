"""What the schedulers of diffusers say of noise and of what their denoiser predicts.

In all of them x_t = a_t x_0 + s_t noise. The denoiser predicts the noise (`epsilon`),
`v_prediction`, the clean sample (`sample`), or, of a flow, the velocity (`flow`) or the clean
sample (`flow_sample`)."""

from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..logging import get_logger


logger = get_logger(__name__)

# Schedulers whose noise is known: x_t = a_t x_0 + s_t noise by `alphas_cumprod`, and what the
# denoiser predicts by the configuration's `prediction_type`.
DIFFUSION_SCHEDULERS = (
    *("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "DDIMInverseScheduler", "DDIMScheduler"),
    *("DDIMParallelScheduler", "DDPMParallelScheduler", "DDPMScheduler", "DEISMultistepScheduler"),
    *("DPMSolverMultistepInverseScheduler", "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler"),
    *("DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler"),
    *("HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler"),
    *("LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler", "TCDScheduler"),
    *("UnCLIPScheduler", "UniPCMultistepScheduler"),
)
# Of a flow, always.
FLOW_SCHEDULERS = (
    *("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"),
)
# By the configuration's name: what denoisers predict, of a diffusion and of a flow.
_OF_DIFFUSIONS = {name: name for name in ("epsilon", "v_prediction", "sample")}
_OF_FLOWS = {"flow_prediction": "flow", "sample": "flow_sample"}


def prediction_type(scheduler: SchedulerMixin) -> str:
    """What the denoiser of a scheduler predicts, by the names above.

    Raises:
        ValueError: one sentence: a scheduler whose noise is not known, or another prediction.
    """
    names = {class_.__name__ for class_ in type(scheduler).__mro__}  # of a sub-class too
    if names & set(FLOW_SCHEDULERS):
        return "flow"
    kind, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    if not names & set(DIFFUSION_SCHEDULERS) or config.get("timestep_type") == "continuous":
        continuous = bool(names & set(DIFFUSION_SCHEDULERS))
        why = "has continuous times" if continuous else "has a noise that is not known here"
        raise ValueError(
            f"a {kind} {why}: use one that is in the documentation's list, such as a DDIMScheduler"
            " or a FlowMatchEulerDiscreteScheduler, if the denoiser was trained for it."
        )
    found = config.get("prediction_type", "epsilon")
    of_flow = config.get("use_flow_sigmas") or found == "flow_prediction"
    predictions = _OF_FLOWS if of_flow else _OF_DIFFUSIONS
    if found not in predictions:
        raise ValueError(
            f"a {kind} of this noise whose denoiser predicts {found!r} is not supported; the"
            f" supported predictions are {', '.join(predictions)}."
        )
    return predictions[found]


def is_flow(kind: str) -> bool:
    """Whether a prediction is one of a flow, whose a_t = 1 - s_t."""
    return kind.startswith("flow")


def _is_flow_match(scheduler: SchedulerMixin) -> bool:
    return type(scheduler).__name__.startswith("FlowMatch")


def check_prediction(scheduler: SchedulerMixin, expected: str, what: str) -> None:
    """Raise a ValueError unless a scheduler's prediction type is the one that something was trained
    with.
    """
    found = prediction_type(scheduler)
    if found != expected:
        raise ValueError(
            f"{what} was trained with {expected!r} predictions, but this {type(scheduler).__name__}"
            f" takes the denoiser's for {found!r}: make the scheduler with from_config(...) of the"
            " one it was trained with."
        )


def warn_of_clipping(scheduler: SchedulerMixin, vae: str) -> None:
    """Warn of a scheduler that keeps samples in the range of pixels, where latents are denoised."""
    if scheduler.config.get("clip_sample") and scheduler.config.get("clip_sample_range", 1.0) <= 1:
        logger.warning(
            "the scheduler clips samples at 1, where pixels end, but the latents of a %s go"
            " beyond: make it with clip_sample=False.",
            vae,
        )


def deterministic(scheduler: SchedulerMixin) -> SchedulerMixin:
    """A DDPM's ancestral scheduler is for training and a thousand steps: DDIM in its place, which
    keeps its noise; others as they are.
    """
    if isinstance(scheduler, DDPMScheduler):
        return DDIMScheduler.from_config(
            scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True
        )
    return scheduler


def training_scheduler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The same schedule as a scheduler for training: a DDPM's, or the flow's own, as it is before
    sampling.
    """
    if not is_flow(prediction_type(scheduler)):
        made = DDPMScheduler.from_config(scheduler.config)
        # Some schedulers shift or rescale the noise of their configuration.
        made.alphas_cumprod = scheduler.alphas_cumprod.clone()
        return made
    if not _is_flow_match(scheduler):
        # A solver that takes flows too: its sigmas are those of other kinds until it samples.
        steps, shift = scheduler.config.num_train_timesteps, scheduler.config.get("flow_shift")
        return FlowMatchEulerDiscreteScheduler(steps, shift=1.0 if shift is None else shift)
    return type(scheduler).from_config(scheduler.config)
