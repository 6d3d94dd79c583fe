"""`selective_scan` in PyTorch: the CPU path, with an explicit backward.

A step's vectors are N times as long as `hgrn`'s: it goes step by step, with decays and inputs of CHUNK steps made at
once. The backward recomputes the states of a chunk from the one saved before it. Packed sequences are one line of
tokens whose state is replaced at every first token.

Legend: B batch, T time, C steps of a chunk, D channels, N states of a channel, S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fla_swap.kernels.scan.checks import CHUNK, state_dtype
from fla_swap.kernels.scan.packing import Packing, packing


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What a scan reads, in the computing dtype; `raw` and `delta` [B,T,D]: the steps before and after softplus."""

    x: Tensor
    raw: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    packed: Packing | None
    starts: Tensor | None

    def chunk(self, tensor: Tensor, start: int) -> Tensor:
        """The chunk at row `start` of [B,T,·], steps first: [C,B,·]."""
        return tensor[:, start : start + CHUNK].transpose(0, 1)

    def edges(self, marks: str, start: int, t: int) -> tuple[Tensor, Tensor] | None:
        """Whether row start + t is a `first` or `last` token, and of which sequence; None when nothing is packed."""
        if self.packed is None:
            return None
        return getattr(self.packed, marks)[start + t], self.packed.number[start + t]

    def states(self, start: int, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(decays, decayed earlier states, states) [C,B,D,N] of a chunk; `before` [B,D,N]: the state before it."""
        delta = self.chunk(self.delta, start)
        decay = (delta.unsqueeze(-1) * self.A).exp_()
        states = (delta * self.chunk(self.x, start)).unsqueeze(-1) * self.chunk(self.B, start).unsqueeze(2)
        kept = torch.empty_like(decay)
        for t in range(decay.shape[0]):
            edge = self.edges("first", start, t)
            if edge is not None and self.starts is not None:
                before = torch.where(edge[0], self.starts[edge[1]], before)
            torch.mul(decay[t], before, out=kept[t])
            before = states[t].add_(kept[t])
        return decay, kept, states

    def mask(self, tensor: Tensor) -> Tensor:
        """[B,T,·] with zeros at padding."""
        return tensor if self.packed is None else torch.where(self.packed.inside[:, None], tensor, 0)

    def read(self, states: Tensor, start: int) -> Tensor:
        """Σ_n C_n h_n of a chunk's states: [B,C,D]."""
        return torch.matmul(states, self.chunk(self.C, start).unsqueeze(-1)).squeeze(-1).transpose(0, 1)


def _prepare(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
) -> Scan:
    dtype, packed = state_dtype(x), packing(cu_seqlens, x.shape[1])
    raw = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    starts = None if packed is None else _per_sequence(packed, initial_state, A, dtype)
    return Scan(
        x=x.to(dtype),
        raw=raw,
        delta=F.softplus(raw) if dt_softplus else raw,
        A=A.to(dtype),
        B=B.to(dtype),
        C=C.to(dtype),
        packed=packed,
        starts=starts,
    )


def _per_sequence(packed: Packing, states: Tensor | None, A: Tensor, dtype: torch.dtype) -> Tensor:
    """[S + 1,D,N]: a state for every packed sequence, zero where none is given, and one of zeros for the padding."""
    found = torch.zeros(packed.filled.shape[0] + 1, *A.shape, dtype=dtype, device=A.device)
    if states is not None:
        found[:-1] = states
    return found


def _whole(scan: Scan, state: Tensor | None) -> Tensor:
    """The state at an end of the line, [B,D,N]; zeros where sequences bring their own."""
    if state is None or scan.packed is not None:
        return scan.x.new_zeros(scan.x.shape[0], *scan.A.shape)
    return state.to(scan.x.dtype)


def selective_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B,T,D] in x's dtype, final state [S,D,N], and the states [B,M,N,D] before every CHUNK-th row, flat."""
    scan = _prepare(x, dt, A, B, C, dt_bias, initial_state, cu_seqlens, dt_softplus)
    state = _whole(scan, initial_state)
    finals = None if scan.starts is None else scan.starts.clone()
    y, saved = torch.empty_like(scan.x, memory_format=torch.contiguous_format), []
    for start in range(0, x.shape[1], CHUNK):
        saved.append(state)
        _, _, states = scan.states(start, state)
        y[:, start : start + CHUNK] = scan.read(states, start)
        if finals is not None:
            for t in range(states.shape[0]):
                edge = scan.edges("last", start, t)
                if edge is not None:
                    finals[edge[1]] = torch.where(edge[0], states[t, 0], finals[edge[1]])
        state = states[-1].clone()
    if D is not None:
        y.addcmul_(scan.x, D.to(y.dtype))
    if z is not None:
        y *= F.silu(z.to(y.dtype))
    final = state if finals is None else finals[:-1].clone()
    kept = torch.stack(saved, 1).mT.to(x.dtype).flatten() if keep else x.new_empty(0)
    return scan.mask(y).to(x.dtype), final, kept


