"""A decode step's pieces are rewritten to few operators, and compute what they computed."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from fla_swap.few_tokens import few, rewrite
from fla_swap.kernels.fused.attend_one import attend_one
from fla_swap.regions import compile_regions
from fla_swap.rewriting.backend import lower


class Norm(nn.Module):
    """RMS norm as transformers spells it: rounded before the weight; `offset` 1 as Gemma does, rounded after it."""

    def __init__(self, width: int, offset: float):
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.rand(width)), offset

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        if self.offset:
            return (wide * (self.offset + self.weight.float())).to(x.dtype)
        return self.weight * wide.to(x.dtype)


class Block(nn.Module):
    def __init__(self, offset: float = 0.0, act=F.silu):
        super().__init__()
        self.norm, self.mlp_norm, self.act = Norm(128, offset), Norm(128, offset), act
        self.q, self.k, self.v = nn.Linear(128, 128), nn.Linear(128, 64, bias=False), nn.Linear(128, 64)
        self.o = nn.Linear(128, 128, bias=False)
        self.gate, self.up, self.down = (nn.Linear(a, b, bias=False) for a, b in ((128, 256), (128, 256), (256, 128)))

    def forward(self, x, keys, values, seen):
        y = self.norm(x)
        q, k, v = (p(y).unflatten(-1, (-1, 32)).transpose(1, 2) for p in (self.q, self.k, self.v))
        keys[:, :, 5:6] = k
        values[:, :, 5:6] = v
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (keys, values))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + self.o(F.dropout(o.transpose(1, 2).flatten(2), 0.0, False))
        y = self.mlp_norm(x)
        return x + self.down(self.act(self.gate(y)) * self.up(y))


def names(graph: fx.Graph) -> list[str]:
    return [getattr(n.target, "__name__", str(n.target)) for n in graph.nodes if n.op == "call_function"]


@torch.no_grad()
def compiled(model, inputs):
    """What `rewrite` makes of a model's graph, run; and the graph."""
    torch.compiler.reset()
    found: list[fx.GraphModule] = []

    def compile_piece(piece, values):
        found.append(lower(piece))
        rewrite(found[-1].graph)
        found[-1].recompile()
        return found[-1].forward

    run = torch.compile(model, fullgraph=True, backend=lambda m, _: compile_regions(m, compile_piece))
    result = run(*inputs)
    torch.compiler.reset()
    return result, found[0].graph


@pytest.mark.parametrize(
    ("offset", "act", "rows"),
    [(0.0, F.silu, 1), (1.0, F.silu, 3), (0.0, lambda x: F.gelu(x, approximate="tanh"), 1)],
)
def test_a_block_becomes_five_operators(offset, act, rows):
    torch.manual_seed(0)
    model = Block(offset, act).bfloat16()
    x = torch.randn(rows, 1, 128).bfloat16()
    cache = [torch.randn(rows, 2, 8, 32).bfloat16() for _ in range(2)]
    seen = (torch.arange(8) < 6)[None, None, None]
    expected = model(x, *(t.clone() for t in cache), seen)
    result, graph = compiled(model, (x, *cache, seen))
    assert names(graph).count("_operator") == 4 and names(graph).count(attend_one.__name__) == 1
    assert not {"linear.default", "silu.default", "gelu.default", "rsqrt.default"} & set(names(graph))
    torch.testing.assert_close(result.float(), expected.float(), atol=0.03, rtol=0.03)


def rewritten(function, *inputs) -> list[str]:
    """What is left of a function's graph."""
    with torch.no_grad():
        graph = make_fx(function, pre_dispatch=True, tracing_mode="fake")(*inputs).graph
    rewrite(graph)
    return names(graph)


def test_what_only_looks_alike_stays():
    x, w = torch.randn(1, 1, 128).bfloat16(), torch.randn(128, 128).bfloat16()
    norm = torch.rand(128).bfloat16()

    def without_mean_over_all(x, w, norm):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(1, keepdim=True) + 1e-6)
        return F.linear(norm * y.to(x.dtype), w)

    def read_twice(x, w, norm):
        gate, up = F.linear(x, w), F.linear(x, w.clone())
        return F.silu(gate) * up + gate

    def exact_gelu(x, w, norm):
        return F.gelu(F.linear(x, w)) * F.linear(x, w)

    def many(x, w, norm):
        return F.linear(x.expand(17, 1, 128), w)

    assert "rsqrt.default" in rewritten(without_mean_over_all, x, w, norm)
    assert "silu.default" in rewritten(read_twice, x, w, norm)
    assert "gelu.default" in rewritten(exact_gelu, x, w, norm)
    assert "linear.default" in rewritten(many, x, w, norm)
    assert "linear.default" in rewritten(lambda x, w, norm: F.linear(x.float(), w.float()), x, w, norm)


def test_attention_of_several_queries_or_under_an_additive_mask_stays():
    q, k = torch.randn(1, 4, 1, 32), torch.randn(1, 4, 9, 32)
    seen = torch.ones(1, 1, 1, 9)

    def attend(q, k, mask):
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask)

    assert rewritten(attend, q, k, seen.bool()) == ["attend_one"]
    assert rewritten(attend, q, k, seen) == ["scaled_dot_product_attention.default"]
    assert rewritten(attend, k, k, seen.bool()) == ["scaled_dot_product_attention.default"]


def test_an_input_that_is_written_in_place_is_not_read_earlier():
    x, w = torch.randn(1, 1, 128).bfloat16(), torch.randn(128, 128).bfloat16()

    def writes(x, w):
        first = F.linear(x, w)
        x.add_(1)
        return first, F.linear(x, w)

    assert rewritten(writes, x, w).count("linear.default") == 2


def test_pieces_of_few_tokens():
    hidden = torch.zeros(16, 1, 8, dtype=torch.bfloat16)
    assert few([hidden, torch.zeros(3)])
    assert not few([hidden.float()]) and not few([hidden.expand(16, 2, 8)])
