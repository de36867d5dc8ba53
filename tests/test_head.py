"""The head against the formulas of METHOD section 2."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from transformers import AutoConfig, AutoModel

from hf_intervene import InterventionConfig, InterventionHead
from hf_intervene.modeling_intervention import LowRankInterventionLayer


CONCEPTS = ["a", "b", "c"]


def make_head(seed=0, **options):
    torch.manual_seed(seed)
    options = {
        "free_blocks": 1,
        "noise_width": 5,
        "concept_width": 3,
        "feature_width": 7,
        "embedding_shape": [2, 3],
    } | options
    head = (
        InterventionHead(InterventionConfig(concepts=CONCEPTS, initializer_range=0.5, **options))
        .double()
        .eval()
    )
    # Norms start at 1 and 0, biases at 0: unchanged, no test would notice if they were missing.
    for parameter in head.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return head


def edges(layer, i, j):
    """The blocks W_obs[i, j] and W_int[i, j]; the structural form has one W."""
    if isinstance(layer, LowRankInterventionLayer):
        return [layer.effects[i] @ layer.causes[k, j].T for k in (0, -1)]
    return [layer.weight[i, :, k, j] for k in (0, -1)]


def slow_head(head, z, targets, values=None, chosen=None):
    """One sample, one block at a time, written from the formulas of METHOD section 2."""
    config = head.config
    D, n, w = config.num_blocks, config.noise_width, config.concept_width
    gelu = torch.nn.functional.gelu
    A_obs, A_int = head.exogenous.slices.weight[:, :, :n], head.exogenous.slices.weight[:, :, n:]
    b_obs, b_int = head.exogenous.slices.bias[:, 0, :n], head.exogenous.slices.bias[:, 0, n:]
    chosen = torch.zeros_like(targets, dtype=torch.bool) if chosen is None else chosen
    embeddings = []
    for b, (z_b, s) in enumerate(zip(z, targets)):
        s = [1.0 if chosen[b, j] else s[j] for j in range(D)]
        eps = []
        for j in range(D):
            h = gelu(
                (1 - s[j]) * (z_b[j] @ A_obs[j] + b_obs[j]) + s[j] * (z_b[j] @ A_int[j] + b_int[j])
            )
            for layer in range(config.depth):
                linear, norm = head.expressive[3 * layer], head.expressive[3 * layer + 1]
                h = h @ linear.weight[j] + linear.bias[j, 0]
                if config.norm == "layer":
                    h = (h - h.mean()) / (h.var(correction=0) + 1e-5).sqrt() * norm.weight[
                        j, 0
                    ] + norm.bias[j, 0]
                h = gelu(h)
            eps.append(values[b, j] - head.intervention.bias[j] if chosen[b, j] else h)
        c = eps
        for _ in range(config.propagation_steps):
            new = []
            for i in range(D):
                heard = torch.zeros(w, dtype=z.dtype)
                for j in range(D):
                    if i != j:
                        W_obs, W_int = edges(head.intervention, i, j)
                        heard = heard + ((1 - s[j]) * W_obs + s[j] * W_int) @ c[j]
                cut = config.intervention == "perfect" or chosen[b, i]
                new.append(eps[i] + ((1 - s[i]) * heard if cut else heard))
            c = new
        c = torch.cat([c[i] + head.intervention.bias[i] for i in range(D)])
        embeddings.append(
            (head.unpool.weight @ c + head.unpool.bias).reshape(config.embedding_shape)
        )
    return torch.stack(embeddings)


@pytest.mark.parametrize("intervention", ["perfect", "soft"])
@pytest.mark.parametrize("norm", ["layer", "none"])
@pytest.mark.parametrize(("depth", "steps", "free_blocks"), [(1, 1, 0), (2, 1, 1), (3, 3, 2)])
@pytest.mark.parametrize("do", [False, True])
def test_head_equals_the_slow_loop(intervention, norm, depth, steps, free_blocks, do):
    check_against_the_slow_loop(
        make_head(
            intervention=intervention,
            norm=norm,
            depth=depth,
            propagation_steps=steps,
            free_blocks=free_blocks,
        ),
        do,
    )


@pytest.mark.parametrize("intervention", ["perfect", "soft"])
@pytest.mark.parametrize(("steps", "rank"), [(1, 2), (3, 2), (2, 1)])
@pytest.mark.parametrize("do", [False, True])
def test_low_rank_head_equals_the_slow_loop(intervention, steps, rank, do):
    check_against_the_slow_loop(
        make_head(intervention=intervention, propagation_steps=steps, intervention_rank=rank), do
    )


def check_against_the_slow_loop(head, do):
    targets = head.targets(
        ["obs", ["a"], ["b", "c"], {"a": 0.3, "c": 0.8}, ["a", "b", "c"]]
    ).double()
    z = torch.randn(5, head.config.num_blocks, 5, dtype=torch.float64)
    values = torch.randn(5, head.config.num_blocks, 3, dtype=torch.float64, requires_grad=True)
    chosen = torch.rand(5, head.config.num_blocks) < 0.4
    clamp = (values, chosen) if do else ()
    fast, slow = head(z, targets, *clamp).embedding, slow_head(head, z, targets, *clamp)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)

    weight = torch.randn_like(fast)
    if do:
        a, b = (
            torch.autograd.grad((out * weight).sum(), values, retain_graph=True)[0]
            for out in (fast, slow)
        )
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    gradients = [
        torch.autograd.grad((out * weight).sum(), list(head.parameters()), allow_unused=True)
        for out in (fast, slow)
    ]
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
    expected = (h - h.mean(1, keepdim=True)) / (
        h.var(1, correction=0, keepdim=True) + 1e-5
    ).sqrt() * blocks[0] + blocks[1]
    torch.testing.assert_close(norm(h), expected)


@given(
    st.lists(
        st.lists(st.sampled_from([0.0, 1.0, 0.25]), min_size=3, max_size=3), min_size=1, max_size=6
    )
)
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
def test_an_intervened_concept_depends_on_no_other_block(context, steps):
    head = make_head(propagation_steps=steps)
    targets = head.targets(context).double()
    z = torch.randn(1, 4, 5, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda z: head(z, targets).concepts[0], z)[
        :, :, 0
    ]  # (D, w, D, n)
    for i in range(4):
        for j in range(4):
            reaches = bool((jacobian[i, :, j] != 0).any())
            cut = i != j and bool(targets[0, i] == 1)
            assert reaches != cut, (i, j)


@pytest.mark.parametrize("intervention", ["perfect", "soft"])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_chosen_value_is_the_value_and_depends_on_nothing(intervention, steps):
    head = make_head(intervention=intervention, propagation_steps=steps)
    z, targets = torch.randn(2, 4, 5, dtype=torch.float64), head.targets([["a"], ["b"]]).double()
    values, chosen = (
        torch.randn(2, 4, 3, dtype=torch.float64),
        torch.tensor([[True, False, True, False]] * 2),
    )
    out = head(z, targets, values, chosen)
    assert torch.equal(out.concepts[chosen], values[chosen])
    assert torch.equal(
        out.embedding,
        head(z, targets, values.masked_fill(~chosen[..., None], torch.nan), chosen).embedding,
    )
    # s_j counts as 1
    assert torch.equal(
        out.embedding, head(z, torch.where(chosen, 0.5, targets), values, chosen).embedding
    )
    replaced = torch.where(chosen[..., None], torch.randn_like(z), z)
    assert torch.equal(out.embedding, head(replaced, targets, values, chosen).embedding)

    jacobian = torch.autograd.functional.jacobian(
        lambda z: head(z, targets, values, chosen).concepts[1], z
    )[:, :, 1]
    others = torch.autograd.functional.jacobian(
        lambda v: head(z, targets, v, chosen).concepts[1], values
    )[:, :, 1]
    # a and c by their values, b by its target
    hard = [
        True,
        intervention == "perfect",
        True,
        False,
    ]
    for i in range(4):
        for j in range(4):
            noise_reaches = not chosen[1, j] and (i == j or not hard[i])
            assert bool((jacobian[i, :, j] != 0).any()) == noise_reaches, (i, j)
            assert bool((others[i, :, j] != 0).any()) == bool(
                chosen[1, j] and (i == j or not hard[i])
            ), (i, j)


def test_setting_a_concept_to_its_own_value_changes_nothing():
    """In the structural form with an acyclic graph, do(c_j = c_j) changes no other concept."""
    head = make_head(propagation_steps=3)
    head.intervention.weight.data *= torch.ones(4, 4).tril(-1).double()[:, None, None, :, None]
    z, targets = torch.randn(6, 4, 5, dtype=torch.float64), head.targets("obs", 6).double()
    c = head(z, targets).concepts
    for j in range(4):
        chosen = (torch.arange(4) == j).expand(6, -1)
        torch.testing.assert_close(head(z, targets, c, chosen).concepts, c, rtol=1e-13, atol=1e-13)


def test_chosen_values_of_wrong_shapes():
    head, z = make_head().float(), torch.zeros(2, 4, 5)
    targets, values, chosen = (
        torch.zeros(2, 4),
        torch.zeros(2, 4, 3),
        torch.zeros(2, 4, dtype=torch.bool),
    )
    for bad in (
        (values[:1], chosen),
        (values, chosen[:, :3]),
        (values[..., 0], chosen),
        (values, chosen.float()),
    ):
        with pytest.raises(ValueError, match="values must have shape"):
            head(z, targets, *bad)
    with pytest.raises(ValueError, match="go together"):
        head(z, targets, values)


def test_soft_interventions_keep_incoming_edges():
    head = make_head(intervention="soft")
    targets = head.targets(["a", "b"]).double()
    z = torch.randn(1, 4, 5, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda z: head(z, targets).concepts[0], z)[
        :, :, 0
    ]
    assert (jacobian.abs().amax(dim=(1, 3)) > 0).all()


def test_strength_interpolates_the_exogenous_layer():
    head = make_head()
    z = torch.randn(1, 4, 5).double().transpose(0, 1)
    before = [head.exogenous.slices(z).chunk(2, -1)[k] for k in (0, 1)]
    s = torch.full((4, 1, 1), 0.25, dtype=torch.float64)
    torch.testing.assert_close(
        head.exogenous(z, s), torch.nn.functional.gelu(0.75 * before[0] + 0.25 * before[1])
    )


def test_the_posterior_uses_the_targets_only_when_conditional():
    features = torch.randn(3, 7).double()
    for posterior, told in (("conditional", True), ("unconditional", False)):
        head = make_head(posterior=posterior)
        obs, a = (
            head.posterior(features, head.targets(context, 3).double())[0]
            for context in ("obs", "a")
        )
        assert torch.equal(obs, a) != told
    unconditional = dict(make_head(posterior="unconditional").named_parameters())
    assert unconditional["encoder_readout.weight"].shape == (2 * 4 * 5, 7), (
        "the paper's linear readout"
    )


@pytest.mark.parametrize("steps", [1, 3])
def test_an_intervention_at_first_only_cuts_edges(steps):
    torch.manual_seed(0)
    config = InterventionConfig(
        concepts=CONCEPTS, free_blocks=1, propagation_steps=steps, intervention="soft"
    )
    head = InterventionHead(config).double()  # soft: no edges are cut
    z = torch.randn(4, 4, config.noise_width, dtype=torch.float64)
    observed = head(z, head.targets("obs", 4)).concepts
    torch.testing.assert_close(head(z, head.targets(["a", "c"], 4)).concepts, observed)
    head.exogenous.slices.weight.data[..., config.noise_width :] += (
        0.1  # training can make them different
    )
    assert (
        head(z, head.targets("a", 4)).concepts - head(z, head.targets("obs", 4)).concepts
    ).abs().max() > 0.01


@pytest.mark.parametrize("posterior", ["centered", "unconditional"])
@pytest.mark.parametrize("std", [0.1, 0.25, 1.0])
def test_the_posterior_starts_at_its_standard_deviation(posterior, std):
    torch.manual_seed(0)
    config = InterventionConfig(concepts=CONCEPTS, posterior=posterior, initial_posterior_std=std)
    head, features = InterventionHead(config), torch.randn(256, config.feature_width)
    mean, logvar = head.posterior(features, head.targets("a", 256))
    assert (0.5 * logvar).exp().mean().item() == pytest.approx(std, rel=0.25)
    torch.manual_seed(0)
    plain = InterventionHead(
        InterventionConfig(concepts=CONCEPTS, posterior=posterior, initial_posterior_std=1.0)
    )
    spread = plain.posterior(features, plain.targets("a", 256))[0].std(0).mean()
    assert mean.std(0).mean().item() == pytest.approx(spread.item() / std, rel=1e-3)


FORMS = [("perfect", 3, False), ("perfect", 3, True), ("soft", 1, True)]


@pytest.mark.parametrize(("intervention", "steps", "do"), FORMS)
def test_compiles_whole(intervention, steps, do):
    head = make_head(intervention=intervention, propagation_steps=steps).float()
    compiled = torch.compile(
        head, fullgraph=True, dynamic=True, backend="aot_eager" if do else "inductor"
    )
    for batch in (2, 5):
        z, targets = (
            torch.randn(batch, 4, 5),
            head.targets([["a"], None] + [["b", "c"]] * (batch - 2)),
        )
        clamp = (torch.randn(batch, 4, 3), torch.rand(batch, 4) < 0.5) if do else ()
        torch.testing.assert_close(
            compiled(z, targets, *clamp).embedding, head(z, targets, *clamp).embedding
        )


@pytest.mark.parametrize(("steps", "rank"), [(1, None), (3, 2)])
def test_one_compilation_serves_all_contexts(steps, rank):
    # with many contexts: reading the targets would find few that differ
    concepts = [f"c{j}" for j in range(40)]
    head = InterventionHead(
        InterventionConfig(concepts=concepts, propagation_steps=steps, intervention_rank=rank)
    )
    torch._dynamo.reset()
    graphs = CompileCounter()

    @torch.compile(backend=graphs, fullgraph=True)
    def step(features, targets, noise):
        mean, logvar = head.posterior(features, targets)
        return head(mean + (0.5 * logvar).exp() * noise, targets).embedding

    features, noise = torch.randn(4, 128), torch.randn(4, 41, 32)
    for context in (
        "obs",
        ["c0"],
        ["c1", "c7"],
        {"c3": 0.3},
        [["c0"], "obs", ["c1", "c2"], {"c39": 0.5}],
        concepts,
    ):
        targets = head.targets(context, 4)
        found = step(features, targets, noise)
        mean, logvar = head.posterior(features, targets)
        expected = head(mean + (0.5 * logvar).exp() * noise, targets).embedding
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        found.sum().backward()
    assert graphs.frame_count == 1


@pytest.mark.parametrize(("intervention", "steps", "do"), FORMS)
def test_exports_with_a_dynamic_batch(intervention, steps, do):
    head = make_head(intervention=intervention, propagation_steps=steps).float()
    batch = torch.export.Dim.DYNAMIC

    def inputs(size):
        clamp = (torch.randn(size, 4, 3), torch.rand(size, 4) < 0.5) if do else (None, None)
        return torch.randn(size, 4, 5), head.targets("a", size), *clamp

    shapes = {
        name: {0: batch} if do or name in ("z", "targets") else None
        for name in ("z", "targets", "values", "chosen")
    }
    program = torch.export.export(head, inputs(3), dynamic_shapes=shapes)
    z, targets, values, chosen = inputs(8)
    torch.testing.assert_close(
        program.module()(z, targets, values, chosen).embedding,
        head(z, targets, values, chosen).embedding,
    )


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
    ("z_shape", "s_shape"),
    [
        ((2, 3, 5), (2, 4)),
        ((2, 4, 6), (2, 4)),
        ((4, 5), (2, 4)),
        ((2, 4, 5), (2, 3)),
        ((2, 4, 5), (4,)),
    ],
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
        {"initial_posterior_std": 0.0},
        {"initial_posterior_std": 1.5},
    ],
)
def test_bad_configurations(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        InterventionConfig(concepts=CONCEPTS, **options)


@pytest.mark.parametrize("concepts", [["a", "a"], ["obs"], []])
def test_bad_concepts_in_a_configuration(concepts):
    with pytest.raises(ValueError):
        InterventionConfig(concepts=concepts)
