"""KFAC and EKFAC against factors that loops and dense autograd give, and against the theorem that makes them exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.nn.functional import cross_entropy, mse_loss

import upweight as uw
from nets import NETS, Net, draw, known, z_scores
from tolerances import EXACT, FLOAT32, STANDARD_ERRORS
from upweight import calculus
from upweight.errors import InvalidInput, UnsupportedModel
from upweight.model import layers, penalties
from upweight.model.sweep import Sweep
from upweight.operators import EKFAC, KFAC, EmpiricalFisher, GaussNewton, Hessian
from upweight.operators.ahead import Ahead
from upweight.operators.cotangents import Signs
from upweight.operators.kronecker import _corrected

PENALTY = 0.05


def close(a, b, rtol: float = EXACT):
    largest, miss = float(torch.as_tensor(b).abs().max()), float((torch.as_tensor(a) - torch.as_tensor(b)).abs().max())
    assert largest > 0
    assert miss <= rtol * largest


def operator(spec, module, X, y, loss=cross_entropy, **settings):
    return uw.explain(module, X, y, loss=loss, curvature=spec, progress=False, **settings).operator


def of_net(spec, one: Net, **settings):
    return operator(spec, one.module, one.X, one.y, sample_weight=one.weights.numpy(), penalty=PENALTY, **settings)


@pytest.mark.parametrize("name", NETS)
def test_kfac_is_the_product_of_factors_found_by_loops(name):
    one, _ = known(name)
    found = of_net(KFAC(), one).matrix()
    expected = PENALTY * torch.eye(len(found), dtype=torch.float64)
    for layer in one.layers:
        for group in range(one.groups[layer]):
            A, B = one.factors(layer, group)
            at = one.places(layer, group).flatten()
            expected[at[:, None], at] += torch.kron(B, A)
    close(found, expected)


@pytest.mark.parametrize("name", NETS)
def test_ekfac_has_the_diagonal_of_the_true_block_in_its_eigenbasis(name):
    one, G = known(name)
    found = of_net(EKFAC(), one).matrix()
    expected = PENALTY * torch.eye(len(found), dtype=torch.float64)
    for layer in one.layers:
        for group in range(one.groups[layer]):
            A, B = one.factors(layer, group)
            at = one.places(layer, group).flatten()
            Q = torch.kron(torch.linalg.eigh(B)[1], torch.linalg.eigh(A)[1])
            block = G[at[:, None], at]
            expected[at[:, None], at] += Q @ torch.diag((Q.T @ block @ Q).diagonal()) @ Q.T
    close(found, expected, 1e-9)


@pytest.mark.parametrize("name", NETS)
def test_ekfac_is_nearer_to_the_blocks_than_kfac(name):
    one, G = known(name)
    G = G + PENALTY * torch.eye(len(G), dtype=torch.float64)
    misses = {EKFAC: 0.0, KFAC: 0.0}
    for spec in misses:
        M = of_net(spec(), one).matrix()
        for layer in one.layers:
            for group in range(one.groups[layer]):
                at = one.places(layer, group).flatten()
                misses[spec] += float(((M - G)[at[:, None], at] ** 2).sum())
    assert misses[EKFAC] < misses[KFAC]


def diagonal_in(basis, G: Tensor) -> Tensor:
    """diag(Qᵀ G Q) of the block of G that a basis of one group is for."""
    at = basis.at.flatten()
    sides = zip(basis.at.shape[1:], (basis.left, basis.right), strict=True)
    left, right = (torch.eye(size, dtype=torch.float64) if Q is None else Q[0].contiguous() for size, Q in sides)
    Q = torch.kron(left, right)
    return (Q.T @ G[at[:, None], at] @ Q).diagonal()


# ---- exact by theorem ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [KFAC(), EKFAC()], ids=["KFAC", "EKFAC"])
@pytest.mark.parametrize("bias", [True, False])
def test_one_linear_layer_with_squared_loss_is_exact(spec, bias):
    """∂²ℓ/∂f² is the same matrix H for every example, so C = (Σ wᵢ ãᵢãᵢᵀ / n) ⊗ H: a Kronecker product."""
    module = nn.Linear(4, 3, bias=bias).double()
    X, y = draw(30, 4), draw(30, 3, seed=1)
    metric = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 0.7]], dtype=torch.float64)

    def loss(f, y):
        return ((f - y) @ metric * (f - y)).sum(1).mean() / 2

    weights = torch.rand(30, generator=torch.Generator().manual_seed(2), dtype=torch.float64).numpy()
    found = operator(spec, module, X, y, loss, sample_weight=weights, penalty=PENALTY)
    wide = torch.cat([X, X.new_ones(30, 1)], 1) if bias else X
    by_hand = torch.kron(metric, wide.T @ (wide * torch.from_numpy(weights)[:, None]) / 30)
    order = [*torch.arange(15).reshape(3, 5)[:, :4].flatten().tolist(), 4, 9, 14] if bias else list(range(12))
    expected = by_hand[order][:, order] + PENALTY * torch.eye(len(order), dtype=torch.float64)
    close(found.matrix(), expected)
    close(found.matrix(), operator(GaussNewton(), module, X, y, loss, sample_weight=weights, penalty=PENALTY).matrix())
    close(found.eigenvalues, torch.linalg.eigvalsh(expected))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("spec", [KFAC(), EKFAC()], ids=repr)
def test_a_grouped_convolution_at_one_position_is_exact_for_squared_loss(spec, bias):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2, bias=bias), nn.Flatten()).double()
    X, y, weights = draw(30, 4, 3), draw(30, 6, seed=1), np.random.default_rng(0).uniform(0.5, 2, 30)
    influence = uw.explain(module, X, y, loss=nn.MSELoss(), sample_weight=weights, damping=0.1, curvature=spec)
    exact = uw.explain(
        module, X, y, loss=nn.MSELoss(), sample_weight=weights, damping=0.1, curvature=GaussNewton(keep=0)
    )
    torch.testing.assert_close(influence.operator.matrix(), exact.operator.matrix(), rtol=1e-8, atol=1e-10)
    ours, truth = (each.of_self().values for each in (influence, exact))
    np.testing.assert_allclose(ours, truth, rtol=1e-8)


@pytest.mark.parametrize("bias", [False, True])
def test_ekfac_of_a_grouped_convolution_has_the_true_diagonal_at_many_positions(bias):
    """More positions than outputs take the other way through the layer, which must agree."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv1d(4, 2, 2, groups=2, bias=bias), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).double()
    X, y = draw(12, 4, 9), torch.arange(12) % 3
    settings = {"loss": nn.CrossEntropyLoss(), "damping": 0.1}
    found = uw.explain(module, X, y, curvature=EKFAC(), **settings).operator
    exact = uw.explain(module, X, y, curvature=GaussNewton(keep=0), **settings).operator.matrix()
    assert found.matrix().trace() == pytest.approx(float(exact.trace()), rel=1e-8)


