"""Muon beside AdamW: steps against an SVD, the rest against AdamW, and which parameters get which."""  # noqa: E501

import pytest
import torch
from accelerate import Accelerator

from hf_intervene.trainer.distributed import Weights
from hf_intervene.trainer.optimizer import (
    COEFFICIENTS,
    MOMENTUM,
    SIZE,
    STEPS,
    MuonAdamW,
    build_optimizer,
    orthogonal,
)
from hf_intervene.trainer.settings import TrainArguments


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (20, 20)])
def test_orthogonal_keeps_directions_and_evens_out_singular_values(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonal(matrix)
    values = torch.linalg.svdvals(found)
    assert 0.6 < values.min() and values.max() < 1.3
    inner = u.T @ found @ v.T  # diagonal, since the singular vectors stay
    assert (inner - inner.diagonal().diag()).abs().max() < 0.05


def test_orthogonal_is_the_iteration_of_the_whole_matrix():
    torch.manual_seed(0)
    # singular values over six orders of magnitude, as gradients have
    u, _, v = torch.linalg.svd(torch.randn(16, 48), full_matrices=False)
    matrix = (u * torch.logspace(0, -6, 16)) @ v
    a, b, c = COEFFICIENTS
    expected = matrix.double() / matrix.norm()
    for _ in range(STEPS):
        gram = expected @ expected.T
        expected = a * expected + (b * gram + c * gram @ gram) @ expected
    torch.testing.assert_close(orthogonal(matrix).double(), expected, rtol=0, atol=1e-3)


def test_a_convolution_takes_the_step_of_its_matrix_and_the_rest_that_of_adamw():
    torch.manual_seed(0)
    kernel, bias = torch.nn.Parameter(torch.randn(8, 3, 4, 4)), torch.nn.Parameter(torch.randn(8))
    other = torch.nn.Parameter(bias.detach().clone())
    before = kernel.detach().clone()
    ours = MuonAdamW(
        [{"params": [bias]}, {"params": [kernel], "muon": True}], lr=0.1, weight_decay=0.0
    )
    theirs = torch.optim.AdamW([other], lr=0.1, weight_decay=0.0)
    momentum = torch.zeros_like(kernel)
    for _ in range(3):
        kernel.grad, bias.grad = torch.randn_like(kernel), torch.randn_like(bias)
        other.grad = bias.grad.clone()
        ours.step()
        theirs.step()
        momentum = MOMENTUM * momentum + kernel.grad
        step = orthogonal((kernel.grad + MOMENTUM * momentum).reshape(8, 48))
        before = before - 0.1 * SIZE * 48**0.5 * step.view_as(kernel)
    torch.testing.assert_close(kernel.detach(), before)
    torch.testing.assert_close(bias, other)


def test_its_state_is_saved_and_restored():
    torch.manual_seed(0)
    runs = []
    for stop in (False, True):
        torch.manual_seed(0)
        weight, bias = torch.nn.Parameter(torch.randn(4, 6)), torch.nn.Parameter(torch.randn(4))
        optimizer = MuonAdamW([{"params": [bias]}, {"params": [weight], "muon": True}], lr=0.1)
        for step in range(6):
            if stop and step == 3:
                state = optimizer.state_dict()
                optimizer = MuonAdamW(
                    [{"params": [bias]}, {"params": [weight], "muon": True}], lr=0.1
                )
                optimizer.load_state_dict(state)
            weight.grad, bias.grad = torch.randn(4, 6), torch.randn(4)
            optimizer.step()
        runs.append((weight, bias))
    for a, b in zip(*runs):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("base", "optimizer", "expected"),
    [
        ("light-vae", "auto", {"base": 0.001}),
        ("a-folder", "auto", {"adapter": 0.1}),
        ("a-folder", "muon", {"base": 0.001, "adapter": 0.1}),
        ("a-folder", "adamw", {}),
    ],
)
def test_muon_takes_the_matrices_of_networks_that_are_trained_from_scratch(
    base, optimizer, expected
):
    networks = {name: torch.nn.Linear(3, 3) for name in ("base", "adapter", "head")}
    if base == "light-vae":  # it has no adapter
        del networks["adapter"]
    of = {name: list(network.parameters()) for name, network in networks.items()}
    arguments = TrainArguments(
        base=base, optimizer=optimizer, learning_rate=0.1, base_learning_rate=0.001
    )
    weights = Weights(Accelerator(), torch.nn.Linear(1, 1))
    every = [p for parameters in of.values() for p in parameters]
    built = build_optimizer(arguments, weights, every, set(of["base"]), of.get("adapter", ()))
    rates, found = {}, {}
    for group in built.param_groups:
        for p in group["params"]:
            assert p not in rates
            rates[p] = group["peak"]
            if group.get("muon"):
                (name,) = (
                    name for name, parameters in of.items() if any(p is q for q in parameters)
                )
                assert p.ndim == 2 and name not in found
                found[name] = group["peak"]
    assert found == expected and set(rates) == set(every)
    assert all(rates[p] == (0.001 if name == "base" else 0.1) for name in of for p in of[name])
