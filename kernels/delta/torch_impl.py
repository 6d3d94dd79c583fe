"""The gated delta rule in chunks of 64 tokens (WY form) with PyTorch alone: the CPU path, with its own backward.

Everything inside a chunk is one batched matrix product over all chunks, heads and batch rows at once; only the state
walks from chunk to chunk (two small products a step). README.md has the algebra and the names.

Legend: X = chunks · B · HV, L = CHUNK, K key width, V value width. Chunk tensors are [X, L, ·] with the chunk number
slowest, so that one chunk of every head is one contiguous slice. Rows past the end are zero and change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fla_swap.kernels.common import chunk_bound, chunk_table
from fla_swap.kernels.delta.torch_pairs import ChannelPairs, HeadPairs, channel_pairs, head_pairs

CHUNK = 64
NORM_EPS = 1e-6


def chunk_count(total: int, sequences: int | None) -> int:
    """Chunk slots that `total` tokens need; `sequences` is the number of packed sequences, None when not packed."""
    return (total + CHUNK - 1) // CHUNK if sequences is None else chunk_bound(total, CHUNK, sequences)


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Where the chunks of packed sequences lie. Built on the device, without a host sync.

    rows [C, L]: token of each chunk row (T for rows that hold none). sequence [C]: owner, 0 for unused slots.
    first, last [C, 1, 1, 1]: whether the chunk starts or ends its sequence (false for unused slots).
    """

    sequences: int
    rows: Tensor
    sequence: Tensor
    first: Tensor
    last: Tensor


def make_packing(cu_seqlens: Tensor, total: int) -> Packing:
    table = chunk_table(cu_seqlens, total, CHUNK).to(torch.int64)
    used, sequence = table[:, 0] >= 0, table[:, 0].clamp(min=0)
    start = cu_seqlens.to(torch.int64)[sequence] + table[:, 1] * CHUNK
    stop = cu_seqlens.to(torch.int64)[sequence + 1]
    rows = start[:, None] + torch.arange(CHUNK, device=cu_seqlens.device)
    rows = torch.where(used[:, None] & (rows < stop[:, None]), rows, total)
    first = used & (table[:, 1] == 0)
    last = used & (start + CHUNK >= stop)
    return Packing(
        sequences=cu_seqlens.shape[0] - 1,
        rows=rows,
        sequence=sequence,
        first=first.view(-1, 1, 1, 1),
        last=last.view(-1, 1, 1, 1),
    )


def split(x: Tensor, packing: Packing | None, dtype: torch.dtype, group: int = 1) -> Tensor:
    """[B, T, H, D] → [C · B · H · group, L, D]: cut into chunks, pad with zeros, repeat each head `group` times."""
    batch, total, heads, width = x.shape
    if packing is not None:
        x = torch.cat((x[0], x.new_zeros(1, heads, width)))[packing.rows].unsqueeze(1)
    else:
        chunks = chunk_count(total, None)
        if chunks * CHUNK != total:
            x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, chunks * CHUNK - total))
        x = x.reshape(batch, chunks, CHUNK, heads, width).transpose(0, 1)
    x = x.transpose(2, 3).unsqueeze(3)
    x = x.expand(-1, -1, -1, group, -1, -1)
    return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x).view(-1, CHUNK, width)


