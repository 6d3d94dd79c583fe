"""Triton for the gated delta rule: what each kernel gets, forward, backward and decode. Imported only when chosen.

Backward recomputes gates, w, u, the chunk-start states and v_new; forward keeps the inverses alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fla_swap.kernels.common import chunk_table, triton_interpreted
from fla_swap.kernels.delta import triton_kernels as kernels
from fla_swap.kernels.delta.torch_impl import CHUNK, chunk_count
from fla_swap.kernels.delta.triton_step import step_kernel

TILE = 64
Launch = Callable[..., None]


def launch_now(kernel: Any, grid: tuple[int, int], num_warps: int, num_stages: int, **arguments: Any) -> None:
    """Run a kernel. The large count goes to the first grid dimension, which has no 65,535 limit."""
    if not grid[0]:
        return
    device = next(x.device for x in arguments.values() if isinstance(x, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Shapes, tables and launch settings of one call.

    chunks [C, 2] int64: first row in [B·T, …] and number of rows of each slot; a sequence's slots are neighbours.
    sequences [N, 2] int64: first slot and number of slots. slots = C · HV. packed: some rows may belong to no chunk.
    """

    heads: int
    value_heads: int
    width: int
    value_width: int
    chunks: Tensor
    sequences: Tensor
    dtype: torch.dtype
    packed: bool
    launch: Launch

    @property
    def slots(self) -> int:
        return self.chunks.shape[0] * self.value_heads

    @property
    def sizes(self) -> dict[str, int]:
        return {"H": self.heads, "HV": self.value_heads, "K": self.width, "V": self.value_width}

    @property
    def precision(self) -> str:
        """Of products with an fp32 side: exact for fp32 inputs, tf32 for narrower ones."""
        if self.dtype == torch.float32:
            return "ieee"
        return "interpreted" if triton_interpreted() and self.chunks.device.type == "cpu" else "tf32"

    @property
    def step(self) -> int:
        """Inner elements of a product at a time: exact ones run without tensor cores and hold them in registers."""
        return 16 if self.dtype == torch.float32 else TILE

    def scratch(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*shape, dtype=dtype or self.dtype, device=self.chunks.device)

    def run(self, kernel: Any, programs: int, columns: int = 1, **arguments: Any) -> None:
        """Launch with one program per `programs` and tile of `columns`; one stage fits every chip's shared memory.

        Eight warps where a program holds many fp32 numbers: exact fp32 products, states of more than 128 keys.
        """
        exact = self.dtype == torch.float32 or kernel is kernels.inverse_kernel
        warps = 8 if exact or self.width > 128 else 4
        self.launch(kernel, (programs, _tiles(columns)), warps, 1, **arguments)


def _tiles(columns: int) -> int:
    return (columns + TILE - 1) // TILE


def _problem(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, launch: Launch) -> Problem:
    batch, total, heads, width = q.shape
    if cu_seqlens is None:
        chunks, sequences = _regular_tables(batch, total, q.device)
    else:
        chunks, sequences = _packed_tables(cu_seqlens, total)
    return Problem(
        heads=heads,
        value_heads=v.shape[2],
        width=width,
        value_width=v.shape[3],
        chunks=chunks,
        sequences=sequences,
        dtype=q.dtype,
        packed=cu_seqlens is not None,
        launch=launch,
    )


def _regular_tables(batch: int, total: int, device: torch.device) -> tuple[Tensor, Tensor]:
    count = chunk_count(total, None)
    start = torch.arange(count, device=device) * CHUNK
    first = start + torch.arange(batch, device=device)[:, None] * total
    rows = (total - start).clamp(max=CHUNK).expand(batch, count)
    begin = torch.arange(batch, device=device) * count
    return torch.stack((first, rows), -1).view(-1, 2), torch.stack((begin, torch.full_like(begin, count)), -1)