def test_one_example_is_exact_for_ekfac_of_the_empirical_fisher():
    """One gradient matrix of one position is an outer product, so its eigenvectors are those of the factors."""
    one, _ = known("mlp")
    found = operator(EKFAC(of=EmpiricalFisher()), one.module, one.X[:1], one.y[:1]).matrix()
    exact = operator(EmpiricalFisher(), one.module, one.X[:1], one.y[:1]).matrix()
    for layer in one.layers:
        at = one.places(layer, 0).flatten()
        close(found[at[:, None], at], exact[at[:, None], at])


def test_the_empirical_fisher_has_the_diagonal_of_its_dense_block():
    one, _ = known("sequence")
    settings = {"sample_weight": one.weights.numpy()}
    found = operator(EKFAC(of=EmpiricalFisher()), one.module, one.X, one.y, **settings)
    exact = operator(EmpiricalFisher(), one.module, one.X, one.y, **settings).matrix()
    for basis in found.bases:
        close(basis.eigenvalues.flatten(), diagonal_in(basis, exact))
    assert float((found.matrix() - of_net(EKFAC(), one).matrix()).abs().max()) > 1e-3


# ---- other blocks ----------------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """Token embeddings (one of them padding), a free table of positions, a norm, and a head."""

    def __init__(self, rows: int = 7) -> None:
        nn.Module.__init__(self)
        self.table = nn.Embedding(rows, 3, padding_idx=0)
        self.positions = nn.Parameter(draw(4, 3, seed=5))
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.table(x) + self.positions)).mean(1))


