"""Triton for the delta family: what each kernel gets, forward, backward and decode. Imported only when chosen.

Forward keeps the inverses, the scores and v_new; backward recomputes the states at the chunks' starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fla_swap.kernels.common import chunk_table, triton_interpreted
from fla_swap.kernels.delta import triton_channels as channels
from fla_swap.kernels.delta import triton_gradients as gradients
from fla_swap.kernels.delta import triton_kernels as kernels
from fla_swap.kernels.delta.torch_impl import CHUNK, chunk_count
from fla_swap.kernels.delta.triton_step import step_kernel

TILE = 64  # of V in the walks, and of K where states are recomputed: measured, with four warps
Launch = Callable[..., None]


def _count(width: int, size: int) -> int:
    """Tiles of `size` that `width` needs."""
    return (width + size - 1) // size


def _power(width: int) -> int:
    """The least power of two that is no less than `width`."""
    return 1 << (width - 1).bit_length()


def launch_now(kernel: Any, grid: tuple[int, int], num_warps: int, num_stages: int, **arguments: Any) -> None:
    """Run a kernel. The large count goes to the first grid dimension, which has no 65,535 limit."""
    if not grid[0]:
        return
    device = next(x.device for x in arguments.values() if isinstance(x, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)


def has_large_memory(device: torch.device) -> bool:
    """Whether a block of this GPU may use 200 KiB of shared memory."""
    if device.type != "cuda":
        return False
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0) >= 200 << 10


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Shapes, tables and launch settings of one call.

    chunks [C, 2] int64: first row in [B·T, …] and number of rows of each slot; sequences [N, 2] int64: first slot and
    number of slots. Both are read for packed sequences only. gate: 0 none, 1 per head, 2 per channel.
    """

    tokens: int
    heads: int
    value_heads: int
    width: int
    value_width: int
    count: int
    sequence_count: int
    chunks: Tensor
    sequences: Tensor
    dtype: torch.dtype
    packed: bool
    gate: int
    large: bool
    amd: bool
    launch: Launch

    @property
    def slots(self) -> int:
        return self.count * self.value_heads

    @property
    def key_tile(self) -> int:
        return max(64, _power(self.width))

    @property
    def roomy(self) -> bool:
        """Whether chunks can be loaded while the ones before them are worked on, and gradients see whole heads."""
        return self.large and self.dtype != torch.float32 and self.width <= 128

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles of K and V in the gradients: whole heads where they fit."""
        if not self.roomy:
            return 64, 64
        return self.key_tile, min(128, max(64, _power(self.value_width)))

    @property
    def forward_walk(self) -> tuple[int, int, int]:
        """Tile of V, warps and stages, as measured on an H200: blocks that share a multiprocessor beat prefetching."""
        if self.roomy and self.gate == 2 and self.value_width > 64:
            return 128, 8, 3
        return 64, 4, 2 if self.roomy else 1

    @property
    def backward_walk(self) -> tuple[int, int, int]:
        if self.roomy and self.value_width > 64:
            return 128, 8, 2 if self.gate == 2 else 3
        return 64, 4, 2 if self.roomy else 1

    @property
    def precision(self) -> str:
        """Of products with an fp32 side: as exact as fp32 for fp32 inputs, tf32 for narrower ones."""
        if triton_interpreted() and self.chunks.device.type == "cpu":
            return "interpreted"
        return self.exact if self.dtype == torch.float32 else "tf32"

    @property
    def exact(self) -> str:
        return "ieee" if self.amd or (triton_interpreted() and self.chunks.device.type == "cpu") else "tf32x3"

    @property
    def common(self) -> dict[str, Any]:
        sizes = {"T": self.tokens, "H": self.heads, "HV": self.value_heads, "K": self.width}
        return sizes | {"chunks": self.chunks, "PACKED": self.packed, "PRECISION": self.precision}

    def masked(self, *pairs: tuple[int, int]) -> bool:
        """Whether chunks can be short, or a (width, tile) of `pairs` does not divide."""
        return self.packed or self.tokens % CHUNK != 0 or any(width % size for width, size in pairs)

    def scratch(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*shape, dtype=dtype or self.dtype, device=self.chunks.device)

    def new(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A contiguous result of the tokens; zeros where no chunk may write."""
        make = torch.zeros if self.packed else torch.empty
        return make(shape, dtype=dtype, device=self.chunks.device)

    def run(
        self, kernel: Any, programs: int, *, columns: int = 1, warps: int = 4, stages: int = 1, **given: Any
    ) -> None:
        """Launch with `programs` × `columns` programs, the arguments in `common` where the kernel has them."""
        arguments = {name: value for name, value in self.common.items() if name in kernel.arg_names} | given
        self.launch(kernel, (programs, columns), warps, stages, **arguments)

    def run_some(self, kernel: Any, programs: int, given: dict[str, Any], *, warps: int = 4) -> None:
        """Launch with those of `given` that the kernel takes."""
        known = {name: value for name, value in given.items() if name in kernel.arg_names}
        self.run(kernel, programs, warps=warps, **known)


