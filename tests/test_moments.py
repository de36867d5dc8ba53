"""The penalty on aggregate posteriors: its gradient against autograd through the covariance itself."""

import pytest
import torch

from hf_intervene import InterventionConfig, InterventionHead
from hf_intervene.moments import BlockMomentMatching, MomentMatching, moment_matching


def batch(seed=0):
    torch.manual_seed(seed)
    ids = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0])
    return torch.randn(8, 2, 3).requires_grad_(), torch.randn(8, 2, 3).requires_grad_(), ids


def test_gradient_is_that_of_the_squared_distance_of_covariance_and_identity():
    mean, logvar, ids = batch()
    matching = MomentMatching(2, 6, weight=0.7, momentum=1.0)  # momentum 1: the running covariance is the batch's
    matching.update(mean, logvar, ids)
    matching.loss(mean, ids).backward()
    found = mean.grad.clone()
    mean.grad = None
    penalty = 0
    for context in (0, 1):
        m, v = mean.flatten(1)[ids == context], logvar.detach().flatten(1)[ids == context].exp()
        covariance = m.T @ m / len(m) + torch.diag(v.mean(0))
        penalty = penalty + len(m) / len(ids) * 0.7 * (covariance - torch.eye(6)).square().sum()
    penalty.backward()
    torch.testing.assert_close(found, mean.grad)
    assert logvar.grad is None  # the KL's to decide


def test_running_covariance_converges_and_leaves_absent_contexts():
    matching = MomentMatching(3, 6, 1.0, momentum=0.05)
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.5, 2, 6)
    for _ in range(400):
        m = torch.randn(64, 6, generator=generator) * scale
        ids = torch.arange(64) % 2
        matching.update(m.view(64, 2, 3), torch.full((64, 2, 3), -30.0), ids)
    torch.testing.assert_close(matching.excess[0], torch.diag(scale.square() - 1), atol=0.5, rtol=0)
    assert (matching.excess[2] == 0).all()


TARGETS = torch.tensor([[0.0, 0.0], [1.0, 0.0]])  # obs, and the context of the first concept


def test_block_gradient_is_that_of_the_squared_distances_of_the_blocks_covariances():
    mean, logvar, ids = batch()
    matching = BlockMomentMatching(TARGETS, 3, weight=0.7, momentum=1.0)
    matching.enough = 1  # four samples of each context count in full
    matching.update(mean, logvar, ids)
    matching.loss(mean, ids).backward()
    found = mean.grad.clone()
    mean.grad = None
    penalty = 0
    for block, groups in enumerate([[ids == 0, ids == 1], [ids >= 0]]):  # nothing intervenes on the second
        for rows in groups:
            m, v = mean[rows, block], logvar.detach()[rows, block].exp()
            covariance = m.T @ m / len(m) + torch.diag(v.mean(0))
            penalty = penalty + len(m) / len(ids) * 0.7 * (covariance - torch.eye(3)).square().sum()
    penalty.backward()
    torch.testing.assert_close(found, mean.grad)
    assert logvar.grad is None  # the KL's to decide


def test_block_covariances_of_rare_groups_move_by_less():
    mean, logvar, _ = batch()
    matching, rare = (BlockMomentMatching(TARGETS, 3, 1.0, momentum=0.5) for _ in range(2))
    matching.update(mean, logvar, torch.ones(8, dtype=torch.int64))
    rare.update(mean[:2], logvar[:2], torch.ones(2, dtype=torch.int64))
    expected = mean[:, 0].T @ mean[:, 0] / 8 + torch.diag(logvar[:, 0].exp().mean(0)) - torch.eye(3)
    torch.testing.assert_close(matching.excess[1, 0], 0.5 * expected)
    expected = mean[:2, 0].T @ mean[:2, 0] / 2 + torch.diag(logvar[:2, 0].exp().mean(0)) - torch.eye(3)
    torch.testing.assert_close(rare.excess[1, 0], 0.5 * 2 / 8 * expected)
    assert (rare.excess[0, 0] == 0).all() and (rare.excess[1, 1] == 0).all() and (rare.excess[0, 1] != 0).all()


def test_many_concepts_are_matched_block_by_block():
    few, many = (moment_matching(torch.cat([torch.zeros(1, d + 1), torch.eye(d, d + 1)]), 32, 1.0) for d in (6, 20))
    assert isinstance(few, MomentMatching) and few.excess.shape == (7, 224, 224)
    assert isinstance(many, BlockMomentMatching) and many.excess.shape == (2, 21, 32, 32)


@pytest.mark.parametrize("make", [lambda: MomentMatching(2, 6, 1.0), lambda: BlockMomentMatching(TARGETS, 3, 1.0)])
def test_splitting_a_batch_does_not_change_the_loss(make):
    mean, logvar, ids = batch()
    matching = make()
    matching.update(mean, logvar, ids)
    parts = [matching.loss(mean[rows], ids[rows]) for rows in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(sum(parts) / 2, matching.loss(mean, ids))


def test_centering_takes_the_mean_of_every_context_out():
    torch.manual_seed(0)
    head = InterventionHead(InterventionConfig(concepts=["a", "b"], noise_width=3, feature_width=5, embedding_shape=[4]))
    features = torch.randn(300, 5) + 3
    targets = head.targets([["a"], ["b"], None] * 100)
    for _ in range(150):
        head.center_posterior(head.posterior(features, targets)[0].detach(), targets)
    mean = head.posterior(features, targets)[0]
    for row in range(3):
        assert mean[row::3].mean(0).abs().max() < 0.01
    before = head.posterior_offset.clone()
    head.center_posterior(mean[:2], head.targets(["a", "b"], 2))  # two targets: no context of the offsets
    head.center_posterior(mean[:2], head.targets({"a": 0.5}, 2))
    assert torch.equal(head.posterior_offset, before)
    # Two targets at once are linear: offset_obs + (offset_a - offset_obs) + (offset_b - offset_obs).
    raw = InterventionHead(InterventionConfig(**head.config.to_dict() | {"posterior": "conditional"}))
    raw.load_state_dict(head.state_dict(), strict=False)
    both = head.targets(["a", "b"], 4)
    offset = head.posterior_offset[1] + head.posterior_offset[2] - head.posterior_offset[0]
    torch.testing.assert_close(head.posterior(features[:4], both)[0], raw.posterior(features[:4], both)[0] - offset)
