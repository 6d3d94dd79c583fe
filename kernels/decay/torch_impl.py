"""Chunked PyTorch for the gated decay recurrence: the CPU path, with an explicit backward.

Time is cut into chunks of C. Between chunks a state K×V is carried; inside a chunk the pairs (i, j), j < i, are
split by binary levels: at level s (1, 2, 4, … C/2) the pairs whose rows lie in the second half, and whose columns in
the first half, of the same block of 2s. Every such pair goes through the block's middle, so

    exp(g_{j+1} + … + g_i) = exp(sum from the middle to i) · exp(sum from j to the middle)

is a product of two factors ≤ 1: one matrix product per level, no exponent of a positive number, no difference of
large sums. The factors of level 2s are those of level s times one more factor, so each gate is exponentiated once.

Legend: G independent rows (B·H, or H when packed), M chunks, C chunk length, K key width, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fla_swap.kernels.decay.torch_layout import Layout, make_layout


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Decay factors of one side. `levels[l]`: (rows, columns) factors at s = 2^l, each [GM, C/2s, s, D].

    `start` [GM,C,D]: decay from the chunk's start to each step, the step included unless the output reads the state
    before the step. `end`: from after each step to the chunk's end. `whole` [G,M,D]: over the chunk.
    """

    levels: tuple[tuple[Tensor, Tensor | None], ...]
    start: Tensor
    end: Tensor
    whole: Tensor


def make_gate(g: Tensor | None, *, before: bool = False) -> Gate | None:
    """Build the factors of every level from log gates [G,M,C,D]. `before`: the output reads the state before a step."""
    if g is None:
        return None
    rows, chunks, chunk, width = g.shape
    through = g.exp().view(rows * chunks, chunk, width)
    end = torch.ones_like(through)
    start = torch.ones_like(through) if before else through
    levels: list[tuple[Tensor, Tensor | None]] = []
    size = 1
    while size < chunk:
        prefix, suffix, read = (x.view(rows * chunks, -1, 2, size, width) for x in (through, end, start))
        levels.append((read[:, :, 1].clone(), suffix[:, :, 0].clone() if size > 1 else None))
        suffix[:, :, 0] *= prefix[:, :, 1, -1:]
        prefix[:, :, 1] *= prefix[:, :, 0, -1:]
        if before:
            read[:, :, 1] *= prefix[:, :, 0, -1:]
        size *= 2
    whole = through[:, -1].view(rows, chunks, width)
    return Gate(levels=tuple(levels), start=start, end=end, whole=whole)