def selective_backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    out_grad: Tensor,
    final_grad: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and the initial state; None where the input is."""
    scan = _prepare(x, dt, A, B, C, dt_bias, initial_state, cu_seqlens, dt_softplus)
    grad = scan.mask(out_grad.to(scan.x.dtype))
    gate = None if z is None else z.to(grad.dtype)
    y_grad = grad if gate is None else grad * F.silu(gate)
    walk = _Walk(scan, y_grad, final_grad)
    saved = saved.view(x.shape[0], -1, A.shape[1], A.shape[0])
    for start in reversed(range(0, x.shape[1], CHUNK)):
        walk.step_back(start, saved[:, start // CHUNK].mT.to(grad.dtype))
    delta_grad = walk.delta_grad.addcmul_(walk.u_grad, scan.x)
    x_grad = walk.u_grad * scan.delta
    D_grad = z_grad = bias_grad = None
    if D is not None:
        x_grad.addcmul_(y_grad, D.to(grad.dtype))
        D_grad = (y_grad * scan.x).sum((0, 1))
    if gate is not None:
        y = walk.y if D is None else walk.y.addcmul_(scan.x, D.to(grad.dtype))
        opened = gate.sigmoid()
        z_grad = scan.mask(grad * y * opened * (1 + gate * (1 - opened)))
    if dt_softplus:
        delta_grad *= scan.raw.sigmoid()
    x_grad, delta_grad, B_grad, C_grad = (scan.mask(g) for g in (x_grad, delta_grad, walk.B_grad, walk.C_grad))
    if dt_bias is not None:
        bias_grad = delta_grad.sum((0, 1))
    return x_grad, delta_grad, walk.A_grad, B_grad, C_grad, D_grad, z_grad, bias_grad, walk.initial_grad()


class _Walk:
    """The backward through time, chunk by chunk from the end."""

    def __init__(self, scan: Scan, y_grad: Tensor, final_grad: Tensor | None):
        self.scan, self.y_grad = scan, y_grad
        self.carry = _whole(scan, final_grad)
        packed = scan.packed
        self.finals = None if packed is None else _per_sequence(packed, final_grad, scan.A, scan.x.dtype)
        self.initials = None if self.finals is None else self.finals.clone()
        self.y, self.u_grad, self.delta_grad = (torch.empty_like(scan.x) for _ in range(3))
        self.A_grad, self.B_grad, self.C_grad = (torch.zeros_like(tensor) for tensor in (scan.A, scan.B, scan.C))

    def step_back(self, start: int, before: Tensor) -> None:
        """One chunk, from the state `before` it [B,D,N]. `u` is δ·x, what B writes into the states."""
        scan, rows = self.scan, slice(start, start + CHUNK)
        decay, kept, states = scan.states(start, before)
        dy, reads, writes = (scan.chunk(tensor, start) for tensor in (self.y_grad, scan.C, scan.B))
        self.y[:, rows] = scan.read(states, start)
        self.C_grad[:, rows] = torch.matmul(dy.unsqueeze(2), states).squeeze(2).transpose(0, 1)
        grads = torch.mul(dy.unsqueeze(-1), reads.unsqueeze(2), out=states)
        for t in reversed(range(decay.shape[0])):
            self._enter(start, t)
            grads[t] += self.carry
            self.carry = decay[t].mul_(grads[t])
            self._leave(start, t)
        self.carry = self.carry.clone()
        delta = scan.chunk(scan.delta, start)
        u = delta * scan.chunk(scan.x, start)
        self.u_grad[:, rows] = torch.matmul(grads, writes.unsqueeze(-1)).squeeze(-1).transpose(0, 1)
        self.B_grad[:, rows] = torch.matmul(u.unsqueeze(2), grads).squeeze(2).transpose(0, 1)
        rate_grad = kept.mul_(grads)
        self.delta_grad[:, rows] = (rate_grad * scan.A).sum(-1).transpose(0, 1)
        self.A_grad += torch.einsum("tbdn,tbd->dn", rate_grad, delta)

    def _enter(self, start: int, t: int) -> None:
        """At the last token of a sequence, the gradient of its final state takes the place of what comes later."""
        edge = self.scan.edges("last", start, t)
        if edge is not None and self.finals is not None:
            self.carry = torch.where(edge[0], self.finals[edge[1]], self.carry)

    def _leave(self, start: int, t: int) -> None:
        edge = self.scan.edges("first", start, t)
        if edge is not None and self.initials is not None:
            self.initials[edge[1]] = torch.where(edge[0], self.carry[0], self.initials[edge[1]])

    def initial_grad(self) -> Tensor:
        return self.carry if self.initials is None else self.initials[:-1].clone()


def selective_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    dt_softplus: bool,
) -> Tensor:
    """T steps, in place on `state` [B,D,N]. Returns [B,T,D] in x's dtype."""
    y, final, _ = selective_forward(x, dt, A, B, C, D, z, dt_bias, state, None, dt_softplus, False)
    state.copy_(final)
    return y
