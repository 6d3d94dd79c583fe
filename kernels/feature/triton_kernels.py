"""Device code for attention whose similarity is a polynomial of degree two in q·k; `triton_impl` launches it.

A sequence is cut into segments of L tokens. Inside a segment tokens meet in pairs, block against block as in flash
attention, and the similarity is computed from q·k. What earlier segments hold arrives as a state over the features of
the keys, in tiles of 64 features. A feature is the product of two channels (`_names`; K names the constant 1); keys
have the bare product, queries the product times a coefficient that holds the polynomial's and the scale.

Arguments of every kernel: bounds [N+1] (None: equal lengths T), T, H, valid [tokens] (None: every key counts). Blocks
of tokens are found through table [slots,2] for packed input, through BLOCKS per sequence otherwise.
"""

# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sequence(sequence, bounds, T, PACKED: tl.constexpr):
    """(first token, length) of a sequence."""
    if PACKED:
        first = tl.load(bounds + sequence).to(tl.int64)
        length = (tl.load(bounds + sequence + 1).to(tl.int64) - first).to(tl.int32)
    else:
        first = sequence.to(tl.int64) * T
        length = T
    return first, length


@triton.jit
def _block(slot, table, BLOCKS, PACKED: tl.constexpr):
    """(sequence, block number inside it, whether there is one) of a slot."""
    if PACKED:
        sequence, local = tl.load(table + slot * 2), tl.load(table + slot * 2 + 1)
        return tl.maximum(sequence, 0), local, sequence >= 0
    return slot // BLOCKS, slot % BLOCKS, slot >= 0


@triton.jit
def _segment_slot(sequence, segment, first_slots, SEGMENTS, PACKED: tl.constexpr):
    """Where the state of a segment is kept."""
    if PACKED:
        return tl.load(first_slots + sequence).to(tl.int64) + segment
    return sequence.to(tl.int64) * SEGMENTS + segment


@triton.jit
def _rows(x, first, head, H, rows, stop, columns, D: tl.constexpr):
    """Rows of one head of a [tokens, H, D] tensor, zero from `stop` on and beyond D: [len(rows), len(columns)]."""
    inside = (rows < stop)[:, None] & (columns < D)[None, :]
    return tl.load(x + (first * H + head) * D + (rows[:, None] * (H * D) + columns[None, :]), mask=inside, other=0.0)


