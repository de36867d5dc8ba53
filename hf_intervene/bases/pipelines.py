"""Any text-to-image pipeline of diffusers as a base, by a recording of how it calls its denoiser
(see `recording.py`).

    base = PipelineBase.from_pipeline(pipe, prompt="")
    model = InterventionModel.build(base, ["smile", "glasses"])

The denoiser, the autoencoder and the scheduler are the pipeline's own. Its text encoders are needed
for the recording alone. A noisy sample has the shape that the pipeline's scheduler steps on, such
as packed tokens (S, c)."""

import inspect
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from transformers import BaseImageProcessor, PreTrainedModel

from .adapter import DiffusionAdapter, check_sites
from .autoencoder import images_of, latent_shape, latents_of
from .diffusion import DiffusionBase
from .injection import Entries, Injection
from .prompts import Prompts, record_prompts
from .recording import NotRecordable, Recorder, record, training_time
from .registry import register_recorded
from .replay import Recording, on_device
from .schedulers import prediction_type
from .sites import find_sites


# The most that a token of an embedding is wide: as wide as the text's tokens of Stable Diffusion 1.
# With the 2,048 of XL an adapter would have 344 million weights.
_TOKEN_WIDTH = 768


@register_recorded
class PipelineBase(DiffusionBase):
    """The denoiser of a pipeline under a head; of images, or of clips (B, C, T, S, S).

    `from_pipeline` makes one. The constructor puts one together of its parts, as a saved model
    does. Of two denoisers that share the noise levels, as those of Wan 2.2, the head enters both;
    the second one stays frozen.

    Args:
        model: the denoiser.
        scheduler, vae: the pipeline's.
        base_2: the second denoiser, for the lower noise levels.
        image_encoder, image_processor, min_snr_gamma: see `DiffusionBase`.
        adapter: the adapter, which holds the recording.

    Raises:
        TypeError, ValueError: one sentence: no scheduler or vae, an adapter without a recording or
            for another denoiser, a vae whose latents the recording is not of, no second denoiser
            where there were two.
    """

    companion_names = (*DiffusionBase.companion_names, "base_2")
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
        base_2: ModelMixin | None = None,
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
        size, frames = adapter.config.sample_size, adapter.config.num_frames
        self.image_shape = _shape_of(vae, size, frames)
        self.sample_shape = recording.sample_shape
        if self._as_encoded(recording.latent_shape) != tuple(latent_shape(vae, self.image_shape)):
            shape = tuple(latent_shape(vae, self.image_shape))
            raise ValueError(
                f"the {type(vae).__name__} makes latents of shape {shape} of images of {size}"
                f" pixels, but the pipeline decodes {recording.latent_shape}: pass the vae of its"
                " pipeline, or record it at another sample_size."
            )
        self._enter_by(adapter)
        if (base_2 is None) != (adapter.config.boundary is None):
            raise ValueError(
                f"a head on this {name} was made for {2 - (base_2 is not None)} denoisers: pass"
                f" {'both, the second one as base_2=' if base_2 is None else 'no base_2'}."
            )
        self.base_2, self.injection_2 = base_2, None
        if base_2 is not None:
            base_2.requires_grad_(False).eval()
            check_sites(find_sites(base_2), adapter, type(base_2).__name__)
            self.injection_2 = Injection(base_2)
            self.injection_2.install()

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
        num_frames: int | None = None,
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
            num_frames: of clips, for a pipeline that makes them; `None`: a head on single images.

        Raises:
            TypeError, NotRecordable (a ValueError): one sentence: no pipeline, a denoiser without a
                site, a scheduler of another kind, or what of the pipeline's run the recording does
                not equal.
        """
        if num_frames is not None:
            if "num_frames" not in inspect.signature(type(pipe).__call__).parameters:
                raise NotRecordable(
                    f"a {type(pipe).__name__} makes images and no clips: leave frames out."
                )
            call = {"num_frames": num_frames} | dict(call or {})
        call = dict(call or {})
        recorder = Recorder(pipe, prompt, sample_size, call)
        model = recorder.denoiser
        sites = find_sites(model)
        recording = record(recorder)
        scheduler = training_time(recorder)
        vae = pipe.vae
        num_frames = None if call.get("num_frames", 1) == 1 else call["num_frames"]
        if (
            num_frames is None
            and len(recording.latent_shape) == 4
            and recording.latent_shape[1] > 1
        ):
            raise NotRecordable(
                f"a {type(pipe).__name__} makes clips of several frames: give num_frames."
            )
        size = pixels_of(vae, recording, num_frames)
        if sample_size not in (None, size):
            raise NotRecordable(
                f"a {type(pipe).__name__} makes images of {size} pixels where {sample_size} were"
                " asked for."
            )
        shape: tuple[int, ...] = (embedding_width,)
        if sites.tokens:
            shape = (num_tokens, min(sites.cross_width, _TOKEN_WIDTH))
        *channels, height, width = _without_frame(recording.latent_shape)
        if sites.map:
            raise NotRecordable(
                f"a {type(model).__name__} is not recorded: build the model of it and its"
                " scheduler."
            )
        # The frames of a clip's latents are channels to the small encoder and decoder.
        decoded_shape = (math.prod(channels), height, width)
        adapter = DiffusionAdapter(
            sample_size=size,
            sites=vars(sites),
            embedding_shape=shape,
            encoder_shape=None if image_encoder is not None else decoded_shape,
            decoded_shape=decoded_shape,
            feature_width=128 if image_encoder is None else image_encoder.config.hidden_size,
            prediction_type=prediction_type(scheduler),
            recording=recording.config,
            num_frames=num_frames,
            boundary=recorder.boundary,
        )
        adapter.recorded.load_state_dict(recording.state_dict())
        second = list(recorder.denoisers.values())[1:]
        parts = (scheduler, vae, image_encoder, image_processor, adapter, min_snr_gamma, *second)
        base = cls(model, *parts)
        if prompts is not None:
            if prompt_folder is None:
                raise ValueError("prompts of images are kept in files: give prompt_folder.")
            base.prompts = record_prompts(recorder, recording, prompts, prompt_folder)
        return base

    def prepare(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            latents = latents_of(self.vae, (2 * pixel_values - 1).to(self.vae.dtype))[0].float()
            x0 = self.adapter.recorded.from_latents(latents)
            if self.image_encoder is None:
                return {"x0": x0}
            return {"x0": x0, "features": self.image_encoder(pixel_values)}

    def _arranged(self, x0: torch.Tensor) -> torch.Tensor:
        # Unscaled: about of variance 1. The frames of a clip are channels.
        latents = self.adapter.recorded.tail.arranged(x0)  # (B, *latent_shape)
        *_, height, width = latents.shape
        return latents.reshape(len(latents), -1, height, width)

    def denoise(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        embedding: torch.Tensor | Entries,
        prompts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The prediction, as that of `DiffusionBase`.

        Args:
            x, timesteps, embedding: see there.
            prompts: of each row the number of its prompt among `self.prompts`, (B,) int64; -1 is
                the one of the recording. `None`: all have that one. Rows whose prompts are of the
                same length are denoised together. On the CPU, or the host waits for the device.
        """
        rows, texts, entries = [*range(len(x))], None, self._entries(embedding)
        groups = [rows]
        if prompts is not None and self.prompts is not None:
            numbers = prompts.tolist()
            groups, texts = self.prompts.groups(numbers), [self.prompts[n] for n in numbers]
        calls = [(group, self.injection) for group in groups]
        if self.injection_2 is not None:  # which of the two it is waits for the device
            early = (timesteps >= self.adapter.config.boundary).expand(len(x)).tolist()
            calls = [
                ([row for row in group if early[row] == first], injection)
                for group in groups
                for first, injection in ((True, self.injection), (False, self.injection_2))
            ]
        found: list[torch.Tensor] = []
        order: list[int] = []
        for group, injection in calls:
            if not group:
                continue
            text = None if texts is None else [texts[row] for row in group]
            order += group
            if group == rows:
                part = x, timesteps, entries
            else:
                index = on_device(torch.tensor(group), x.device)
                part = x[index], timesteps.expand(len(x))[index], entries.rows(index)
            found.append(self._denoise(*part, injection, text=text))
        if len(found) == 1 and order == rows:
            return found[0]
        return torch.cat(found)[on_device(torch.tensor(order).argsort(), x.device)]

    def _predicted(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        denoiser: Any = None,
        text: Sequence[dict[int, torch.Tensor]] | None = None,
    ) -> torch.Tensor:
        recording, denoiser = self.adapter.recorded, denoiser or self.model
        arguments = recording.call(x, timesteps.expand(len(x)), denoiser.dtype, text)
        return recording.predicted(denoiser(**arguments))

    def _to_images(self, x0: torch.Tensor) -> torch.Tensor:
        latents = self.adapter.recorded.to_latents(x0)
        latents = latents.view(len(latents), *self._as_encoded(latents.shape[1:]))
        return images_of(self.vae, latents.to(self.vae.dtype))

    def _as_encoded(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of what the pipeline decodes as the autoencoder makes it of an image: without
        the axis of its one frame."""
        return tuple(shape) if len(self.image_shape) == 4 else _without_frame(tuple(shape))

    def companions(self) -> dict[str, Any]:
        return super().companions() | ({} if self.base_2 is None else {"base_2": self.base_2})

    def release(self) -> None:
        super().release()
        if self.injection_2 is not None:
            self.injection_2.remove()

    def train(self, mode: bool = True) -> "PipelineBase":
        super().train(mode)
        if self.base_2 is not None:
            self.base_2.eval()
        return self


def _without_frame(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape (c, h, w) of latents (c, h, w) or (c, 1, h, w)."""
    if len(shape) == 4 and shape[1] == 1:
        return (shape[0], *shape[2:])
    return tuple(shape)


def _shape_of(vae: ModelMixin, size: int, frames: int | None) -> tuple[int, ...]:
    """(C, S, S) of images, or (C, T, S, S) of clips."""
    channels = vae.config.get("in_channels", 3)
    return (channels, size, size) if frames is None else (channels, frames, size, size)


def pixels_of(vae: ModelMixin, recording: Recording, frames: int | None = None) -> int:
    """Side in pixels of the images that a pipeline was recorded with, or of the clips of so many
    frames.

    Raises:
        NotRecordable: its autoencoder makes latents of another size, or the images are not square.
    """
    *_, height, width = recording.latent_shape
    for exponent in range(7):
        size = height << exponent
        try:
            shape = latent_shape(vae, _shape_of(vae, size, frames))
        except ValueError:
            continue
        expected = recording.latent_shape[-2:] if frames is None else recording.latent_shape[1:]
        if height == width and tuple(shape[-len(expected) :]) == expected:
            return size
    if frames is not None:
        raise NotRecordable(
            f"the pipeline decodes latents of {' x '.join(map(str, recording.latent_shape[1:]))}"
            f" (frames, height, width), which are of no square clip of {frames} frames that its"
            f" {type(vae).__name__} encodes: give sample_size, in pixels, and another num_frames."
        )
    raise NotRecordable(
        f"a head needs square images, and the pipeline decodes latents of {height} x {width}, which"
        f" are of none that its {type(vae).__name__} encodes: give sample_size, in pixels."
    )


__all__ = ["PipelineBase"]