def reader(rows: int = 7) -> tuple[nn.Module, Tensor, Tensor, np.ndarray]:
    module = Reader(rows).double()
    with torch.no_grad():
        module.table.weight[1:] = draw(rows - 1, 3, seed=3)
        module.head.weight.copy_(draw(3, 3, seed=4))
    X = torch.randint(0, 7, (50, 4), generator=torch.Generator().manual_seed(0))
    weights = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    return module, X, torch.arange(50) % 3, weights.numpy()


def blocks(module: nn.Module) -> dict[str, Tensor]:
    sizes = [p.numel() for p in module.parameters()]
    places = torch.arange(sum(sizes)).split(sizes)
    return {name: at for (name, _), at in zip(module.named_parameters(), places, strict=True)}


@pytest.mark.parametrize("spec", [KFAC(), EKFAC()], ids=["KFAC", "EKFAC"])
def test_tables_have_frequencies_and_parameters_without_structure_their_own_block(spec):
    module, X, y, weights = reader()
    found = operator(spec, module, X, y, sample_weight=weights)
    exact = operator(GaussNewton(), module, X, y, sample_weight=weights).matrix()
    at = blocks(module)
    M = found.matrix()
    for name in ("positions", "norm.weight", "norm.bias"):
        close(M[at[name][:, None], at[name]], exact[at[name][:, None], at[name]])
    table = M[at["table.weight"][:, None], at["table.weight"]].reshape(7, 3, 7, 3)
    truth = exact[at["table.weight"][:, None], at["table.weight"]].reshape(7, 3, 7, 3)
    assert not table[0].any()
    _, Q = torch.linalg.eigh(table[2, :, 2, :] if isinstance(spec, KFAC) else _table_factor(module, X, y, weights))
    for token in range(7):
        for other in set(range(7)) - {token}:
            assert not table[token, :, other].any()
    if isinstance(spec, KFAC):
        read = torch.from_numpy(weights)[:, None] * (X > 0)
        B = _table_factor(module, X, y, weights)
        for token in range(1, 7):
            close(table[token, :, token], B * float((read * (token == X)).sum() / read.sum()))
    else:
        for token in range(1, 7):
            close((Q.T @ table[token, :, token] @ Q), torch.diag((Q.T @ truth[token, :, token] @ Q).diagonal()))


def _table_factor(module: nn.Module, X: Tensor, y: Tensor, weights: np.ndarray) -> Tensor:
    """B = (1/n) Σ w Σ_t E[d dᵀ] of what the table gives, by autograd on its output."""
    B = torch.zeros(3, 3, dtype=torch.float64)
    for x, target, w in zip(X, y, weights, strict=True):

        def out(e: Tensor) -> Tensor:
            return module.head(torch.tanh(module.norm(e + module.positions)).mean(0))

        e = module.table(x).detach()
        J = jacobian(out, e)
        H = hessian(lambda f, target=target: cross_entropy(f[None], target[None]), out(e).detach())
        for t in range(4):
            if x[t] > 0:
                B += w * J[:, t].T @ H @ J[:, t]
    return B / len(X)