def join(x: Tensor, packing: Packing | None, like: Tensor) -> Tensor:
    """The inverse of `split`: [X, L, D] → `like`'s shape and dtype; repeated heads are summed, padding rows dropped."""
    batch, total, heads, width = like.shape
    group = x.shape[0] // ((packing.rows.shape[0] if packing else chunk_count(total, None) * batch) * heads)
    x = x.view(-1, batch, heads, group, CHUNK, width)
    x = x.sum(3) if group > 1 else x.squeeze(3)
    if packing is None:
        out = x.permute(1, 0, 3, 2, 4).reshape(batch, -1, heads, width)[:, :total]
        return out.to(like.dtype, memory_format=torch.contiguous_format, copy=True)
    out = x.new_zeros(total + 1, heads, width)
    out.index_copy_(0, packing.rows.flatten(), x.squeeze(1).transpose(1, 2).reshape(-1, heads, width))
    return out[:total].to(like.dtype, copy=True).unsqueeze(0)


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """What forward and backward both need of each chunk. Row vectors are [X, L, 1].

    q (times scale) and k are normalised if asked; `q_norm`, `k_norm` hold 1/‖·‖. growth = e^G, rest = e^(G_last − G),
    total = e^G_last [X, 1, 1]; per key channel [X, L, K] and [X, K, 1]. `pairs`: the decay between rows.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    growth: Tensor
    rest: Tensor
    total: Tensor
    pairs: HeadPairs | ChannelPairs

    @property
    def k_beta(self) -> Tensor:
        return self.k * (self.beta * self.growth)

    @property
    def q_in(self) -> Tensor:
        return self.q * self.growth

    @property
    def k_out(self) -> Tensor:
        return self.k * self.rest


def _normalised(x: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
    if not wanted:
        return x, None
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().add_(NORM_EPS).rsqrt_()
    return x * norm, norm


def make_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    packing: Packing | None,
    scale: float,
    qk_l2norm: bool,
) -> Chunks:
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_n, q_norm = _normalised(split(q, packing, dtype, v.shape[2] // q.shape[2]), qk_l2norm)
    k_n, k_norm = _normalised(split(k, packing, dtype, v.shape[2] // q.shape[2]), qk_l2norm)
    beta_x = split(beta.unsqueeze(-1), packing, dtype)
    if g is not None and g.ndim == 4:
        pairs, growth, rest, whole = channel_pairs(split(g, packing, dtype))
    else:
        gates = torch.zeros_like(beta_x) if g is None else split(g.unsqueeze(-1), packing, dtype)
        pairs, growth, rest, whole = head_pairs(gates)
    return Chunks(
        q=q_n * scale,
        k=k_n,
        v=split(v, packing, dtype),
        beta=beta_x,
        q_norm=q_norm,
        k_norm=k_norm,
        growth=growth,
        rest=rest,
        total=whole,
        pairs=pairs,
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    qk_l2norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (o, final state, inverse [C·B·HV·L, L], chunk-start states [C+1,B,HV,K,V], v_new [C·B·HV·L, V])."""
    packing = None if cu_seqlens is None else make_packing(cu_seqlens, q.shape[1])
    batch, heads, width, value_width = v.shape[0], v.shape[2], q.shape[3], v.shape[3]
    x = make_chunks(q, k, v, g, beta, packing, scale, qk_l2norm)
    inverse = _inverse(x.pairs.products(x.k, x.k).mul_(x.beta))
    v_new = torch.bmm(inverse, x.v * x.beta)
    sequences = batch if packing is None else packing.sequences
    begin = inverse.new_zeros(sequences, heads, width, value_width)
    if initial_state is not None:
        begin.copy_(initial_state)
    states, final = _walk(torch.bmm(inverse, x.k_beta), v_new, x, begin, packing)
    scores = x.pairs.products(x.q, x.k)
    o = torch.bmm(scores, v_new).baddbmm_(x.q_in, states[:-1].view(-1, width, value_width))
    return join(o, packing, v), final, inverse.view(-1, CHUNK), states, v_new.view(-1, value_width)


def _inverse(lower: Tensor) -> Tensor:
    """(I + strictly lower part)⁻¹ of [N, L, L], L a power of two; the diagonal and what is above it are not read.

    By blocks that double: [[A, 0], [L, C]]⁻¹ = [[A⁻¹, 0], [−C⁻¹ L A⁻¹, C⁻¹]]. As exact as forward substitution, and
    batched products run several times faster here than LAPACK's small triangular solves.
    """
    lower = lower.contiguous()
    count, length = lower.shape[0], lower.shape[-1]
    inverse = torch.zeros_like(lower)
    inverse.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    size = 1
    while size < length:
        pairs = length // (2 * size)

        def block(matrix: Tensor, row: int, column: int, size: int = size, pairs: int = pairs) -> Tensor:
            stride = (length * length, 2 * size * (length + 1), length, 1)
            return matrix.as_strided((count, pairs, size, size), stride, row * length + column)

        below = block(lower, size, 0).reshape(-1, size, size)
        first = block(inverse, 0, 0).reshape(-1, size, size)
        second = block(inverse, size, size).reshape(-1, size, size)
        block(inverse, size, 0).copy_(torch.bmm(torch.bmm(second, below), first).neg_().view(count, pairs, size, size))
        size *= 2
    return inverse


