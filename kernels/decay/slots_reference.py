"""Slot attention as a plain loop over time: the oracle of `gsa` and `abc`. Works in float64."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fla_swap.kernels.decay.reference import segments


def gsa_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """`gsa` step by step, in float64 when q is float64 and in float32 otherwise. Arguments as for `slots.gsa`."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    factor = q.shape[3] ** -0.5 if scale is None else scale
    groups = q.shape[2] // k.shape[2]
    qf, kf, vf, sf, gf = (x.to(dtype) for x in (q, k, v, s, g))
    outputs, finals = [], []
    for start, stop, rows in segments(q.shape[0], q.shape[1], cu_seqlens):
        keys, values = _start(initial_state, rows, kf, vf, sf)
        for t in range(start, stop):
            decay, write = gf[:, t].exp(), sf[:, t]
            keys = keys * decay.unsqueeze(-2) + kf[:, t].unsqueeze(-1) * write.unsqueeze(-2)
            values = values * decay.unsqueeze(-1) + write.unsqueeze(-1) * vf[:, t].unsqueeze(-2)
            query = qf[:, t].unflatten(1, (-1, groups)) * factor
            outputs.append((torch.matmul(query, keys).softmax(-1) @ values).flatten(1, 2))
        finals.append((keys, values))
    o = _stack(outputs, q, v)
    if not output_final_state:
        return o, None
    return o, (torch.cat([keys for keys, _ in finals]), torch.cat([values for _, values in finals]))


def abc_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    *,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """`abc` step by step. Arguments as for `slots.abc`."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    factor = q.shape[3] ** -0.5 if scale is None else scale
    groups = q.shape[2] // k.shape[2]
    qf, kf, vf, sf = (x.to(dtype) for x in (q, k, v, s))
    outputs, finals = [], []
    for start, stop, rows in segments(q.shape[0], q.shape[1], cu_seqlens):
        keys, values = _start(None if initial_state is None else initial_state[:2], rows, kf, vf, sf)
        if initial_state is None:
            running = keys.new_full((keys.shape[0], *s.shape[2:]), -torch.inf)
        else:
            running = initial_state[2][rows].to(dtype)
        for t in range(start, stop):
            before, running = running, torch.logaddexp(running, sf[:, t])
            decay, write = (before - running).exp(), (sf[:, t] - running).exp()
            keys = keys * decay.unsqueeze(-2) + kf[:, t].unsqueeze(-1) * write.unsqueeze(-2)
            values = values * decay.unsqueeze(-1) + write.unsqueeze(-1) * vf[:, t].unsqueeze(-2)
            query = qf[:, t].unflatten(1, (-1, groups)) * factor
            outputs.append((torch.matmul(query, keys).softmax(-1) @ values).flatten(1, 2))
        finals.append((keys, values, running))
    o = _stack(outputs, q, v)
    if not output_final_state:
        return o, None
    keys, values, running = (torch.cat([final[n] for final in finals]) for n in range(3))
    return o, (keys, values, running)


def _start(state: tuple[Tensor, Tensor] | None, rows: slice, k: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The states before the first step, of the sequences `rows`."""
    if state is not None:
        return state[0][rows].to(k.dtype), state[1][rows].to(k.dtype)
    sequences, (heads, slots) = k.shape[0], s.shape[2:]
    return k.new_zeros(sequences, heads, k.shape[3], slots), k.new_zeros(sequences, heads, slots, v.shape[3])


def _stack(outputs: list[Tensor], q: Tensor, v: Tensor) -> Tensor:
    """[B,T,HQ,V] in q's dtype; zeros after the last sequence."""
    shape = (*q.shape[:3], v.shape[3])
    if not outputs:
        return q.new_zeros(shape)
    o = torch.stack(outputs, 1)
    rest = shape[1] - o.shape[1]
    return (torch.cat((o, o.new_zeros(shape[0], rest, *shape[2:])), 1) if rest else o).to(q.dtype)


def make_inputs(
    device: torch.device | str, dtype: torch.dtype, T: int, H: int, D: int, seed: int, *, gated: bool
) -> dict[str, Tensor]:
    """Random arguments (B = 2, K = V = D, half as many slots, two query heads for each of H)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    slots = max(1, D // 2)
    values = {"q": normal(2, T, 2 * H, D), "k": normal(2, T, H, D), "v": normal(2, T, H, D)}
    if gated:
        g = torch.nn.functional.logsigmoid(normal(2, T, H, slots)) / 4
        values |= {"s": -torch.expm1(g), "g": g}
        values = {name: x if name == "g" else x.to(dtype) for name, x in values.items()}
    else:
        values = {name: x.to(dtype) for name, x in values.items()} | {"s": normal(2, T, H, slots)}
    values["initial_state"] = normal(2, H, 2 * D * slots + (0 if gated else slots))
    return {name: x.to(device).requires_grad_() for name, x in values.items()}


def on_one_state(
    operator: Any, q: Tensor, k: Tensor, v: Tensor, s: Tensor, initial_state: Tensor, **options: Any
) -> Any:
    """`gsa` or `abc` with the parts of the initial state side by side in one tensor [N,H,K·M + M·V (+ M)]."""
    (width, slots), value_width = (k.shape[3], s.shape[3]), v.shape[3]
    sizes = [width * slots, slots * value_width, slots]
    parts = initial_state.split(sizes[: 2 if "g" in options else 3], -1)
    shapes = ((width, slots), (slots, value_width), (slots,))
    state = tuple(part.unflatten(-1, shape).contiguous() for part, shape in zip(parts, shapes, strict=False))
    return operator(q, k, v, s, initial_state=state, **options)


def numerics_cases() -> tuple[dict[str, Any], ...]:
    """Build `NUMERICS_CASES` late: the public functions live in `slots`, which imports this file.

    All start from a state: before the second token the slots are equal, and gradients of the scores rounding errors.
    """
    from fla_swap.kernels.decay.slots import abc, gsa

    def case(operator: Any, reference: Any, gated: bool) -> dict[str, Any]:
        def op(q: Tensor, k: Tensor, v: Tensor, s: Tensor, initial_state: Tensor, **options: Any) -> Any:
            return on_one_state(operator, q, k, v, s, initial_state, **options)

        def loop(q: Tensor, k: Tensor, v: Tensor, s: Tensor, initial_state: Tensor, **options: Any) -> Any:
            return on_one_state(reference, q, k, v, s, initial_state, **options)

        make = functools.partial(make_inputs, gated=gated)
        return {"name": operator.__name__, "op": op, "reference": loop, "make": make, "kwargs": {}, "gates": ("g", "s")}

    return case(gsa, gsa_reference, True), case(abc, abc_reference, False)


def __getattr__(name: str) -> Any:
    if name == "NUMERICS_CASES":
        return numerics_cases()
    raise AttributeError(name)