class Tied(nn.Module):
    """One weight both looked up and multiplied by, and another used twice."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.table = nn.Embedding(5, 3)
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(torch.tanh(self.inner(self.table(x).mean(1)))))
        return h @ self.table.weight.T


@pytest.mark.parametrize("spec", [KFAC(), EKFAC()], ids=["KFAC", "EKFAC"])
def test_shared_weights_are_counted_in_all_their_uses(spec):
    module = Tied().double()
    X = torch.randint(0, 5, (30, 4), generator=torch.Generator().manual_seed(0))
    y = torch.arange(30) % 5
    found, exact = (operator(s, module, X, y).matrix() for s in (spec, GaussNewton()))
    at = blocks(module)["table.weight"]
    close(found[at[:, None], at], exact[at[:, None], at])
    inner = next(b for b in operator(spec, module, X, y).bases if "inner" in b.name)
    assert inner.left is not None
    if isinstance(spec, EKFAC):
        close(inner.eigenvalues.flatten(), diagonal_in(inner, exact))


class Language(nn.Module):
    """A table that is read, and multiplied with at the end, with or without a bias beside it."""

    def __init__(self, bias: bool) -> None:
        nn.Module.__init__(self)
        self.table, self.inner, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=bias)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.table(x))))


def per_token(f, y):
    return cross_entropy(f.movedim(2, 1), y)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("of", [GaussNewton(), EmpiricalFisher()], ids=["GaussNewton", "EmpiricalFisher"])
def test_a_large_tied_weight_has_its_true_diagonal(bias, of, monkeypatch):
    monkeypatch.setattr("upweight.operators.blocks.DENSE", 0)
    module = Language(bias).double()
    X = torch.randint(0, 7, (30, 5), generator=torch.Generator().manual_seed(0))
    weights = torch.rand(30, generator=torch.Generator().manual_seed(2), dtype=torch.float64).numpy()
    settings = {"sample_weight": weights, "penalty": PENALTY}
    found, exact = (operator(s, module, X, X.flip(1), per_token, **settings) for s in (EKFAC(of=of), of))
    tied = next(basis for basis in found.bases if "table" in basis.name)
    assert tied.at.shape == (1, 7, 4 + bias)
    close(tied.eigenvalues.flatten(), diagonal_in(tied, exact.matrix()))
    G = draw(3, found.size)
    batch = calculus.ready(found.sweep.objective, (X[:9], X.flip(1)[:9]))
    rows = calculus.gradients(found.sweep.objective, batch)
    close(found.weigh(found.pieces(batch), lambda values: values), (found.apply(rows) * rows).sum(1))
    close(found.map(lambda values: 1 / values, found.apply(G)), G, 1e-8)


def test_kfac_of_a_tied_weight_is_the_product_of_the_marginals_of_its_uses(monkeypatch):
    """At one position each use's gradient is rank one, and an untied copy of the model tells the uses apart."""
    monkeypatch.setattr("upweight.operators.blocks.DENSE", 0)
    module = Language(bias=False).double()
    apart = Language(bias=False).double()
    apart.head.weight = nn.Parameter(module.head.weight.detach().clone())
    apart.load_state_dict(module.state_dict())
    X = torch.randint(0, 7, (30, 1), generator=torch.Generator().manual_seed(0))
    spec = KFAC(of=EmpiricalFisher())
    found = next(basis for basis in operator(spec, module, X, X.flip(0), per_token).bases if "table" in basis.name)
    objective = uw.Objective.from_module(apart, per_token)
    rows = calculus.gradients(objective, (X, X.flip(0)))
    uses = [rows[:, list(at)].reshape(30, 7, 4) for at in map(blocks(apart).get, ("table.weight", "head.weight"))]
    left = sum(torch.einsum("boi,bpi->op", G, G) for G in uses) / 30
    right = sum(torch.einsum("boi,boj->ij", G, G) for G in uses) / 30
    Q = torch.kron(found.left[0], found.right[0])
    close(Q @ torch.diag(found.values.flatten()) @ Q.T, torch.kron(left, right) / left.trace(), 1e-9)