def _problem(
    q: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, launch: Launch, **target: bool
) -> Problem:
    batch, total, heads, width = q.shape
    if cu_seqlens is None:
        count, sequence_count = batch * chunk_count(total, None), batch
        chunks = sequences = torch.empty(0, dtype=torch.int64, device=q.device)
    else:
        chunks, sequences = _packed_tables(cu_seqlens, total)
        count, sequence_count = chunks.shape[0], sequences.shape[0]
    return Problem(
        tokens=total,
        heads=heads,
        value_heads=v.shape[2],
        width=width,
        value_width=v.shape[3],
        count=count,
        sequence_count=sequence_count,
        chunks=chunks,
        sequences=sequences,
        dtype=q.dtype,
        packed=cu_seqlens is not None,
        gate=0 if g is None else g.ndim - 2,
        large=target.get("large", has_large_memory(q.device)),
        amd=target.get("amd", torch.version.hip is not None),
        launch=launch,
    )


def _packed_tables(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    table, bounds = chunk_table(cu_seqlens, total, CHUNK).to(torch.int64), cu_seqlens.to(torch.int64)
    owner = table[:, 0].clamp(min=0)
    first = bounds[owner] + table[:, 1] * CHUNK
    rows = (bounds[owner + 1] - first).clamp(max=CHUNK)
    unused = table[:, 0] < 0
    chunks = torch.stack((first, rows), -1).masked_fill(unused[:, None], 0)
    counts = (bounds[1:] - bounds[:-1] + CHUNK - 1) // CHUNK
    return chunks, torch.stack((counts.cumsum(0) - counts, counts), -1)


class Kept(NamedTuple):
    """What backward needs: T − I and A T [slots·128, 64], A [slots·64, 64], v_new like v, rows [3·slots·64] fp32.

    `rows` are the summed gates, 1/‖q‖ and 1/‖k‖ of each slot; channel gates are summed again instead.
    """

    solution: Tensor
    scores: Tensor
    v_new: Tensor
    rows: Tensor


class Keys(NamedTuple):
    """q and k as the walks take them, with what stands beside them; see `triton_kernels.py`."""

    q: Tensor
    k: Tensor
    k_out: Tensor
    gates: Tensor
    q_norm: Tensor
    k_norm: Tensor
    normalise: bool
    summed: Tensor
    norms: tuple[Tensor, Tensor]


def _walk_arguments(keys: Keys, p: Problem) -> dict[str, Any]:
    arguments = {"q": keys.q, "k": keys.k, "k_out": keys.k_out, "gates": keys.gates}
    arguments |= {"q_norm": keys.q_norm, "k_norm": keys.k_norm, "NORMALISE": keys.normalise}
    return arguments | {"sequences": p.sequences, "V": p.value_width, "BK": p.key_tile, "GATE": p.gate}


def _head_keys(p: Problem, q: Tensor, k: Tensor, rows: Tensor, qk_l2norm: bool) -> Keys:
    gates, q_norm, k_norm = rows.view(3, -1)
    return Keys(q, k, k, gates, q_norm, k_norm, qk_l2norm, gates, (q_norm, k_norm))


def _channel_keys(p: Problem, q: Tensor, k: Tensor, g: Tensor, scale: float, qk_l2norm: bool) -> Keys:
    q_norm, k_norm = (_norm(p, x) for x in (q, k)) if qk_l2norm else (q, k)
    shape = p.slots, CHUNK, p.width
    q_in, k_in, k_out = (p.scratch(*shape) for _ in range(3))
    summed, whole = p.scratch(*shape, dtype=torch.float32), p.scratch(p.slots, p.width, dtype=torch.float32)
    p.run(
        channels.channel_decay_kernel,
        p.slots,
        columns=_count(p.width, 64),
        q=q,
        k=k,
        g=g,
        q_norm=q_norm,
        k_norm=k_norm,
        summed=summed,
        q_in=q_in,
        k_in=k_in,
        k_out=k_out,
        whole=whole,
        scale=scale,
        BK=64,
        NORMALISE=qk_l2norm,
    )
    return Keys(q_in, k_in, k_out, whole, whole, whole, False, summed, (q_norm, k_norm))


def _norm(p: Problem, x: Tensor) -> Tensor:
    norm = p.scratch(*x.shape[:3], dtype=torch.float32)
    _run_rows(p, gradients.norm_kernel, x=x, norm=norm)
    return norm


def _run_rows(p: Problem, kernel: Any, *, x: Tensor, **arguments: Any) -> None:
    count, rows = x.numel() // x.shape[-1], 16
    block = _power(x.shape[-1])
    p.run(kernel, _count(count, rows), x=x, **arguments, count=count, BK=block, ROWS=rows)


def _prepare(
    p: Problem, q: Tensor, k: Tensor, g: Tensor | None, beta: Tensor, scale: float, qk_l2norm: bool, kept: Kept
) -> Keys:
    """Fill all of `kept` but v_new."""
    shared = {"beta": beta, "solution": kept.solution, "pair": kept.scores, "scale": scale, "NORMALISE": qk_l2norm}
    shared |= {"SAVE": kept.scores.numel() > 0}
    if g is not None and p.gate == 2:
        keys = _channel_keys(p, q, k, g, scale, qk_l2norm)
        p.run(
            channels.channel_pairs_kernel,
            p.slots,
            q=q,
            k=k,
            q_norm=keys.norms[0],
            k_norm=keys.norms[1],
            summed=keys.summed,
            BK=64,
            MASK=p.masked((p.width, 64)),
            EXACT=p.exact,
            **shared,
        )
        return keys
    keys = _head_keys(p, q, k, kept.rows, qk_l2norm)
    step = 128 if p.width > 64 and p.large and p.dtype != torch.float32 else 64
    p.run(
        kernels.prepare_kernel,
        p.slots,
        warps=4 if p.dtype == torch.float32 else 2,
        q=q,
        k=k,
        g=beta if g is None else g,
        gates=keys.gates,
        q_norm=keys.q_norm,
        k_norm=keys.k_norm,
        STEP=step,
        GATE=p.gate,
        MASK=p.masked((p.width, step)),
        EXACT=p.exact,
        **shared,
    )
    return keys


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
    output_final_state: bool,
    save: bool,
    launch: Launch = launch_now,
    **target: bool,
) -> tuple[Tensor, Tensor, Kept]:
    """Return (o, final state [N, HV, K, V], what backward needs). Unasked for, the last two are not filled."""
    q, k, v, beta = (x.contiguous() for x in (q, k, v, beta))
    g = None if g is None else g.contiguous()
    p = _problem(q, v, g, cu_seqlens, launch, **target)
    make = torch.zeros if p.packed else torch.empty  # outputs of the op: slots without a chunk must not hold rubbish
    kept = Kept(
        solution=make(2 * p.slots * CHUNK, CHUNK, dtype=p.dtype, device=q.device),
        scores=make(p.slots * CHUNK if save else 0, CHUNK, dtype=p.dtype, device=q.device),
        v_new=p.new(v.shape, v.dtype) if save else v,
        rows=torch.zeros(0 if p.gate == 2 else 3 * p.slots * CHUNK, dtype=torch.float32, device=q.device),
    )
    keys = _prepare(p, q, k, g, beta, scale, qk_l2norm, kept)
    o = p.new(v.shape, v.dtype)
    shape = (p.sequence_count, p.value_heads, p.width, p.value_width) if output_final_state else (0,)
    final = p.scratch(*shape, dtype=torch.float32)
    size, warps, stages = p.forward_walk
    p.run(
        kernels.forward_kernel,
        p.sequence_count * p.value_heads * _count(p.value_width, size),
        warps=warps,
        stages=stages,
        v=v,
        beta=beta,
        solution=kept.solution,
        initial=kept.solution if initial_state is None else initial_state.contiguous(),
        o=o,
        v_new=kept.v_new,
        final=final,
        scale=scale,
        BV=size,
        HAS_INITIAL=initial_state is not None,
        SAVE=save,
        FINAL=output_final_state,
        MASK=p.masked((p.width, p.key_tile), (p.value_width, size)),
        STAGES=stages,
        **_walk_arguments(keys, p),
    )
    return o, final, kept


