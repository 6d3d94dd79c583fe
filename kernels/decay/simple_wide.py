"""One decay per head in fp32 and fp16 on a GPU: by the kernels for one decay per channel, which multiply exactly.

`simple_triton` keeps operands that only bf16 makes small enough. Same functions, same arguments.
"""

from __future__ import annotations

from torch import Tensor

from fla_swap.kernels.decay import simple_triton, triton_impl
from fla_swap.kernels.decay.checks import expand_heads


def _wide(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """q, k [B,T,HV,K] and the gate [B,T,HV,K]."""
    heads, width = v.shape[2], q.shape[3]
    if g is not None:
        g = g.expand(v.shape[:3]).unsqueeze(-1).expand(*v.shape[:3], width)
    return expand_heads(q, heads), expand_heads(k, heads), g


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """See `simple_triton.forward`."""
    q, k, wide = _wide(q, k, v, g)
    o, final, _ = triton_impl.forward(
        q, k, v, g=wide, gv=None, u=None, initial_state=initial_state, cu_seqlens=cu_seqlens, scale=scale
    )
    return o, final if output_final_state else final.new_empty(0)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    out_grad: Tensor,
    final_grad: Tensor | None,
    scale: float,
    gate_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """See `simple_triton.backward`."""
    heads = q.shape[2]
    q, k, wide = _wide(q, k, v, g)
    dq, dk, dv, dg, _, _, dstate = triton_impl.backward(
        q,
        k,
        v,
        g=wide,
        gv=None,
        u=None,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        out_grad=out_grad,
        final_grad=final_grad,
        scale=scale,
    )
    if g is not None and dg is not None and gate_grad:
        dg = dg.sum(-1)
        dg = dg if g.ndim == 3 else dg.sum((0, 1))
    else:
        dg = None
    dq, dk = (simple_triton.sum_over_groups(x, heads) for x in (dq, dk))
    return dq, dk, dv, dg, dstate


step = simple_triton.step