@triton.jit
def _store(x, value, first, head, H, rows, stop, columns, D: tl.constexpr):
    inside = (rows < stop)[:, None] & (columns < D)[None, :]
    place = x + (first * H + head) * D + (rows[:, None] * (H * D) + columns[None, :])
    tl.store(place, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _numbers(x, first, head, H, rows, stop, other):
    """Rows of a [tokens, H] tensor."""
    return tl.load(x + first * H + head + rows * H, mask=rows < stop, other=other)


@triton.jit
def _counts(valid, first, rows, stop):
    """Whether these rows are keys that count."""
    inside = rows < stop
    if valid is not None:
        inside = inside & (tl.load(valid + first + rows, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _dot(a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(DOT), b.to(DOT), input_precision=PRECISION)


@triton.jit
def _names(features, scale, K: tl.constexpr, TAYLOR: tl.constexpr):
    """(first channel, second channel, coefficient for the query) of each feature; see `maps.channels`."""
    pairs: tl.constexpr = K * (K + 1) // 2
    a, b = features % K, (features % K + features // K) % K
    c = tl.where(features < K, 1.0, 2.0) * scale * scale
    if TAYLOR:
        linear, constant = features - pairs, features == pairs + K
        a = tl.where(features < pairs, a, tl.where(constant, K, linear))
        b = tl.where(features < pairs, b, K)
        c = tl.where(features < pairs, 0.5 * c, tl.where(constant, 1.0, scale))
        last: tl.constexpr = pairs + K + 1
    else:
        last: tl.constexpr = pairs
    return tl.where(features < last, a, K + 1), tl.where(features < last, b, K + 1), c


@triton.jit
def _factor(x, index, channels, K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Channels `index` of x [C, KP], one for the index K: [C, 64] in fp32, exact."""
    select = (channels[:, None] == index[None, :]).to(tl.float32)
    return _dot(x, select, DOT, PRECISION) + (index == K).to(tl.float32)[None, :]


@triton.jit
def _monomials(x, a, b, channels, K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    return _factor(x, a, channels, K, DOT, PRECISION) * _factor(x, b, channels, K, DOT, PRECISION)


@triton.jit
def _chain_rule(x, mapped_grad, a, b, channels, K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """The gradient that reaches channels [C, KP] through products of two channels, [C, 64]."""
    to_a = mapped_grad * _factor(x, b, channels, K, DOT, PRECISION)
    to_b = mapped_grad * _factor(x, a, channels, K, DOT, PRECISION)
    grad = _dot(to_a, (a[:, None] == channels[None, :]).to(tl.float32), DOT, PRECISION)
    return grad + _dot(to_b, (b[:, None] == channels[None, :]).to(tl.float32), DOT, PRECISION)


@triton.jit
def _similarity(scores, TAYLOR: tl.constexpr):
    return 1.0 + scores + 0.5 * scores * scores if TAYLOR else scores * scores


@triton.jit
def _slope(scores, TAYLOR: tl.constexpr):
    return 1.0 + scores if TAYLOR else 2.0 * scores


@triton.jit
def _load_tile(states, sums, slot, features, values, F: tl.constexpr, V: tl.constexpr):
    """A tile [64, BV] of a state and of its normaliser [64]."""
    inside = (features < F)[:, None] & (values < V)[None, :]
    tile = tl.load(states + slot * F * V + (features[:, None] * V + values[None, :]), mask=inside, other=0.0)
    return tile, tl.load(sums + slot * F + features, mask=features < F, other=0.0).to(tl.float32)


@triton.jit
def _store_tile(states, sums, tile, total, slot, features, values, F: tl.constexpr, V: tl.constexpr):
    inside = (features < F)[:, None] & (values < V)[None, :]
    place = states + slot * F * V + (features[:, None] * V + values[None, :])
    tl.store(place, tile.to(states.dtype.element_ty), mask=inside)
    tl.store(sums + slot * F + features, total, mask=features < F)


@triton.jit(do_not_specialize=["T", "H", "SEGMENTS"])
def state_kernel(
    x, y, factor, weight, valid, initial, initial_sum, bounds, first_slots, states, sums, final, final_sum,
    T, H, SEGMENTS, scale,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, TILES: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
    L: tl.constexpr, C: tl.constexpr, TAYLOR: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    WHOLE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the state, before each segment and (WHOLE) after the last. Grid: N · H · TILES.

    x = k, y = v. REVERSE: the gradient of the state, after each segment and before the first; x = q (with
    coefficients), y = do, times `factor` [tokens, H] a row; the normaliser sums the features times `weight`
    [tokens, H].
    """
    program = tl.program_id(0).to(tl.int64)
    features = (program % TILES).to(tl.int32) * 64 + tl.arange(0, 64)
    row = program // TILES
    head, sequence = row % H, row // H
    first, length = _sequence(sequence, bounds, T, PACKED)
    channels, values, rows = tl.arange(0, KP), tl.arange(0, BV), tl.arange(0, C)
    a, b, c = _names(features, scale, K, TAYLOR)
    tile = tl.zeros([64, BV], tl.float32)
    total = tl.zeros([64], tl.float32)
    if initial is not None:
        loaded, total = _load_tile(initial, initial_sum, row, features, values, F, V)
        tile = loaded.to(tl.float32)
    segments = tl.cdiv(length, L)
    for number in range(0, segments):
        segment = segments - 1 - number if REVERSE else number
        slot = _segment_slot(sequence, segment, first_slots, SEGMENTS, PACKED)
        _store_tile(states, sums, tile, total, slot * H + head, features, values, F, V)
        stop = tl.minimum(segment * L + L, length)
        if not WHOLE:  # nobody asks what the last segment adds
            stop = tl.where(number + 1 < segments, stop, segment * L)
        for start in range(segment * L, stop, C):
            token = start + rows
            xs = _rows(x, first, head, H, token, length, channels, K)
            ys = _rows(y, first, head, H, token, length, values, V)
            mapped = _monomials(xs, a, b, channels, K, DOT, PRECISION)
            if REVERSE:
                mapped *= c[None, :]
                total += tl.sum(mapped * _numbers(weight, first, head, H, token, length, 0.0)[:, None], 0)
                mapped *= _numbers(factor, first, head, H, token, length, 0.0)[:, None]
            else:
                mapped = tl.where(_counts(valid, first, token, length)[:, None], mapped, 0.0)
                total += tl.sum(mapped, 0)
            tile += _dot(tl.trans(mapped), ys, DOT, PRECISION)
    _store_tile(final, final_sum, tile, total, row, features, values, F, V)


@triton.jit(do_not_specialize=["T", "H", "BLOCKS", "SEGMENTS"])
def forward_kernel(
    q, k, v, valid, states, sums, table, bounds, first_slots, o, den_out, T, H, BLOCKS, SEGMENTS, scale, eps,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, TILES: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
    L: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, TAYLOR: tl.constexpr, PACKED: tl.constexpr,
    FROM_START: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o and the denominators of BQ queries. Grid: H · slots. FROM_START: there is a state before the first segment."""
    slot, head = tl.program_id(0), tl.program_id(1)
    sequence, local, used = _block(slot, table, BLOCKS, PACKED)
    first, length = _sequence(sequence, bounds, T, PACKED)
    length = tl.where(used, length, 0)
    channels, values, keys = tl.arange(0, KP), tl.arange(0, BV), tl.arange(0, BK)
    begin = local * BQ
    rows = begin + tl.arange(0, BQ)
    qs = _rows(q, first, head, H, rows, length, channels, K)
    num, den = tl.zeros([BQ, BV], tl.float32), tl.zeros([BQ], tl.float32)
    segment = begin // L
    for start in range(segment * L, tl.minimum(begin + BQ, length), BK):
        ks = _rows(k, first, head, H, start + keys, length, channels, K)
        vs = _rows(v, first, head, H, start + keys, length, values, V)
        weights = _similarity(_dot(qs, tl.trans(ks), DOT, PRECISION) * scale, TAYLOR)
        if start + BK > begin:
            weights = tl.where(rows[:, None] >= (start + keys)[None, :], weights, 0.0)
        if valid is not None:
            weights = tl.where(_counts(valid, first, start + keys, length)[None, :], weights, 0.0)
        den += tl.sum(weights, 1)
        num += _dot(weights, vs, DOT, PRECISION)
    if states is not None:  # noqa: SIM102 (decided when compiled)
        if FROM_START or segment > 0:
            where = _segment_slot(sequence, segment, first_slots, SEGMENTS, PACKED) * H + head
            for number in range(0, TILES):
                features = number * 64 + tl.arange(0, 64)
                a, b, c = _names(features, scale, K, TAYLOR)
                tile, total = _load_tile(states, sums, where, features, values, F, V)
                mapped = _monomials(qs, a, b, channels, K, DOT, PRECISION) * c[None, :]
                den += tl.sum(mapped * total[None, :], 1)
                num += _dot(mapped, tile, DOT, PRECISION)
    _store(o, num / (den + eps)[:, None], first, head, H, rows, length, values, V)
    tl.store(den_out + first * H + head + rows * H, den, mask=rows < length)


@triton.jit(do_not_specialize=["TOKENS", "H"])
def delta_kernel(
    o, out_grad, den, bounds, factor, den_grad, TOKENS, H, eps,
    V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, N: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """factor = 1 / (den + eps) and the denominators' gradient, −(o · do) · factor. Grid: tokens · H / C."""
    rows = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
    inside = rows < TOKENS.to(tl.int64) * H
    if PACKED:
        inside = inside & (rows // H < tl.load(bounds + N).to(tl.int64))
    columns = tl.arange(0, BV)
    mask = inside[:, None] & (columns < V)[None, :]
    place = rows[:, None] * V + columns[None, :]
    product = tl.load(o + place, mask=mask, other=0.0).to(tl.float32)
    product *= tl.load(out_grad + place, mask=mask, other=0.0).to(tl.float32)
    inverse = 1.0 / (tl.load(den + rows, mask=inside, other=1.0) + eps)
    tl.store(factor + rows, inverse, mask=inside)
    tl.store(den_grad + rows, -tl.sum(product, 1) * inverse, mask=inside)


@triton.jit(do_not_specialize=["T", "H", "BLOCKS", "SEGMENTS"])
def query_grad_kernel(
    q, k, v, valid, states, sums, table, bounds, first_slots, out_grad, factor, den_grad, dq,
    T, H, BLOCKS, SEGMENTS, scale,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, TILES: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
    L: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, TAYLOR: tl.constexpr, PACKED: tl.constexpr,
    FROM_START: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BQ queries. Grid as in `forward_kernel`."""
    slot, head = tl.program_id(0), tl.program_id(1)
    sequence, local, used = _block(slot, table, BLOCKS, PACKED)
    first, length = _sequence(sequence, bounds, T, PACKED)
    length = tl.where(used, length, 0)
    channels, values, keys = tl.arange(0, KP), tl.arange(0, BV), tl.arange(0, BK)
    begin = local * BQ
    rows = begin + tl.arange(0, BQ)
    qs = _rows(q, first, head, H, rows, length, channels, K)
    dos = _rows(out_grad, first, head, H, rows, length, values, V)
    inverse = _numbers(factor, first, head, H, rows, length, 0.0)
    below = _numbers(den_grad, first, head, H, rows, length, 0.0)
    grad = tl.zeros([BQ, KP], tl.float32)
    segment = begin // L
    for start in range(segment * L, tl.minimum(begin + BQ, length), BK):
        ks = _rows(k, first, head, H, start + keys, length, channels, K)
        vs = _rows(v, first, head, H, start + keys, length, values, V)
        scores = _dot(qs, tl.trans(ks), DOT, PRECISION) * scale
        weights_grad = _dot(dos, tl.trans(vs), DOT, PRECISION) * inverse[:, None] + below[:, None]
        weights_grad *= _slope(scores, TAYLOR)
        if start + BK > begin:
            weights_grad = tl.where(rows[:, None] >= (start + keys)[None, :], weights_grad, 0.0)
        if valid is not None:
            weights_grad = tl.where(_counts(valid, first, start + keys, length)[None, :], weights_grad, 0.0)
        grad += _dot(weights_grad, ks, DOT, PRECISION)
    grad *= scale
    if states is not None:  # noqa: SIM102 (decided when compiled)
        if FROM_START or segment > 0:
            where = _segment_slot(sequence, segment, first_slots, SEGMENTS, PACKED) * H + head
            for number in range(0, TILES):
                features = number * 64 + tl.arange(0, 64)
                a, b, c = _names(features, scale, K, TAYLOR)
                tile, total = _load_tile(states, sums, where, features, values, F, V)
                mapped_grad = _dot(dos, tl.trans(tile), DOT, PRECISION) * inverse[:, None]
                mapped_grad = (mapped_grad + below[:, None] * total[None, :]) * c[None, :]
                grad += _chain_rule(qs, mapped_grad, a, b, channels, K, DOT, PRECISION)
    _store(dq, grad, first, head, H, rows, length, channels, K)


@triton.jit(do_not_specialize=["T", "H", "BLOCKS", "SEGMENTS"])
def key_value_grad_kernel(
    q, k, v, valid, states, sums, table, bounds, first_slots, out_grad, factor, den_grad, dk, dv,
    T, H, BLOCKS, SEGMENTS, scale,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, TILES: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
    L: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, TAYLOR: tl.constexpr, PACKED: tl.constexpr,
    FROM_END: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BK keys; `states`: the gradient of the state after each segment. FROM_END: also after the last.

    Grid: H · slots of BK tokens.
    """
    slot, head = tl.program_id(0), tl.program_id(1)
    sequence, local, used = _block(slot, table, BLOCKS, PACKED)
    first, length = _sequence(sequence, bounds, T, PACKED)
    length = tl.where(used, length, 0)
    channels, values, queries = tl.arange(0, KP), tl.arange(0, BV), tl.arange(0, BQ)
    begin = local * BK
    rows = begin + tl.arange(0, BK)
    ks = _rows(k, first, head, H, rows, length, channels, K)
    vs = _rows(v, first, head, H, rows, length, values, V)
    key_grad, value_grad = tl.zeros([BK, KP], tl.float32), tl.zeros([BK, BV], tl.float32)
    segment = begin // L
    end = tl.minimum(segment * L + L, length)
    for start in range(begin // BQ * BQ, end, BQ):
        token = start + queries
        qs = _rows(q, first, head, H, token, length, channels, K)
        dos = _rows(out_grad, first, head, H, token, length, values, V)
        inverse = _numbers(factor, first, head, H, token, length, 0.0)
        below = _numbers(den_grad, first, head, H, token, length, 0.0)
        scores = _dot(ks, tl.trans(qs), DOT, PRECISION) * scale
        weights = _similarity(scores, TAYLOR) * inverse[None, :]
        weights_grad = _dot(vs, tl.trans(dos), DOT, PRECISION) * inverse[None, :] + below[None, :]
        weights_grad *= _slope(scores, TAYLOR)
        if start < begin + BK:
            causal = rows[:, None] <= token[None, :]
            weights, weights_grad = tl.where(causal, weights, 0.0), tl.where(causal, weights_grad, 0.0)
        value_grad += _dot(weights, dos, DOT, PRECISION)
        key_grad += _dot(weights_grad, qs, DOT, PRECISION)
    key_grad *= scale
    if states is not None:  # noqa: SIM102 (decided when compiled)
        if FROM_END or segment * L + L < length:
            where = _segment_slot(sequence, segment, first_slots, SEGMENTS, PACKED) * H + head
            for number in range(0, TILES):
                features = number * 64 + tl.arange(0, 64)
                a, b, _ = _names(features, scale, K, TAYLOR)
                tile, total = _load_tile(states, sums, where, features, values, F, V)
                value_grad += _dot(_monomials(ks, a, b, channels, K, DOT, PRECISION), tile, DOT, PRECISION)
                mapped_grad = _dot(vs, tl.trans(tile), DOT, PRECISION) + total[None, :]
                key_grad += _chain_rule(ks, mapped_grad, a, b, channels, K, DOT, PRECISION)
    if valid is not None:
        counts = _counts(valid, first, rows, length)[:, None]
        key_grad, value_grad = tl.where(counts, key_grad, 0.0), tl.where(counts, value_grad, 0.0)
    _store(dk, key_grad, first, head, H, rows, length, channels, K)
    _store(dv, value_grad, first, head, H, rows, length, values, V)