def _states(p: Problem, keys: Keys, v_new: Tensor, initial_state: Tensor | None) -> Tensor:
    """The states at the chunks' starts, [slots, V, K]."""
    states = p.scratch(p.slots, p.value_width, p.width)
    columns, parts = _count(p.value_width, TILE), _count(p.width, TILE)
    stages = 3 if p.large else 1
    arguments = _walk_arguments(keys, p) | {"k": keys.k_out, "BK": TILE}
    del arguments["q"], arguments["k_out"]
    p.run(
        kernels.state_kernel,
        p.sequence_count * p.value_heads * columns * parts,
        stages=stages,
        v_new=v_new,
        initial=v_new if initial_state is None else initial_state.contiguous(),
        states=states,
        BV=TILE,
        HAS_INITIAL=initial_state is not None,
        MASK=p.masked((p.width, TILE), (p.value_width, TILE)),
        STAGES=stages,
        **arguments,
    )
    return states


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Kept,
    d_o: Tensor,
    d_final: Tensor | None,
    scale: float,
    qk_l2norm: bool,
    launch: Launch = launch_now,
    **target: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """Gradients of q, k, v, g, beta and the initial state."""
    q, k, v, beta, d_o = (x.contiguous() for x in (q, k, v, beta, d_o))
    g = None if g is None else g.contiguous()
    p = _problem(q, v, g, cu_seqlens, launch, **target)
    if g is not None and p.gate == 2:
        keys = _channel_keys(p, q, k, g, scale, qk_l2norm)
    else:
        keys = _head_keys(p, q, k, kept.rows, qk_l2norm)
    du, d_states = p.scratch(*v.shape), p.scratch(p.slots, p.value_width, p.width)
    size, warps, stages = p.backward_walk
    shape = (p.sequence_count, p.value_heads, p.width, p.value_width) if initial_state is not None else (0,)
    d_initial = p.scratch(*shape, dtype=torch.float32)
    p.run(
        kernels.backward_kernel,
        p.sequence_count * p.value_heads * _count(p.value_width, size),
        warps=warps,
        stages=stages,
        d_o=d_o,
        beta=beta,
        solution=kept.solution,
        d_final=d_initial if d_final is None else d_final.contiguous(),
        du=du,
        d_states=d_states,
        d_initial=d_initial,
        scale=scale,
        BV=size,
        HAS_FINAL=d_final is not None,
        INITIAL=initial_state is not None,
        MASK=p.masked((p.width, p.key_tile), (p.value_width, size)),
        STAGES=stages,
        **_walk_arguments(keys, p),
    )
    shared = {"d_o": d_o, "du": du, "v_new": kept.v_new, "d_states": d_states, "beta": beta, "slots": p.slots}
    shared |= {"states": _states(p, keys, kept.v_new, initial_state), "v": v, "V": p.value_width}
    shared |= {"q": q, "k": k, "scale": scale, "NORMALISE": qk_l2norm}
    shared |= {"q_norm": keys.norms[0], "k_norm": keys.norms[1]}
    d_q, d_k, d_v, d_g, d_beta = _gradients(p, keys, g, beta, kept, shared)
    return (
        _key_gradient(p, d_q, q, qk_l2norm),
        _key_gradient(p, d_k, k, qk_l2norm),
        d_v,
        d_g,
        d_beta,
        None if initial_state is None else d_initial.to(initial_state.dtype),
    )