def _walk(w: Tensor, v_new: Tensor, x: Chunks, begin: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor]:
    """Carry the state over the chunks; `v_new` holds u on entry and u − w S on return. Returns (states, final)."""
    heads, width, value_width = begin.shape[1:]
    rows = heads * (begin.shape[0] if packing is None else 1)
    w, u, k_out, total = (y.view(-1, rows, *y.shape[1:]) for y in (w, v_new, x.k_out, x.total))
    count = w.shape[0]
    states = w.new_empty(count + 1, rows, width, value_width)
    states[0] = begin.view(-1, width, value_width) if packing is None else 0.0
    final = begin.clone()
    for c in range(count):
        if packing is not None:
            states[c] = torch.where(packing.first[c], begin[packing.sequence[c]], states[c])
        u[c].baddbmm_(w[c], states[c], alpha=-1)
        torch.mul(states[c], total[c], out=states[c + 1])
        states[c + 1].baddbmm_(k_out[c].mT, u[c])
        if packing is not None:
            _put(final, packing, packing.last, c, states[c + 1])
    if packing is None:
        final.view(-1, width, value_width).copy_(states[-1])
    return states.view(count + 1, -1, heads, width, value_width), final


def _put(target: Tensor, packing: Packing, when: Tensor, c: int, value: Tensor) -> None:
    """target[sequence of chunk c] = value if when[c], on the device."""
    owner = packing.sequence[c : c + 1]
    target.index_copy_(0, owner, torch.where(when[c], value.unsqueeze(0), target.index_select(0, owner)))


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    inverse: Tensor,
    states: Tensor,
    v_new: Tensor,
    d_o: Tensor,
    d_final: Tensor | None,
    scale: float,
    qk_l2norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """Gradients of q, k, v, g, beta and the initial state, from what `forward` returned."""
    packing = None if cu_seqlens is None else make_packing(cu_seqlens, q.shape[1])
    width, value_width = q.shape[3], v.shape[3]
    x = make_chunks(q, k, v, g, beta, packing, scale, qk_l2norm)
    inverse, v_new = inverse.view(-1, CHUNK, CHUNK), v_new.view(-1, CHUNK, value_width)
    starts, do = states[:-1].reshape(-1, width, value_width), split(d_o, packing, x.q.dtype)
    scores = x.pairs.products(x.q, x.k)
    overlap = x.pairs.products(x.k, x.k)

    d_v_new = torch.bmm(scores.mT, do)
    end = torch.zeros_like(states[0]) if packing is None else states.new_zeros(packing.sequences, *states.shape[2:])
    if d_final is not None:
        end.copy_(d_final)
    d_states, d_begin = _walk_back(torch.bmm(inverse, x.k_beta), d_v_new, do, x, end, packing)
    d_u = torch.bmm(inverse.mT, d_v_new)

    d_scores = torch.bmm(do, v_new.mT)
    d_lower = torch.bmm(d_u, v_new.mT).neg_().tril_(-1)
    d_q_in = torch.bmm(do, starts.mT)
    d_k_beta = torch.bmm(d_u, starts.mT).neg_()
    d_k_out = torch.bmm(v_new, d_states.mT)

    d_beta = (d_lower * overlap).sum(-1, keepdim=True)
    d_beta += (d_u * x.v).sum(-1, keepdim=True) + (d_k_beta * x.growth).mul_(x.k).sum(-1, keepdim=True)
    start = d_q_in.mul_(x.growth), d_k_beta.mul_(x.growth).mul_(x.beta)
    d_q, d_k, d_gates = _gathered(x, d_scores, d_lower.mul_(x.beta), scores, overlap, *start, d_k_out.mul_(x.rest))
    d_g = None
    if g is not None:
        through = (starts * d_states).sum(2 if g.ndim == 4 else (1, 2))
        d_gates += (through.view(-1, x.total.shape[1], 1) * x.total).mT
        d_g = join(d_gates, packing, g.reshape(*beta.shape, -1)).view(g.shape)
    d_q = _normalised_backward(d_q.mul_(scale), x.q, x.q_norm, scale)
    d_k = _normalised_backward(d_k, x.k, x.k_norm, 1.0)
    return (
        join(d_q, packing, q),
        join(d_k, packing, k),
        join(d_u * x.beta, packing, v),
        d_g,
        join(d_beta, packing, beta.unsqueeze(-1)).squeeze(-1),
        None if initial_state is None else d_begin.to(initial_state.dtype),
    )