class Mixed(nn.Module):
    """Tokens, each mixed with those before it; positions behind the end of a row reach no counted one."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.table, self.mix, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.table(input_ids).cumsum(1)))).transpose(1, 2)


@pytest.mark.parametrize("spec", [KFAC(), EKFAC()], ids=["KFAC", "EKFAC"])
def test_padding_counts_in_no_factor(spec):
    """The factors of rows one by one, which are not padded, are those of batches, which are."""
    torch.manual_seed(0)
    module = Mixed().double()
    sizes = np.random.default_rng(0).integers(2, 7, 12)
    tokens = [
        torch.randint(0, 9, (int(size),), generator=torch.Generator().manual_seed(k)) for k, size in enumerate(sizes)
    ]
    rows = [{"input_ids": row, "labels": row.roll(-1)} for row in tokens]
    found = [
        uw.explain(module, rows, loss=nn.CrossEntropyLoss(), curvature=spec, batch_size=size, progress=False).operator
        for size in (1, 4, 12)
    ]
    for other in found[1:]:
        close(other.matrix(), found[0].matrix())
    first = next(basis for basis in found[0].bases if "head" in basis.name)
    h = [torch.tanh(module.mix(module.table(row).cumsum(0))) for row in tokens]
    wide = torch.cat([torch.cat([part, part.new_ones(len(part), 1)], 1) for part in h]).detach()
    # a row of t tokens has a weight in proportion to t
    weight = torch.cat([torch.full((size,), float(size)) for size in sizes]).double()
    A = (wide * weight[:, None]).T @ wide / weight.sum()
    Q = first.right[0]
    off = Q.T @ A @ Q
    assert float((off - torch.diag(off.diagonal())).abs().max()) <= 1e-9 * float(off.abs().max())


class Transformer(nn.Module):
    """A block with attention, norms and a feed-forward part between tied tables."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.table = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        inner = self.norm(h)
        h = h + self.attention(inner, inner, inner, need_weights=False)[0]
        return (h + self.down(torch.tanh(self.up(h)))) @ self.table.weight.T


def test_every_block_of_a_transformer_has_its_true_diagonal():
    module = Transformer().double()
    with torch.no_grad():
        for number, p in enumerate(module.parameters()):
            p.copy_(draw(*p.shape, seed=number))
    X = torch.randint(0, 7, (30, 5), generator=torch.Generator().manual_seed(0))
    found, exact = (operator(s, module, X, X.flip(1), per_token) for s in (EKFAC(), GaussNewton()))
    G, reached = exact.matrix(), []
    for basis in found.bases:
        at = basis.at.flatten()
        close(basis.eigenvalues.flatten(), diagonal_in(basis, G))
        reached.append(at)
    assert torch.equal(torch.cat(reached).sort().values, torch.arange(found.size))
    assert sum(basis.left is not None for basis in found.bases) == 4  # in and out of attention, up, down


