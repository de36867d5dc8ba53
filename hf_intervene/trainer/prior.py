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

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from tqdm.auto import tqdm

from ..bases.hashes import weight_hash
from ..data import ContextImages
from ..logging import get_logger
from ..metrics.transport import sliced_w2
from ..model import InterventionModel
from ..modeling_intervention import InterventionHead
from .checkpoints import (
    flatten_optimizer,
    newest_checkpoint,
    remove_whole,
    restore_optimizer,
    save_checkpoint,
)
from .prepared import PreparedImages
from .validation import model_inputs


logger = get_logger(__name__)
BATCH = 256  # codes
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
    check: Callable[[], None] = lambda: None,
    kept: Path | None = None,
) -> float:
    """Fit the prior of a model whose head has flows, in place.

    Args:
        model: the model; it is put in eval mode.
        data: the training images.
        prepared: what a denoiser's frozen parts made of them, if there is one.
        steps: of Adam, with one cycle of its learning rate.
        seed: of the draws.
        check: called after each batch that is encoded and each step. An exception that it raises
            goes on, after the state of the fit was written to `kept`.
        kept: folder of that state. A fit of the same model goes on from there.

    Returns:
        The mean of log p(c | s) over the last tenth of the steps, in nats.
    """
    key = {"model": weight_hash(model), "steps": steps, "seed": seed}
    if model.config.concept_edges:
        order_concepts(model, data, prepared, check)
    fit, head = _Fit(model, steps, seed), cast(Any, model.head)
    mean, std, targets = _codes(model, data, prepared, MOST, fit.generator, check)
    if kept is not None:
        fit.load(kept, key)
    try:
        for _ in tqdm(range(fit.step, steps), disable=None, desc="prior"):
            rows = torch.randint(len(mean), (BATCH,), generator=fit.generator)
            noise = torch.randn(BATCH, *mean.shape[1:], generator=fit.generator)
            c = (mean[rows] + std[rows] * noise).to(model.device)
            fit.take(head.log_density(c, targets[rows].to(model.device)).mean())
            check()
    finally:
        if kept is not None:
            fit.save(kept, key)
    return fit.found.item()


class _Fit:
    """How far the fit of a prior has come.

    Args:
        model: see `fit_prior`, as are the others.
        steps: of the whole fit.
        seed: of the draws.
    """

    def __init__(self, model: InterventionModel, steps: int, seed: int):
        head: Any = model.head
        self.parameters = [*head.flow.parameters(), *head.intervention.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, LEARNING_RATE)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, LEARNING_RATE, total_steps=steps
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.step, self.steps = 0, steps
        self.found = torch.zeros((), device=model.device)

    def take(self, density: torch.Tensor) -> None:
        """One step, of the mean log density of a batch."""
        last = max(1, self.steps // 10)
        if self.step >= self.steps - last:
            self.found += density.detach() / last
        self.optimizer.zero_grad()
        (-density).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, LARGEST)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1

    def save(self, folder: Path, key: dict) -> None:
        tensors = {
            "model": {str(n): p for n, p in enumerate(self.parameters)},
            "optimizer": flatten_optimizer(self.optimizer.state, self.parameters),
        }
        draws = bytes(self.generator.get_state().tolist()).hex()
        state = {"key": key, "found": self.found.item(), "generator": draws}
        try:
            save_checkpoint(folder, self.step, tensors, state, keep=1)
        except OSError as error:
            logger.warning("%s The fit of the prior would begin anew if it is stopped.", error)

    def load(self, folder: Path, key: dict) -> None:
        """Go on from what is in the folder, if it is of this key."""
        found = newest_checkpoint(folder)
        if found is None:
            return
        if found[2].get("key") != key:  # of another model; its later steps would outlive ours
            remove_whole(folder)
            return
        _, tensors, state = found
        self.step = state["step"]
        self.found += state["found"]
        draws = list(bytes.fromhex(state["generator"]))
        self.generator.set_state(torch.tensor(draws, dtype=torch.uint8))
        with torch.no_grad():
            for n, p in enumerate(self.parameters):
                p.copy_(tensors["model"][str(n)])
        device = self.found.device

        def placed(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
            return value.to(device) if value.ndim else value  # Adam counts steps on the CPU

        restore_optimizer(self.optimizer, self.parameters, tensors["optimizer"], placed)
        with warnings.catch_warnings():  # that no step of the optimiser came before
            warnings.simplefilter("ignore")
            for _ in range(self.step):
                self.schedule.step()


@torch.no_grad()
def order_concepts(
    model: InterventionModel,
    data: ContextImages,
    prepared: PreparedImages | None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Put the concepts in the order that their codes suggest, for `OrderedInterventionLayer`;
    processes all find the same, and call `check` after each batch that is encoded.
    """
    generator = torch.Generator().manual_seed(0)
    mean, _, targets = _codes(model, data, prepared, SOME * len(data.contexts), generator, check)
    assert model.head is not None
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
    check: Callable[[], None],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of q(c | x), each (N, D, w), and targets (N, D), on the CPU,
    contexts in equal parts.
    """
    model.eval()
    head: Any = model.head
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
        mean, logvar = head.posterior(features, targets.to(model.device))
        found.append((mean.cpu(), (0.5 * logvar).exp().cpu(), targets))
        check()
    return (
        torch.cat([f[0] for f in found]),
        torch.cat([f[1] for f in found]),
        torch.cat([f[2] for f in found]),
    )


__all__ = ["ORDERED", "causal_order", "fit_prior", "order_concepts"]
