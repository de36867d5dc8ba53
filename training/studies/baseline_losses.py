"""What the losses of the baselines add to reconstruction and KL; see baselines.py."""

from functools import lru_cache

import torch
from torch import nn
from torch.distributions import Normal, kl_divergence


MARGIN = 1.0  # of the triplets


def averaged_posteriors(
    mean: torch.Tensor, logvar: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ada-GVAE (Locatello et al., "Weakly-supervised disentanglement without compromises", ICML
    2020, arXiv:2002.02886, section 4).

    Of the pair (n, B / 2 + n), the coordinates i with delta_i = KL(q(z_i | x_1) || q(z_i | x_2))
    below (max delta + min delta) / 2 are taken as shared: both get the average of the two means and
    that of the two variances. The pairs here are an observational image and one of context k that
    are not otherwise matched, so that more than the concept differs and the method's assumption
    holds but roughly; contexts give no better pairs.

    Args:
        mean, logvar: of q(z | x), (B, latent_width, 1, 1), the first images of the pairs before the
            second.
    """
    (m1, m2), (v1, v2) = mean.chunk(2), logvar.exp().chunk(2)
    delta = kl_divergence(
        Normal(m1, v1.sqrt()), Normal(m2, v2.sqrt())
    ).detach()  # (B / 2, latent_width, 1, 1)
    shared = delta < (delta.amax(1, keepdim=True) + delta.amin(1, keepdim=True)) / 2
    m, v = (m1 + m2) / 2, (v1 + v2) / 2
    means = [torch.where(shared, m, own) for own in (m1, m2)]
    variances = [torch.where(shared, v, own) for own in (v1, v2)]
    return torch.cat(means), torch.cat(variances).log()


def decomposed_kl(
    mean: torch.Tensor,
    logvar: torch.Tensor,
    z: torch.Tensor,
    beta: float,
    weight: float,
    images: int,
) -> torch.Tensor:
    """beta * (mutual information + dimension-wise KL) + weight * total correlation, in nats,
    averaged over the batch (Chen et al., "Isolating sources of disentanglement in VAEs", NeurIPS
    2018, arXiv:1802.04942, equations 2 and 4), each by minibatch-weighted sampling (their section
    3.1); with weight = beta it is beta times a one-sample estimate of the KL. From pythae; its
    other estimator (stratified) gives a column the weight that belongs to the diagonal.

    Args:
        mean, logvar: of q(z | x), (B, latent_width).
        z: a draw from it, (B, latent_width).
        beta, weight: the weights.
        images: size of the training set.

    Raises:
        ImportError: pythae is not installed; the message names the extra.
    """
    terms = beta_tcvae()
    terms.alpha = terms.gamma = beta
    terms.beta = weight
    # an image without error: what is left is the sum of the three terms
    nothing = torch.zeros(len(z), 1, device=z.device)
    return terms.loss_function(nothing, nothing, mean, logvar, z, images)[0]


@lru_cache(maxsize=1)
def beta_tcvae():
    """A `BetaTCVAE` of pythae, for its loss alone."""
    try:
        from pythae.models import BetaTCVAE, BetaTCVAEConfig
    except ImportError as error:
        raise ImportError(
            'the baseline beta-tcvae needs pythae: pip install "hf-intervene[baselines]".'
        ) from error
    return BetaTCVAE(
        BetaTCVAEConfig(input_dim=(1,), latent_dim=1, use_mss=False, reconstruction_loss="mse")
    )


def triplet_loss(mean: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """TVAE (Ishfaq, Hoogi, Rubin, "TVAE: triplet-based variational autoencoder using metric
    learning", 2018, arXiv:1802.04403): the mean of max(0, |m_a - m_p| - |m_a - m_n| + 1) over the
    images a of a batch, of posterior means m. The positive p is the next image of the batch in the
    context of a, the negative n the next one in another context; the batch comes in random order.

    Args:
        mean: of q(z | x), (B, latent_width).
        ids: context of each image, (B,).
    """
    size = len(ids)
    ahead = (
        torch.arange(size, device=ids.device) - torch.arange(size, device=ids.device)[:, None]
    ) % size  # of column from row
    same = ids == ids[:, None]
    positives, negatives = (
        torch.where(kind & (ahead > 0), ahead, size).min(1) for kind in (same, ~same)
    )
    complete = (positives.values < size) & (negatives.values < size)
    if not bool(complete.any()):
        return mean.sum() * 0
    a, p, n = mean[complete], mean[positives.indices[complete]], mean[negatives.indices[complete]]
    return nn.functional.triplet_margin_loss(a, p, n, margin=MARGIN)
