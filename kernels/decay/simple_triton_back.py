"""Device code: the gradients of keys, values and gates in one pass, for heads whose whole state fits in registers.

`simple_triton` launches it; legend in `simple_triton_kernels`.
"""

# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from fla_swap.kernels.decay.simple_triton_kernels import _constant, _gates, _load, _span, _store, _weights


@triton.jit(do_not_specialize=["T", "PIECES", "LENGTH", "tokens", "H", "HV"])
def keys_values_kernel(
    q, k, v, g, out_grad, initial, final, k_grad, v_grad, flow, states, table, bounds,
    T, PIECES, LENGTH, tokens, H, HV, scale, start_scale, end_scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, RESET: tl.constexpr,
    GATE: tl.constexpr, STAGES: tl.constexpr, ORDER: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the last token to the first, with dS, the gradient of the state, in registers as [V, K]:

        dv_j = scale · (Σ_{i≥j} (k_j·q_i) w_ij do_i + dS k_j)      dk_j = scale · (Σ_{i≥j} (v_j·do_i) w_ij q_i + dSᵀ v_j)

    Grid: spans · HV. `initial` and `final` (or None): [spans, HV, K, V], times start_scale and end_scale. For gate
    gradients, else None: `flow` [tokens, HV], what a token's key wrote that others read, less what its query read of
    this chunk; `states` [.., HV, V, K]: dS before every RESET-th chunk.
    """
    row = tl.program_id(0).to(tl.int64)
    head, slot = row % HV, row // HV
    sequence, first, count = _span(slot, table, bounds, T, PIECES, LENGTH)
    key_head = head // (HV // H)
    constant = _constant(g, head, GATE)
    i = tl.arange(0, C)
    ks = tl.arange(0, BK)
    vs = tl.arange(0, BV)
    inside = (vs < V)[:, None] & (ks < K)[None, :]
    tile = ks[None, :] * V + vs[:, None]
    state = tl.zeros([BV, BK], tl.float32)
    if initial is not None:
        state += tl.load(initial + row * K * V + tile, mask=inside, other=0.0).to(tl.float32) * start_scale
    chunks = ((count + C - 1) // C).to(tl.int32)
    for step in tl.range(0, chunks, num_stages=STAGES):
        local = chunks - 1 - step
        here = first + local * C
        n = tl.minimum(count - local * C, C).to(tl.int32)
        q_tile = _load(q, here, n, key_head, H, i, ks, K, BK).to(DOT)
        k_tile = _load(k, here, n, key_head, H, i, ks, K, BK).to(DOT)
        v_tile = _load(v, here, n, head, HV, i, vs, V, BV).to(DOT)
        o_tile = _load(out_grad, here, n, head, HV, i, vs, V, BV).to(DOT)
        sums, total = _gates(g, constant, here, n, head, tokens, i, GATE)
        written = tl.zeros([C, C], tl.float32)
        read = tl.zeros([C, C], tl.float32)
        if n > 0:  # always: it keeps these products apart from the next ones, or all warps would share their rows
            written = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
            read = tl.dot(v_tile, tl.trans(o_tile), input_precision=PRECISION)
        weights = _weights(sums, constant, i, n, GATE, True, False)
        written *= weights
        if flow is not None:
            met = tl.where(i[:, None] == i[None, :] + tl.minimum(n, 0), 0.0, written * read)
            change = tl.sum(met, 1) - tl.sum(met, 0)
        written = tl.trans(written.to(DOT))
        read = tl.trans((read * weights).to(DOT))
        narrow = state.to(DOT)
        v_part = tl.dot(narrow, tl.trans(k_tile), input_precision=PRECISION)  # [V, C]
        if GATE > 0:
            to_end = tl.exp2((total - sums).to(tl.float32))
            v_part *= to_end[None, :]
        if flow is not None:
            if ORDER % 10 == 3:
                change += tl.sum(tl.trans(v_tile).to(tl.float32) * v_part, 0)
            else:
                own = tl.dot(v_tile, v_part.to(DOT), input_precision=PRECISION)
                change += tl.sum(tl.where(i[:, None] == i[None, :] + tl.minimum(n, 0), own, 0.0), 1)
            tl.store(flow + (here + i) * HV + head, change * scale, mask=i < n)
        if ORDER < 10:
            o_turned = tl.trans(o_tile)
            if GATE > 0:
                to_start = tl.exp2(sums.to(tl.float32))
                o_turned = (o_turned.to(tl.float32) * to_start[None, :]).to(DOT)
                state *= tl.exp2(total.to(tl.float32))
            state = tl.dot(o_turned, q_tile, state, input_precision=PRECISION)
        v_part = tl.dot(tl.trans(o_tile), written, v_part, input_precision=PRECISION)
        _store(v_grad, tl.trans(v_part * scale), here, n, head, HV, i, vs, V, BV)
        k_part = tl.dot(tl.trans(narrow), tl.trans(v_tile), input_precision=PRECISION)
        if GATE > 0:
            k_part *= to_end[None, :]
        k_part = tl.dot(tl.trans(q_tile), read, k_part, input_precision=PRECISION)
        _store(k_grad, tl.trans(k_part * scale), here, n, head, HV, i, ks, K, BK)
        if ORDER >= 10:
            o_turned = tl.trans(o_tile)
            if GATE > 0:
                to_start = tl.exp2(sums.to(tl.float32))
                o_turned = (o_turned.to(tl.float32) * to_start[None, :]).to(DOT)
                state *= tl.exp2(total.to(tl.float32))
            state = tl.dot(o_turned, q_tile, state, input_precision=PRECISION)
        if states is not None:
            if local % RESET == 0:
                rows, columns = vs + tl.minimum(n, 0), ks + tl.minimum(n, 0)  # kept from leaving the loop: registers
                place = (here // (C * RESET) + sequence) * HV + head
                at = states + place * K * V + rows[:, None] * K + columns[None, :]
                tl.store(at, state.to(states.dtype.element_ty), mask=(rows < V)[:, None] & (columns < K)[None, :])
    if final is not None:
        tl.store(final + row * K * V + tile, state * end_scale, mask=inside)
