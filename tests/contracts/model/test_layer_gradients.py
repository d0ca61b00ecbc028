"""Every way a parameter can act: gradients from layers equal autograd's, one example at a time.

The oracle below runs the module on one example and calls autograd; it shares nothing with `layers`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import upweight as uw
from upweight.data.trees import tree_map
from upweight.model import layers, routes
from upweight.model.layers import convolution, pieces, written

n = 5
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),  # vmap loops over bilinear
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning"),
]


class Tied(nn.Module):
    """An embedding whose table is also the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4, padding_idx=2)
        self.mix = nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return (torch.tanh(self.mix(self.table(tokens))) @ self.table.weight.T).mean(1)


class Functional(nn.Module):
    """Parameters used as functions, as views, as factors, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.randn(6, 8) / 3)
        self.left = nn.Parameter(torch.randn(3, 5) / 3)
        self.square = nn.Parameter(torch.randn(4, 4) / 3)
        self.bias = nn.Parameter(torch.randn(8))
        self.scale = nn.Parameter(torch.randn(4))
        self.idle = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.wide.chunk(2, dim=1)
        h = torch.tanh(F.linear(x, first.T, self.bias[:4])) * torch.exp(self.scale)
        h = torch.addmm(self.bias[4:], h, self.square)
        h = h + (x @ second) @ self.square.transpose(0, 1) + self.bias.reshape(2, 4).sum(0)
        columns = self.left @ torch.cat([h.T, h.T[:1]], 0)
        return columns.T[:, :3]


class Indexed(nn.Module):
    """A table that is read by indexing."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table[tokens - 7]


class Odd(nn.Module):
    """Keywords, biases that broadcast, and a buffer that picks rows of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Parameter(torch.randn(12))
        self.left = nn.Parameter(torch.randn(3, 3))
        self.square = nn.Parameter(torch.randn(3, 3))
        self.one = nn.Parameter(torch.randn(1))
        self.register_buffer("rows", torch.tensor([0, 2, 2]))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x, torch.reshape(input=self.flat, shape=(3, 4)), self.one))
        h = torch.addmm(self.one, torch.mm(self.left, mat2=h.T).T, self.square)
        return h + self.left[self.rows].sum(0)


class Shared(nn.Module):
    """One layer applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.top = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Attention(nn.Module):
    """Self-attention, cross-attention with keys of another width, and a learned position."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(3, 8) / 3)
        self.own = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True, kdim=5, vdim=5)
        self.top = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.position
        h = h + self.own(h, h, h, need_weights=False)[0]
        h = h + self.cross(h, h[..., :5], h[..., 3:], need_weights=False)[0]
        return self.top(h.mean(1))


class Asked(nn.Module):
    """Attention of queries, keys and a mask that are parameters, some of them of fewer heads."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.mask = nn.Parameter(torch.randn(1, 4, 3, 2)), nn.Parameter(torch.randn(1, 1, 3, 3))
        self.key, self.value = nn.Parameter(torch.randn(1, 2, 3, 2)), nn.Parameter(torch.randn(1, 2, 3, 2))
        self.top = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        own = x.unflatten(-1, (4, 2)).transpose(1, 2)
        h = F.scaled_dot_product_attention(self.query, self.key, self.value, self.mask, enable_gqa=True) * own
        h = h + F.scaled_dot_product_attention(self.query, self.query, self.query)
        return self.top(torch.tanh(h).transpose(1, 2).flatten(2).mean(1))


def image(*stages: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*stages, nn.Flatten(), nn.LazyLinear(3))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3))


def padded(mode: str) -> Callable[[], nn.Module]:
    return image(nn.Conv2d(2, 4, 3, padding=1, padding_mode=mode))


