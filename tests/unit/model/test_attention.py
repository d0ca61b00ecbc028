"""Short attention gives what torch's plain form gives, and so do its derivatives."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from upweight.model.attention import ShortAttention
from upweight.model.transforms import vmap

SEEN = torch.tensor([[True, False, False, False], [True, True, False, False], [False] * 4])
CASES = {
    "no mask": {},
    "mask": {"attn_mask": SEEN},
    "mask of each row": {"attn_mask": torch.stack([SEEN, SEEN.flip(0)])[:, None]},
    "numbers": {"attn_mask": torch.where(SEEN, 0.3, -torch.inf)},
    "most negative numbers": {"attn_mask": torch.where(SEEN, 0.0, torch.finfo(torch.float32).min)},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.2},
    "shared keys": {"enable_gqa": True, "attn_mask": SEEN},
}


def tensors(dtype=torch.float64, heads=4):
    draw = torch.Generator().manual_seed(0)
    sizes = (2, 4, 3, 5), (2, heads, 4, 5), (2, heads, 4, 5)
    return [torch.randn(size, generator=draw, dtype=dtype) for size in sizes]


def plain(*args, **settings):
    with sdpa_kernel(SDPBackend.MATH):
        return functional.scaled_dot_product_attention(*args, **settings)


def short(*args, **settings):
    with ShortAttention():
        return functional.scaled_dot_product_attention(*args, **settings)


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_values_and_derivatives_are_those_of_torch(settings):
    given = tensors(heads=2 if "enable_gqa" in settings else 4)
    settings = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in settings.items()
    }
    if settings.get("enable_gqa"):
        settings_of_plain = {"attn_mask": settings["attn_mask"]}

        def theirs(q, k, v):
            return plain(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), **settings_of_plain)
    else:
        theirs = partial(plain, **settings)
    ours = partial(short, **settings)
    torch.testing.assert_close(ours(*given), theirs(*given))
    weights = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def second(function):
        leaves = [x.clone().requires_grad_() for x in given]
        first = torch.autograd.grad((function(*leaves) * weights).sin().sum(), leaves, create_graph=True)
        return [*first, *torch.autograd.grad(sum(x.square().sum() for x in first), leaves)]

    for mine, other in zip(second(ours), second(theirs), strict=True):
        assert torch.isfinite(mine).all()
        torch.testing.assert_close(mine, other)


def test_it_is_batched_by_vmap():
    query, key, value = tensors(torch.float32)
    mask = torch.stack([SEEN, SEEN.flip(0)])[:, None]
    together = vmap(lambda q, k, v, m: short(q[None], k[None], v[None], attn_mask=m[None])[0])(query, key, value, mask)
    torch.testing.assert_close(together, plain(query, key, value, attn_mask=mask))


def test_dropout_is_left_to_torch():
    query, key, value = tensors()
    torch.manual_seed(0)
    theirs = plain(query, key, value, dropout_p=0.5)
    torch.manual_seed(0)
    with sdpa_kernel(SDPBackend.MATH):
        ours = short(query, key, value, dropout_p=0.5)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min])
def test_a_mask_of_another_precision(lowest):
    q, k, v = tensors()
    mask = torch.where(SEEN, 0.3, lowest)
    wanted = plain(q, k, v, attn_mask=mask.double())
    torch.testing.assert_close(short(q, k, v, attn_mask=mask), wanted)
    rough = short(q.bfloat16(), k.bfloat16(), v.bfloat16(), attn_mask=mask)
    torch.testing.assert_close(rough.double(), wanted, rtol=0.1, atol=0.1)


def test_values_of_fewer_heads_than_keys():
    q, k, _ = tensors()
    v = tensors(heads=2)[2]
    torch.testing.assert_close(
        short(q, k, v, enable_gqa=True), plain(q, k, v.repeat_interleave(2, -3)), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("mask", [torch.zeros(3, 4, dtype=torch.int64), torch.zeros(1, 1, 1, 3, 4)])
def test_what_torch_refuses_is_left_to_torch(mask):
    q, k, v = tensors(torch.float32)
    with pytest.raises(RuntimeError):
        plain(q, k, v, attn_mask=mask)
    with pytest.raises(RuntimeError):
        short(q, k, v, attn_mask=mask)
