"""Frozen vision models of transformers as encoders: pretrained features for the head's posterior to
read z from.

With `posterior="unconditional"` that is the linear readout of the paper, c_j = C_j h + noise, on
real pretrained features (METHOD section 2); with the other posteriors a small network that is told
the targets too."""

import torch
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel


class VisionEncoder(nn.Module):
    """Features of a frozen vision model (ViT, DINOv2, CLIP vision: any `AutoModel` with an image
    processor).

    Args:
        model: the vision model; frozen and put into evaluation mode.
        image_processor: its image processor.

    Raises:
        TypeError: one of the two is something else.
    """

    def __init__(self, model: PreTrainedModel, image_processor: BaseImageProcessor | None):
        super().__init__()
        if not isinstance(model, PreTrainedModel):
            raise TypeError(
                "image_encoder must be a vision model of transformers, not a"
                f" {type(model).__name__}."
            )
        if image_processor is None or not callable(getattr(image_processor, "preprocess", None)):
            raise TypeError(
                "an image_encoder needs its image processor (AutoImageProcessor) as"
                f" image_processor, not {image_processor!r}."
            )
        self.model, self.image_processor = model.requires_grad_(False).eval(), image_processor
        self.width = model.config.hidden_size

    def train(self, mode: bool = True) -> "VisionEncoder":
        return super().train(False)  # frozen, dropout too

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features (B, width), float32, of images (B, 3, H, W) in [0, 1]: the pooled output, or the
        mean of the last hidden states. Those of a clip (B, 3, T, H, W) are means over its frames.
        """
        if pixel_values.ndim == 5:
            frames = pixel_values.transpose(1, 2)  # (B, T, 3, H, W)
            return self(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).mean(1)
        images = (pixel_values * 255).round().to(torch.uint8).cpu()
        inputs = self.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        output = self.model(inputs.to(self.model.device, self.model.dtype))
        pooled = output.get("pooler_output")
        if pooled is None:
            pooled = output.last_hidden_state.flatten(2).mean(
                2 if output.last_hidden_state.ndim == 4 else 1
            )
        return pooled.flatten(1).float()
