"""Triton kernels for the gated decay recurrence, forward and backward. Imported only when Triton is chosen.

Five kernels, each used for several quantities, because keys with `g` and values with `gv` play the same part:

    cumulate      gates → their running sums inside each chunk
    carry         chunk states forward in time; backwards: the gradients of the chunk states
    pair          C×C weights inside a chunk: of the output (q, k, g) and of its gradient (do, v, gv)
    combine       weights @ rows + rows @ state: o and dq; with REVERSE: dk and dv
    gate_grad     dg and dgv from q·dq, k·dk, v·dv, do·o and the boundary states

Inside a chunk the pairs j < i are split by binary levels as in `torch_impl`: the pairs of level s meet at the last row
m of the first half of a block of 2s rows, and exp(G_i − G_j) = exp(−|G_i − G_m|) · exp(−|G_m − G_j|), both ≤ 1. Every
matrix product is C×C or C×BLOCK with C = BLOCK = 64; other widths are padded with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fla_swap.kernels.common import chunk_bound, chunk_table, triton_interpreted

CHUNK = 64
BLOCK = 64
LEVELS = 6


@triton.jit
def _locate(slot, table, bounds, T, CHUNKS, C: tl.constexpr, PACKED: tl.constexpr):
    """(sequence, chunk number inside it, first token, tokens) of a chunk slot; no tokens in an unused slot."""
    if PACKED:
        sequence = tl.load(table + slot * 2).to(tl.int64)
        local = tl.load(table + slot * 2 + 1).to(tl.int64)
        used = sequence >= 0
        sequence = tl.maximum(sequence, 0)
        first = tl.load(bounds + sequence).to(tl.int64) + local * C
        stop = tl.load(bounds + sequence + 1).to(tl.int64)
        count = tl.where(used, tl.minimum(stop - first, C), 0)
    else:
        sequence = slot // CHUNKS
        local = slot % CHUNKS
        first = sequence * T + local * C
        count = tl.minimum(T - local * C, C).to(tl.int64)
    return sequence, local, first, count


@triton.jit
def _rows(base, first, count, head, H, rows, columns, D: tl.constexpr):
    """Load rows of a [tokens, H, D] tensor, zero outside the chunk or beyond D: [len(rows), len(columns)]."""
    token = first + rows.to(tl.int64)
    inside = ((rows >= 0) & (rows < count))[:, None] & (columns < D)[None, :]
    return tl.load(base + (token[:, None] * H + head) * D + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store_rows(base, value, first, count, head, H, rows, columns, D: tl.constexpr):
    token = first + rows.to(tl.int64)
    inside = (rows < count)[:, None] & (columns < D)[None, :]
    place = base + (token[:, None] * H + head) * D + columns[None, :]
    tl.store(place, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _dot(a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(DOT), b.to(DOT), input_precision=PRECISION)


@triton.jit(do_not_specialize=["T", "CHUNKS", "H"])
def cumulate_kernel(
    g, sums, table, bounds, T, CHUNKS, H,
    D: tl.constexpr, BLOCKS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """sums_t = g_first + … + g_t inside each chunk. Grid: slots · H · BLOCKS."""
    program = tl.program_id(0).to(tl.int64)
    block, head, slot = program % BLOCKS, program // BLOCKS % H, program // BLOCKS // H
    _, _, first, count = _locate(slot, table, bounds, T, CHUNKS, C, PACKED)
    rows = tl.arange(0, C)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    gates = _rows(g, first, count, head, H, rows, columns, D).to(sums.dtype.element_ty)
    _store_rows(sums, tl.cumsum(gates, 0), first, count, head, H, rows, columns, D)


@triton.jit(do_not_specialize=["T", "CHUNKS", "H"])
def carry_kernel(
    x, y, gx, gy, initial, states, final, bounds, first_slots, T, CHUNKS, H, scale,
    K: tl.constexpr, V: tl.constexpr, K_BLOCKS: tl.constexpr, V_BLOCKS: tl.constexpr,
    C: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carry one K×V tile over the chunks of a sequence, storing it before each. Grid: N · H · K_BLOCKS · V_BLOCKS.

    Forward (x = k, y = v): S ← decay · S + Σ_t to_end(k_t) to_end(v_t)ᵀ. REVERSE (x = q, y = do): the same from the last
    chunk to the first, with the decay from the chunk's start. `gx`, `gy` are running sums, or None.
    """
    program = tl.program_id(0).to(tl.int64)
    y_block, x_block = program % V_BLOCKS, program // V_BLOCKS % K_BLOCKS
    row = program // V_BLOCKS // K_BLOCKS
    head, sequence = row % H, row // H
    rows = tl.arange(0, C)
    x_columns = x_block * BLOCK + tl.arange(0, BLOCK)
    y_columns = y_block * BLOCK + tl.arange(0, BLOCK)
    tile = x_columns[:, None] * V + y_columns[None, :]
    tile_inside = (x_columns < K)[:, None] & (y_columns < V)[None, :]
    if PACKED:
        start = tl.load(bounds + sequence).to(tl.int64)
        length = tl.load(bounds + sequence + 1).to(tl.int64) - start
        slot = tl.load(first_slots + sequence).to(tl.int64)
    else:
        start = sequence * T
        length = T.to(tl.int64)
        slot = sequence * CHUNKS
    chunks = (length + C - 1) // C
    state = tl.zeros([BLOCK, BLOCK], tl.float32)
    if initial is not None:
        state += tl.load(initial + row * K * V + tile, mask=tile_inside, other=0.0).to(tl.float32)
    for step in range(0, chunks):
        local = step
        if REVERSE:
            local = chunks - 1 - step
        first = start + local * C
        count = tl.minimum(length - local * C, C)
        tl.store(states + ((slot + local) * H + head) * K * V + tile, state, mask=tile_inside)
        xs = _rows(x, first, count, head, H, rows, x_columns, K).to(tl.float32)
        ys = _rows(y, first, count, head, H, rows, y_columns, V).to(tl.float32)
        if gx is not None:
            sums = _rows(gx, first, count, head, H, rows, x_columns, K)
            last = tl.load(gx + ((first + count - 1) * H + head) * K + x_columns, mask=x_columns < K, other=0.0)
            state *= tl.exp(last.to(tl.float32))[:, None]
            xs *= tl.exp((sums if REVERSE else last[None, :] - sums).to(tl.float32))
        if gy is not None:
            sums = _rows(gy, first, count, head, H, rows, y_columns, V)
            last = tl.load(gy + ((first + count - 1) * H + head) * V + y_columns, mask=y_columns < V, other=0.0)
            state *= tl.exp(last.to(tl.float32))[None, :]
            ys *= tl.exp((sums if REVERSE else last[None, :] - sums).to(tl.float32))
        state += _dot(tl.trans(xs), ys, DOT, PRECISION) * scale
    tl.store(final + row * K * V + tile, state, mask=tile_inside)