def _gathered(
    x: Chunks,
    d_scores: Tensor,
    d_lower: Tensor,
    scores: Tensor,
    overlap: Tensor,
    from_q: Tensor,
    from_k: Tensor,
    from_end: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and the gates ([X, L, 1] or [X, L, K]; without the part through the chunk's whole decay).

    d_scores, d_lower: of the two products of pairs, whose values are `scores` and `overlap`. from_q, from_k, from_end:
    what q and k receive through the state at the chunk's start and at its end.
    """
    if isinstance(x.pairs, HeadPairs):
        # e^(G_i − G_j) appears off the diagonal of the scores and of the triangular matrix
        d_pair = (d_scores * scores).tril_(-1).add_(d_lower * overlap)
        ahead = (from_q * x.q).add_(from_k * x.k).sum(-1, keepdim=True)
        ahead += d_pair.sum(2, keepdim=True) - d_pair.sum(1).unsqueeze(-1)
        behind = (from_end * x.k).sum(-1, keepdim=True)
        d_qk, d_kk = d_scores.mul_(x.pairs.decay), d_lower.mul_(x.pairs.decay)
        d_q = from_q.baddbmm_(d_qk, x.k)
        d_k = from_k.add_(from_end).baddbmm_(d_qk.mT, x.q).baddbmm_(d_kk + d_kk.mT, x.k)
    else:
        rows_q, columns = x.pairs.apply(d_scores, x.q, x.k)
        rows_k, more = x.pairs.apply(d_lower, x.k, x.k)
        columns += more
        ahead = (from_q + rows_q).mul_(x.q).add_((from_k + rows_k).sub_(columns).mul_(x.k))
        behind = from_end * x.k
        diagonal = d_scores.diagonal(dim1=1, dim2=2).unsqueeze(-1)
        d_q = from_q.add_(rows_q).addcmul_(diagonal, x.k)
        d_k = from_k.add_(from_end).add_(rows_k).add_(columns).addcmul_(diagonal, x.q)
    d_gates = ahead.flip(1).cumsum(1).flip(1)
    d_gates[:, 1:] += behind[:, :-1].cumsum(1)
    return d_q, d_k, d_gates


def _normalised_backward(grad: Tensor, scaled: Tensor, norm: Tensor | None, scale: float) -> Tensor:
    """From the gradient of y = x · norm(x) to that of x, where `scaled` = scale · y."""
    if norm is None:
        return grad
    along = (grad * scaled).sum(-1, keepdim=True).mul_(scale**-2)
    return grad.addcmul_(scaled, along, value=-1).mul_(norm)


def _walk_back(
    w: Tensor, d_v_new: Tensor, do: Tensor, x: Chunks, end: Tensor, packing: Packing | None
) -> tuple[Tensor, Tensor]:
    """Carry the state's gradient from the last chunk to the first.

    Adds the state's part to `d_v_new` in place. Returns (gradient at each chunk's end [X, K, V], gradient of the
    initial states).
    """
    heads, width, value_width = end.shape[1:]
    rows = heads * (end.shape[0] if packing is None else 1)
    w, du, k_out, total = (y.view(-1, rows, *y.shape[1:]) for y in (w, d_v_new, x.k_out, x.total))
    count = w.shape[0]
    d_states = w.new_empty(count + 1, rows, width, value_width)
    torch.bmm(x.q_in.mT, do, out=d_states[:-1].view(-1, width, value_width))
    d_states[-1] = end.view(-1, width, value_width) if packing is None else 0.0
    d_begin = end.clone()
    for c in reversed(range(count)):
        if packing is not None:
            d_states[c + 1] = torch.where(packing.last[c], end[packing.sequence[c]], d_states[c + 1])
        du[c].baddbmm_(k_out[c], d_states[c + 1])
        d_states[c].addcmul_(total[c], d_states[c + 1]).baddbmm_(w[c].mT, du[c], alpha=-1)
        if packing is not None:
            _put(d_begin, packing, packing.first, c, d_states[c])
    if packing is None:
        d_begin.view(-1, width, value_width).copy_(d_states[0])
    return d_states[1:].view(-1, width, value_width), d_begin


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor,
    scale: float,
    qk_l2norm: bool,
) -> Tensor:
    """The recurrence token by token on `state` [B, HV, K, V], in place. Returns o."""
    dtype, group = state.dtype, v.shape[2] // q.shape[2]
    q_n = _normalised(q.to(dtype), qk_l2norm)[0].repeat_interleave(group, dim=2) * scale
    k_n = _normalised(k.to(dtype), qk_l2norm)[0].repeat_interleave(group, dim=2)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    for t in range(q.shape[1]):
        if g is not None:
            decay = g[:, t].to(dtype).exp().unsqueeze(-1)
            state.mul_(decay if g.ndim == 4 else decay.unsqueeze(-1))
        key = k_n[:, t].unsqueeze(-1)
        error = v[:, t].to(dtype).unsqueeze(-2) - key.mT @ state
        state.addcmul_(key, error * beta[:, t, :, None, None].to(dtype))
        o[:, t] = (q_n[:, t].unsqueeze(-2) @ state).squeeze(-2)
    return o