def pictures(*shape: int) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def tokens() -> Tensor:
    return torch.randint(0, 7, (n, 4), generator=torch.Generator().manual_seed(1))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], set[str]]] = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)),
        lambda: pictures(6),
        {"linear"},
    ),
    "positions": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)),
        lambda: pictures(4, 6),
        {"linear"},
    ),
    "bilinear": (lambda: _Twice(nn.Bilinear(6, 6, 3)), lambda: pictures(6), {"autograd: bilinear"}),
    "conv1d": (image(nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2)), lambda: pictures(4, 9), {"conv1d"}),
    "conv2d": (
        image(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, (2, 3), stride=(1, 2))),
        lambda: pictures(2, 7, 8),
        {"conv2d"},
    ),
    "conv3d": (image(nn.Conv3d(2, 4, 2, padding=1, groups=2)), lambda: pictures(2, 3, 4, 3), {"conv3d"}),
    "grouped": (image(nn.Conv2d(4, 6, 3, groups=2, padding=1, bias=False)), lambda: pictures(4, 5, 5), {"conv2d"}),
    "depthwise": (image(nn.Conv2d(4, 8, 3, groups=4)), lambda: pictures(4, 5, 5), {"conv2d"}),
    **{
        f"padding-{mode}": (padded(mode), lambda: pictures(2, 5, 6), {"conv2d"})
        for mode in ("reflect", "replicate", "circular", "zeros")
    },
    "same": (image(nn.Conv2d(2, 4, (2, 3), padding="same", dilation=2)), lambda: pictures(2, 6, 5), {"conv2d"}),
    "same, uneven": (
        image(nn.Conv2d(2, 4, (4, 2), padding="same", dilation=(1, 3))),
        lambda: pictures(2, 6, 5),
        {"conv2d"},
    ),
    "valid": (image(nn.Conv1d(2, 4, 3, padding="valid")), lambda: pictures(2, 6), {"conv1d"}),
    "transposed-1d": (
        image(nn.ConvTranspose1d(4, 3, 3, stride=2, padding=1)),
        lambda: pictures(4, 5),
        {"conv_transpose1d"},
    ),
    "transposed-2d": (
        image(nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=(1, 2))),
        lambda: pictures(4, 4, 3),
        {"conv_transpose2d"},
    ),
    "transposed-3d": (
        image(nn.ConvTranspose3d(2, 3, 2, bias=False)),
        lambda: pictures(2, 2, 3, 2),
        {"conv_transpose3d"},
    ),
    "layer-norm": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)),
        lambda: pictures(6),
        {"autograd: layer_norm"},
    ),
    "rms-norm": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.RMSNorm(5), nn.Linear(5, 3)),
        lambda: pictures(6),
        {"autograd: rms_norm"},
    ),
    "group-norm": (image(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)), lambda: pictures(2, 5, 5), {"autograd: group_norm"}),
    "instance-norm": (
        image(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True)),
        lambda: pictures(2, 5, 5),
        {"autograd: instance_norm"},
    ),
    "batch-norm": (image(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)), lambda: pictures(2, 5, 5), {"autograd: batch_norm"}),
    "prelu": (image(nn.Conv2d(2, 4, 3), nn.PReLU(4)), lambda: pictures(2, 5, 5), {"autograd: prelu"}),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(7, 4, padding_idx=2), nn.Flatten(), nn.Linear(16, 3)),
        tokens,
        {"embedding"},
    ),
    "indexed": (lambda: nn.Sequential(Indexed(), nn.Flatten(), nn.Linear(16, 3)), tokens, {"embedding", "linear"}),
    "odd calls": (Odd, lambda: pictures(4), {"matmul + embedding"}),
    "tied": (Tied, tokens, {"embedding + matmul"}),
    "shared": (Shared, lambda: pictures(6), {"linear"}),
    "functional": (
        Functional,
        lambda: pictures(6),
        {"linear + matmul", "matmul", "addmm + matmul", "not used by the loss"},
    ),
    "attention": (Attention, lambda: pictures(3, 8), {"linear", "autograd: add"}),
    "attention of parameters": (Asked, lambda: pictures(3, 8), {"linear", "autograd: mul + autograd: matmul"}),
    "transformer": (
        encoder,
        lambda: pictures(3, 8),
        {"linear", "autograd: layer_norm"},
    ),
}  # fmt: skip


class _Twice(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, torch.tanh(x))


@pytest.fixture(params=CASES)
def case(request):
    return _made(request.param, torch.float64)


def _made(name: str, dtype: torch.dtype):
    torch.manual_seed(0)
    build, inputs, words = CASES[name]
    model = build().double().eval()
    X = inputs()
    model(X[:1])  # lazy layers find their shape
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) / 2
    model = model.to(dtype)
    X = X.to(dtype) if X.is_floating_point() else X
    classes = model(X[:1]).shape[1]
    y = torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(2))
    if model(X[:1]).ndim == 3:  # outputs at several positions
        y = y[:, None].expand(n, model(X[:1]).shape[2])
    objective = routes.probe(uw.Objective.from_module(model, F.cross_entropy), (X[:3], y[:3]))
    return model, objective, (X, y), words


def by_hand(model: nn.Module, batch: tuple[Tensor, Tensor], *, outputs: bool = False) -> Tensor:
    """(n, m, p): autograd on the module itself, one example and one number at a time."""
    parameters = list(model.parameters())
    every = []
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for x, y in zip(*batch, strict=True):
            f = model(x[None])
            numbers = f.reshape(-1) if outputs else F.cross_entropy(f, y[None])[None]
            rows = []
            for number in numbers:
                found = torch.autograd.grad(number, parameters, retain_graph=True, allow_unused=True)
                pairs = zip(parameters, found, strict=True)
                rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in pairs]))
            every.append(torch.stack(rows))
    return torch.stack(every)


