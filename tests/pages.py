"""A tiny page, and what one shows, for the tests."""

import base64
import io
import re

import numpy as np
import torch
from PIL import Image

from hf_intervene import InterventionModel, InterventionPipeline, LightVAE
from hf_intervene.page import Page


def grey_page(folder):
    """The page of a tiny model of grey images, saved there."""
    torch.manual_seed(0)
    base = LightVAE(1, 16, block_out_channels=(8, 8), hidden_width=16, latent_width=12)
    model = InterventionModel.build(base, ["thin", "wide"], noise_width=4, initializer_range=0.5)
    InterventionPipeline.from_model(model).save_pretrained(folder)
    return Page(str(folder))


def drawn(html):
    """The pictures in HTML, by their texts for screen readers: int arrays (H, W, 3)."""
    found = {}
    for data, text in re.findall(r'src="data:image/png;base64,([^"]+)" alt="([^"]*)"', html):
        image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
        found[text] = np.asarray(image).astype(int)
    return found
