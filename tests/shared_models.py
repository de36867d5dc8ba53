"""Tiny models for the tests of the Hub, and a pretrained base on the Hub."""

from pathlib import Path

import torch
from conftest import HUB
from diffusers import AutoencoderTiny

from hf_intervene import (
    InterventionHead,
    InterventionModel,
    InterventionPipeline,
    LightVAE,
    wrap_base,
)
from hf_intervene.bases.lora import add_lora


ALICE = {"token": "hf_alice"}
LOADERS = {"head": InterventionHead, "model": InterventionModel, "pipeline": InterventionPipeline}


def build(seed=0):
    torch.manual_seed(seed)
    base = LightVAE(3, 16, block_out_channels=(8, 8), hidden_width=16, latent_width=12)
    return InterventionModel.build(base, ["a", "b"], noise_width=4, initializer_range=0.5).eval()


def one_sentence(error):
    """Return the message of an error, which must be a sentence with the client's error as cause."""
    message = str(error.value)
    assert "\n" not in message and message.rstrip(")").endswith(".") and "http" not in message, (
        message
    )
    assert error.value.__cause__ is not None
    return message


def of_kind(kind, model):
    return {
        "head": lambda: model.head,
        "model": lambda: model,
        "pipeline": lambda: InterventionPipeline.from_model(model),
    }[kind]()


def outcome(saved):
    """Return the output of a head, model or pipeline for a fixed noise."""
    head = saved if isinstance(saved, InterventionHead) else saved.head
    noise = torch.randn(
        2,
        head.config.num_blocks,
        head.config.noise_width,
        generator=torch.Generator().manual_seed(0),
    )
    if saved is head:
        with torch.no_grad():
            return head(noise, head.targets("a+b", 2)).embedding
    return (saved.model if isinstance(saved, InterventionPipeline) else saved).sample(
        "a+b", noise=noise
    )


def put_folder(repo_id, folder, **options):
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }
    return HUB.put(repo_id, files, **options)


def put_vae(repo_id="org/vae", seed=0, subfolder="", tmp_path=None):
    """Put a pretrained autoencoder on the Hub."""
    torch.manual_seed(seed)
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    vae = AutoencoderTiny(**blocks, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    vae.save_pretrained(tmp_path / repo_id / subfolder)
    return put_folder(repo_id, tmp_path / repo_id)


def frozen_on(vae, **options):
    torch.manual_seed(1)
    model = InterventionModel.build(
        wrap_base(vae, sample_size=16), ["a", "b"], noise_width=4, initializer_range=0.5, **options
    )
    if model.config.lora_rank:
        add_lora(model.base.model, model.config.lora_rank)
        for name, p in model.base.model.named_parameters():
            p.data += 0.1 * (".lora_" in name)
    else:
        model.base.trainable(False)
    return model.eval()