class Partly(nn.Module):
    """A free parameter that autograd takes example by example, and a layer that the loss never sees."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.rates = nn.Parameter(draw(3, seed=7))
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        decayed = torch.exp(-(self.rates**2) * x).sum(1)
        return torch.stack([decayed.sum(1), decayed.cos().sum(1)], 1)


def test_what_goes_through_autograd_keeps_its_blocks_and_what_is_unused_its_penalty():
    module, X, y = Partly().double(), draw(12, 4, 3), torch.arange(12) % 2
    strengths = {name: draw(*p.shape, seed=1).abs() for name, p in module.named_parameters()}
    settings = {"penalty": uw.L2(strengths)}
    found, exact = (operator(s, module, X, y, **settings).matrix() for s in (EKFAC(), GaussNewton()))
    for name, at in blocks(module).items():
        close(found[at[:, None], at], exact[at[:, None], at])
        if "unused" in name:
            close(found[at[:, None], at], torch.diag(strengths[name].flatten()))


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_steps_of_a_recurrent_layer_are_positions_of_one_weight(kind):
    """So its factors have the trace of its own block, whatever the steps have in common."""

    class Last(nn.Module):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.cell = kind(3, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.cell(x)[0][:, -1]

    module, X, y = Last().double(), draw(12, 4, 3), torch.arange(12) % 2
    found, exact = (operator(s, module, X, y).matrix() for s in (EKFAC(), GaussNewton()))
    for side in ("ih", "hh"):
        at = torch.cat([blocks(module)[f"cell.{part}_{side}_l0"] for part in ("weight", "bias")])
        close(found[at, at].sum(), exact[at, at].sum())


def test_many_parameters_without_structure_keep_their_diagonal(monkeypatch):
    monkeypatch.setattr("upweight.operators.factors.DENSE", 8)
    module, X, y, weights = reader()
    found, exact = (operator(s, module, X, y, sample_weight=weights).matrix() for s in (KFAC(), GaussNewton()))
    at = blocks(module)["positions"]
    close(found[at[:, None], at], torch.diag(exact[at, at]))


def test_a_side_too_wide_to_rotate_keeps_its_diagonal(monkeypatch):
    one, _ = known("mlp")
    monkeypatch.setattr("upweight.operators.factors.WIDEST", 3)  # layer 0 has 4 outputs, layer 2 has 4 inputs
    found = of_net(KFAC(), one).matrix() - PENALTY * torch.eye(31, dtype=torch.float64)
    (A0, B0), (A2, B2) = one.factors("0", 0), one.factors("2", 0)
    for layer, expected in (
        ("0", torch.kron(torch.diag(B0.diagonal()), A0)),
        ("2", torch.kron(B2, torch.diag(A2.diagonal()))),
    ):
        at = one.places(layer, 0).flatten()
        close(found[at[:, None], at], expected)
    close_to_own_forms(of_net(EKFAC(), one), one.X, one.y)
    one, G = known("sequence")
    for basis in of_net(EKFAC(), one).bases:
        close(basis.values.flatten(), diagonal_in(basis, G))


# ---- the penalty -----------------------------------------------------------------------------------------------------


def test_a_penalty_that_differs_inside_a_layer_enters_by_its_diagonal_in_the_eigenbasis():
    one, _ = known("mlp")
    objective = uw.Objective.from_module(one.module, cross_entropy)
    strengths = {"0.weight": 0.3, "2.weight": 0.1}
    examples = uw.Examples(one.X, one.y)
    with_, without = (
        KFAC().bind(Sweep(uw.Objective.from_module(one.module, cross_entropy, penalty=penalty), examples))
        for penalty in (uw.L2(strengths), None)
    )
    D = penalties.diagonal(uw.Objective.from_module(one.module, cross_entropy, penalty=uw.L2(strengths)))
    for a, b in zip(with_.bases, without.bases, strict=True):
        Q = torch.kron(a.left[0], a.right[0])
        close(
            a.eigenvalues - b.eigenvalues, (Q.T @ torch.diag(D[a.at.flatten()]) @ Q).diagonal().reshape(a.values.shape)
        )
    assert objective.size == with_.size


def test_a_penalty_given_as_a_function_counts_if_it_is_separable():
    one, _ = known("mlp")

    def separable(params):
        return sum((0.5 * PENALTY * p**2).sum() for p in params.values())

    def coupled(params):
        return (params["0.weight"].sum()) ** 2

    found = operator(KFAC(), one.module, one.X, one.y, penalty=separable)
    close(found.matrix(), operator(KFAC(), one.module, one.X, one.y, penalty=PENALTY).matrix())
    with pytest.raises(UnsupportedModel, match=r"couples parameters.*Use a float, L2"):
        operator(KFAC(), one.module, one.X, one.y, penalty=coupled)


# ---- chance ----------------------------------------------------------------------------------------------------------


def test_sampled_factors_are_unbiased_and_converge():
    one, _ = known("grouped cnn")
    bound = of_net(KFAC(), one)
    few = [KFAC(samples=1, seed=seed).bind(bound.sweep).matrix() for seed in range(30)]
    assert float(z_scores(few, bound.matrix()).abs().max()) < STANDARD_ERRORS
    many = KFAC(samples=64).bind(bound.sweep).matrix()
    spread = torch.stack(few).sub(bound.matrix()).square().mean().sqrt()
    assert float((many - bound.matrix()).square().mean().sqrt()) < 2 * spread / 8


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_sampled_eigenvalues_are_unbiased_in_a_given_basis(name):
    one, _ = known(name)
    kfac = of_net(KFAC(), one)
    truth = torch.cat([basis.values.flatten() for basis in of_net(EKFAC(), one).bases])
    few = [_corrected(kfac, Ahead(Signs(1, seed))) for seed in range(30)]
    scores = z_scores([torch.cat([basis.values.flatten() for basis in each.bases]) for each in few], truth)
    assert float(scores.abs().max()) < STANDARD_ERRORS


def test_draws_depend_on_the_seed_and_not_on_the_batch_size():
    one, _ = known("mlp")
    spec = EKFAC(samples=1, seed=3)
    whole = of_net(spec, one).matrix()
    close(of_net(spec, one, batch_size=7).matrix(), whole)
    assert not torch.allclose(of_net(EKFAC(samples=1, seed=4), one).matrix(), whole, rtol=1e-3)


def test_a_batch_that_does_not_fit_draws_the_same_again(monkeypatch):
    one, _ = known("mlp")
    spec = EKFAC(samples=1)
    whole = of_net(spec, one).matrix()
    capture, failed = layers.captured, []

    def full_at_first(objective, plan, batch, cotangents=None):
        if cotangents is not None and not failed:
            failed.append(1)
            raise MemoryError
        return capture(objective, plan, batch, cotangents)

    monkeypatch.setattr(layers, "captured", full_at_first)
    close(of_net(spec, one).matrix(), whole)
    assert failed


def test_too_many_outputs_say_what_to_do():
    module = nn.Linear(2, 1200).double()
    X, y = draw(4, 2), torch.arange(4)
    with pytest.raises(UnsupportedModel, match=r"1,200 outputs per example.*samples=1"):
        operator(KFAC(), module, X, y)
    assert operator(KFAC(samples=1), module, X, y).size == 3600

    def odd(f, y):
        return (f.sum(1) ** 2).mean() + mse_loss(f, y)

    with pytest.raises(UnsupportedModel, match=r"neither diagonal nor that of a cross-entropy.*EmpiricalFisher"):
        operator(KFAC(samples=1), module, X, draw(4, 1200), odd)


def test_a_loss_that_is_not_convex_in_the_output_is_refused():
    module, X, y = nn.Linear(2, 2).double(), draw(5, 2), draw(5, 2, seed=1)
    with pytest.raises(UnsupportedModel, match=r"not convex in the model's output.*EmpiricalFisher"):
        operator(KFAC(), module, X, y, lambda f, y: torch.cos(f - y).mean())


def test_an_objective_in_one_step_is_refused_except_for_the_empirical_fisher():
    def loss(params, example):
        return (params["w"] @ example[0] - example[1]) ** 2

    objective = uw.Objective(loss, {"w": torch.ones(3, dtype=torch.float64)})
    sweep = Sweep(objective, uw.Examples(draw(9, 3), draw(9, seed=1)))
    with pytest.raises(UnsupportedModel, match=r"one function.*of=EmpiricalFisher"):
        KFAC().bind(sweep)
    close(KFAC(of=EmpiricalFisher()).bind(sweep).matrix().trace(), EmpiricalFisher().bind(sweep).matrix().trace(), 1)


# ---- laws ------------------------------------------------------------------------------------------------------------


def close_to_own_forms(found, X, y):
    """gᵀ f(C) g by pieces, against the gradients written out."""
    batch = (X, y)
    G = calculus.gradients(found.sweep.objective, batch).double()

    def inverse(x):
        return 1 / (x + 0.1)

    close(found.weigh(found.pieces(batch), inverse), (G * found.map(inverse, G)).sum(1))


@pytest.mark.parametrize("spec", [KFAC(), EKFAC(samples=1)], ids=["KFAC", "EKFAC"])
@pytest.mark.parametrize("name", [*NETS, "reader"])
def test_forms_by_pieces_equal_forms_by_gradients(spec, name):
    if name == "reader":
        module, X, y, _ = reader()
        close_to_own_forms(operator(spec, module, X, y, penalty=PENALTY), X, y)
    else:
        one, _ = known(name)
        close_to_own_forms(of_net(spec, one), one.X, one.y)


@pytest.mark.parametrize("spec", [KFAC(), EKFAC()], ids=["KFAC", "EKFAC"])
def test_functions_of_it_compose(spec):
    one, _ = known("grouped cnn")
    found = of_net(spec, one)
    V = draw(3, found.size)
    root = found.map(torch.sqrt, found.map(torch.sqrt, V))
    close(root, found.apply(V))
    close(found.map(lambda x: 1 / x, found.apply(V)), V, 1e-9)
    close(found.eigenvalues, torch.linalg.eigvalsh(found.matrix()))
    assert float(found.eigenvalues[0]) >= PENALTY * (1 - 1e-12)


@pytest.mark.parametrize("spec", [KFAC(), EKFAC(), EKFAC(of=EmpiricalFisher())], ids=["KFAC", "EKFAC", "empirical"])
def test_a_row_of_weight_two_is_the_row_twice(spec):
    one, _ = known("cnn")
    n = len(one.X)
    weights = np.ones(n)
    weights[3] = 2
    once = operator(spec, one.module, one.X, one.y, sample_weight=weights).matrix()
    order = [*range(n), 3]
    twice = operator(spec, one.module, one.X[order], one.y[order]).matrix()
    close(once * n, twice * (n + 1), 1e-9)


def test_it_works_in_the_precision_of_the_model():
    one, _ = known("cnn")
    objective = uw.Objective.from_module(one.module.float(), cross_entropy)
    one.module.double()
    found = EKFAC().bind(Sweep(objective, uw.Examples(one.X, one.y)))
    assert objective.reference.dtype == torch.float32
    close(found.matrix(), operator(EKFAC(), one.module, one.X, one.y).matrix(), 10 * FLOAT32)
    assert found.weigh(found.pieces((one.X[:3], one.y[:3])), torch.sqrt).dtype == torch.float64


def test_a_factor_that_is_not_finite_names_the_layer():
    module = nn.Sequential(nn.Linear(2, 2), nn.Identity(), nn.Linear(2, 2)).float()
    with torch.no_grad():
        module[0].weight.fill_(1e-30)
        module[0].bias.fill_(1e25)
        module[2].weight.copy_(torch.eye(2) * 1e-25)
    objective = uw.Objective.from_module(module, cross_entropy)
    sweep = Sweep(objective, uw.Examples(draw(5, 2).float(), torch.arange(5) % 2))
    with pytest.raises(InvalidInput, match=r"of layer '2.weight \+ 2.bias' are NaN or infinite.*float64"):
        KFAC().bind(sweep)


def test_settings_are_checked():
    with pytest.raises(InvalidInput, match=r"KFAC\(of=Hessian\(\)\).*GaussNewton"):
        KFAC(of=Hessian())
    with pytest.raises(InvalidInput, match="samples=0"):
        EKFAC(samples=0)
    with pytest.raises(InvalidInput, match="nothing is drawn"):
        EKFAC(of=EmpiricalFisher(), samples=2)