def close(ours: Tensor, truth: Tensor, rtol: float = 1e-10) -> None:
    assert ours.shape == truth.shape
    assert float((ours - truth).abs().max()) <= rtol * float(truth.abs().max())


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_every_parameter_has_the_rule_of_its_layer(case):
    _, objective, _, words = case
    rules = layers.rules(objective)
    assert list(rules) == list(objective.blocks)
    assert words <= set(rules.values())
    assert objective.route.plan.structured


def test_gradients(case):
    model, objective, batch, _ = case
    close(layers.gradients(objective, batch), by_hand(model, batch)[:, 0])


@pytest.mark.parametrize(
    ("k", "tile", "rate", "unrolled"),
    [(1, None, 3.0, 1), (4, None, 3.0, 1), (4, 1, 0.0, 1), (4, 1024, 0.0, 4096), (4, None, 1e9, 1)],
)
def test_dots(case, k, tile, rate, unrolled, monkeypatch):
    """By factors, by convolving or by matrices that are written out, in tiles and parts of any size."""
    model, objective, batch, _ = case
    monkeypatch.setattr(convolution, "_RATE", rate)
    monkeypatch.setattr(convolution, "_UNROLLED", unrolled)
    if tile is not None:
        monkeypatch.setattr(written, "_TILE_BYTES", tile)
        monkeypatch.setattr(written, "_TILE_ROWS", 2)
        monkeypatch.setattr(written, "_TILE_LINES", 3)
    V, weights, G = draw(k, objective.size), torch.rand(n, dtype=torch.float64), by_hand(model, batch)[:, 0]
    close(layers.dots(objective, batch, V), G @ V.T)
    products, total = layers.dots_and_sum(objective, batch, weights, V)
    close(products, G @ V.T)
    close(total, weights @ G)


@pytest.mark.parametrize(("k", "convolved"), [(1, 1), (3, 1), (12, 0)])
def test_a_convolution_convolves_for_few_vectors_and_writes_out_for_many(k, convolved, monkeypatch):
    """Counted: what is unrolled, and what is convolved, beside the model's own two convolutions."""
    _, objective, batch, _ = _made("conv2d", torch.float64)
    unrolled, seen = [], convolution.windows
    monkeypatch.setattr(convolution, "windows", lambda images, *rest: unrolled.append(images) or seen(images, *rest))
    V = draw(k, objective.size)
    with _Convolutions() as found:
        layers.dots(objective, batch, V)
    assert (len(unrolled), found.count) == (0, 4) if convolved else (2, 2)


def test_vectors_are_put_in_order_once_for_all_batches(case):
    """Batches of several sizes meet the same tiles; a block is held in one form, and vectors in float64 are cast."""
    model, objective, batch, _ = case
    V = draw(4, objective.size)
    ordered, G = layers.in_order(objective, V), by_hand(model, batch)[:, 0]
    close(layers.dots(objective, batch, ordered), G @ V.T)
    held = {name: id(found) for name, found in ordered._tiles.items()}
    few = tree_map(lambda leaf: leaf[:2], batch)
    close(layers.dots(objective, few, ordered), G[:2] @ V.T)
    assert {name: id(found) for name, found in ordered._tiles.items()} == held
    close(layers.dots(objective, batch, ordered), G @ V.T)


