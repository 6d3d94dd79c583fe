"""What must hold for the layer of every mixer, alone; see `mixer_checks`.

Layers are those of the papers, with all parameters moved away from their neutral start.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from fla_swap.kernels.window.ops import window_attention, window_attention_lse
from fla_swap.mixers import State, TokenMixer

Kind = type[TokenMixer]
HIDDEN, HEADS = 32, 2
TIME = 70
"""More than a chunk of the operators."""
ANGLES = 1e-5
"""Rotary angles are made in fp32: the same distance between other positions."""


class NotApplicable(Exception):
    """This check says nothing about this mixer; the message says why."""


def layer(kind: Kind, dtype: torch.dtype = torch.float64, **options: Any) -> TokenMixer:
    """The paper's layer, small, the same every time."""
    torch.manual_seed(0)
    shared = {"hidden_size": HIDDEN, "num_heads": HEADS, "layer": 1, "num_layers": 3}
    mixer = kind(kind.config_class.paper(**shared, **options)).to(dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer


def tokens(time: int = TIME, rows: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, time, HIDDEN, dtype=dtype, generator=torch.Generator().manual_seed(1))


def close(a: Any, b: Any, tolerance: float = 1e-6) -> None:
    assert_close(a, b, rtol=tolerance, atol=tolerance)


def rows_of(state: State, row: int) -> State:
    return {name: tensor[row : row + 1].clone() for name, tensor in state.items()}


def with_state(kind: Kind) -> None:
    if kind.uses_kv_cache:
        raise NotApplicable("its keys and values are in the model's cache")


@contextmanager
def looped() -> Iterator[int]:
    """While open, every operator of a mixer runs as its reference, a plain loop over time; yields their number."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("fla_swap.mixers.")]
    found = [(m, n, v) for m in modules for n, v in vars(m).items() if _is_operator(v)]
    for module, name, value in found:
        loop = functools.partial(value, implementation="reference")
        setattr(module, name, windows_by_loops if value is window_attention_lse else loop)
    try:
        yield len(found)
    finally:
        for module, name, value in found:
            setattr(module, name, value)


def _is_operator(value: Any) -> bool:
    return inspect.isfunction(value) and "implementation" in inspect.signature(value).parameters


def windows_by_loops(
    q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None = None, initial_state: Any = None, **options: Any
) -> tuple[Tensor, Tensor, Any]:
    """`window_attention_lse` by the reference, which has no denominator: that follows from values of 1 beside a sink.

    With weights p = Z / (Z + exp s) of all keys together, log (Z + exp s) is s − log(1 − p), and log Z is logit p.
    """
    loop = functools.partial(window_attention, implementation="reference")
    o, state = loop(q, k, v, sinks=sinks, initial_state=initial_state, **options)
    if initial_state is not None:
        initial_state = initial_state._replace(v=torch.ones_like(initial_state.v[..., :1]))
    beside = q.new_zeros(q.shape[2]) if sinks is None else sinks
    p, _ = loop(q, k, torch.ones_like(v[..., :1]), sinks=beside, initial_state=initial_state, **options)
    lse = p.logit() if sinks is None else beside[:, None] - torch.log1p(-p)
    return o, lse[..., 0], state


def operator(kind: Kind) -> str:
    """Output, state and every gradient of the chunked operator are those of a plain loop over time."""
    with_state(kind)
    mixer, x = layer(kind), tokens().requires_grad_()
    readout = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))

    def run() -> tuple[Tensor, State, tuple[Tensor, ...]]:
        y, state = mixer(x, output_state=True)
        assert state is not None
        trained = [p for p in mixer.parameters() if p.requires_grad]
        return y, state, torch.autograd.grad((y * readout).sum(), [x, *trained])

    chunked = run()
    with looped() as operators:
        assert operators
        loop = run()
    close(chunked, loop)
    return f"{max((a - b).abs().max().item() for a, b in zip(chunked[2], loop[2], strict=True)):.0e}"


@torch.no_grad()
def chunks(kind: Kind) -> str:
    """One call, pieces and single tokens agree; the state keeps its size and its addresses."""
    with_state(kind)
    mixer, x = layer(kind), tokens()
    whole, last = mixer(x, output_state=True)
    assert last is not None
    for sizes in ((41, 29), (1, 64, 1, 1, 1, 1, 1)):
        state = mixer.init_state(2, device=x.device, dtype=x.dtype)
        places = {name: tensor.data_ptr() for name, tensor in state.items()}
        close(torch.cat([mixer(piece, state=state)[0] for piece in x.split(sizes, 1)], 1), whole)
        close(state, last)
        assert places == {name: tensor.data_ptr() for name, tensor in state.items()}
    return f"{sum(t[0].numel() * 4 for t in last.values()) / 1024:.1f} kB"


@torch.no_grad()
def padding(kind: Kind) -> str:
    """Left padding, full of garbage, changes nothing; documents that start inside a row see nothing before."""
    mixer, x = layer(kind), tokens()
    valid = torch.ones(2, TIME, dtype=torch.bool)
    valid[0, :9] = False
    padded = torch.where(valid[..., None], x, 100.0)
    y, _ = mixer(padded, valid=valid)
    close(y[:1, 9:], mixer(x[:1, 9:])[0], ANGLES)
    close(y[1:], mixer(x[1:])[0])
    starts = torch.zeros(2, TIME, dtype=torch.bool)
    starts[0, 30], starts[1, [5, 66]] = True, True
    y, _ = mixer(x, starts=starts)
    close(y[:1, 30:], mixer(x[:1, 30:])[0], ANGLES)
    close(y[1:, 5:66], mixer(x[1:, 5:66])[0], ANGLES)
    return "ok"


@torch.no_grad()
def packed(kind: Kind) -> str:
    """Documents end to end in one row are the documents apart, an empty one and rows after the last included."""
    mixer, x = layer(kind), tokens()
    line = torch.cat((x[:1, :50], x[1:, :67], x[:1, :3]), 1)
    borders = torch.tensor([0, 50, 50, 117])
    y, state = mixer(line, cu_seqlens=borders, output_state=not kind.uses_kv_cache)
    apart = [mixer(part, output_state=not kind.uses_kv_cache) for part in (x[:1, :50], x[1:, :67])]
    close(y[:, :117], torch.cat([part for part, _ in apart], 1), ANGLES)
    if state is not None:
        for row, (_, alone) in ((0, apart[0]), (2, apart[1])):
            close(rows_of(state, row), alone)
    return "ok"


def gradients(kind: Kind) -> str:
    """Of every parameter and the input, against finite differences along a random direction."""
    mixer, x = layer(kind), tokens(9).requires_grad_()
    readout = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    named = {"hidden_states": x, **{n: p for n, p in mixer.named_parameters() if p.requires_grad}}

    def loss() -> Tensor:
        return (mixer(x)[0] * readout).sum()

    found = torch.autograd.grad(loss(), list(named.values()))
    torch.manual_seed(3)
    step, worst = 1e-5, 0.0
    for (name, tensor), gradient in zip(named.items(), found, strict=True):
        direction = torch.randn_like(tensor)
        with torch.no_grad():
            tensor.add_(step * direction)
            above = loss()
            tensor.sub_(2 * step * direction)
            below = loss()
            tensor.add_(step * direction)
        expected, got = (above - below) / (2 * step), (gradient * direction).sum()
        assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        worst = max(worst, ((got - expected).abs() / (1 + expected.abs())).item())
    return f"{worst:.0e}"


def compiled(kind: Kind, backend: str = "aot_eager") -> str:
    """The layer as one graph: forward, backward, and a decode step that keeps its addresses."""
    torch._dynamo.reset()
    mixer, own = layer(kind, torch.float32), layer(kind, torch.float32)
    x = tokens(9, dtype=torch.float32)
    fast = torch.compile(own, fullgraph=True, dynamic=False, backend=backend)
    for module in (mixer, fast):
        module(x)[0].pow(2).sum().backward()
    for (name, a), b in zip(mixer.named_parameters(), own.parameters(), strict=True):
        if a.grad is not None:
            assert b.grad is not None, name
            assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-3 * max(a.grad.abs().max().item(), 1e-3), msg=name)
    if kind.uses_kv_cache:
        return backend
    with torch.no_grad():
        _, state = mixer(x, output_state=True)
        assert state is not None
        mine = {name: tensor.clone() for name, tensor in state.items()}
        places = {name: tensor.data_ptr() for name, tensor in mine.items()}
        for token in x[:, :3].split(1, 1):
            close(fast(token, state=mine)[0], mixer(token, state=state)[0], 1e-4)
        close(mine, state, 1e-4)
        assert places == {name: tensor.data_ptr() for name, tensor in mine.items()}
    return backend