def _gradients(
    p: Problem, keys: Keys, g: Tensor | None, beta: Tensor, kept: Kept, shared: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """dq and dk (one for each value head and of the normalised q, k, unless `_fused`), dv, dg, dβ."""
    tokens = kept.v_new.shape[:3]
    fused = _fused(p)
    wide = p.dtype if fused or not (shared["NORMALISE"] or p.heads != p.value_heads) else torch.float32
    d_q, d_k = (p.new(torch.Size((*tokens, p.width)), wide) for _ in range(2))
    d_v, d_beta = p.new(kept.v_new.shape, p.dtype), p.new(beta.shape, beta.dtype)
    d_g = None if g is None else p.new(g.shape, g.dtype)
    key_tile, value_tile = p.tiles
    if p.gate == 2:
        key_tile, value_tile = 64, 64
    columns = _count(p.width, key_tile)
    parts = p.scratch(columns, 4, p.slots, CHUNK, dtype=torch.float32)
    sums = p.scratch(2 if p.gate == 2 else 5, p.slots, CHUNK, dtype=torch.float32)
    given: dict[str, Any] = {"BK": key_tile, "BV": value_tile, "parts": parts, "sums": sums, "gates": keys.gates}
    given |= {"dq": d_q, "dk": d_k, "dv": d_v, "dg": d_beta if d_g is None else d_g, "d_beta": d_beta, "GATE": p.gate}
    given |= {"MASK": p.masked((p.width, key_tile), (p.value_width, value_tile)), "FUSED": fused, "pair": kept.scores}
    given["weights"] = p.scratch(2 if p.gate == 2 else 3, p.slots, CHUNK, CHUNK)
    given |= {"summed": keys.summed, "whole": keys.gates, "EXACT": p.exact, "TILES": columns, **shared}
    if p.gate == 2:
        p.run_some(channels.channel_scores_kernel, p.slots, given, warps=8)
        p.run_some(channels.channel_gradient_kernel, p.slots * columns, given)
    else:
        p.run_some(gradients.pair_gradient_kernel, p.slots, given)
        p.run_some(gradients.key_gradient_kernel, p.slots * columns, given)
    p.run_some(gradients.gates_kernel, p.slots, given, warps=1)
    return d_q, d_k, d_v, d_g, d_beta


def _fused(p: Problem) -> bool:
    """Whether one program sees a whole chunk of a key head, and can finish its norms and gates."""
    return p.gate != 2 and p.heads == p.value_heads and p.width <= p.tiles[0]


def _key_gradient(p: Problem, grad: Tensor, x: Tensor, qk_l2norm: bool) -> Tensor:
    """Sum the value heads that share a key head; go back through the normalisation."""
    if _fused(p):
        return grad
    if p.heads != p.value_heads:
        grad = grad.view(*x.shape[:3], -1, p.width).sum(3)
    if not qk_l2norm:
        return grad.to(x.dtype)
    out = torch.empty_like(x)
    _run_rows(p, gradients.norm_backward_kernel, x=x, dy=grad, dx=out)
    return out


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor,
    scale: float,
    qk_l2norm: bool,
    launch: Launch = launch_now,
) -> Tensor:
    """Update `state` [B, HV, K, V] (contiguous fp32) in place, token by token. Returns o."""
    q, k, v, beta = (x.contiguous() for x in (q, k, v, beta))
    batch, tokens, heads, width = q.shape
    value_heads, value_width = v.shape[2:]
    o = torch.empty_like(v)
    block = 64 if batch * value_heads >= 512 else 32
    launch(
        step_kernel,
        (batch * value_heads, (value_width + block - 1) // block),
        4,
        1,
        q=q,
        k=k,
        v=v,
        g=beta if g is None else g.contiguous(),
        beta=beta,
        state=state,
        o=o,
        tokens=tokens,
        scale=scale,
        H=heads,
        HV=value_heads,
        K=width,
        V=value_width,
        BK=_power(width),
        BV=block,
        GATE=0 if g is None else g.ndim - 2,
        NORMALISE=qk_l2norm,
    )
    return o


def configurations(
    large: bool = False, amd: bool = False
) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """Kernels as shipped, bf16 (D 64 to 256) and fp32 (64, 128), for chips whose blocks have 200 KiB or not, or AMD's.

    Yields name, kernel, signature, constexprs, num_warps, num_stages.
    """
    found: dict[str, tuple[str, Any, dict[str, str], dict[str, Any], int, int]] = {}

    def record(kernel: Any, grid: tuple[int, int], num_warps: int, num_stages: int, **arguments: Any) -> None:
        signature, constexprs = _describe(kernel, arguments)
        name = f"{kernel.fn.__name__} {[*signature.values()]} {constexprs}"
        found.setdefault(name, (name, kernel, signature, constexprs, num_warps, num_stages))

    for dtype, widths in ((torch.bfloat16, (64, 128, 256)), (torch.float32, (64, 128))):
        for width in widths:
            for channel in (False, True):
                _record_calls(dtype, width, channel, record, large=large, amd=amd)
    yield from found.values()


def _record_calls(dtype: torch.dtype, width: int, channel: bool, record: Launch, **target: bool) -> None:
    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    for value_heads in (2, 4):
        q, k, v = new(1, 128, 2, width), new(1, 128, 2, width), new(1, 128, value_heads, width)
        state, beta = new(1, value_heads, width, width, dtype=torch.float32), new(1, 128, value_heads)
        g = new(1, 128, value_heads, *((width,) if channel else ()), dtype=torch.float32)
        shared: dict[str, Any] = {"launch": record, **target}
        _, _, kept = forward(q, k, v, g, beta, state, None, 1.0, True, True, True, **shared)
        backward(q, k, v, g, beta, state, None, kept, v, state, 1.0, True, **shared)
        step(q, k, v, g, beta, state, 1.0, True, launch=record)


_TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}


def _describe(kernel: Any, arguments: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """Triton's signature and constexprs for a launch with these arguments."""
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constexprs[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    return signature, constexprs
