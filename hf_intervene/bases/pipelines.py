"""Any text-to-image pipeline of diffusers as a base, by a recording of how it calls its denoiser
(see `recording.py`).

    base = PipelineBase.from_pipeline(pipe, prompt="")
    model = InterventionModel.build(base, ["smile", "glasses"])

The denoiser, the autoencoder and the scheduler are the pipeline's own. Its text encoders are needed
for the recording alone. A noisy sample has the shape that the pipeline's scheduler steps on, such
as packed tokens (S, c)."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from transformers import BaseImageProcessor, PreTrainedModel

from .adapter import DiffusionAdapter
from .autoencoder import images_of, latent_shape, latents_of
from .base import register_recorded
from .denoising import prediction_type
from .diffusion import DiffusionBase
from .prompts import Prompts, record_prompts
from .recording import NotRecordable, Recorder, record, training_time
from .replay import Recording
from .sites import find_sites


@register_recorded
class PipelineBase(DiffusionBase):
    """The denoiser of a pipeline under a head.

    `from_pipeline` makes one. The constructor puts one together of its parts, as a saved model
    does.

    Args:
        model: the denoiser.
        scheduler, vae: the pipeline's.
        image_encoder, image_processor, min_snr_gamma: see `DiffusionBase`.
        adapter: the adapter, which holds the recording.

    Raises:
        TypeError, ValueError: one sentence: no scheduler or vae, an adapter without a recording or
            for another denoiser, a vae whose latents the recording is not of.
    """

    vae: ModelMixin
    prompts: Prompts | None = None  # of the images that it is trained with

    def __init__(
        self,
        model: ModelMixin,
        scheduler: SchedulerMixin | None = None,
        vae: ModelMixin | None = None,
        image_encoder: PreTrainedModel | None = None,
        image_processor: BaseImageProcessor | None = None,
        adapter: DiffusionAdapter | None = None,
        min_snr_gamma: float | None = None,
    ):
        super(DiffusionBase, self).__init__(model)
        name = type(model).__name__
        recording = getattr(adapter, "recorded", None)
        if adapter is None or recording is None:
            raise ValueError(
                f"nothing is known of how a pipeline calls this {name}: make the base with"
                " PipelineBase.from_pipeline."
            )
        if vae is None:
            raise ValueError(
                f"a head on a {name} needs the autoencoder of its pipeline: pass vae=."
            )
        recording.check()
        self._take_parts(scheduler, vae, image_encoder, image_processor, min_snr_gamma)
        size = adapter.config.sample_size
        self.image_shape = (vae.config.get("in_channels", 3), size, size)
        self.sample_shape = recording.sample_shape
        shape = tuple(latent_shape(vae, self.image_shape))
        if _without_frame(recording.latent_shape) != shape:
            raise ValueError(
                f"the {type(vae).__name__} makes latents of shape {shape} of images of {size}"
                f" pixels, but the pipeline decodes {recording.latent_shape}: pass the vae of its"
                " pipeline, or record it at another sample_size."
            )
        self._enter_by(adapter)

    @classmethod
    def from_pipeline(
        cls,
        pipe: DiffusionPipeline,
        prompt: str = "",
        sample_size: int | None = None,
        call: Mapping[str, Any] | None = None,
        image_encoder: PreTrainedModel | None = None,
        image_processor: BaseImageProcessor | None = None,
        embedding_width: int = 128,
        num_tokens: int = 4,
        min_snr_gamma: float | None = None,
        prompts: Sequence[str] | None = None,
        prompt_folder: str | os.PathLike | None = None,
    ) -> "PipelineBase":
        """Record how a pipeline calls its denoiser, and make a base of its parts. The pipeline is
        left as it was.

        Args:
            pipe: the pipeline.
            prompt: the prompt that the head is trained and sampled with.
            sample_size: side of the images in pixels; `None`: the pipeline's own.
            call: further arguments of the pipeline's call, such as `image` and `mask_image`, or
                `prompt_embeds` in place of the prompt.
            image_encoder, image_processor, embedding_width, num_tokens, min_snr_gamma: see
                `DiffusionBase`.
            prompts: prompts of images to train with, each one once; see `denoise`.
            prompt_folder: where what the text encoders make of them is kept; what is there already
                is not made again.

        Raises:
            TypeError, NotRecordable (a ValueError): one sentence: no pipeline, a denoiser without a
                site, a scheduler of another kind, or what of the pipeline's run the recording does
                not equal.
        """
        recorder = Recorder(pipe, prompt, sample_size, call or {})
        model = recorder.denoiser
        sites = find_sites(model)
        recording = record(recorder)
        scheduler = training_time(recorder)
        vae, frames = pipe.vae, recording.latent_shape[1] if len(recording.latent_shape) == 4 else 1
        if frames > 1:
            raise NotRecordable(
                f"a {type(pipe).__name__} makes clips of several frames: a head is trained on"
                " single images."
            )
        size = pixels_of(vae, recording)
        if sample_size not in (None, size):
            raise NotRecordable(
                f"a {type(pipe).__name__} makes images of {size} pixels where {sample_size} were"
                " asked for."
            )
        shape = (num_tokens, sites.cross_width) if sites.tokens else (embedding_width,)
        latents = _without_frame(recording.latent_shape)
        if sites.map:
            raise NotRecordable(
                f"a {type(model).__name__} is not recorded: build the model of it and its"
                " scheduler."
            )
        adapter = DiffusionAdapter(
            sample_size=size,
            sites=vars(sites),
            embedding_shape=shape,
            encoder_shape=None if image_encoder is not None else latents,
            feature_width=128 if image_encoder is None else image_encoder.config.hidden_size,
            prediction_type=prediction_type(scheduler),
            recording=recording.config,
        )
        adapter.recorded.load_state_dict(recording.state_dict())
        base = cls(model, scheduler, vae, image_encoder, image_processor, adapter, min_snr_gamma)
        if prompts is not None:
            if prompt_folder is None:
                raise ValueError("prompts of images are kept in files: give prompt_folder.")
            base.prompts = record_prompts(recorder, recording, prompts, prompt_folder)
        return base

    def prepare(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            latents = latents_of(self.vae, (2 * pixel_values - 1).to(self.vae.dtype))[0].float()
            x0 = self.adapter.recorded.from_latents(latents)
            return {"x0": x0} | (
                {} if self.image_encoder is None else {"features": self.image_encoder(pixel_values)}
            )

    def _features(self, prepared: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if self.image_encoder is not None:
            return prepared["features"]
        latents = self.adapter.recorded.tail.arranged(
            prepared["x0"]
        )  # unscaled: about of variance 1
        latents = latents.view(len(latents), *_without_frame(latents.shape[1:]))
        return self.adapter.encoder(latents.to(self.adapter.dtype))

    def denoise(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        embedding: torch.Tensor,
        prompts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The prediction, as that of `DiffusionBase`.

        Args:
            x, timesteps, embedding: see there.
            prompts: of each row the number of its prompt among `self.prompts`, (B,) int64; -1 is
                the one of the recording. `None`: all have that one. Rows whose prompts are of the
                same length are denoised together.
        """
        if prompts is None or self.prompts is None:
            return self._denoise(x, timesteps, embedding)
        numbers, timesteps = prompts.tolist(), timesteps.expand(len(x))
        groups = self.prompts.groups(numbers)
        found = []
        for group in groups:
            index = torch.tensor(group, device=x.device)
            text = [self.prompts[numbers[row]] for row in group]
            found.append(self._denoise(x[index], timesteps[index], embedding[index], text=text))
        order = torch.tensor([row for group in groups for row in group], device=x.device)
        return torch.cat(found)[order.argsort()]

    def _predicted(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        text: Sequence[dict[int, torch.Tensor]] | None = None,
    ) -> torch.Tensor:
        recording: Recording = self.adapter.recorded
        arguments = recording.call(x, timesteps.expand(len(x)), self.model.dtype, text)
        return recording.predicted(self.model(**arguments))

    def _to_images(self, x0: torch.Tensor) -> torch.Tensor:
        latents = self.adapter.recorded.to_latents(x0)
        return images_of(
            self.vae,
            latents.view(len(latents), *_without_frame(latents.shape[1:])).to(self.vae.dtype),
        )


def _without_frame(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape (c, h, w) of latents (c, h, w) or (c, 1, h, w)."""
    if len(shape) == 4 and shape[1] == 1:
        return (shape[0], *shape[2:])
    return tuple(shape)


def pixels_of(vae: ModelMixin, recording: Recording) -> int:
    """Side in pixels of the images that a pipeline was recorded with.

    Raises:
        NotRecordable: its autoencoder makes latents of another size, or the images are not square.
    """
    *_, height, width = recording.latent_shape
    for exponent in range(7):
        size = height << exponent
        try:
            shape = latent_shape(vae, (vae.config.get("in_channels", 3), size, size))
        except ValueError:
            continue
        if height == width and tuple(shape[-2:]) == (height, width):
            return size
    raise NotRecordable(
        f"a head needs square images, and the pipeline decodes latents of {height} x {width}, which"
        f" are of none that its {type(vae).__name__} encodes: give sample_size, in pixels."
    )


__all__ = ["PipelineBase"]