def _packed_tables(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    table, bounds = chunk_table(cu_seqlens, total, CHUNK).to(torch.int64), cu_seqlens.to(torch.int64)
    owner = table[:, 0].clamp(min=0)
    first = bounds[owner] + table[:, 1] * CHUNK
    rows = (bounds[owner + 1] - first).clamp(max=CHUNK)
    unused = table[:, 0] < 0
    chunks = torch.stack((first, rows), -1).masked_fill(unused[:, None], 0)
    counts = (bounds[1:] - bounds[:-1] + CHUNK - 1) // CHUNK
    return chunks, torch.stack((counts.cumsum(0) - counts, counts), -1)


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
    launch: Launch = launch_now,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (o, final state [N, HV, K, V], inverse [C · HV · 64, 64])."""
    q, k, v, beta = (x.contiguous() for x in (q, k, v, beta))
    p = _problem(q, v, cu_seqlens, launch)
    norms = _norms(p, q, k, qk_l2norm)
    gates = _gates(p, g)
    inverse = p.scratch(p.slots * CHUNK, CHUNK, dtype=torch.float32)
    if p.packed:
        inverse.zero_()  # an output of the op: slots without a chunk must not hold what was in memory
    p.run(
        kernels.inverse_kernel,
        p.slots,
        k=k,
        k_norm=norms["k_norm"],
        beta=beta,
        gates=gates,
        inverse=inverse,
        chunks=p.chunks,
        H=p.heads,
        HV=p.value_heads,
        K=p.width,
        NORMALISE=qk_l2norm,
        PRECISION=p.precision,
    )
    _, states, v_new, final = _states(p, k, norms, v, beta, gates, inverse, initial_state)
    o = torch.zeros_like(v) if p.packed else torch.empty_like(v)
    p.run(
        kernels.output_kernel,
        p.slots,
        p.value_width,
        q=q,
        k=k,
        v_new=v_new,
        states=states,
        gates=gates,
        o=o,
        chunks=p.chunks,
        scale=scale,
        STEP=p.step,
        PRECISION=p.precision,
        **norms,
        **p.sizes,
    )
    return o, final, inverse


def _norms(p: Problem, q: Tensor, k: Tensor, wanted: bool) -> dict[str, Any]:
    """1/‖q‖ and 1/‖k‖ of each row, [B, T, H] fp32, as the kernels take them (stand-ins when nothing is normalised)."""
    if not wanted:
        return {"q_norm": q, "k_norm": k, "NORMALISE": False}
    norms = p.scratch(*q.shape[:3], dtype=torch.float32), p.scratch(*k.shape[:3], dtype=torch.float32)
    for x, norm in zip((q, k), norms, strict=True):
        _run_rows(p, kernels.norm_kernel, x=x, norm=norm)
    return {"q_norm": norms[0], "k_norm": norms[1], "NORMALISE": True}


def _run_rows(p: Problem, kernel: Any, *, x: Tensor, **arguments: Tensor) -> None:
    count, rows = x.numel() // x.shape[-1], 16
    block = triton.next_power_of_2(x.shape[-1])
    programs = (count + rows - 1) // rows
    p.launch(kernel, (programs, 1), 4, 1, x=x, **arguments, count=count, K=x.shape[-1], BK=block, ROWS=rows)


def _gates(p: Problem, g: Tensor | None) -> Tensor:
    """Gates summed inside each chunk, [C, HV, 64] fp32."""
    gates = p.scratch(p.slots, CHUNK, dtype=torch.float32)
    if g is None:
        return gates.zero_()
    g = g.contiguous()
    p.run(kernels.gates_kernel, p.slots, g=g, gates=gates, chunks=p.chunks, HV=p.value_heads)
    return gates


def _states(
    p: Problem,
    k: Tensor,
    norms: dict[str, Any],
    v: Tensor,
    beta: Tensor,
    gates: Tensor,
    inverse: Tensor,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(w, chunk-start states, v_new, final states)."""
    u = p.scratch(p.slots, CHUNK, p.value_width, dtype=torch.float32)
    w = p.scratch(p.slots, CHUNK, p.width, dtype=torch.float32)
    key_norm = {"k_norm": norms["k_norm"], "NORMALISE": norms["NORMALISE"]}
    for x, out, grow in ((v, u, False), (k, w, True)):
        p.run(
            kernels.apply_kernel,
            p.slots,
            x.shape[3],
            x=x,
            beta=beta,
            gates=gates,
            inverse=inverse,
            out=out,
            chunks=p.chunks,
            HX=x.shape[2],
            HV=p.value_heads,
            D=x.shape[3],
            GROW=grow,
            PRECISION=p.precision,
            **key_norm,
        )
    programs = p.sequences.shape[0] * p.value_heads
    states = p.scratch(p.slots, p.width, p.value_width)
    final = p.scratch(p.sequences.shape[0], p.value_heads, p.width, p.value_width, dtype=torch.float32)
    v_new = p.scratch(p.slots, CHUNK, p.value_width)
    p.run(
        kernels.state_kernel,
        programs,
        p.value_width,
        w=w,
        u=u,
        k=k,
        gates=gates,
        initial=final if initial_state is None else initial_state.contiguous(),
        states=states,
        v_new=v_new,
        final=final,
        chunks=p.chunks,
        sequences=p.sequences,
        HAS_INITIAL=initial_state is not None,
        PRECISION=p.precision,
        **key_norm,
        **p.sizes,
    )
    return w, states, v_new, final


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    inverse: Tensor,
    d_o: Tensor,
    d_final: Tensor | None,
    scale: float,
    qk_l2norm: bool,
    launch: Launch = launch_now,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """Gradients of q, k, v, g, beta and the initial state."""
    q, k, v, beta, d_o = (x.contiguous() for x in (q, k, v, beta, d_o))
    p = _problem(q, v, cu_seqlens, launch)
    norms = _norms(p, q, k, qk_l2norm)
    gates = _gates(p, g)
    w, states, v_new, _ = _states(p, k, norms, v, beta, gates, inverse, initial_state)
    dv_new, d_states, d_initial = _states_backward(p, q, k, norms, w, gates, d_o, d_final, scale)

    new = torch.zeros_like if p.packed else torch.empty_like
    du, from_v, d_v = torch.empty_like(v_new), torch.empty_like(gates), new(v)
    p.run(
        kernels.apply_backward_kernel,
        p.slots,
        v=v,
        beta=beta,
        inverse=inverse,
        dv_new=dv_new,
        du=du,
        dv=d_v,
        d_factor=from_v,
        chunks=p.chunks,
        HV=p.value_heads,
        V=p.value_width,
        PRECISION=p.precision,
    )
    d_qk, d_kk = p.scratch(p.slots, CHUNK, CHUNK), p.scratch(p.slots, CHUNK, CHUNK)
    d_gates, from_pair = torch.empty_like(gates), torch.empty_like(gates)
    shared: dict[str, Any] = {"q": q, "k": k, "beta": beta, "d_o": d_o, "v_new": v_new, "du": du, "gates": gates}
    shared |= {"d_qk": d_qk, "d_kk": d_kk, "chunks": p.chunks, "scale": scale}
    shared |= {"STEP": p.step, "PRECISION": p.precision, **norms, **p.sizes}
    p.run(kernels.pair_backward_kernel, p.slots, d_gates=d_gates, d_factor=from_pair, **shared)

    tiles = _tiles(p.width)
    parts = p.scratch(tiles, 3, p.slots, CHUNK, dtype=torch.float32)
    through = p.scratch(tiles, p.slots, dtype=torch.float32)
    wide = torch.float32 if qk_l2norm or p.heads != p.value_heads else p.dtype
    dq = new(v[..., :1].expand(*v.shape[:3], p.width), dtype=wide, memory_format=torch.contiguous_format)
    dk = new(dq)
    p.run(
        kernels.qk_backward_kernel,
        p.slots,
        p.width,
        states=states,
        d_states=d_states,
        dq=dq,
        dk=dk,
        parts=parts,
        through=through,
        slots=p.slots,
        **shared,
    )
    d_beta = new(beta)
    d_g = None if g is None else new(g, memory_format=torch.contiguous_format)
    p.run(
        kernels.gates_backward_kernel,
        p.slots,
        parts=parts,
        through=through,
        d_gates=d_gates,
        from_pair=from_pair,
        from_v=from_v,
        dg=d_beta if d_g is None else d_g,
        d_beta=d_beta,
        chunks=p.chunks,
        slots=p.slots,
        HV=p.value_heads,
        TILES=tiles,
        HAS_GATE=g is not None,
    )
    return (
        _key_gradient(p, dq, q, qk_l2norm),
        _key_gradient(p, dk, k, qk_l2norm),
        d_v,
        d_g,
        d_beta,
        None if initial_state is None else d_initial.to(initial_state.dtype),
    )


def _states_backward(
    p: Problem,
    q: Tensor,
    k: Tensor,
    norms: dict[str, Any],
    w: Tensor,
    gates: Tensor,
    d_o: Tensor,
    d_final: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of v_new, of the state at each chunk's end, of the initial states)."""
    dv = p.scratch(p.slots, CHUNK, p.value_width, dtype=torch.float32)
    p.run(
        kernels.dv_kernel,
        p.slots,
        p.value_width,
        q=q,
        k=k,
        d_o=d_o,
        gates=gates,
        dv=dv,
        chunks=p.chunks,
        scale=scale,
        PRECISION=p.precision,
        **norms,
        **p.sizes,
    )
    count = p.sequences.shape[0]
    dv_new = torch.empty_like(dv)
    d_states = p.scratch(p.slots, p.width, p.value_width)
    d_initial = p.scratch(count, p.value_heads, p.width, p.value_width, dtype=torch.float32)
    p.run(
        kernels.state_backward_kernel,
        count * p.value_heads,
        p.value_width,
        q=q,
        k=k,
        w=w,
        d_o=d_o,
        gates=gates,
        d_final=d_initial if d_final is None else d_final.contiguous(),
        d_states=d_states,
        dv=dv,
        dv_new=dv_new,
        d_initial=d_initial,
        chunks=p.chunks,
        sequences=p.sequences,
        scale=scale,
        HAS_FINAL=d_final is not None,
        PRECISION=p.precision,
        **norms,
        **p.sizes,
    )
    return dv_new, d_states, d_initial


def _key_gradient(p: Problem, grad: Tensor, x: Tensor, qk_l2norm: bool) -> Tensor:
    """Sum the value heads that share a key head; go back through the normalisation."""
    if p.heads != p.value_heads:
        grad = grad.view(*x.shape[:3], -1, p.width).sum(3)
    if not qk_l2norm:
        return grad.to(x.dtype)
    out = torch.empty_like(x)
    _run_rows(p, kernels.norm_backward_kernel, x=x, dy=grad, dx=out)
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
    block = 32
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
        BK=triton.next_power_of_2(width),
        BV=block,
        HAS_GATE=g is not None,
        NORMALISE=qk_l2norm,
    )
    return o


def configurations() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """Kernels as shipped, bf16 (D 64 to 256) and fp32 (64, 128).

    Yields name, kernel, signature, constexprs, num_warps, num_stages.
    """
    found: dict[str, tuple[str, Any, dict[str, str], dict[str, Any], int, int]] = {}

    def record(kernel: Any, grid: tuple[int, int], num_warps: int, num_stages: int, **arguments: Any) -> None:
        signature, constexprs = _describe(kernel, arguments)
        name = f"{kernel.fn.__name__} {[*signature.values()]} {constexprs}"
        found.setdefault(name, (name, kernel, signature, constexprs, num_warps, num_stages))

    for dtype, widths in ((torch.bfloat16, (64, 128, 256)), (torch.float32, (64, 128))):
        for width in widths:
            _record_calls(dtype, width, record)
    yield from found.values()


def _record_calls(dtype: torch.dtype, width: int, record: Launch) -> None:
    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    q, k, v = new(1, 128, 2, width), new(1, 128, 2, width), new(1, 128, 4, width)
    state, beta = new(1, 4, width, width, dtype=torch.float32), new(1, 128, 4)
    g = new(1, 128, 4, dtype=torch.float32)
    inverse = new(2 * 4 * CHUNK, CHUNK, dtype=torch.float32)
    forward(q, k, v, g, beta, state, None, 1.0, True, launch=record)
    backward(q, k, v, g, beta, state, None, inverse, v, state, 1.0, True, launch=record)
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
