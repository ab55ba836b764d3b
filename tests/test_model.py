from __future__ import annotations

import json

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sedd.binning import UNBOUNDED
from sedd.errors import UserError
from sedd.graph import AbsorbingGraph
from sedd.loss import diffusion_loss
from sedd.model import SEDDTransformer, SEDDTransformerLarge, SEDDTransformerMedium, SEDDTransformerSmall
from sedd.nn.backbones import Features
from sedd.nn.heads import CHUNK_CPU, SoftmaxHead
from sedd.noise import LogLinearNoise

N_VARS, N_BINS, CELLS = 23, 7, 5
DESIGNS = pytest.mark.parametrize(("attention", "num_latents"), [("full", 1), ("latent", 1), ("latent", 3)])


def marginals(n_vars: int = N_VARS, n_bins: int = N_BINS) -> torch.Tensor:
    return torch.randn(n_vars, n_bins, generator=torch.Generator().manual_seed(1)).log_softmax(-1)


def build(stir: float = 0.2, **kwargs: object) -> SEDDTransformer:
    """A small model whose zero-initialised weights have been moved away from zero."""
    torch.manual_seed(0)
    settings = {"hidden_dim": 16, "num_layers": 2, "num_heads": 4, "rank": 4, "log_marginals": marginals(), **kwargs}
    model = SEDDTransformer(N_VARS, N_BINS, **settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(stir * torch.randn_like(parameter))
    return model


def cells(share: float = 0.5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    clean = torch.randint(0, N_BINS, (CELLS, N_VARS), generator=generator)
    masked = torch.rand(CELLS, N_VARS, generator=generator) < share
    return clean, clean.masked_fill(masked, N_BINS), torch.linspace(0.1, 3, CELLS)


@DESIGNS
def test_permuting_genes_with_what_belongs_to_them_permutes_the_output(attention, num_latents):
    model = build(attention=attention, num_latents=num_latents)
    _, tokens, sigma = cells()
    order = torch.randperm(N_VARS, generator=torch.Generator().manual_seed(3))
    before = model(tokens, sigma)
    with torch.no_grad():
        model.backbone.genes.weight.copy_(model.backbone.genes.weight[order])
        model.head.bias.copy_(model.head.bias[order])
        if attention == "latent":
            model.backbone.usual.copy_(model.backbone.usual[order])
    torch.testing.assert_close(model(tokens[:, order], sigma), before[:, order], atol=1e-5, rtol=1e-5)


@DESIGNS
def test_masked_scores_are_probabilities_times_r_and_visible_genes_are_settled(attention, num_latents):
    model = build(attention=attention, num_latents=num_latents)
    _, tokens, sigma = cells()
    score = model(tokens, sigma)
    masked = tokens == N_BINS
    r = 1 / torch.expm1(sigma)
    total = score[..., :N_BINS].exp().sum(-1) / r.unsqueeze(-1)
    torch.testing.assert_close(total[masked], torch.ones(int(masked.sum())), atol=1e-4, rtol=0)
    own = score.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    assert (own == 0).all()
    assert (score[~masked].exp().sum(-1) == 1).all()


@DESIGNS
def test_everywhere_gives_all_genes_and_agrees_where_masked(attention, num_latents):
    model = build(attention=attention, num_latents=num_latents)
    _, tokens, sigma = cells()
    log_mu = model(tokens, sigma, everywhere=True)
    masked = tokens == N_BINS
    want = model(tokens, sigma)[..., :N_BINS] + torch.expm1(sigma).log()[:, None, None]
    torch.testing.assert_close(log_mu[masked], want[masked], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(log_mu.exp().sum(-1), torch.ones(CELLS, N_VARS), atol=1e-4, rtol=0)


@DESIGNS
def test_log_mu_of_targets_is_the_full_output_at_masked_genes(attention, num_latents, monkeypatch):
    model = build(attention=attention, num_latents=num_latents)
    clean, tokens, sigma = cells()
    r = 1 / torch.expm1(sigma)
    full = model(tokens, sigma).gather(-1, clean.unsqueeze(-1)).squeeze(-1) - r.log().unsqueeze(-1)
    want = torch.where(tokens == N_BINS, full, 0.0)
    monkeypatch.setattr("sedd.nn.heads.CHUNK_CPU", 11 * N_BINS)
    got = model(tokens, sigma, targets=clean)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert got.dtype == torch.float32


@pytest.mark.parametrize("attention", ["full", "latent"])
def test_an_untrained_model_gives_the_marginals(attention):
    model = build(stir=0, attention=attention)
    clean, tokens, sigma = cells(share=0.9)
    want = marginals().expand(CELLS, -1, -1).gather(-1, clean.unsqueeze(-1)).squeeze(-1)
    got = model(tokens, sigma, targets=clean)
    torch.testing.assert_close(got, torch.where(tokens == N_BINS, want, 0.0))


@pytest.mark.parametrize("attention", ["full", "latent"])
def test_every_parameter_learns_and_the_loss_falls(attention):
    model = build(attention=attention).train()
    clean, tokens, sigma = cells()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = -model(tokens, sigma, targets=clean).mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_gradient_of_the_chosen_log_probabilities_is_that_of_the_whole_table(monkeypatch):
    monkeypatch.setattr("sedd.nn.heads.CHUNK_CPU", 5 * N_BINS)
    head = SoftmaxHead(marginals(), torch.arange(N_BINS).float(), 4)
    generator = torch.Generator().manual_seed(4)
    readout = torch.randn(6, N_VARS, 4, generator=generator, requires_grad=True)
    targets = torch.randint(0, N_BINS, (6, N_VARS), generator=generator)
    masked = torch.rand(6, N_VARS, generator=generator) < 0.6
    weight = torch.randn(6, N_VARS, generator=generator)
    table = head.log_table(readout.flatten(0, 1), torch.arange(N_VARS).repeat(6)).view(6, N_VARS, N_BINS)
    table = table.gather(-1, targets[..., None]).squeeze(-1) * masked
    chosen = head.log_prob(readout, targets, masked)
    torch.testing.assert_close(chosen, table)
    learned = [readout, head.basis, head.bias]
    wanted = torch.autograd.grad((table * weight).sum(), learned)
    for got, want in zip(torch.autograd.grad((chosen * weight).sum(), learned), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


class Largest(TorchDispatchMode):
    """Notes the most elements that a float tensor had while it was active, and every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.operations = 0, set[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations.add(func.name())
        for value in torch.utils._pytree.tree_leaves(out):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                self.elements = max(self.elements, value.numel())
        return out


@DESIGNS
def test_no_step_makes_a_distribution_for_every_gene_at_once(attention, num_latents):
    batch, n_vars, n_bins = 8, 300, 300
    settings = {"hidden_dim": 8, "num_layers": 1, "num_heads": 2, "log_marginals": marginals(n_vars, n_bins)}
    model = SEDDTransformer(n_vars, n_bins, attention=attention, num_latents=num_latents, **settings)
    graph, noise, t = AbsorbingGraph(n_bins), LogLinearNoise(), torch.ones(batch)
    clean = torch.randint(n_bins, (batch, n_vars), generator=torch.Generator().manual_seed(7))
    with Largest() as seen:
        loss, _ = diffusion_loss(model, graph, noise, clean, torch.ones_like(clean, dtype=torch.bool), t)
        loss.backward()
    # A chunk of 2^17, or the genes' own table of biases, which is there in any case.
    assert seen.elements <= max(CHUNK_CPU, n_vars * n_bins)
    assert seen.elements < batch * n_vars * n_bins / 5
    if attention == "full":  # without a mask and with heads it takes, or the square of the genes would be made
        assert "aten::_scaled_dot_product_flash_attention_for_cpu" in seen.operations
        assert not any("softmax" in name for name in seen.operations - {"aten::_log_softmax"})


@DESIGNS
def test_probabilities_are_float32_under_bfloat16_autocast(attention, num_latents):
    model = build(attention=attention, num_latents=num_latents)
    clean, tokens, sigma = cells()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(tokens, sigma, targets=clean)
        assert model(tokens, sigma, everywhere=True).dtype == torch.float32
    low.sum().backward()
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, model(tokens, sigma, targets=clean), atol=0.1, rtol=0.1)


def test_a_cell_with_nothing_masked_costs_nothing_and_has_a_gradient():
    model = build()
    clean, _, sigma = cells()
    out = model(clean, sigma, targets=clean)
    assert (out == 0).all()
    out.sum().backward()


@DESIGNS
def test_expectation_is_the_moments_of_the_output(attention, num_latents, monkeypatch):
    monkeypatch.setattr("sedd.nn.heads.CHUNK_CPU", 9 * N_BINS)
    model = build(attention=attention, num_latents=num_latents)
    _, tokens, sigma = cells()
    values = torch.tensor([0.0, 1, 2, 3, 4, 5, 8.5])
    model.head.values.copy_(values)
    mean, var = model.expectation(tokens, sigma)
    p = (model(tokens, sigma)[..., :N_BINS] + torch.expm1(sigma).log()[:, None, None]).exp()
    masked = tokens == N_BINS
    torch.testing.assert_close(mean[masked], (p @ values)[masked], atol=1e-4, rtol=1e-4)
    want = (p.double() @ values.double().square() - mean.double().square())[masked]
    torch.testing.assert_close(var[masked].double(), want, atol=1e-2, rtol=1e-2)
    assert (mean[~masked] == values[tokens[~masked]]).all()
    assert (var[~masked] == 0).all()


def test_conditions_and_library_matter_and_null_means_not_given():
    model = build(condition_sizes=[3, 2], condition_library=True)
    clean, tokens, sigma = cells()
    codes = torch.ones(CELLS, 2, dtype=torch.int64)
    bare = model(tokens, sigma, targets=clean)
    null = model(
        tokens, sigma, targets=clean, condition=torch.zeros_like(codes), library=torch.full((CELLS,), torch.nan)
    )
    torch.testing.assert_close(null, bare)
    assert not torch.allclose(model(tokens, sigma, targets=clean, condition=codes), bare)
    assert not torch.allclose(model(tokens, sigma, targets=clean, library=torch.full((CELLS,), 8.0)), bare)


def test_config_rebuilds_the_model_from_json():
    model = build(condition_sizes=[3], attention="full")
    again = SEDDTransformer(**json.loads(json.dumps(model.config))).eval()
    again.load_state_dict(model.state_dict())
    _, tokens, sigma = cells()
    torch.testing.assert_close(again(tokens, sigma), model(tokens, sigma), atol=0, rtol=0)


def test_a_model_of_pretrained_gene_vectors_is_rebuilt_from_config_and_weights():
    vectors = torch.randn(N_VARS, 9, generator=torch.Generator().manual_seed(5))
    model = build(gene_embeddings=vectors)
    again = SEDDTransformer(**model.config).eval()
    again.load_state_dict(model.state_dict())
    _, tokens, sigma = cells()
    torch.testing.assert_close(again(tokens, sigma), model(tokens, sigma), atol=0, rtol=0)


@DESIGNS
def test_a_model_of_pretrained_gene_vectors_takes_another_panel(attention, num_latents):
    vectors = torch.randn(N_VARS, 9, generator=torch.Generator().manual_seed(5))
    model = build(gene_embeddings=vectors, attention=attention, num_latents=num_latents)
    _, tokens, sigma = cells()
    order = torch.randperm(N_VARS, generator=torch.Generator().manual_seed(6))[:15]
    panel = model.for_genes(marginals()[order], vectors[order], known=order)
    chosen = torch.full_like(tokens, N_BINS)
    chosen[:, order] = tokens[:, order]
    if attention == "latent":  # where genes that are not visible do not count
        torch.testing.assert_close(panel(tokens[:, order], sigma), model(chosen, sigma)[:, order], atol=1e-4, rtol=1e-4)
    new = model.for_genes(marginals()[:3], torch.randn(3, 9))
    assert new(tokens[:, :3], sigma).shape == (CELLS, 3, N_BINS + 1)
    with pytest.raises(UserError, match="pretrained gene embeddings"):
        build().for_genes(marginals(), vectors)


@pytest.mark.parametrize(
    ("kind", "size"),
    [(SEDDTransformerSmall, (128, 4, 4)), (SEDDTransformerMedium, (256, 6, 8)), (SEDDTransformerLarge, (512, 12, 16))],
)
def test_named_sizes(kind, size):
    with torch.device("meta"):
        model = kind(N_VARS, N_BINS)
    assert (model.config["hidden_dim"], model.config["num_layers"], model.config["num_heads"]) == size


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hidden_dim": 30, "num_heads": 4}, "hidden_dim 30 is not divisible by num_heads 4"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"attention": "sparse"}, "'latent' or 'full'"),
        ({"log_marginals": torch.zeros(2, 3)}, r"log_marginals has shape \(2, 3\); expected \(23, 7\)"),
        ({"bin_values": torch.zeros(3)}, "bin_values has shape"),
        ({"gene_embeddings": torch.zeros(4, 8)}, "gene_embeddings has shape"),
    ],
)
def test_sizes_that_do_not_fit_are_named(settings, words):
    with pytest.raises(UserError, match=words):
        SEDDTransformer(N_VARS, N_BINS, **settings)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("default")  # of torch's own, while it imports its compiler
@pytest.mark.parametrize("attention", ["full", "latent"])
def test_compiling_with_static_shapes_gives_the_same_and_compiles_once(attention):
    torch._dynamo.reset()
    model = build(attention=attention)
    compiled = model.compiled(torch.device("cpu"))
    for share in (0.2, 0.5, 0.8):
        clean, tokens, sigma = cells(share)
        with torch._dynamo.config.patch(error_on_recompile=True):
            got = compiled(tokens, sigma, targets=clean)
        torch.testing.assert_close(got, model(tokens, sigma, targets=clean), atol=1e-4, rtol=1e-4)
        got.sum().backward()


@pytest.mark.parametrize(("device", "graphs", "mode"), [("cuda", True, "reduce-overhead"), ("cuda", False, None), ("cpu", False, None)])
def test_a_gpu_records_what_it_does_and_a_cpu_keeps_its_kernel(device, graphs, mode, monkeypatch):
    asked, kept = [], []
    monkeypatch.setattr(torch, "compile", lambda module, **settings: asked.append(settings) or module)
    monkeypatch.setattr(torch.compiler, "disable", lambda method: kept.append(method.__name__) or method)
    build().compiled(torch.device(device), graphs=graphs)
    assert asked == [{"dynamic": False, "mode": mode}]
    assert kept == (["_at_masked"] if device == "cpu" else [])


def test_what_a_visible_count_tells_is_the_same_from_the_kernel_and_from_torch():
    tokens = torch.tensor([[0, 1, 7, UNBOUNDED, 1023, 1024, 2_000_000_000]])
    features = Features(UNBOUNDED, None)
    counts = tokens.masked_fill(tokens == UNBOUNDED, 0).double()
    seen = (tokens != UNBOUNDED).double()
    want = torch.stack([seen, (counts > 0) * seen, counts.log1p() * seen], 1).float()
    torch.testing.assert_close(features(tokens), want)
    torch.testing.assert_close(features(tokens.to(torch.int32)), want)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # the other way, that of a GPU and of a compiler, has the same shape
        assert Features(UNBOUNDED, None)(mode.from_tensor(tokens).to("meta")).shape == want.shape


@DESIGNS
def test_labels_that_are_hidden_are_answered_and_shown_ones_are_not(attention, num_latents):
    model = build(attention=attention, num_latents=num_latents, condition_sizes=(3, 4), answer_labels=True)
    clean, tokens, sigma = cells()
    labels = torch.tensor([[1, 4], [3, 0], [2, 2], [0, 1], [3, 3]])
    condition = torch.tensor([[0, 4], [0, 0], [2, 2], [0, 0], [3, 0]])
    log_mu, log_nu = model(tokens, sigma, targets=clean, condition=condition, labels=labels)
    assert torch.equal(log_mu, model(tokens, sigma, targets=clean, condition=condition))
    laws = model.label_laws(tokens, sigma, condition=condition)
    for law, size in zip(laws, (3, 4), strict=True):
        assert law.shape == (CELLS, size)
        torch.testing.assert_close(law.exp().sum(1), torch.ones(CELLS))
    asked = [(0, 0), (1, 0), (3, 1), (4, 1)]  # known and hidden
    want = torch.zeros(CELLS, 2)
    for cell, column in asked:
        want[cell, column] = laws[column][cell, labels[cell, column] - 1]
    assert torch.equal(log_nu, want)
    nothing = model(tokens, sigma, targets=clean, labels=labels)[1]
    assert torch.equal(nothing != 0, labels != 0)
    given_other = model.label_laws(tokens, sigma, condition=torch.tensor([[0, 1]] * CELLS))[0]
    assert not torch.allclose(given_other, model.label_laws(tokens, sigma)[0])


@DESIGNS
def test_a_model_that_answers_labels_is_otherwise_the_same_bit_for_bit(attention, num_latents):
    given = {"attention": attention, "num_latents": num_latents, "condition_sizes": (3,)}
    without, answering = build(0.0, **given), build(0.0, **given, answer_labels=True)
    extra = {name for name in answering.state_dict() if name not in without.state_dict()}
    assert extra == {"labels.columns.0.weight", "labels.columns.0.bias"}
    for name, value in without.state_dict().items():
        assert torch.equal(value, answering.state_dict()[name]), name
    torch.testing.assert_close(answering.label_laws(*cells()[1:])[0].exp(), torch.full((CELLS, 3), 1 / 3))
    shares = build(0.0, **given, answer_labels=True, label_shares=[[0.5, 0.3, 0.2]])
    torch.testing.assert_close(shares.label_laws(*cells()[1:])[0].exp(), torch.tensor([[0.5, 0.3, 0.2]] * CELLS))
    with pytest.raises(UserError, match="this model gives no labels"):
        without.label_laws(*cells()[1:])


@pytest.mark.parametrize("attention", ["latent", "full"])
def test_training_learns_labels_from_the_genes_that_are_visible(attention):
    model = build(0.0, attention=attention, num_layers=1, condition_sizes=(2,), answer_labels=True).train()
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(1, 3, (64, 1), generator=generator)
    clean = torch.randint(0, 3, (64, N_VARS), generator=generator) + 3 * (labels - 1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        masked = torch.rand(clean.shape, generator=generator) < 0.5
        given = {"labels": labels, "label_weight": torch.ones(64, 1)}
        loss, _ = diffusion_loss(model, AbsorbingGraph(N_BINS), LogLinearNoise(), clean, masked, torch.full((64,), 0.5), **given)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    few = clean.masked_fill(torch.rand(clean.shape, generator=generator) < 0.8, N_BINS)
    law = model.eval().label_laws(few, torch.full((64,), 1.6))[0]
    seen = (few != N_BINS).any(1)
    assert (law.argmax(1) + 1 == labels[:, 0])[seen].double().mean() > 0.9


def law_means(model, readout):
    """The mean of each gene's law at a readout, (n_vars, rank), by its own table."""
    genes = torch.arange(N_VARS)
    if isinstance(model.head, SoftmaxHead):
        return model.head.log_table(readout.float(), genes).double().exp() @ model.head.values.double()
    raw = model.head.start.double() + torch.einsum("gr,rjc->gjc", readout, model.head.moves.double())
    return (raw[..., 0].softmax(-1) * raw[..., 1].exp()).sum(-1)


@pytest.mark.parametrize("kind", ["counts", "bins"])
def test_usual_means_and_their_slopes_are_those_of_the_laws(kind):
    model = build(0.3) if kind == "bins" else SEDDTransformer(N_VARS, UNBOUNDED, hidden_dim=16, num_layers=1, rank=4)
    with torch.no_grad():
        for weight in model.head.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
        mean, slopes = model.head.usual_means()
        torch.testing.assert_close(mean, law_means(model, torch.zeros(N_VARS, 4).double()), rtol=1e-5, atol=1e-7)
        for r in range(4):
            step = torch.zeros(N_VARS, 4).double()
            step[:, r] = 1e-2
            change = (law_means(model, step).log() - law_means(model, -step).log()) / 2e-2
            torch.testing.assert_close(slopes[:, r], change, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("num_latents", [1, 3])
def test_distances_of_embeddings_are_those_of_expected_logarithms_to_first_order(num_latents):
    torch.manual_seed(0)
    model = SEDDTransformer(N_VARS, UNBOUNDED, hidden_dim=16, num_layers=1, num_latents=num_latents, rank=3).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
        basis = model.embedding_basis()
        assert basis.shape == (16 * num_latents, 16)
        base = model.backbone.readouts(torch.zeros(1, num_latents, 16))

        def log1p_cp10k(latents):
            readout = (model.backbone.readouts(latents) - base)[0].double()
            mean = law_means(model, readout)
            return (1e4 * mean / mean.sum()).log1p()

        for k in range(5):
            step = 1e-3 * torch.randn(1, num_latents, 16, generator=torch.Generator().manual_seed(k))
            moved = log1p_cp10k(step) - log1p_cp10k(-step)
            if num_latents == 1:  # else what the last directions hold is left out
                assert float((2 * step.flatten() @ basis).norm()) == pytest.approx(float(moved.norm()), rel=1e-2)
            else:
                assert 0.3 * float(moved.norm()) < float((2 * step.flatten() @ basis).norm()) < 1.01 * float(moved.norm())
        lengths = basis.norm(dim=0)
        assert (lengths[:-1] >= lengths[1:] - 1e-5).all()
        assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) >= 0).all()
        clean, sigma = torch.randint(0, 9, (CELLS, N_VARS)), torch.full((CELLS,), 0.1)
        state = model.backbone.of_cell(model.backbone.trunk(clean, model.conditioner(sigma, None, None)))
        torch.testing.assert_close(model.embed(clean, sigma), state @ basis)
