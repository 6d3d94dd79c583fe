"""On a GPU, where compilers have miscompiled gated kernels: packed batches, extreme gates, and very long sequences.

`python -m pytest -m gpu`. The comparison over all shapes and dtypes is `python -m fla_swap.bench.numerics`.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from fla_swap.kernels.decay.reference import gla_reference
from fla_swap.kernels.delta.reference import gated_delta_rule_reference
from fla_swap.ops import gated_delta_rule, gla, linear_attention, retention, simple_gla, window_attention

pytestmark = pytest.mark.gpu

OPERATORS = {"gla": (gla, gla_reference), "gated_delta_rule": (gated_delta_rule, gated_delta_rule_reference)}


def inputs(name, T, gates, dtype=torch.float32, B=1, H=2, D=64, seed=0):
    """Random arguments on the GPU; every gate is drawn from `gates`."""
    generator = torch.Generator("cuda").manual_seed(seed)
    kwargs = {"device": "cuda", "generator": generator}
    q, k, v = (torch.randn(B, T, H, D, **kwargs).to(dtype) for _ in range(3))
    k = F.normalize(k.float(), dim=-1).to(dtype)
    shape = (B, T, H, D) if name == "gla" else (B, T, H)
    g = torch.tensor(gates, device="cuda")[torch.randint(len(gates), shape, **kwargs)]
    if name == "gla":
        return (q, k, v, g)
    return (q, k, v, g, torch.rand(B, T, H, **kwargs))


def error(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-12))


def results(operator, arguments, **kwargs):
    """Output, final state, and the gradients of a fixed function of both."""
    leaves = [a.detach().requires_grad_() for a in arguments]
    o, state = operator(*leaves, output_final_state=True, **kwargs)
    total = (o.float() if o.dtype == torch.bfloat16 else o).square().sum() + state.square().sum()
    return [o.detach(), state.detach(), *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("gates", [(0.0,), (-10.0,), (0.0, -10.0), (-0.01, -1.0, -10.0)], ids=str)
@pytest.mark.parametrize("T", [1, 65, 257])
@pytest.mark.parametrize("name", OPERATORS)
def test_extreme_gates(name, T, gates):
    operator, reference = OPERATORS[name]
    arguments = inputs(name, T, gates)
    wanted = results(reference, [a.double() for a in arguments])
    for got, right in zip(results(operator, arguments), wanted, strict=True):
        assert torch.isfinite(got).all()
        assert error(got, right) < 1e-4 or float((got.double() - right).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_packed_equals_separate(name, dtype):
    operator, _ = OPERATORS[name]
    arguments = inputs(name, 300, (-0.1, -0.5), dtype)
    borders = [0, 70, 70, 71, 199, 290]
    packed, states = operator(*arguments, cu_seqlens=torch.tensor(borders, device="cuda"), output_final_state=True)
    for n, (start, end) in enumerate(itertools.pairwise(borders)):
        if start == end:
            assert not states[n].any()
            continue
        alone, state = operator(*(a[:, start:end] for a in arguments), output_final_state=True)
        assert error(packed[:, start:end], alone.double()) < (1e-5 if dtype == torch.float32 else 5e-3)
        assert error(states[n], state[0].double()) < (1e-5 if dtype == torch.float32 else 5e-3)
    assert not packed[:, 290:].any()


@pytest.mark.parametrize("name", OPERATORS)
def test_long_sequences_stay_finite(name):
    operator, _ = OPERATORS[name]
    arguments = inputs(name, 65_536, (0.0, -0.001, -10.0), torch.bfloat16)
    for got in results(operator, arguments):
        assert torch.isfinite(got).all()


def test_window_attention_equals_masked_softmax():
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(2, 300, 4, 64, device="cuda", generator=generator) for _ in range(3))
    i = torch.arange(300, device="cuda")
    seen = (i[:, None] >= i) & (i[:, None] - i < 100)
    wanted = F.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v)), attn_mask=seen)
    assert error(window_attention(q, k, v, window=100)[0], wanted.transpose(1, 2)) < 1e-5


@pytest.mark.parametrize("options", ["plain", "softcap", "sinks", "alibi", "padding", "everything"])
@pytest.mark.parametrize("window", [1, 300, None], ids=str)
@pytest.mark.parametrize("width", [60, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_window_attention_of_every_tile(dtype, width, window, options):
    """Outputs and gradients against float64: tiles inside the band, its edges, grouped heads, an odd length."""
    generator = torch.Generator("cuda").manual_seed(width)
    kwargs = {"device": "cuda", "generator": generator}
    q, k, v = (torch.randn(2, 777, heads, width, **kwargs).to(dtype) for heads in (4, 2, 2))
    chosen = {"softcap", "sinks", "alibi", "padding"} if options == "everything" else {options}
    extra = {}
    if "softcap" in chosen:
        extra["softcap"] = 5.0
    if "sinks" in chosen:
        extra["sinks"] = torch.randn(4, **kwargs)
    if "alibi" in chosen:
        extra["alibi"] = torch.tensor([0.5, 0.25, 0.125, 0.01], device="cuda")
    valid = torch.ones(2, 777, dtype=torch.bool, device="cuda")
    valid[1, :99] = False
    padded = {"valid": valid} if "padding" in chosen else {}

    def run(cast, **more):
        tensors = {"q": q, "k": k, "v": v} | extra
        leaves = {n: x.to(cast).detach().requires_grad_() if torch.is_tensor(x) else x for n, x in tensors.items()}
        o = window_attention(**leaves, window=window, **padded, **more)[0]
        wanted = [x for x in leaves.values() if torch.is_tensor(x)]
        return [o.detach(), *torch.autograd.grad((o.float() if cast == torch.bfloat16 else o).square().sum(), wanted)]

    limits = (5e-3, 1.6e-2) if dtype == torch.bfloat16 else (1e-5, 1e-4)
    exact = run(torch.float64, implementation="torch")
    largest = max(float(right.abs().max()) for right in exact)  # some gradients are exactly zero
    for number, (got, right) in enumerate(zip(run(dtype), exact, strict=True)):
        assert torch.isfinite(got).all()
        limit = limits[number > 0]
        assert error(got, right) < limit or float((got.double() - right).abs().max()) < limit * largest


@pytest.mark.parametrize("gate", ["none", "constant", "per step"])
@pytest.mark.parametrize("width", [60, 64, 100, 128, 256])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("value_heads", [4, 96], ids=["segments", "one pass"])
def test_one_decay_per_head(value_heads, packed, width, gate):
    """Outputs, states and gradients in bf16 against float64: two value heads for each query and key head."""
    generator = torch.Generator("cuda").manual_seed(width)

    def normal(*shape):
        return torch.randn(*shape, device="cuda", generator=generator)

    time, bounds = 1030, torch.tensor([0, 3, 3, 600, 1001], device="cuda") if packed else None
    q, k = (normal(1, time, value_heads // 2, width).bfloat16() for _ in range(2))
    v = normal(1, time, value_heads, width).bfloat16()
    state = normal(4 if packed else 1, value_heads, width, width)
    gates = {
        "none": (),
        "constant": (-torch.rand(value_heads, device="cuda", generator=generator) / 5,),
        "per step": (F.logsigmoid(normal(1, time, value_heads)) / 4,),
    }[gate]

    def run(cast, **more):
        leaves = [x.to(cast).detach().requires_grad_() for x in (q, k, v)]
        other = torch.float64 if cast == torch.float64 else torch.float32
        leaves += [x.to(other).detach().requires_grad_() for x in (state, *gates)]
        options = {"initial_state": leaves[3], "output_final_state": True, "cu_seqlens": bounds} | more
        if gate == "per step":
            o, final = simple_gla(*leaves[:3], leaves[4], **options)
        elif gate == "constant":
            o, final = retention(*leaves[:3], decay=leaves[4], **options)
        else:
            o, final = linear_attention(*leaves[:3], **options)
        cotangents = [
            torch.randn(x.shape, generator=torch.Generator().manual_seed(n)) for n, x in enumerate((o, final))
        ]
        gradients = torch.autograd.grad(
            (o, final), leaves, [c.to(x) for c, x in zip(cotangents, (o, final), strict=True)]
        )
        return [o.detach(), final.detach(), *gradients]

    exact = run(torch.float64, implementation="torch")
    limits = [5e-3, 5e-3, 8e-3, 8e-3, 8e-3, 8e-3, 2e-2]
    for got, right, limit in zip(run(torch.bfloat16), exact, limits[: len(exact)], strict=True):
        assert torch.isfinite(got).all()
        assert error(got, right) < limit
