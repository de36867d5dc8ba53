"""The critic of aggregate posteriors: against a KL known in closed form, and what its penalty makes of a posterior."""

import copy

import pytest
import torch
from torch.nn.functional import softplus

from hf_intervene.prior_matching import PriorMatching


def draws(contexts, generator):
    """Two numbers that are standard normal in context 0; in context 1 two lumps at (1.2, 1.2) and (-1.2, -1.2)."""
    lump = torch.randint(2, (len(contexts), 1), generator=generator) * 2.4 - 1.2
    return torch.randn(len(contexts), 2, generator=generator) + contexts[:, None] * lump


@pytest.fixture(scope="module")
def trained():
    critic, generator = PriorMatching(blocks=1, noise_width=2, weight=3.0), torch.Generator().manual_seed(0)
    contexts = torch.arange(512) % 2
    for _ in range(600):
        z, prior = draws(contexts, generator), torch.randn(512, 2, generator=generator)
        critic.update(z.view(-1, 1, 2), prior.view(-1, 1, 2), contexts[:, None].float())
    return critic


def test_the_mean_log_ratio_is_the_kl(trained):
    generator = torch.Generator().manual_seed(1)
    contexts = torch.arange(40000) % 2
    z = draws(contexts, generator)
    ratios = trained.log_ratio(z.view(-1, 1, 2), contexts[:, None].float())
    along = z.sum(1) * 1.2
    true = torch.where(contexts == 1, torch.logaddexp(along, -along) - torch.tensor(2.0).log() - 1.44, 0.0)  # log q_k(z) / p(z)
    for context in (0, 1):
        assert ratios[contexts == context].mean().item() == pytest.approx(true[contexts == context].mean().item(), abs=0.12)
    assert true[contexts == 1].mean() > 0.7
    assert (ratios - true).abs().mean() < 0.25


def test_the_penalty_pulls_draws_to_the_prior_and_leaves_the_critic_alone(trained):
    z = torch.tensor([[[1.2, 1.2]], [[-0.2, -0.2]], [[0.3, -0.8]]], requires_grad=True)
    targets = torch.tensor([[1.0], [1.0], [0.0]])
    loss = trained.loss(z, targets)
    assert loss.item() == pytest.approx(3.0 * trained.log_ratio(z, targets).mean().item())
    loss.backward()
    assert (z.grad[0] > 0).all() and (z.grad[1] < 0).all()  # out of the lumps
    assert z.grad[2].norm() < 0.2 * z.grad[0].norm()  # where there are none
    assert not any(p.requires_grad or p.grad is not None for p in trained.network.parameters())


def test_it_learns_as_plain_adam_does():
    """Fused Adam takes the entries of a gradient as they lie in memory, and those of a block's weights come transposed."""
    critic, generator = PriorMatching(3, 4, 1.0), torch.Generator().manual_seed(0)
    network = copy.deepcopy(critic.network).requires_grad_(True)
    adam = torch.optim.Adam(network.parameters(), lr=3e-3, betas=(0.5, 0.9), eps=1e-6, foreach=False)
    targets = torch.ones(16, 3)
    for _ in range(3):
        z, prior = torch.randn(2, 16, 3, 4, generator=generator)
        critic.update(z + 1, prior, targets)
        adam.zero_grad()
        (softplus(-network(z + 1, targets)).mean() + softplus(network(prior, targets)).mean()).backward()
        adam.step()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(critic.network.state_dict()[name], value, msg=name)


def test_it_goes_on_from_its_state():
    def learn(critic, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            z, prior = torch.randn(2, 16, 3, 4, generator=generator)
            critic.update(z + 1, prior, torch.ones(16, 3))
        return critic

    whole, first, second = (PriorMatching(3, 4, 1.0, seed) for seed in (0, 0, 1))
    learn(whole, range(6))
    state = {name: value.clone() for name, value in learn(first, range(3)).state_dict().items()}
    second.load_state_dict(state)
    learn(second, range(3, 6))
    after = second.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in whole.state_dict().items())
    assert not torch.equal(state["critic.together.0.weight"], after["critic.together.0.weight"])
    with pytest.raises((KeyError, RuntimeError)):
        PriorMatching(3, 5, 1.0).load_state_dict(state)
    with pytest.raises(KeyError):
        PriorMatching(3, 4, 1.0).load_state_dict({})
