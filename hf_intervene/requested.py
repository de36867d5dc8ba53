"""What a user asks of a head on a pipeline: interventions, noise, guidance."""

from typing import Any

import torch

from .contexts import Interventions, is_per_sample, parse_choices
from .modeling_intervention import InterventionHead
from .sampling_arguments import check_composition, check_generator, check_noise, check_options
from .values import Values, each_alone, head_values


# targets (images, D) and chosen values of one call of the denoiser
_Pass = tuple[torch.Tensor, Values | None]


class Requested:
    """What is asked of one head, checked; `attaching.intervene` is one of these.

    Args:
        head: in evaluation mode.
        interventions, guidance_scale, noise, generator, num_images, compose: of `intervene`.

    Attributes:
        targets, values: of one image for all, or of each.
        contexts: number of images that the interventions are for; `None`: one context for any
            number.
        noise_rows: number of images that the noise is for; `None`: there is none.
        acted: whether a call of the pipeline was intervened on.
        heads, name, attached: of the head, on its pipeline.

    Raises:
        ValueError, TypeError: one sentence.
    """

    heads: Any
    name: str
    attached: Any

    def __init__(
        self,
        head: InterventionHead,
        interventions: Interventions,
        guidance_scale: float,
        noise: torch.Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
        num_images: int | None,
        compose: str,
    ):
        config = head.config
        check_options(None, 1, None, "pt", guidance_scale=guidance_scale)
        check_composition(compose)
        if noise is not None:
            noise = check_noise("noise", noise, (config.num_blocks, config.noise_width))
        targets, choices = parse_choices(
            interventions, config.concepts, num_images, config.free_blocks
        )
        self.targets = targets.cpu()
        if guidance_scale != 1.0 and not bool((self.targets != 0).any()):
            raise ValueError(
                "guidance_scale compares each step with an observational pass, but nothing is "
                "intervened on: leave it at 1, or intervene."
            )
        self.contexts = len(targets) if is_per_sample(interventions) or len(targets) > 1 else None
        self.noise_rows = None if noise is None else len(noise)
        if self.contexts is not None and self.noise_rows not in (None, self.contexts):
            raise ValueError(
                f"noise has {self.noise_rows} rows for {self.contexts} images: give one row per "
                "image."
            )
        check_generator(generator, len(generator) if isinstance(generator, list) else 1)
        self.values = head_values(head, choices, len(targets), _no_references)
        self.guidance_scale, self.compose = float(guidance_scale), compose
        self.noise, self.generator = noise, generator
        self.num_images = None if num_images is None else int(num_images)
        self.acted = False

    @property
    def further_calls(self) -> bool:
        """Whether the denoiser is called more than once in a step."""
        return self.compose != "head" or self.guidance_scale != 1.0

    def passes(
        self, targets: torch.Tensor, values: Values | None
    ) -> tuple[_Pass, list[tuple[_Pass, float]]]:
        """What the head is given in each call of the denoiser in a step: that of the first call,
        and of further ones with weights.

        The prediction is p + sum of w (p_other - p), where p is that of the first call.

        Args:
            targets: of each image, (images, D).
            values: the chosen values of each image, if there are any.
        """
        observational: _Pass = (torch.zeros_like(targets), None)
        if self.compose == "head":
            w = self.guidance_scale
            return (targets, values), [] if w == 1.0 else [(observational, 1 - w)]
        alone = each_alone(targets, values)
        return observational, [(one, self.guidance_scale) for one in alone]


def _no_references(rows: list[int], names: list[str], images: list[Any]) -> torch.Tensor:
    raise ValueError(
        f"a reference image, here of {names[0]!r}, needs the encoder that the head was trained "
        "with, which this pipeline does not have: choose a Quantile, or use InterventionModel."
    )
