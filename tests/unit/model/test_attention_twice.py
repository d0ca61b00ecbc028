"""Attention as it is written out has the values and both derivatives of torch's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from upweight.model import attention_twice

PLAINLY = F.scaled_dot_product_attention
DRAW = torch.Generator().manual_seed(0)


def drawn(*shape):
    return torch.randn(shape, generator=DRAW, dtype=torch.float64)


def answers(written, shapes, *, mask=None, batched=False, **settings):
    """Output, gradients, and the products of second derivatives with fixed vectors."""
    draw = torch.Generator().manual_seed(1)

    def same(shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    inputs = [same(shape).requires_grad_() for shape in shapes]

    def one(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **settings)

    function = torch.func.vmap(one, in_dims=(0, 0, 0, None if mask is None else 0)) if batched else one
    with sdpa_kernel(SDPBackend.MATH), attention_twice.bent() if written else nullcontext():
        output = function(*inputs, mask)
    asked = [*inputs, mask] if mask is not None and mask.requires_grad else inputs
    first = torch.autograd.grad((same(output.shape) * output).sin().sum(), asked, create_graph=True)
    second = torch.autograd.grad(first, asked, [same(one.shape) for one in first])
    return [output, *first, *second]


ALIKE = [(2, 3, 5, 4)] * 3
CASES = {
    "alone": (ALIKE, {}),
    "causal, with a scale": (ALIKE, {"is_causal": True, "scale": 0.7}),
    "other keys than queries": ([(2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 2)], {}),
    "one head": ([(2, 5, 4)] * 3, {}),
    "rows that see nothing": (ALIKE, {"mask": torch.arange(5)[:, None].expand(5, 5) > 1}),
    "numbers that are added": (ALIKE, {"mask": drawn(3, 5, 5)}),
    "batched, a mask without heads": ([(6, 3, 5, 4)] * 3, {"mask": drawn(6, 5, 5) > -1, "batched": True}),
    "batched, with an axis more": ([(6, 1, 3, 5, 4)] * 3, {"mask": drawn(6, 1, 1, 5, 5), "batched": True}),
    "batched, rows that see nothing": (
        [(6, 2, 3, 5, 4)] * 3,
        {"mask": torch.arange(5)[:, None].expand(6, 1, 1, 5, 5) > 1, "batched": True},
    ),
    "keys for several queries": ([(2, 4, 5, 4), (2, 2, 5, 4), (2, 2, 5, 4)], {"enable_gqa": True}),
    "a mask that is learned": (ALIKE, {"mask": drawn(3, 5, 5).requires_grad_()}),
    "batched, a mask that is learned": (
        [(6, 3, 5, 4)] * 3,
        {"mask": drawn(6, 3, 5, 5).requires_grad_(), "batched": True},
    ),
}


@pytest.mark.parametrize("heads_at_once", [1, 60, 100, 2**20])  # of 25 scores each: 1, 2, 4 heads, all
@pytest.mark.parametrize("name", CASES)
def test_values_and_both_derivatives(name, heads_at_once, monkeypatch):
    monkeypatch.setattr(attention_twice, "_NUMBERS_AT_ONCE", heads_at_once)
    shapes, settings = CASES[name]
    for found, expected in zip(answers(True, shapes, **settings), answers(False, shapes, **settings), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("mask", [None, drawn(6, 1, 5, 5) > -1])
def test_several_slopes_at_once(mask, batched):
    inputs = [drawn(6, 3, 5, 4).requires_grad_() for _ in range(3)]
    slopes, found = drawn(2, 6, 3, 5, 4), []

    def one(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    function = torch.func.vmap(one, in_dims=(0, 0, 0, None if mask is None else 0)) if batched else one
    for context in (attention_twice.bent(), sdpa_kernel(SDPBackend.MATH)):
        with context:
            output = function(*inputs, mask)
        found.append(torch.autograd.grad(output, inputs, slopes, is_grads_batched=True))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_it_is_written_out_where_it_can_be(monkeypatch):
    calls, plainly = [], set()
    own = attention_twice._slopes
    monkeypatch.setattr(attention_twice, "_slopes", lambda *told: calls.append(1) or own(*told))
    for name, (shapes, settings) in CASES.items():
        before = len(calls)
        answers(True, shapes, **settings)
        plainly |= {name} if len(calls) == before else set()
    assert plainly == {"a mask that is learned", "batched, a mask that is learned"}


def test_a_slope_of_some_inputs_alone():
    q, k, v = (drawn(2, 3, 4) for _ in range(3))
    q.requires_grad_()
    found = []
    for context in (attention_twice.bent(), sdpa_kernel(SDPBackend.MATH)):
        with context:
            (first,) = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).square().sum(), q, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), q)[0])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


def test_third_derivatives_are_refused():
    q = drawn(2, 3, 4).requires_grad_()
    with attention_twice.bent():
        output = F.scaled_dot_product_attention(q, q, q)
    (first,) = torch.autograd.grad(output.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="twice"):
        torch.autograd.grad(first.square().sum(), q, create_graph=True)


def test_torch_has_its_own_back():
    with attention_twice.bent(), attention_twice.bent():
        assert F.scaled_dot_product_attention is not PLAINLY
    assert F.scaled_dot_product_attention is PLAINLY


def test_other_threads_keep_torchs_attention_and_what_stood_in_its_place_comes_back(monkeypatch):
    asked = []

    def patched(*args, **settings):
        asked.append(1)
        return PLAINLY(*args, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", patched)
    q = torch.randn(1, 3, 2, requires_grad=True)
    with ThreadPoolExecutor(1) as pool, attention_twice.bent():
        F.scaled_dot_product_attention(q, q, q)
        assert not asked
        pool.submit(lambda: F.scaled_dot_product_attention(q, q, q)).result()
        assert asked
        with attention_twice.bent():  # the last to leave is not the first that came
            pass
    assert F.scaled_dot_product_attention is patched
