"""What a decode step is made of: products with few tokens, attention of one query. Triton runs in its interpreter."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from torch.nn import functional as F

from fla_swap.errors import KernelError
from fla_swap.kernels.fused.attend_one import attend_one
from fla_swap.kernels.fused.matvec import few_linears, fits

WAYS = ("torch", "triton")


def rms(x, weight, offset, eps=1e-6):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (weight + offset)


@pytest.mark.parametrize("implementation", WAYS)
@pytest.mark.parametrize(("tokens", "width"), [(1, 128), (1, 320), (5, 128), (16, 384)])
def test_several_maps_of_one_input_with_its_norm_and_a_residual(implementation, tokens, width):
    torch.manual_seed(0)
    x, norm = torch.randn(tokens, 1, width), torch.randn(width)
    weights = [torch.randn(n, width) for n in (64, 30, 5)]
    biases = [None, torch.randn(30), None]
    residual = torch.randn(tokens, 1, 99)
    expected = torch.cat([F.linear(rms(x, norm, 1.0), w, b) for w, b in zip(weights, biases, strict=True)], -1)
    options = {"norm": norm, "norm_offset": 1.0, "residual": residual, "implementation": implementation}
    torch.testing.assert_close(few_linears(x, weights, biases, **options), expected + residual, atol=1e-4, rtol=1e-4)
    plain = few_linears(x, weights[:1], implementation=implementation)
    torch.testing.assert_close(plain, F.linear(x, weights[0]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("implementation", WAYS)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_gate_and_its_partner(implementation, activation, tokens):
    torch.manual_seed(0)
    x, norm = torch.randn(1, tokens, 128), torch.rand(128)
    gate, up = torch.randn(70, 128), torch.randn(70, 128)
    y = rms(x, norm, 0.0)
    opened = F.silu(y @ gate.T) if activation == "silu" else F.gelu(y @ gate.T, approximate="tanh")
    found = few_linears(x, [gate, up], norm=norm, activation=activation, implementation=implementation)
    torch.testing.assert_close(found, opened * (y @ up.T), atol=1e-4, rtol=1e-4)


def test_what_does_not_fit_is_refused():
    x, w = torch.zeros(1, 128), torch.zeros(8, 128)
    with pytest.raises(KernelError, match="1 to 6 weights"):
        few_linears(x, [w] * 7)
    with pytest.raises(KernelError, match="contiguous and"):
        few_linears(x, [w.half()])
    with pytest.raises(KernelError, match="two weights of equal shape"):
        few_linears(x, [w], activation="silu")
    with pytest.raises(KernelError, match="residual"):
        few_linears(x, [w], residual=x)
    assert fits(16, 256, torch.bfloat16)
    assert not fits(17, 256, torch.bfloat16) and not fits(1, 200, torch.bfloat16) and not fits(1, 256, torch.float32)


@pytest.mark.parametrize("implementation", WAYS)
@pytest.mark.parametrize(("heads", "length", "width", "values"), [(4, 70, 32, 32), (2, 200, 60, 24), (8, 1000, 16, 64)])
def test_one_query_over_many_keys(implementation, heads, length, width, values):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, heads, width), torch.randn(3, 2, length, width), torch.randn(3, 2, length, values)
    q, seen = q.transpose(1, 2), torch.arange(length) < torch.tensor([[1], [length // 2], [length]])
    for mask in (None, seen[:, None, None], seen[1:2, None, None]):
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
        found = attend_one(q, k, v, mask, scale=0.3, implementation=implementation)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_attention_of_several_queries_is_refused():
    q = torch.zeros(1, 2, 3, 16)
    with pytest.raises(KernelError, match="q must have shape"):
        attend_one(q, q, q)
    with pytest.raises(KernelError, match="mask must be bool"):
        attend_one(q[:, :, :1], q, q, torch.zeros(1, 1, 1, 3))


def test_the_operators_are_well_formed():
    x, w = torch.randn(1, 1, 128), torch.randn(8, 128)
    torch.library.opcheck(
        torch.ops.fla_swap.few_linears.default, (x, [w, w], [None, None], w[0], 0.0, 1e-6, None, None, "torch")
    )
    q, k = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 9, 16)
    torch.library.opcheck(torch.ops.fla_swap.attend_one.default, (q, k, k, None, 0.25, "torch"))
