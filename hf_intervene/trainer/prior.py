"""The order of the concepts, and the prior of a finished model: both are fitted to the codes of
images.

Concepts that may cause each other are put in an order, causes first. do(k) moves what k causes, and
nothing else:

    M[k, j] = distance of c_j under do(k) from c_j in obs,    next in the order: argmin_j max_k M[k, j] of those that are left.

When the training is over, flows and W are fitted once more,

    max E_{x, c ~ q(c | x)} log p(c | s)

over the flows and W alone. While encoder and decoder learn, codes move, and p(c | s) lags behind
them; and with the images encoded once a step needs neither of them. Nothing that a reconstruction
or its code depends on is changed."""  # noqa: E501

import torch
from tqdm.auto import tqdm

from ..data import ContextImages
from ..metrics.transport import sliced_w2
from ..model import InterventionModel
from ..modeling_intervention import InterventionHead
from .prepared import PreparedImages
from .validation import model_inputs


BATCH = 512  # codes
LEARNING_RATE = 3e-3
MOST = 65_536  # images that are encoded
LARGEST = 50.0  # norm of a gradient
ORDERED = (0.2, 0.4, 0.6)  # shares of the training at which concepts are ordered
SOME = 512  # images of each context that the order is estimated from


def fit_prior(
    model: InterventionModel,
    data: ContextImages,
    prepared: PreparedImages | None,
    steps: int,
    seed: int,
) -> float:
    """Fit the prior of a model whose head has flows, in place.

    Args:
        model: the model; it is put in eval mode.
        data: the training images.
        prepared: what a denoiser's frozen parts made of them, if there is one.
        steps: of Adam, with one cycle of its learning rate.
        seed: of the draws.

    Returns:
        The mean of log p(c | s) over the last tenth of the steps, in nats.
    """
    if model.config.concept_edges:
        order_concepts(model, data, prepared)
    generator = torch.Generator().manual_seed(seed)
    mean, std, targets = _codes(model, data, prepared, MOST, generator)
    parameters = [*model.head.flow.parameters(), *model.head.intervention.parameters()]
    optimizer = torch.optim.Adam(parameters, LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    found = torch.zeros((), device=model.device)
    for step in tqdm(range(steps), disable=None, desc="prior"):
        rows = torch.randint(len(mean), (BATCH,), generator=generator)
        noise = torch.randn(BATCH, *mean.shape[1:], generator=generator)
        c = (mean[rows] + std[rows] * noise).to(model.device)
        density = model.head.log_density(c, targets[rows].to(model.device)).mean()
        if step >= steps - max(1, steps // 10):
            found += density.detach() / max(1, steps // 10)
        optimizer.zero_grad()
        (-density).backward()
        torch.nn.utils.clip_grad_norm_(parameters, LARGEST)
        optimizer.step()
        schedule.step()
    return found.item()


@torch.no_grad()
def order_concepts(
    model: InterventionModel, data: ContextImages, prepared: PreparedImages | None
) -> None:
    """Put the concepts in the order that their codes suggest, for `OrderedInterventionLayer`;
    processes all find the same.
    """
    generator = torch.Generator().manual_seed(0)
    mean, _, targets = _codes(model, data, prepared, SOME * len(data.contexts), generator)
    order_by_codes(model.head, mean, targets, generator)


@torch.no_grad()
def order_by_codes(
    head: InterventionHead, mean: torch.Tensor, targets: torch.Tensor, generator: torch.Generator
) -> None:
    """`order_concepts` of codes (N, D, w) under these targets (N, D).

    Args:
        head: the head, which gets the order.
        mean: posterior means of c.
        targets: of the contexts that they come from; `obs` and single concepts count.
        generator: of the directions of the distances.
    """
    d = len(head.config.concepts)
    single = {
        int(t.argmax()): mean[(targets == t).all(1), :d]
        for t in targets.unique(dim=0)
        if t.sum() == 1
    }
    obs = mean[targets.sum(1) == 0, :d]  # (N, d, w)
    directions = torch.nn.functional.normalize(
        torch.randn(mean.shape[2], 64, generator=generator), dim=0
    )
    moved = torch.stack(
        [_moved(single[k], obs, directions) if k in single else torch.zeros(d) for k in range(d)]
    )
    head.intervention.order.copy_(torch.tensor(causal_order(moved)))


def causal_order(moved: torch.Tensor) -> list[int]:
    """Concepts, causes first, of M, (d, d): how far an intervention on one (row) moves another
    (column).
    """
    left, found = list(range(len(moved))), []
    while left:
        by_others = [max((moved[k, j].item() for k in left if k != j), default=0.0) for j in left]
        found.append(left.pop(by_others.index(min(by_others))))
    return found


def _moved(there: torch.Tensor, obs: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Sliced 2-Wasserstein distance of blocks (n, d, w) from others (n, d, w), in standard
    deviations of the others, (d,).

    Args:
        directions: of length 1, (w, projections).
    """
    # each (n, projections)
    pairs = zip(there.transpose(0, 1) @ directions, obs.transpose(0, 1) @ directions)
    distance = torch.tensor([sliced_w2(a.numpy(), b.numpy()) for a, b in pairs])
    return distance / obs.var(0).mean(1).sqrt().clamp(min=1e-12)


@torch.no_grad()
def _codes(
    model: InterventionModel,
    data: ContextImages,
    prepared: PreparedImages | None,
    most: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of q(c | x), each (N, D, w), and targets (N, D), on the CPU,
    contexts in equal parts.
    """
    model.eval()
    of_contexts = model.seen(data.targets(model.config.free_blocks))  # (contexts, D)
    each = min(most // len(data.contexts), int(data.context_ids.bincount().max()))
    rows = []
    for k in range(len(data.contexts)):
        own = (data.context_ids == k).nonzero()[:, 0]
        rows.append(
            own[torch.randperm(len(own), generator=generator)].repeat(-(-each // len(own)))[:each]
        )
    found = []
    for part in torch.cat(rows).split(256):
        targets = of_contexts[data.context_ids[part]]
        inputs = model_inputs(data, prepared, part, model.device)
        base = model.base
        features = (
            base.encode(inputs["pixel_values"]).features
            if prepared is None
            else base.encode_prepared(inputs["prepared"]).features
        )
        mean, logvar = model.head.posterior(features, targets.to(model.device))
        found.append((mean.cpu(), (0.5 * logvar).exp().cpu(), targets))
    return (
        torch.cat([f[0] for f in found]),
        torch.cat([f[1] for f in found]),
        torch.cat([f[2] for f in found]),
    )


__all__ = ["ORDERED", "causal_order", "fit_prior", "order_concepts"]
