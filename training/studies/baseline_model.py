"""The model of a baseline: a light VAE without a head; see `baselines.py`."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.utils.torch_utils import randn_tensor
from safetensors.torch import load_file, save_file
from torch import nn

from hf_intervene.bases import LightVAE
from hf_intervene.contexts import OBS
from hf_intervene.data import ContextImages
from hf_intervene.model import InterventionModel
from hf_intervene.posterior import gaussian_kl
from hf_intervene.training.studies.baseline_losses import (
    averaged_posteriors,
    decomposed_kl,
    triplet_loss,
)
from hf_intervene.values import Values


BASELINES = ("conditional-vae", "beta-tcvae", "ada-gvae", "tvae")
WEIGHTS = {"beta-tcvae": 4.0, "tvae": 10.0}  # default of `weight`, for those that have one


class Baseline(InterventionModel):
    """A light VAE without a head, z of shape (B, latent_width, 1, 1). Only `conditional-vae` edits;
    the others' `edit` reconstructs.

    Args:
        base: its encoder and decoder. For `conditional-vae` the layer after the features and the
            first one after z are made anew, to take the targets too.
        concepts: names of the concepts, d of them.
        baseline: one of `BASELINES`.
    """

    def __init__(self, base: LightVAE, concepts: Sequence[str], baseline: str):
        plain = InterventionModel.build(base, concepts, "base-pooled", free_blocks=0)
        super().__init__(plain.config, plain.base)
        self.baseline = baseline
        width, hidden, d = base.config.latent_width, base.config.hidden_width, len(concepts)
        if self.conditional:
            base.quant, base.decoder[1] = (
                nn.Linear(hidden + d, 2 * width),
                nn.Linear(width + d, hidden),
            )
        else:  # row 0: obs; row k: concept k
            self.register_buffer("context_means", torch.zeros(1 + d, width))
            self.register_buffer("context_covariances", torch.eye(width).repeat(1 + d, 1, 1))

    @property
    def conditional(self) -> bool:
        return self.baseline == "conditional-vae"

    def _posterior_of(
        self, features: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.base.posterior(
            torch.cat([features, targets.to(features)], 1) if self.conditional else features
        )

    def embed(
        self, z: torch.Tensor, targets: torch.Tensor, values: Values | None = None
    ) -> torch.Tensor:
        return torch.cat([z, targets.to(z)[..., None, None]], 1) if self.conditional else z

    def objective(
        self,
        x: torch.Tensor,
        s: torch.Tensor,
        ids: torch.Tensor,
        noise: torch.Tensor,
        beta: float,
        weight: float,
        images: int,
    ) -> torch.Tensor:
        """The loss of a batch: scalar, nats an image.

        Args:
            x, s: images (B, C, H, W) and their targets (B, d); for `ada-gvae` B / 2 observational
                ones, then their partners.
            ids: context of each image, (B,).
            noise: standard normal, (B, latent_width, 1, 1).
            beta, weight: see the losses.
            images: size of the training set.
        """
        encoded = self.base.encode(x)
        mean, logvar = self._posterior_of(encoded.features, s)
        mean, logvar = mean.float(), logvar.float()
        if self.baseline == "ada-gvae":
            mean, logvar = averaged_posteriors(mean, logvar)
        z = mean + (0.5 * logvar).exp() * noise
        loss = self.base.loss(self.embed(z, s), encoded, {})["reconstruction_loss"].mean()
        if self.baseline == "beta-tcvae":
            return loss + decomposed_kl(
                mean.flatten(1), logvar.flatten(1), z.flatten(1), beta, weight, images
            )
        if self.baseline == "tvae":
            loss = loss + weight * triplet_loss(mean.flatten(1), ids)
        return loss + beta * gaussian_kl(mean, logvar).mean()

    @torch.no_grad()
    def fit_contexts(self, data: ContextImages) -> None:
        """Take mean and covariance of each context's aggregate posterior: exactly, by the law of
        total variance, where draws would only add noise. The mean of the posterior variances keeps
        the covariance regular: nothing needs to be shrunk."""
        self.eval()
        for number, name in enumerate((OBS, *self.concepts)):
            moments = []
            for pixels in data.select([name]).pixels.split(256):
                x = pixels.to(self.device).float() / 255
                moments.append(
                    [
                        part.flatten(1).double()
                        for part in self.posterior(x, self.targets(name, len(x)))
                    ]
                )
            mean, logvar = (torch.cat(parts) for parts in zip(*moments))  # (n, latent_width)
            self.context_means[number] = mean.mean(0)
            self.context_covariances[number] = (
                mean.T.cov(correction=0) + logvar.exp().mean(0).diag()
            )

    def context_noise(self, noise: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Draws from the contexts' Gaussians, (B, latent_width, 1, 1), of standard normal noise of
        that shape under targets (B, d).
        """
        z = torch.empty_like(noise)
        for row in targets.unique(dim=0):
            shares = torch.cat([1 - row.sum(dim=0, keepdim=True), row])  # obs + sum_k s_k (k - obs)
            mean = shares @ self.context_means
            values, vectors = torch.linalg.eigh(
                torch.einsum("k,kij->ij", shares, self.context_covariances)
            )
            root = vectors * values.clamp(min=0).sqrt() @ vectors.T
            chosen = (targets == row).all(1)
            z[chosen] = (mean + noise[chosen].flatten(1) @ root)[..., None, None]
        return z

    def sample(self, interventions=None, num_images=None, generator=None, noise=None, **options):
        """As `InterventionModel.sample`; the contexts as in the docstring of `baselines.py`."""
        targets = self.targets(
            interventions, len(noise) if num_images is None and noise is not None else num_images
        )
        if noise is None:
            noise = randn_tensor(
                (len(targets), *self.noise_shape), generator=generator, device=self.device
            )
        if not self.conditional:
            noise = self.context_noise(noise.to(self.device), targets)
        return super().sample(targets, noise=noise, generator=generator, **options)

    def save(self, folder: Path) -> None:
        """`model.safetensors` and `baseline.json`; `load` reads them."""
        base = {
            key: value for key, value in self.base.model.config.items() if not key.startswith("_")
        }
        settings = {"baseline": self.baseline, "concepts": list(self.concepts), "base": base}
        save_file(
            {key: value.contiguous() for key, value in self.state_dict().items()},
            folder / "model.safetensors",
        )
        (folder / "baseline.json").write_text(json.dumps(settings, indent=1))

    @classmethod
    def load(cls, folder: str | Path) -> "Baseline":
        settings = json.loads(Path(folder, "baseline.json").read_text())
        model = cls(LightVAE(**settings["base"]), settings["concepts"], settings["baseline"])
        model.load_state_dict(load_file(Path(folder, "model.safetensors")))
        return model.eval()
