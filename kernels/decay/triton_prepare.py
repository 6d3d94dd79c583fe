"""Device code: rows scaled by the decay inside their chunk, so that a chunk becomes plain linear attention.

With G_i the running sum of a chunk's gates and m its middle, reader rows get exp(G_i − G_m) and writer rows
exp(G_m − G_j): safe while either half decays by less than exp(−LIMIT). A chunk that forgets more is marked in `slow`.
Its readers get exp(G_i), its writers exp(G_end − G_j), and its pairs are computed by binary levels, as in `torch_impl`.
`shifts` [slots,H,3,D] holds the logs of the state's decay before it is read, after the update, and in between.
"""

# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from fla_swap.kernels.decay.triton_parts import (
    BLOCK,
    _clip,
    _exp,
    _halves,
    _locate,
    _pairs_by_level,
    _rows,
    _store_rows,
    _sums,
)


@triton.jit(do_not_specialize=["T", "CHUNKS", "H"])
def prepare_kernel(
    z, y, g, u, readers, writers, shifts, slow, own, places, T, CHUNKS, H, TOKENS,
    D: tl.constexpr, BLOCKS: tl.constexpr, C: tl.constexpr, LIMIT: tl.constexpr, BEFORE: tl.constexpr,
    DOT: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Scales z into `readers` and y into `writers` (either None). Grid: slots · H · BLOCKS.

    BEFORE: readers leave out their own gate, and own [BLOCKS,TOKENS,H] gets Σ u z y of each row. slow [slots,H,BLOCKS].
    """
    program = tl.program_id(0).to(tl.int64)
    block, row = (program % BLOCKS).to(tl.int32), program // BLOCKS
    head, slot = row % H, row // H
    first, count = _locate(places, slot, T, CHUNKS, C)
    rows = tl.arange(0, C)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    gates = _clip(_rows(g, first, count, head, H, rows, columns, D))
    zt = gates
    if z is not None:  # everything is under way before the first product waits
        zt = _rows(z, first, count, head, H, rows, columns, D)
    yt = gates
    if y is not None:
        yt = _rows(y, first, count, head, H, rows, columns, D)
    early, late = _halves(gates, C)
    steepest = early  # the first gate lies between no two rows of the chunk, unless readers leave out their own gate
    if not BEFORE:
        here = g + (first * H + head) * D + columns
        steepest -= _clip(tl.load(here, mask=(columns < D) & (count > 0), other=0.0)).to(tl.float32)
    fast = tl.min(tl.minimum(steepest, late), 0) > -LIMIT
    place = shifts + row * 3 * D + columns
    tl.store(place + 2 * D, tl.where(fast, 0.0, early + late), mask=columns < D)
    total = early + late
    early, late = tl.where(fast, early, 0.0), tl.where(fast, late, 0.0)
    tl.store(place, early, mask=columns < D)
    tl.store(place + D, late, mask=columns < D)
    tl.store(slow + program, tl.where(fast, 0, 1).to(tl.int32))
    sums = _sums(rows[None, :] <= rows[:, None], gates, DOT, GATE)
    if readers is not None:
        past = sums
        if BEFORE:
            past = _sums(rows[None, :] < rows[:, None], gates, DOT, GATE)
        _store_rows(readers, zt.to(tl.float32) * _exp(past - early[None, :]), first, count, head, H, rows, columns, D)
    if writers is not None:
        if DOT == tl.bfloat16:  # noqa: SIM300 (one product less; its rounding is far below bf16's)
            future = total[None, :] - sums
        else:
            future = _sums(rows[None, :] > rows[:, None], gates, DOT, GATE)
        _store_rows(writers, yt.to(tl.float32) * _exp(future - late[None, :]), first, count, head, H, rows, columns, D)
    if u is not None:
        bonus = tl.load(u + head * D + columns, mask=columns < D, other=0.0).to(tl.float32)
        products = tl.sum(zt.to(tl.float32) * yt.to(tl.float32) * bonus[None, :], 1)
        tl.store(own + (block * TOKENS + first + rows) * H + head, products, mask=rows < count)


@triton.jit
def _any_slow(slow, row, BLOCKS: tl.constexpr):
    """Whether any block of columns of a chunk is slow."""
    found = tl.load(slow + row * BLOCKS)
    if BLOCKS > 1:
        found += tl.load(slow + row * BLOCKS + 1)
    if BLOCKS > 2:
        found += tl.load(slow + row * BLOCKS + 2)
    if BLOCKS > 3:
        found += tl.load(slow + row * BLOCKS + 3)
    return found > 0


@triton.jit
def _some_slow(slow, first, last, SPAN: tl.constexpr):
    """Whether any of slow[first:last] is marked, last − first ≤ SPAN: one look, where most programs end."""
    at = first + tl.arange(0, SPAN)
    return tl.max(tl.load(slow + at, mask=at < last, other=0), 0) > 0


@triton.jit(do_not_specialize=["T", "CHUNKS", "H", "COUNT"])
def pairs_kernel(
    z, y, g, slow, pairs, places, T, CHUNKS, H, COUNT,
    D: tl.constexpr, BLOCKS: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, LEVELS: tl.constexpr,
    BEFORE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """pairs[i,j] = Σ_d z_i y_j exp(G_i − G_j) of slow chunks, j ≤ i (BEFORE: j < i); others are not touched.

    Grid: COUNT / GROUP, with COUNT = slots · H.
    """
    begin = tl.program_id(0).to(tl.int64) * GROUP
    stop = tl.minimum(begin + GROUP, COUNT)
    if _some_slow(slow, begin * BLOCKS, stop * BLOCKS, GROUP * 4):
        rows = tl.arange(0, C)
        for i in range(0, GROUP):
            row = begin + i
            if (row < COUNT) & _any_slow(slow, tl.minimum(row, COUNT - 1), BLOCKS):
                head, slot = row % H, row // H
                first, count = _locate(places, slot, T, CHUNKS, C)
                total = _pairs_by_level(
                    z, y, g, first, count, head, H, D, BLOCKS * BLOCK, C, LEVELS, False, BEFORE, DOT, PRECISION, GATE
                )
                tl.store(pairs + row * C * C + rows[:, None] * C + rows[None, :], total.to(pairs.dtype.element_ty))
