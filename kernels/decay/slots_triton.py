"""What `gsa` and `abc` are about to launch, so that their kernels compile side by side at the first call.

Imported only when Triton is chosen.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fla_swap.kernels.decay import slot_softmax_triton, slot_writes_triton, triton_impl
from fla_swap.kernels.launching import Launch, compile_ahead, has_large_memory


def compile_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None,
    states: tuple[Tensor | None, Tensor | None, Tensor | None],
    cu_seqlens: Tensor | None,
    *,
    save: bool,
) -> None:
    """Arguments as for `slots.gsa`, with heads already repeated; g None: those of `slots.abc`. save: with gradients."""
    compile_ahead(_run, q.device, q, k, v, s, g, *states, cu_seqlens, large=has_large_memory(q.device), save=save)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None,
    keys: Tensor | None,
    values: Tensor | None,
    running: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    launch: Launch,
    large: bool,
    save: bool,
) -> None:
    options: dict[str, Any] = {"launch": launch, "large": large}
    gate = g
    if gate is None:
        weight, gate, last = slot_writes_triton.forward(s, running, None, cu_seqlens, launch)
        if save:
            slot_writes_triton.backward(weight, gate, None, cu_seqlens, weight, gate, last, launch)
    s = s.to(q.dtype)
    first = (q, k, s, None, gate, None, keys, cu_seqlens)
    scores, _, kept_first = triton_impl.forward(*first, 1.0, **options, save=save)
    p = slot_softmax_triton.forward(scores, launch)
    second = (p, s, v, gate, None, None, values, cu_seqlens)
    o, _, kept_second = triton_impl.forward(*second, 1.0, **options, save=save)
    if save:
        dp, *_ = triton_impl.backward(*second, o, None, 1.0, **options, kept=kept_second)
        dscores = slot_softmax_triton.backward(p, dp, launch)
        triton_impl.backward(*first, dscores, None, 1.0, **options, kept=kept_first)