def _halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(second, first) halves of every block of 2·size rows: views [GM, C/2s, s, D] of [GM, C, D]."""
    split = x.view(x.shape[0], -1, 2, size, x.shape[-1])
    return split[:, :, 1], split[:, :, 0]


def _block(matrix: Tensor, size: int) -> Tensor:
    """The [C/2s] blocks (second half × first half) of a C×C matrix: a view [GM, s, s, C/2s]."""
    split = matrix.view(matrix.shape[0], -1, 2, size, matrix.shape[1] // (2 * size), 2, size)
    return split[:, :, 1, :, :, 0, :].diagonal(dim1=1, dim2=3)


def pair_products(x: Tensor, y: Tensor, gate: Gate | None) -> Tensor:
    """A[i,j] = Σ_d x_i y_j exp(g_{j+1} + … + g_i) for j < i; zero for j ≥ i. x, y [GM,C,D] → [GM,C,C]."""
    if gate is None:
        return torch.bmm(x, y.mT).tril_(-1)
    out = x.new_zeros(x.shape[0], x.shape[1], x.shape[1])
    for level, (row_factor, column_factor) in enumerate(gate.levels):
        rows, _ = _halves(x, 1 << level)
        _, columns = _halves(y, 1 << level)
        columns = columns if column_factor is None else columns * column_factor
        _block(out, 1 << level).copy_(_contract(rows * row_factor, columns))
    return out


def _contract(rows: Tensor, columns: Tensor) -> Tensor:
    """[GM, b, s, D] × [GM, b, s, D] → [GM, s, s, b]; tiny blocks go elementwise, they are slow as matrix products."""
    if rows.shape[2] <= 2:
        products = (rows.unsqueeze(3) * columns.unsqueeze(2)).sum(-1)
    else:
        products = torch.matmul(rows, columns.mT)
    return products.permute(0, 2, 3, 1)


def pair_apply(weights: Tensor, x: Tensor | None, y: Tensor | None, gate: Gate | None) -> tuple[Tensor, Tensor]:
    """Gradients of Σ weights ⊙ pair_products(x, y) with respect to x (needs y) and to y (needs x). [GM,C,D].

    The first result is also the output of the recurrence inside a chunk, when y is v and the gate gv.
    """
    some = x if x is not None else y
    assert some is not None
    if gate is None:
        to_x = torch.bmm(weights, y) if y is not None else some
        to_y = torch.bmm(weights.mT, x) if x is not None else some
        return to_x, to_y
    to_x = torch.zeros_like(some) if y is not None else some
    to_y = torch.zeros_like(some) if x is not None else some
    for level, (row_factor, column_factor) in enumerate(gate.levels):
        block = _block(weights, 1 << level).permute(0, 3, 1, 2)
        if y is not None:
            columns = _halves(y, 1 << level)[1]
            columns = columns if column_factor is None else columns * column_factor
            _halves(to_x, 1 << level)[0].addcmul_(torch.matmul(block, columns), row_factor)
        if x is not None:
            rows = torch.matmul(block.mT, _halves(x, 1 << level)[0] * row_factor)
            target = _halves(to_y, 1 << level)[1]
            target.add_(rows) if column_factor is None else target.addcmul_(rows, column_factor)
    return to_x, to_y


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _decays(key: Gate | None, value: Gate | None, m: int) -> Tensor | None:
    """Decay of the whole state over chunk m, [G,K,V] by broadcasting, or None."""
    if key is None and value is None:
        return None
    if value is None:
        assert key is not None
        return key.whole[:, m, :, None]
    return value.whole[:, m, None, :] if key is None else key.whole[:, m, :, None] * value.whole[:, m, None, :]


def _advance(state: Tensor, decay: Tensor | None, update: Tensor) -> Tensor:
    return state + update if decay is None else torch.addcmul(update, state, decay)


def carry_forward(
    update: Tensor, key: Gate | None, value: Gate | None, layout: Layout, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run S ← decay · S + update over the chunks. Returns the start states [G,M,K,V] and the final [N,H,K,V]."""
    rows, chunks, width, value_width = update.shape
    heads = rows // layout.batch
    states = torch.empty_like(update)
    if layout.sequence is None:
        state = update.new_zeros(rows, width, value_width)
        if initial_state is not None:
            state = initial_state.to(update.dtype).reshape(rows, width, value_width)
        for m in range(chunks):
            states[:, m] = state
            state = _advance(state, _decays(key, value, m), update[:, m])
        return states, state.reshape(layout.batch, heads, width, value_width).clone()
    assert layout.first is not None
    final = update.new_zeros(layout.sequences + 1, heads, width, value_width)
    if initial_state is not None:
        final[:-1] = initial_state
    start = final.clone()
    state = start[0]
    for m in range(chunks):
        here = layout.sequence[m : m + 1]
        state = torch.where(layout.first[m], start.index_select(0, here)[0], state)
        states[:, m] = state
        state = _advance(state, _decays(key, value, m), update[:, m])
        final.index_copy_(0, here, state.unsqueeze(0))
    return states, final[:-1].clone()


