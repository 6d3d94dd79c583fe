"""Chunked PyTorch for one decay per head: the CPU path, with an explicit backward.

Inside a chunk every pair of a reader i and a writer j has the decay exp(G_i − G_j) ≤ 1, one number for a head. The
sums G are float64: their differences keep the last digits of fp32 however strong the gates. Legend for shapes: H query
and key heads, R value heads for each of them, M chunks of C tokens, K key width, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fla_swap.kernels.decay.torch_layout import Layout, make_layout


@dataclass(frozen=True, kw_only=True)
class Decay:
    """Decays of the chunks. `pairs` [B,H,R,M,C,C] (some dimensions 1): between writer and reader, 0 above the diagonal.

    `start` [B,H,R,M,C,1]: from the chunk's start to each token, its own gate included. `end`: from after each token
    to the chunk's end. `whole` [B,H,R,M]: over the chunk. Without gates only `pairs`.
    """

    pairs: Tensor
    start: Tensor | None = None
    end: Tensor | None = None
    whole: Tensor | None = None


def make_decay(g: Tensor | None, like: Tensor, heads: int, layout: Layout) -> Decay:
    """From natural log gates, [HV] or [B,T,HV]."""
    lower = torch.ones(layout.chunk, layout.chunk, dtype=layout.dtype, device=like.device).tril_()
    if g is None:
        return Decay(pairs=lower)
    steps = g.expand(like.shape[:3]) if g.ndim == 1 else g
    gates = _chunks(steps.unsqueeze(-1), heads, layout).squeeze(-1)
    sums = gates.double().cumsum(-1)
    if g.ndim == 1:
        distance = torch.arange(layout.chunk, dtype=layout.dtype, device=like.device)
        between = (distance[:, None] - distance) * g.to(layout.dtype).view(1, heads, -1, 1, 1, 1)
    else:
        between = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).to(layout.dtype)
    last = sums[..., -1:]
    return Decay(
        pairs=between.masked_fill_(lower == 0, float("-inf")).exp_(),
        start=sums.to(layout.dtype).exp().unsqueeze(-1),
        end=(last - sums).to(layout.dtype).exp().unsqueeze(-1),
        whole=last.squeeze(-1).to(layout.dtype).exp(),
    )


def _chunks(x: Tensor, heads: int, layout: Layout) -> Tensor:
    """[B,T,H·R,D] → [B,H,R,M,C,D] in the computing dtype."""
    split = layout.split(x)
    return split.view(layout.batch, heads, -1, *split.shape[1:])


def _join(x: Tensor, dtype: torch.dtype, layout: Layout) -> Tensor:
    """[B,H,R,M,C,D] → [B,T,H·R,D]."""
    return layout.join(x.reshape(-1, *x.shape[3:]), dtype)


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def carry(
    update: Tensor, decay: Decay, layout: Layout, initial: Tensor | None, *, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Run S ← decay · S + update over the chunks [B,H,R,M,K,V], or from the last to the first.

    Returns S before each chunk (REVERSE: after it), shaped like update, and the final S [N,H·R,K,V].
    """
    batch, heads, group, chunks, width, value_width = update.shape
    sequences = layout.sequences if layout.sequence is not None else batch
    ends = update.new_zeros(sequences + 1, heads, group, width, value_width)
    if initial is not None:
        ends[:-1] = initial.unflatten(1, (heads, group))
    states = torch.empty_like(update)
    state = ends[:-1].clone()
    for m in reversed(range(chunks)) if reverse else range(chunks):
        if layout.sequence is not None:
            state = ends.index_select(0, layout.sequence[m : m + 1])
        states[:, :, :, m] = state
        if decay.whole is None:
            state = state + update[:, :, :, m]
        else:
            state = torch.addcmul(update[:, :, :, m], state, decay.whole[:, :, :, m, None, None])
        if layout.sequence is not None:
            ends.index_copy_(0, layout.sequence[m : m + 1], state)
    final = state if layout.sequence is None else ends[:-1]
    return states, final.reshape(sequences, heads * group, width, value_width).clone()


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
    """Output [B,T,HV,V] in q's dtype and final state [N,HV,K,V] in the computing dtype, empty unless asked for."""
    layout, heads = make_layout(q, cu_seqlens), q.shape[2]
    decay = make_decay(g, v, heads, layout)
    qc, kc, vc = _chunks(q, heads, layout) * scale, _chunks(k, heads, layout), _chunks(v, heads, layout)
    states, final = carry(kc.mT @ _times(vc, decay.end), decay, layout, initial_state)
    out = _times(qc @ states, decay.start)
    out += ((qc @ kc.mT) * decay.pairs) @ vc
    return _join(out, q.dtype, layout), final if output_final_state else final.new_empty(0)


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
    """Gradients of q, k, v, g (None unless asked for) and the initial state."""
    layout, heads = make_layout(q, cu_seqlens), q.shape[2]
    decay = make_decay(g, v, heads, layout)
    qc, kc, vc = _chunks(q, heads, layout) * scale, _chunks(k, heads, layout), _chunks(v, heads, layout)
    oc = _chunks(out_grad, heads, layout)
    v_end, o_start = _times(vc, decay.end), _times(oc, decay.start)
    states, _ = carry(kc.mT @ v_end, decay, layout, initial_state)
    ends, initial_grad = carry(qc.mT @ o_start, decay, layout, final_grad, reverse=True)

    weights, weights_grad = (qc @ kc.mT) * decay.pairs, oc @ vc.mT
    flow = (weights * weights_grad).tril_(-1) if gate_grad else None
    weights_grad *= decay.pairs
    from_states, from_ends = o_start @ states.mT, v_end @ ends.mT
    dq, dk = from_states + weights_grad @ kc, from_ends + weights_grad.mT @ qc
    dv = weights.mT @ oc + _times(kc @ ends, decay.end)

    dg = None
    if g is not None and flow is not None:
        change = flow.sum(-2) - flow.sum(-1)  # what a token wrote minus what it read
        change += (kc * from_ends).sum(-1) - (qc * from_states).sum(-1)
        boundary = (states * (qc.mT @ o_start + _through(ends, decay))).sum((-1, -2))
        dg = boundary.unsqueeze(-1) + torch.nn.functional.pad(change.cumsum(-1)[..., :-1], (1, 0))
        dg = _join(dg.unsqueeze(-1), g.dtype if g.ndim == 3 else layout.dtype, layout).squeeze(-1)
        dg = dg if g.ndim == 3 else dg.sum((0, 1)).to(g.dtype)
    return (
        _join(dq.sum(2, keepdim=True) * scale, q.dtype, layout),
        _join(dk.sum(2, keepdim=True), k.dtype, layout),
        _join(dv, v.dtype, layout),
        dg,
        initial_grad,
    )


def _through(ends: Tensor, decay: Decay) -> Tensor:
    """The gradient of the state after each chunk, brought to the chunk's start."""
    return ends if decay.whole is None else ends * decay.whole[..., None, None]


def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, scale: float) -> Tensor:
    """T steps of the recurrence, in place on `state` [B,HV,K,V]. Returns [B,T,HV,V] in q's dtype."""
    group = v.shape[2] // q.shape[2]
    dtype = state.dtype
    qf, kf = ((x.repeat_interleave(group, 2) if group > 1 else x).to(dtype) for x in (q * scale, k))
    vf = v.to(dtype)
    decays = None if g is None else g.to(dtype).exp().expand(v.shape[:3])
    out = vf.new_empty(v.shape)
    for t in range(q.shape[1]):
        if decays is not None:
            state *= decays[:, t, :, None, None]
        state.addcmul_(kf[:, t].unsqueeze(-1), vf[:, t].unsqueeze(-2))
        torch.matmul(qf[:, t].unsqueeze(-2), state, out=out[:, t].unsqueeze(-2))
    return out.to(q.dtype)