@triton.jit
def _middle(rows, level):
    """Last row of the first half of each row's block of 2^(level+1) rows."""
    return ((rows >> (level + 1)) << (level + 1)) + (1 << level) - 1


@triton.jit(do_not_specialize=["T", "CHUNKS", "H"])
def pair_kernel(
    x, y, g, weights, table, bounds, T, CHUNKS, H, scale,
    D: tl.constexpr, BLOCKS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr,
    PACKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """weights[i,j] = scale · Σ_d x_i y_j exp(G_i − G_j) for j ≤ i, else 0. Grid: slots · H."""
    program = tl.program_id(0).to(tl.int64)
    head, slot = program % H, program // H
    _, _, first, count = _locate(slot, table, bounds, T, CHUNKS, C, PACKED)
    rows = tl.arange(0, C)
    total = tl.zeros([C, C], tl.float32)
    diagonal = tl.zeros([C], tl.float32)
    for block in range(0, BLOCKS):
        columns = block * BLOCK + tl.arange(0, BLOCK)
        xs = _rows(x, first, count, head, H, rows, columns, D).to(tl.float32)
        ys = _rows(y, first, count, head, H, rows, columns, D).to(tl.float32)
        diagonal += tl.sum(xs * ys, 1)
        if g is None:
            total += _dot(xs, tl.trans(ys), DOT, PRECISION)
        else:
            sums = _rows(g, first, count, head, H, rows, columns, D)
            for level in range(0, LEVELS):
                middle = _rows(g, first, count, head, H, _middle(rows, level), columns, D)
                factor = tl.exp(-tl.abs(sums - middle).to(tl.float32))
                second = ((rows >> level) & 1)[:, None] == 1
                part = _dot(
                    tl.where(second, xs * factor, 0.0), tl.trans(tl.where(second, 0.0, ys * factor)), DOT, PRECISION
                )
                same = (rows >> (level + 1))[:, None] == (rows >> (level + 1))[None, :]
                total += tl.where(same, part, 0.0)
    total = tl.where(rows[:, None] > rows[None, :], total, 0.0)
    total = tl.where(rows[:, None] == rows[None, :], diagonal[:, None], total) * scale
    place = weights + program * C * C + rows[:, None] * C + rows[None, :]
    tl.store(place, total.to(weights.dtype.element_ty))


@triton.jit(do_not_specialize=["T", "CHUNKS", "H"])
def combine_kernel(
    weights, x, y, gx, gy, states, partner, out, flow, table, bounds, T, CHUNKS, H, scale,
    X: tl.constexpr, Y: tl.constexpr, X_BLOCKS: tl.constexpr, Y_BLOCKS: tl.constexpr,
    C: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr, PACKED: tl.constexpr,
    TRANSPOSED: tl.constexpr, REVERSE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of o, dq, dk or dv. Grid: slots · H · Y_BLOCKS.

    out_i = Σ_{j≤i} weights[i,j] y_j exp(Gy_i − Gy_j) + scale · exp(Gy_i) ⊙ Sᵀ (x_i exp(Gx_i)), S the [X,Y] state at the chunk's
    start. REVERSE: Σ_{i≥j} weights[i,j] y_i exp(Gy_i − Gy_j), and S the gradient at the chunk's end with decays to it. TRANSPOSED:
    `states` are stored [Y,X]. `flow` (or None) gets partner ⊙ (out without the term j = i), the gate's share.
    """
    program = tl.program_id(0).to(tl.int64)
    y_block, row = program % Y_BLOCKS, program // Y_BLOCKS
    head, slot = row % H, row // H
    _, _, first, count = _locate(slot, table, bounds, T, CHUNKS, C, PACKED)
    rows = tl.arange(0, C)
    y_columns = y_block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([C, BLOCK], tl.float32)
    for block in range(0, X_BLOCKS):
        x_columns = block * BLOCK + tl.arange(0, BLOCK)
        xs = _rows(x, first, count, head, H, rows, x_columns, X).to(tl.float32)
        if gx is not None:
            sums = _rows(gx, first, count, head, H, rows, x_columns, X)
            if REVERSE:
                sums = _rows(gx, first, count, head, H, rows * 0 + (count - 1).to(tl.int32), x_columns, X) - sums
            xs *= tl.exp(sums.to(tl.float32))
        base = states + row * X * Y
        if TRANSPOSED:
            inside = (y_columns < Y)[:, None] & (x_columns < X)[None, :] & (count > 0)
            state = tl.trans(tl.load(base + y_columns[:, None] * X + x_columns[None, :], mask=inside, other=0.0))
        else:
            inside = (x_columns < X)[:, None] & (y_columns < Y)[None, :] & (count > 0)
            state = tl.load(base + x_columns[:, None] * Y + y_columns[None, :], mask=inside, other=0.0)
        total += _dot(xs, state, DOT, PRECISION)
    total *= scale
    ys = _rows(y, first, count, head, H, rows, y_columns, Y).to(tl.float32)
    place = weights + row * C * C
    if REVERSE:
        pairs = tl.trans(tl.load(place + rows[:, None] * C + rows[None, :])).to(tl.float32)
        off_diagonal = tl.where(rows[:, None] < rows[None, :], pairs, 0.0)
    else:
        pairs = tl.load(place + rows[:, None] * C + rows[None, :]).to(tl.float32)
        off_diagonal = tl.where(rows[:, None] > rows[None, :], pairs, 0.0)
    diagonal = tl.sum(tl.where(rows[:, None] == rows[None, :], pairs, 0.0), 1)
    if gy is None:
        total += _dot(off_diagonal, ys, DOT, PRECISION)
    else:
        sums = _rows(gy, first, count, head, H, rows, y_columns, Y)
        if REVERSE:
            last = _rows(gy, first, count, head, H, rows * 0 + (count - 1).to(tl.int32), y_columns, Y)
            total *= tl.exp((last - sums).to(tl.float32))
        else:
            total *= tl.exp(sums.to(tl.float32))
        for level in range(0, LEVELS):
            middle = _rows(gy, first, count, head, H, _middle(rows, level), y_columns, Y)
            factor = tl.exp(-tl.abs(sums - middle).to(tl.float32))
            target = ((rows >> level) & 1)[:, None] == (0 if REVERSE else 1)
            same = (rows >> (level + 1))[:, None] == (rows >> (level + 1))[None, :]
            part = _dot(tl.where(same, off_diagonal, 0.0), tl.where(target, 0.0, ys * factor), DOT, PRECISION)
            total += tl.where(target, part * factor, 0.0)
    if flow is not None:
        mate = _rows(partner, first, count, head, H, rows, y_columns, Y).to(tl.float32)
        _store_rows(flow, mate * total, first, count, head, H, rows, y_columns, Y)
    if out is not None:
        _store_rows(out, total + diagonal[:, None] * ys, first, count, head, H, rows, y_columns, Y)


@triton.jit(do_not_specialize=["T", "CHUNKS", "H"])
def gate_grad_kernel(
    gained, lost, states, ends, initial_grad, grad, table, bounds, T, CHUNKS, H,
    D: tl.constexpr, OTHER: tl.constexpr, BLOCKS: tl.constexpr, OTHER_BLOCKS: tl.constexpr,
    C: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """dg_t = Σ_other S ⊙ dS at the chunk's start + Σ_{s<t in the chunk} (gained_s − lost_s). Grid: slots · H · BLOCKS.

    Every term passes through at least one gate, so nothing large cancels. States are [D,OTHER], TRANSPOSED [OTHER,D].
    """
    program = tl.program_id(0).to(tl.int64)
    block, row = program % BLOCKS, program // BLOCKS
    head, slot = row % H, row // H
    sequence, local, first, count = _locate(slot, table, bounds, T, CHUNKS, C, PACKED)
    rows = tl.arange(0, C)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    others = tl.arange(0, BLOCK)
    boundary = tl.zeros([BLOCK], tl.float32)
    for other_block in range(0, OTHER_BLOCKS):
        wide = other_block * BLOCK + others
        if TRANSPOSED:
            tile = wide[None, :] * D + columns[:, None]
        else:
            tile = columns[:, None] * OTHER + wide[None, :]
        inside = (columns < D)[:, None] & (wide < OTHER)[None, :] & (count > 0)
        state = tl.load(states + row * D * OTHER + tile, mask=inside, other=0.0)
        earlier = tl.load(ends + (row - H) * D * OTHER + tile, mask=inside & (local > 0), other=0.0)
        initial = tl.load(
            initial_grad + (sequence * H + head) * D * OTHER + tile, mask=inside & (local == 0), other=0.0
        )
        boundary += tl.sum(state * (earlier + initial), 1)
    change = _rows(gained, first, count, head, H, rows - 1, columns, D)
    change -= _rows(lost, first, count, head, H, rows - 1, columns, D)
    _store_rows(grad, tl.cumsum(change, 0) + boundary[None, :], first, count, head, H, rows, columns, D)


@triton.jit(do_not_specialize=["T", "H"])
def step_kernel(
    q, k, v, g, gv, state, out, T, H, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, V_BLOCKS: tl.constexpr,
):  # fmt: skip
    """T decoding steps on one K×BV tile of the state, in place. Grid: B · H · V_BLOCKS."""
    program = tl.program_id(0).to(tl.int64)
    block, row = program % V_BLOCKS, program // V_BLOCKS
    head, batch = row % H, row // H
    keys = tl.arange(0, BK)
    values = block * BV + tl.arange(0, BV)
    tile = state + row * K * V + keys[:, None] * V + values[None, :]
    inside = (keys < K)[:, None] & (values < V)[None, :]
    current = tl.load(tile, mask=inside, other=0.0).to(tl.float32)
    for t in range(0, T):
        token = (batch * T + t) * H + head
        if g is not None:
            current *= tl.exp(tl.load(g + token * K + keys, mask=keys < K, other=0.0).to(tl.float32))[:, None]
        if gv is not None:
            current *= tl.exp(tl.load(gv + token * V + values, mask=values < V, other=0.0).to(tl.float32))[None, :]
        key = tl.load(k + token * K + keys, mask=keys < K, other=0.0).to(tl.float32)
        value = tl.load(v + token * V + values, mask=values < V, other=0.0).to(tl.float32)
        query = tl.load(q + token * K + keys, mask=keys < K, other=0.0).to(tl.float32) * scale
        current += key[:, None] * value[None, :]
        result = tl.sum(current * query[:, None], 0)
        tl.store(out + token * V + values, result.to(out.dtype.element_ty), mask=values < V)
    tl.store(tile, current.to(state.dtype.element_ty), mask=inside)


Launch = Callable[..., None]


def launch_now(kernel: Any, programs: int, num_warps: int, num_stages: int, **arguments: Any) -> None:
    """Run a kernel on a one-dimensional grid (the first grid dimension is the one without a 65,535 limit)."""
    if not programs:
        return
    device = next(x.device for x in arguments.values() if isinstance(x, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](**arguments, num_warps=num_warps, num_stages=num_stages)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Shapes, chunk tables and precision of one call, and how to launch (the cross-compile test records instead)."""

    heads: int
    width: int
    value_width: int
    time: int
    chunks: int
    sequences: int
    slots: int
    table: Tensor | None
    bounds: Tensor | None
    first_slots: Tensor | None
    dot: Any
    precision: str
    launch: Launch

    @property
    def place(self) -> dict[str, Any]:
        """What every chunk kernel needs to find its tokens."""
        return {
            "table": self.table,
            "bounds": self.bounds,
            "T": self.time,
            "CHUNKS": self.chunks,
            "H": self.heads,
            "C": CHUNK,
            "BLOCK": BLOCK,
            "PACKED": self.bounds is not None,
        }

    @property
    def products(self) -> dict[str, Any]:
        return {"DOT": self.dot, "PRECISION": self.precision}


def _blocks(width: int) -> int:
    return -(-width // BLOCK)


def make_problem(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, launch: Launch) -> Problem:
    """Build the chunk tables on the device.

    bf16 multiplies natively, fp16 in tf32 (same mantissa, and the state may pass 65,504), fp32 exactly. Triton's
    interpreter cannot multiply bf16: it works in fp32.
    """
    batch, time, heads, width = q.shape
    half = q.dtype == torch.float16 and torch.version.hip is None
    table = first_slots = None
    chunks, sequences = -(-time // CHUNK), batch
    slots = batch * chunks
    if cu_seqlens is not None:
        sequences = cu_seqlens.shape[0] - 1
        slots = chunk_bound(time, CHUNK, sequences)
        table = chunk_table(cu_seqlens, time, CHUNK)
        counts = ((cu_seqlens[1:] - cu_seqlens[:-1]).to(torch.int64) + CHUNK - 1) // CHUNK
        first_slots = counts.cumsum(0) - counts
    return Problem(
        heads=heads,
        width=width,
        value_width=v.shape[3],
        time=time,
        chunks=chunks,
        sequences=sequences,
        slots=slots,
        table=table,
        bounds=cu_seqlens,
        first_slots=first_slots,
        dot=tl.bfloat16 if q.dtype == torch.bfloat16 and not triton_interpreted() else tl.float32,
        precision="tf32" if half else "ieee",
        launch=launch,
    )


def _cumulate(p: Problem, g: Tensor | None, like: Tensor) -> Tensor | None:
    """Running sums of gates; float64 for fp32 inputs, whose differences would otherwise lose their last digits."""
    if g is None:
        return None
    sums = torch.empty_like(g, dtype=torch.float64 if like.dtype == torch.float32 else torch.float32)
    blocks = _blocks(g.shape[3])
    p.launch(cumulate_kernel, p.slots * p.heads * blocks, 4, 1, g=g, sums=sums, D=g.shape[3], BLOCKS=blocks, **p.place)
    return sums


def _carry(
    p: Problem,
    x: Tensor,
    y: Tensor,
    gates: tuple[Tensor | None, Tensor | None],
    initial: Tensor | None,
    scale: float,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """States before each chunk [slots,H,K,V] and after the last [N,H,K,V]; both fp32."""
    states = x.new_empty((p.slots, p.heads, p.width, p.value_width), dtype=torch.float32)
    final = x.new_empty((p.sequences, p.heads, p.width, p.value_width), dtype=torch.float32)
    key_blocks, value_blocks = _blocks(p.width), _blocks(p.value_width)
    place = {name: value for name, value in p.place.items() if name != "table"}
    p.launch(
        carry_kernel,
        p.sequences * p.heads * key_blocks * value_blocks,
        4,
        1,
        x=x,
        y=y,
        gx=gates[0],
        gy=gates[1],
        initial=initial,
        states=states,
        final=final,
        first_slots=p.first_slots,
        scale=scale,
        K=p.width,
        V=p.value_width,
        K_BLOCKS=key_blocks,
        V_BLOCKS=value_blocks,
        REVERSE=reverse,
        **place,
        **p.products,
    )
    return states, final


def _pair(p: Problem, x: Tensor, y: Tensor, g: Tensor | None, scale: float) -> Tensor:
    """Weights inside the chunks, [slots,H,C,C], zero above the diagonal."""
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    weights = x.new_empty((p.slots, p.heads, CHUNK, CHUNK), dtype=dtype)
    width = x.shape[3]
    p.launch(
        pair_kernel,
        p.slots * p.heads,
        4,
        1,
        x=x,
        y=y,
        g=g,
        weights=weights,
        scale=scale,
        D=width,
        BLOCKS=_blocks(width),
        LEVELS=LEVELS,
        **p.place,
        **p.products,
    )
    return weights


def _combine(
    p: Problem,
    weights: Tensor,
    x: Tensor,
    y: Tensor,
    gates: tuple[Tensor | None, Tensor | None],
    states: Tensor,
    scale: float,
    *,
    transposed: bool = False,
    reverse: bool = False,
    partner: Tensor | None = None,
    only_flow: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """(out, flow) of `combine_kernel`, shaped like y; flow is None without a partner."""
    new = torch.empty_like if p.bounds is None else torch.zeros_like
    out = None if only_flow else new(y)
    flow = None if partner is None else torch.empty_like(y, dtype=torch.float32)
    x_width, y_width = x.shape[3], y.shape[3]
    p.launch(
        combine_kernel,
        p.slots * p.heads * _blocks(y_width),
        4,
        1,
        weights=weights,
        x=x,
        y=y,
        gx=gates[0],
        gy=gates[1],
        states=states,
        partner=partner,
        out=out,
        flow=flow,
        scale=scale,
        X=x_width,
        Y=y_width,
        X_BLOCKS=_blocks(x_width),
        Y_BLOCKS=_blocks(y_width),
        LEVELS=LEVELS,
        TRANSPOSED=transposed,
        REVERSE=reverse,
        **p.place,
        **p.products,
    )
    return out, flow


def _gate_grad(
    p: Problem, g: Tensor, flows: tuple[Tensor, Tensor], carried: tuple[Tensor, Tensor, Tensor], *, transposed: bool
) -> Tensor:
    """Gradient of one side's gates from (gained, lost) flows and (states, gradients at ends, initial gradient)."""
    grad = torch.empty_like(g) if p.bounds is None else torch.zeros_like(g)
    width, other = (p.value_width, p.width) if transposed else (p.width, p.value_width)
    p.launch(
        gate_grad_kernel,
        p.slots * p.heads * _blocks(width),
        4,
        1,
        gained=flows[0],
        lost=flows[1],
        states=carried[0],
        ends=carried[1],
        initial_grad=carried[2],
        grad=grad,
        D=width,
        OTHER=other,
        BLOCKS=_blocks(width),
        OTHER_BLOCKS=_blocks(other),
        TRANSPOSED=transposed,
        **p.place,
    )
    return grad


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in tensors]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    launch: Launch = launch_now,
) -> tuple[Tensor, Tensor]:
    """Output [B,T,H,V] in q's dtype and final state [N,H,K,V] in fp32."""
    q, k, v, g, gv, initial_state, cu_seqlens = _contiguous(q, k, v, g, gv, initial_state, cu_seqlens)
    p = make_problem(q, v, cu_seqlens, launch)
    gates = _cumulate(p, g, q), _cumulate(p, gv, q)
    states, final = _carry(p, k, v, gates, initial_state, 1.0, reverse=False)
    weights = _pair(p, q, k, gates[0], scale)
    o, _ = _combine(p, weights, q, v, gates, states, scale)
    assert o is not None
    return o, final


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    out_grad: Tensor,
    final_grad: Tensor | None,
    scale: float,
    launch: Launch = launch_now,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """Gradients of q, k, v, g, gv and the initial state; those of absent gates are None. States are recomputed."""
    q, k, v, g, gv, initial_state, cu_seqlens = _contiguous(q, k, v, g, gv, initial_state, cu_seqlens)
    out_grad, final_grad = _contiguous(out_grad.to(q.dtype), final_grad)
    p = make_problem(q, v, cu_seqlens, launch)
    gates = _cumulate(p, g, q), _cumulate(p, gv, q)
    swapped = gates[1], gates[0]
    states, _ = _carry(p, k, v, gates, initial_state, 1.0, reverse=False)
    ends, initial_grad = _carry(p, q, out_grad, gates, final_grad, scale, reverse=True)
    weights, weights_grad = _pair(p, q, k, gates[0], scale), _pair(p, out_grad, v, gates[1], scale)
    on_keys, on_values = g is not None, gv is not None
    dq, lost = _combine(
        p, weights_grad, out_grad, k, swapped, states, scale, transposed=True, partner=q if on_keys else None
    )
    dk, gained = _combine(
        p, weights_grad, v, q, swapped, ends, 1.0, transposed=True, reverse=True, partner=k if on_keys else None
    )
    dv, value_gained = _combine(
        p, weights, k, out_grad, gates, ends, 1.0, reverse=True, partner=v if on_values else None
    )
    assert dq is not None and dk is not None and dv is not None
    dg = dgv = None
    carried = states, ends, initial_grad
    if g is not None:
        assert gained is not None and lost is not None
        dg = _gate_grad(p, g, (gained, lost), carried, transposed=False)
    if gv is not None:
        _, value_lost = _combine(p, weights, q, v, gates, states, scale, partner=out_grad, only_flow=True)
        assert value_gained is not None and value_lost is not None
        dgv = _gate_grad(p, gv, (value_gained, value_lost), carried, transposed=True)
    return dq, dk, dv, dg, dgv, initial_grad


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    state: Tensor,
    scale: float,
    launch: Launch = launch_now,
) -> Tensor:
    """T steps of the recurrence, in place on `state` [B,H,K,V] (contiguous). Returns [B,T,H,V] in q's dtype."""
    q, k, v, g, gv = _contiguous(q, k, v, g, gv)
    batch, time, heads, width = q.shape
    value_width = v.shape[3]
    padded = max(16, triton.next_power_of_2(width))
    tile = 16 if padded > 128 else 32
    blocks = -(-value_width // tile)
    out = torch.empty_like(v)
    launch(
        step_kernel,
        batch * heads * blocks,
        4,
        1,
        q=q,
        k=k,
        v=v,
        g=g,
        gv=gv,
        state=state,
        out=out,
        T=time,
        H=heads,
        scale=scale,
        K=width,
        V=value_width,
        BK=padded,
        BV=tile,
        V_BLOCKS=blocks,
    )
    return out


def configurations() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """(name, kernel, signature, constexprs, num_warps, num_stages) of every kernel as shipped: bf16 and fp32, D 64 and 128."""
    found: dict[str, tuple[str, Any, dict[str, str], dict[str, Any], int, int]] = {}

    def record(kernel: Any, programs: int, num_warps: int, num_stages: int, **arguments: Any) -> None:
        signature, constexprs = _describe(kernel, arguments)
        name = f"{kernel.fn.__name__} {[*signature.values()]} {constexprs}"
        found.setdefault(name, (name, kernel, signature, constexprs, num_warps, num_stages))

    for dtype in (torch.bfloat16, torch.float32):
        for width in (64, 128):
            for gated, packed in ((True, False), (False, False), (True, True)):
                _record_calls(dtype, width, gated, packed, record)
    yield from found.values()


def _record_calls(dtype: torch.dtype, width: int, gated: bool, packed: bool, record: Launch) -> None:
    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    q, k, v, o = (new(1, 128, 2, width) for _ in range(4))
    bounds = new(4, dtype=torch.int32) if packed else None
    state = new(3 if packed else 1, 2, width, width, dtype=torch.float32)
    for value_gated in (False, True) if gated else (False,):
        g = new(1, 128, 2, width, dtype=torch.float32) if gated else None
        gv = g if value_gated else None
        forward(q, k, v, g, gv, state, bounds, 1.0, launch=record)
        backward(q, k, v, g, gv, state, bounds, o, state, 1.0, launch=record)
        step(q, k, v, g, gv, state[:1], 1.0, launch=record)


_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def _describe(kernel: Any, arguments: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """Triton's signature and constexprs for a launch with these arguments."""
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constexprs[parameter.name] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    return signature, constexprs
