"""Triton for the gated decay recurrence, forward and backward. Imported only when Triton is chosen.

Five kernels, each used for several quantities, because keys with `g` and values with `gv` play the same part:

    cumulate      gates → their running sums inside each chunk
    carry         chunk states forward in time; backwards: the gradients of the chunk states
    pair          C×C weights inside a chunk: of the output (q, k, g) and of its gradient (do, v, gv)
    combine       weights @ rows + rows @ state: o and dq; with REVERSE: dk and dv
    gate_grad     dg and dgv from q·dq, k·dk, v·dv, do·o and the boundary states
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

from fla_swap.errors import KernelError
from fla_swap.kernels.common import chunk_bound, chunk_table, triton_interpreted
from fla_swap.kernels.decay.triton_kernels import (
    carry_kernel,
    combine_kernel,
    cumulate_kernel,
    gate_grad_kernel,
    pair_kernel,
    step_kernel,
)

CHUNK = 64
BLOCK = 64
LEVELS = 6


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

    def warps(self, heavy: bool) -> int:
        """8 where 4 would spill registers: fp32 operands, and the most gated variants."""
        return 8 if heavy or self.dot == tl.float32 else 4


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
        p.warps(gates[0] is not None and gates[1] is not None),
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
        p.warps(False),
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
        p.warps(gates[1] is not None),
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


def _refuse_bonus(u: Tensor | None) -> None:
    if u is not None:
        raise KernelError("rwkv6 has no Triton kernel yet; use implementation='torch'")


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in tensors]


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
    launch: Launch = launch_now,
) -> tuple[Tensor, Tensor]:
    """Output [B,T,H,V] in q's dtype and final state [N,H,K,V] in fp32."""
    _refuse_bonus(u)
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
    u: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    out_grad: Tensor,
    final_grad: Tensor | None,
    scale: float,
    launch: Launch = launch_now,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Gradients of q, k, v, g, gv and the initial state; those of absent gates are None. States are recomputed."""
    _refuse_bonus(u)
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
    return dq, dk, dv, dg, dgv, None, initial_grad


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    u: Tensor | None,
    state: Tensor,
    scale: float,
    launch: Launch = launch_now,
) -> Tensor:
    """T steps of the recurrence, in place on `state` [B,H,K,V] (contiguous). Returns [B,T,H,V] in q's dtype."""
    _refuse_bonus(u)
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
    """Kernels as shipped, bf16 and fp32, D 64 and 128: name, kernel, signature, constexprs, num_warps, num_stages."""
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
        forward(q, k, v, g, gv, None, state, bounds, 1.0, launch=record)
        backward(q, k, v, g, gv, None, state, bounds, o, state, 1.0, launch=record)
        step(q, k, v, g, gv, None, state[:1], 1.0, launch=record)


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