class Words(nn.Module):
    """A weight of GPT-2's kind, (inputs, outputs), at as many positions as there are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.addmm(self.bias, x.flatten(0, 1), self.weight)).unflatten(0, x.shape[:2]).mean(1)


def test_vectors_are_in_one_order_for_rows_of_all_lengths():
    torch.manual_seed(0)
    model = Words().double()
    objective = uw.adapters.module.explain(
        model, torch.randn(n, 6, 3).double(), torch.zeros(n).long(), loss=nn.CrossEntropyLoss()
    ).objective
    V = draw(4, objective.size)
    ordered = layers.in_order(objective, V)
    for length in (6, 5, 4, 7):
        batch = torch.randn(n, length, 3, dtype=torch.float64), torch.zeros(n, dtype=torch.int64)
        close(layers.dots(objective, batch, ordered), by_hand(model, batch)[:, 0] @ V.T)
    assert objective.route.plan.structured
    assert len(ordered._tiles) == 1


class _Convolutions(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ == "convolution"
        return function(*args, **(kwargs or {}))


def test_jacobians_along_onto_and_squares(case):
    model, objective, batch, _ = case
    J = by_hand(model, batch, outputs=True)  # (n, K, p)
    K, found = J.shape[1], objective.route.plan
    cotangents = torch.eye(K, dtype=torch.float64)[:, None].expand(K, n, K)
    captured = layers.capture(objective, found, batch, lambda _: cotangents)
    V, U = draw(3, objective.size), draw(3, n, K)
    close(pieces.rows(captured, found.sizes), J)
    close(pieces.along(captured, V, found.sizes), torch.einsum("nmp,kp->knm", J, V))
    close(pieces.onto(captured, U, found.sizes), torch.einsum("nmp,knm->kp", J, U))
    close(pieces.squares(captured), J.square().sum(2))


def test_gauss_newton_kept_and_swept_agree(case):
    model, objective, batch, _ = case
    kept = uw.Influence(objective, uw.Examples(*batch), curvature=uw.operators.GaussNewton()).operator
    swept = uw.Influence(objective, uw.Examples(*batch), curvature=uw.operators.GaussNewton(keep=0)).operator
    assert type(kept) is not type(swept)
    V = draw(2, objective.size)
    J = by_hand(model, batch, outputs=True)
    f = torch.cat([model(x[None]) for x in batch[0]]).detach()
    truth = torch.zeros(2, objective.size, dtype=torch.float64)
    for b in range(n):
        H = torch.autograd.functional.hessian(
            lambda out, b=b: F.cross_entropy(out.reshape(f[b : b + 1].shape), batch[1][b : b + 1]), f[b].reshape(-1)
        )
        truth += V @ J[b].T @ H @ J[b]
    close(kept.apply(V), truth / n, 1e-8)
    close(swept.apply(V), truth / n, 1e-8)


@pytest.mark.parametrize("name", CASES)
def test_single_precision(name):
    model, objective, batch, _ = _made(name, torch.float32)
    close(layers.gradients(objective, batch), by_hand(model, batch)[:, 0], 1e-5)


def test_the_module_is_left_alone():
    model, objective, batch, _ = _made("attention", torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers.gradients(objective, batch)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_vmap_cannot_follow_goes_through_autograd_and_says_so():
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if float(x.sum()) > 0 else self.inner(2 * x)

    model = Branch().double()
    batch = (pictures(6), torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(2)))
    objective = routes.probe(uw.Objective.from_module(model, F.cross_entropy), batch)
    assert all(rule.startswith("autograd (") for rule in layers.rules(objective).values())
    close(layers.gradients(objective, batch), by_hand(model, batch)[:, 0])


def test_queries_of_another_size():
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)
    ).double()
    y = torch.tensor([0, 1, 2, 1, 0])
    objective = routes.probe(uw.Objective.from_module(model, F.cross_entropy), (pictures(1, 3, 3)[:3], y[:3]))
    for shape in ((1, 5, 5), (1, 3, 3), (1, 4, 6)):
        batch = (pictures(*shape), y)
        close(layers.gradients(objective, batch), by_hand(model, batch)[:, 0])


@torch.jit.script
def compiled(x: Tensor, bias: Tensor) -> Tensor:
    return torch.tanh(x + bias)


def test_a_use_inside_a_compiled_function_is_noticed_even_where_it_does_not_show():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 3)
            self.bias = nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            h = self.inner(x)
            return h + x[:, :1] * compiled(h, self.bias)

    X = pictures(6)
    X[:3, 0] = 0  # on the rows that are probed the bias has no effect
    model, batch = Gated().double(), (X, torch.tensor([0, 1, 2, 1, 0]))
    objective = routes.probe(uw.Objective.from_module(model, F.cross_entropy), (X[:3], batch[1][:3]))
    assert "'bias' acts where it cannot be seen" in str(layers.rules(objective))
    close(layers.gradients(objective, batch), by_hand(model, batch)[:, 0])


def test_check_lists_every_parameter():
    _, objective, batch, _ = _made("transformer", torch.float64)
    report = uw.Influence(objective, uw.Examples(*batch), damping=0.1).check()
    assert list(report.rules) == list(objective.blocks)
    assert "linear: 0.self_attn.in_proj_weight" in str(report)


def test_check_says_which_gradients_are_written_out():
    _, objective, batch, _ = _made("conv2d", torch.float64)
    report = uw.Influence(objective, uw.Examples(*batch), damping=0.1).check()
    assert report.written_out == {"0.weight": 5 * 6, "2.weight": 4 * 2}
    assert "0.weight (30), 2.weight (8)" in str(report)


def test_a_rule_that_is_wrong_for_a_model_is_seen_and_autograd_stands_in(monkeypatch):
    windows = convolution.windows
    monkeypatch.setattr(convolution, "windows", lambda images, *rest: windows(images, *rest) * 1.001)
    model, objective, batch, _ = _made("conv2d", torch.float64)
    assert not objective.route.plan.structured
    assert "captured gradients differ from autograd's by" in objective.route.plan.reason
    close(layers.gradients(objective, batch), by_hand(model, batch)[:, 0])
    V = draw(3, objective.size)
    close(layers.dots(objective, batch, V), by_hand(model, batch)[:, 0] @ V.T)