def carry_backward(
    update: Tensor, key: Gate | None, value: Gate | None, layout: Layout, final_grad: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same backwards: gradients of the states at chunk ends and starts [G,M,K,V], and of the initial state."""
    rows, chunks, width, value_width = update.shape
    heads = rows // layout.batch
    ends, starts = torch.empty_like(update), torch.empty_like(update)
    if layout.sequence is None:
        grad = update.new_zeros(rows, width, value_width)
        if final_grad is not None:
            grad = final_grad.to(update.dtype).reshape(rows, width, value_width)
        for m in reversed(range(chunks)):
            ends[:, m] = grad
            grad = _advance(grad, _decays(key, value, m), update[:, m])
            starts[:, m] = grad
        return ends, starts, grad.reshape(layout.batch, heads, width, value_width).clone()
    initial = update.new_zeros(layout.sequences + 1, heads, width, value_width)
    if final_grad is not None:
        initial[:-1] = final_grad
    for m in reversed(range(chunks)):
        here = layout.sequence[m : m + 1]
        grad = initial.index_select(0, here)[0]
        ends[:, m] = grad
        grad = _advance(grad, _decays(key, value, m), update[:, m])
        starts[:, m] = grad
        initial.index_copy_(0, here, grad.unsqueeze(0))
    return ends, starts, initial[:-1].clone()


def _bonus(u: Tensor | None, layout: Layout, rows: int) -> Tensor | float:
    """u [H,K] as a factor on rows [GM,C,K]; 1 without a bonus."""
    if u is None:
        return 1.0
    return u.to(layout.dtype).repeat(layout.batch, 1).repeat_interleave(rows, 0).unsqueeze(1)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    u: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [B,T,H,V] in q's dtype and final state [N,H,K,V] in the computing dtype."""
    layout = make_layout(q, cu_seqlens)
    qc, kc, vc = layout.split(q) * scale, layout.split(k), layout.split(v)
    key = make_gate(None if g is None else layout.split(g), before=u is not None)
    value = make_gate(None if gv is None else layout.split(gv))
    shape = vc.shape
    qc, kc, vc = (x.flatten(0, 1) for x in (qc, kc, vc))
    update = torch.bmm(_times(kc, key and key.end).mT, _times(vc, value and value.end))
    states, final = carry_forward(update.view(*shape[:2], *update.shape[1:]), key, value, layout, initial_state)
    out, _ = pair_apply(pair_products(qc, kc, key), None, vc, value)
    if value is None:
        out.baddbmm_(_times(qc, key and key.start), states.flatten(0, 1))
    else:
        out.addcmul_(torch.bmm(_times(qc, key and key.start), states.flatten(0, 1)), value.start)
    out.addcmul_((qc * kc * _bonus(u, layout, shape[1])).sum(-1, keepdim=True), vc)
    return layout.join(out.view(shape), q.dtype), final


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    u: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    out_grad: Tensor,
    final_grad: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Gradients of q, k, v, g, gv, u and the initial state; those of absent gates and bonus are None."""
    layout = make_layout(q, cu_seqlens)
    qc, kc, vc, oc = layout.split(q) * scale, layout.split(k), layout.split(v), layout.split(out_grad)
    key = make_gate(None if g is None else layout.split(g), before=u is not None)
    value = make_gate(None if gv is None else layout.split(gv))
    key_shape, value_shape = qc.shape, vc.shape
    state_shape = (*key_shape[:2], key_shape[-1], value_shape[-1])
    qc, kc, vc, oc = (x.flatten(0, 1) for x in (qc, kc, vc, oc))

    q_start, k_end = _times(qc, key and key.start), _times(kc, key and key.end)
    o_start, v_end = _times(oc, value and value.start), _times(vc, value and value.end)
    states, _ = carry_forward(torch.bmm(k_end.mT, v_end).view(state_shape), key, value, layout, initial_state)
    ends, starts, initial_grad = carry_backward(
        torch.bmm(q_start.mT, o_start).view(state_shape), key, value, layout, final_grad
    )
    flat_states, flat_ends = states.flatten(0, 1), ends.flatten(0, 1)

    weights, weights_grad = pair_products(qc, kc, key), pair_products(oc, vc, value)
    undecayed = None
    if u is not None:
        undecayed = weights_grad.diagonal(-1, 1, 2).unsqueeze(-1).clone()
        weights_grad.diagonal(-1, 1, 2).zero_()
    q_grad, k_grad = pair_apply(weights_grad, qc, kc, key)
    out, v_grad = pair_apply(weights, oc, vc if value is not None else None, value)
    q_old = _times(torch.bmm(o_start, flat_states.mT), key and key.start)
    k_grad += _times(torch.bmm(v_end, flat_ends.mT), key and key.end)
    v_grad += _times(torch.bmm(k_end, flat_ends), value and value.end)

    g_grad = gv_grad = None
    if g is not None:
        assert key is not None
        gained, lost = kc * k_grad, qc * (q_grad + q_old)
        if u is None:
            boundary = (states * starts).sum(-1)
        else:
            lost[:, 0] = 0
            lost = torch.nn.functional.pad(lost[:, 1:], (0, 0, 0, 1))
            read = (qc * q_old)[:, 1:].sum(1).view(key.whole.shape)
            boundary = (states * ends).sum(-1) * key.whole + read
        g_grad = layout.join(_gate_grad(gained - lost, boundary, key_shape), g.dtype)
    if gv is not None:
        assert value is not None
        out = out + torch.bmm(q_start, flat_states) * value.start
        boundary = (states * starts).sum(-2)
        gv_grad = _gate_grad(vc * v_grad - oc * out, boundary, value_shape)
        gv_grad = layout.join(gv_grad, gv.dtype)

    q_grad += q_old
    if undecayed is not None:
        q_grad[:, 1:].addcmul_(undecayed, kc[:, :-1])
        k_grad[:, :-1].addcmul_(undecayed, qc[:, 1:])
    bonus = _bonus(u, layout, key_shape[1])
    diagonal, diagonal_grad = (qc * kc * bonus).sum(-1, keepdim=True), (oc * vc).sum(-1, keepdim=True)
    u_grad = None
    if u is not None:
        u_grad = (diagonal_grad * qc * kc).sum(1).view(layout.batch, -1, key_shape[1], key_shape[3]).sum((0, 2))
        u_grad = u_grad.to(u.dtype)
    q_grad.addcmul_(diagonal_grad, kc * bonus).mul_(scale)
    k_grad.addcmul_(diagonal_grad, qc * bonus)
    v_grad.addcmul_(diagonal, oc)
    return (
        layout.join(q_grad.view(key_shape), q.dtype),
        layout.join(k_grad.view(key_shape), k.dtype),
        layout.join(v_grad.view(value_shape), v.dtype),
        g_grad,
        gv_grad,
        u_grad,
        initial_grad,
    )


def _gate_grad(flow: Tensor, boundary: Tensor, shape: torch.Size) -> Tensor:
    """dg_t = boundary + Σ_{s<t in the chunk} flow_s: what enters the decayed past minus what was read from it."""
    flow = flow.view(shape)
    grad = torch.empty_like(flow)
    grad[:, :, 0] = 0
    torch.cumsum(flow[:, :, :-1], 2, out=grad[:, :, 1:])
    return grad.add_(boundary.unsqueeze(2))


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    u: Tensor | None,
    state: Tensor,
    scale: float,
) -> Tensor:
    """T steps of the recurrence, in place on `state` [B,H,K,V]. Returns [B,T,H,V] in q's dtype."""
    out = torch.empty(q.shape[0], q.shape[1], v.shape[2], v.shape[3], dtype=q.dtype, device=q.device)
    for t in range(q.shape[1]):
        query, key, value = (x[:, t].to(state.dtype) for x in (q, k, v))
        query = query * scale
        if u is not None:
            own = (query * key * u.to(state.dtype)).sum(-1, keepdim=True)
            out[:, t] = torch.matmul(query.unsqueeze(-2), state).squeeze(-2) + own * value
        if g is not None:
            state.mul_(g[:, t].to(state.dtype).exp().unsqueeze(-1))
        if gv is not None:
            state.mul_(gv[:, t].to(state.dtype).exp().unsqueeze(-2))
        state.addcmul_(key.unsqueeze(-1), value.unsqueeze(-2))
        if u is None:
            out[:, t] = torch.matmul(query.unsqueeze(-2), state).squeeze(-2)
    return out
