"""Checkpoints that tests turn into harmful ones, and the check that they are refused."""

import json
import os

import pytest
import torch
from diffusers import AutoencoderTiny
from fuzzing import bounds
from shared_models import build, frozen_on

from hf_intervene import InterventionModel, InterventionPipeline


HEAD, DIFFUSERS, LORA = "model", "diffusion_pytorch_model", "adapter_model"
PARTS = [  # kind of checkpoint, folder of a part, and name of its weights without ending
    ("model", ".", HEAD),
    ("model", "base", DIFFUSERS),
    ("frozen", "adapter", DIFFUSERS),
    ("lora", "lora", LORA),
    ("pipeline", "head", HEAD),
    ("pipeline", "base", DIFFUSERS),
]
LOADERS = {"pipeline": InterventionPipeline.from_pretrained}


def save_originals(folder):
    """Save a checkpoint of each kind into a folder."""
    model = build()
    model.save_pretrained(folder / "model")
    InterventionPipeline.from_model(model).save_pretrained(folder / "pipeline")
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    AutoencoderTiny(**widths, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(
        folder / "vae"
    )
    frozen_on(AutoencoderTiny.from_pretrained(folder / "vae")).save_pretrained(folder / "frozen")
    frozen_on(AutoencoderTiny.from_pretrained(folder / "vae"), lora_rank=2).save_pretrained(
        folder / "lora"
    )
    return folder


class Canary:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def refused(folder, message, kind="model"):
    """Check that a checkpoint is refused with one sentence, quickly and with little memory."""
    with bounds(memory=1 << 30), pytest.raises((OSError, ValueError), match=message) as error:
        LOADERS.get(kind, InterventionModel.from_pretrained)(folder)
    assert "\n" not in str(error.value)


def change(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
