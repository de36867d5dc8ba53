"""The head against the formulas of METHOD section 2."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel

from hf_intervene import InterventionConfig, InterventionHead
from hf_intervene.modeling_intervention import gaussian_kl


CONCEPTS = ["a", "b", "c"]


def make_head(seed=0, **options):
    torch.manual_seed(seed)
    options = {"free_blocks": 1, "noise_width": 5, "concept_width": 3, "feature_width": 7, "embedding_shape": [2, 3]} | options
    head = InterventionHead(InterventionConfig(concepts=CONCEPTS, initializer_range=0.5, **options)).double().eval()
    for parameter in head.parameters():  # norms start at 1 and 0, biases at 0: no test would see them missing
        parameter.data += 0.1 * torch.randn_like(parameter)
    return head


def slow_head(head, z, targets):
    """One sample, one block at a time, written from the formulas of METHOD section 2."""
    config = head.config
    D, n, w = config.num_blocks, config.noise_width, config.concept_width
    gelu = torch.nn.functional.gelu
    A_obs, A_int = head.exogenous.slices.weight[:, :, :n], head.exogenous.slices.weight[:, :, n:]
    b_obs, b_int = head.exogenous.slices.bias[:, 0, :n], head.exogenous.slices.bias[:, 0, n:]
    embeddings = []
    for z_b, s in zip(z, targets):
        eps = []
        for j in range(D):
            h = gelu((1 - s[j]) * (z_b[j] @ A_obs[j] + b_obs[j]) + s[j] * (z_b[j] @ A_int[j] + b_int[j]))
            for layer in range(config.depth):
                linear, norm = head.expressive[3 * layer], head.expressive[3 * layer + 1]
                h = h @ linear.weight[j] + linear.bias[j, 0]
                if config.norm == "layer":
                    h = (h - h.mean()) / (h.var(correction=0) + 1e-5).sqrt() * norm.weight[j, 0] + norm.bias[j, 0]
                h = gelu(h)
            eps.append(h)
        c = eps
        for _ in range(config.propagation_steps):
            new = []
            for i in range(D):
                heard = torch.zeros(w, dtype=z.dtype)
                for j in range(D):
                    if i != j:
                        W = head.intervention.weight[i, :, :, j]  # (w, 2 or 1, w): the structural form has one W
                        W_obs, W_int = W[:, 0], W[:, -1]
                        heard = heard + ((1 - s[j]) * W_obs + s[j] * W_int) @ c[j]
                new.append(eps[i] + (heard if config.intervention == "soft" else (1 - s[i]) * heard))
            c = new
        c = torch.cat([c[i] + head.intervention.bias[i] for i in range(D)])
        embeddings.append((head.unpool.weight @ c + head.unpool.bias).reshape(config.embedding_shape))
    return torch.stack(embeddings)


@pytest.mark.parametrize("intervention", ["perfect", "soft"])
@pytest.mark.parametrize("norm", ["layer", "none"])
@pytest.mark.parametrize(("depth", "steps", "free_blocks"), [(1, 1, 0), (2, 1, 1), (3, 3, 2)])
def test_head_equals_the_slow_loop(intervention, norm, depth, steps, free_blocks):
    head = make_head(intervention=intervention, norm=norm, depth=depth, propagation_steps=steps, free_blocks=free_blocks)
    targets = head.targets(["obs", ["a"], ["b", "c"], {"a": 0.3, "c": 0.8}, ["a", "b", "c"]]).double()
    z = torch.randn(5, head.config.num_blocks, 5, dtype=torch.float64)
    fast, slow = head(z, targets).embedding, slow_head(head, z, targets)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)

    weight = torch.randn_like(fast)
    gradients = [torch.autograd.grad((out * weight).sum(), list(head.parameters()), allow_unused=True) for out in (fast, slow)]
    for (name, _), a, b in zip(head.named_parameters(), *gradients):
        assert (a is None) == (b is None) == name.startswith("encoder_readout"), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=name)


def test_batch_norm_head_equals_one_batch_norm_per_unit():
    head = make_head(norm="batch").train()
    z, targets = torch.randn(6, 4, 5).double(), head.targets("a", 6).double()
    u = head.exogenous(z.transpose(0, 1), targets[..., None].transpose(0, 1))
    linear, norm = head.expressive[0], head.expressive[1]
    h = linear(u)
    blocks = norm.weight.view(4, 1, -1), norm.bias.view(4, 1, -1)
    expected = (h - h.mean(1, keepdim=True)) / (h.var(1, correction=0, keepdim=True) + 1e-5).sqrt() * blocks[0] + blocks[1]
    torch.testing.assert_close(norm(h), expected)


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, 0.25]), min_size=3, max_size=3), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None)
def test_mixed_batch_equals_one_context_batches(rows):
    head = make_head()
    targets = head.targets(torch.tensor(rows)).double()
    z = torch.randn(len(rows), 4, 5, dtype=torch.float64)
    mixed = head(z, targets).embedding
    for row in range(len(rows)):
        alone = head(z[row : row + 1], targets[row : row + 1]).embedding
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("context", [["a"], ["a", "b"], ["a", "b", "c"]])
@pytest.mark.parametrize("steps", [1, 3])
def test_an_intervened_concept_hears_no_other_block(context, steps):
    head = make_head(propagation_steps=steps)
    targets = head.targets(context).double()
    z = torch.randn(1, 4, 5, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda z: head(z, targets).concepts[0], z)[:, :, 0]  # (D, w, D, n)
    for i in range(4):
        for j in range(4):
            reaches = bool((jacobian[i, :, j] != 0).any())
            cut = i != j and bool(targets[0, i] == 1)
            assert reaches != cut, (i, j)


def test_soft_interventions_keep_incoming_edges():
    head = make_head(intervention="soft")
    targets = head.targets(["a", "b"]).double()
    z = torch.randn(1, 4, 5, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda z: head(z, targets).concepts[0], z)[:, :, 0]
    assert (jacobian.abs().amax(dim=(1, 3)) > 0).all()


def test_strength_interpolates_the_exogenous_layer():
    head = make_head()
    z = torch.randn(1, 4, 5).double().transpose(0, 1)
    before = [head.exogenous.slices(z).chunk(2, -1)[k] for k in (0, 1)]
    s = torch.full((4, 1, 1), 0.25, dtype=torch.float64)
    torch.testing.assert_close(head.exogenous(z, s), torch.nn.functional.gelu(0.75 * before[0] + 0.25 * before[1]))


def test_the_posterior_is_told_the_targets_only_when_conditional():
    features = torch.randn(3, 7).double()
    for posterior, told in (("conditional", True), ("unconditional", False)):
        head = make_head(posterior=posterior)
        obs, a = (head.posterior(features, head.targets(context, 3).double())[0] for context in ("obs", "a"))
        assert torch.equal(obs, a) != told
    unconditional = dict(make_head(posterior="unconditional").named_parameters())
    assert unconditional["encoder_readout.weight"].shape == (2 * 4 * 5, 7), "the paper's linear readout"


def test_gaussian_kl_against_torch():
    mean, logvar = torch.randn(3, 4, 5).double(), torch.randn(3, 4, 5).double()
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    torch.testing.assert_close(gaussian_kl(mean, logvar), torch.distributions.kl_divergence(posterior, prior).sum((1, 2)))


def test_compiles_whole():
    head = make_head().float()
    compiled = torch.compile(head, fullgraph=True, dynamic=True)
    for batch in (2, 5):
        z, targets = torch.randn(batch, 4, 5), head.targets([["a"], None] + [["b", "c"]] * (batch - 2))
        torch.testing.assert_close(compiled(z, targets).embedding, head(z, targets).embedding)


def test_exports_with_a_dynamic_batch():
    head = make_head().float()
    batch = torch.export.Dim("batch")
    example = torch.randn(3, 4, 5), head.targets([["a"], None, ["b"]])
    program = torch.export.export(head, example, dynamic_shapes={"z": {0: batch}, "targets": {0: batch}})
    z, targets = torch.randn(8, 4, 5), head.targets(["b", "c"], 8)
    torch.testing.assert_close(program.module()(z, targets).embedding, head(z, targets).embedding)


def test_runs_under_bf16_autocast():
    head = make_head().float()
    z, targets = torch.randn(64, 4, 5, requires_grad=True), head.targets(["a", "b"], 64)
    with torch.autocast("cpu", torch.bfloat16):
        out = head(z, targets).embedding
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), head(z, targets).embedding, atol=0.05, rtol=0.05)
    out.float().square().sum().backward()
    assert z.grad.isfinite().all() and z.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("z_shape", "s_shape"), [((2, 3, 5), (2, 4)), ((2, 4, 6), (2, 4)), ((4, 5), (2, 4)), ((2, 4, 5), (2, 3)), ((2, 4, 5), (4,))]
)
def test_wrong_shapes(z_shape, s_shape):
    with pytest.raises(ValueError, match="must have shape"):
        make_head().float()(torch.zeros(z_shape), torch.zeros(s_shape))


def test_saves_and_loads_bit_equal_and_through_the_auto_classes(tmp_path):
    head = make_head(norm="batch").float()
    head.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), InterventionConfig)
    for loaded in (InterventionHead.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert isinstance(loaded, InterventionHead)
        assert loaded.config.to_diff_dict() == head.config.to_diff_dict()
        state = head.state_dict()
        assert loaded.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert not list(tmp_path.glob("*.bin")) and (tmp_path / "model.safetensors").exists()


def test_a_configuration_that_does_not_fit_the_weights(tmp_path):
    make_head().save_pretrained(tmp_path)
    for change in ({"concept_width": 4}, {"depth": 1}, {"depth": 3}, {"concepts": ["a", "b"]}):
        InterventionConfig(**make_head().config.to_dict() | change).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="do not fit its configuration"):
            InterventionHead.from_pretrained(tmp_path)


def test_a_truncated_checkpoint(tmp_path):
    make_head().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(OSError, match="truncated or corrupt"):
        InterventionHead.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"depth": 0},
        {"free_blocks": -1},
        {"norm": "spectral"},
        {"intervention": "hard"},
        {"embedding_shape": []},
        {"posterior": "x"},
    ],
)
def test_bad_configurations(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        InterventionConfig(concepts=CONCEPTS, **options)


@pytest.mark.parametrize("concepts", [["a", "a"], ["obs"], []])
def test_bad_concepts_in_a_configuration(concepts):
    with pytest.raises(ValueError):
        InterventionConfig(concepts=concepts)
