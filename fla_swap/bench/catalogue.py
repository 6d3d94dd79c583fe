"""Every sequence operator with inputs to measure it on, the work it has to do, and the peer's call for the same.

`CASES` is the one list that the benchmark of operators, the compile tests and the sanitizer run go through.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize, softplus

from fla_swap.bench.work import delta_products, feature_products, scan_exponentials, slot_products, state_products
from fla_swap.bench.work import window_products as window_work

NARROW = 16
"""Width of q and k in front of a quadratic feature map, and states per channel of a selective scan, as published."""
SLOTS = 64
WINDOW = 512


@dataclass(frozen=True, kw_only=True)
class Shape:
    """B sequences of T tokens, H heads of width D."""

    batch: int = 8
    time: int = 2048
    heads: int = 32
    width: int = 128

    @property
    def label(self) -> str:
        return f"B{self.batch} T{self.time} H{self.heads} D{self.width}"


class Source:
    """Random tensors of one shape: drawn in fp32 from one seed on the device, leaves that require a gradient."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype, seed: int = 0):
        self.shape, self.device, self.dtype = shape, device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *size: int) -> Tensor:
        return torch.randn(*size, device=self.device, generator=self.generator)

    def heads(self, width: int | None = None) -> Tensor:
        s = self.shape
        return self.normal(s.batch, s.time, s.heads, s.width if width is None else width)

    def gate(self, *last: int) -> Tensor:
        """Natural logs of decays, about −.2 a step in the middle."""
        s = self.shape
        return logsigmoid(self.normal(s.batch, s.time, s.heads, *last) + 1.5)

    def leaf(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return x.to(dtype or self.dtype).requires_grad_()


def _qkv(source: Source, narrow: bool = False, unit: bool = False) -> dict[str, Tensor]:
    width = min(NARROW, source.shape.width) if narrow else None
    q, k, v = source.heads(width), source.heads(width), source.heads()
    if unit:
        q, k = normalize(q, dim=-1), normalize(k, dim=-1)
    return {"q": source.leaf(q), "k": source.leaf(k), "v": source.leaf(v)}


def _plain(source: Source) -> dict[str, Tensor]:
    return _qkv(source)


def _narrow(source: Source) -> dict[str, Tensor]:
    return _qkv(source, narrow=True)


def _head_gate(source: Source) -> dict[str, Tensor]:
    return {**_qkv(source), "g": source.leaf(source.gate(), torch.float32)}


def _channel_gate(source: Source) -> dict[str, Tensor]:
    return {**_qkv(source), "g": source.leaf(source.gate(source.shape.width))}


def _bonus(source: Source) -> dict[str, Tensor]:
    s = source.shape
    return {**_channel_gate(source), "u": source.leaf(source.normal(s.heads, s.width))}


def _slots(source: Source) -> dict[str, Tensor]:
    return {**_qkv(source), "s": source.leaf(source.heads(min(SLOTS, source.shape.width)))}


def _gated_slots(source: Source) -> dict[str, Tensor]:
    return {**_slots(source), "g": source.leaf(source.gate(min(SLOTS, source.shape.width)))}


def _beta(source: Source) -> Tensor:
    s = source.shape
    return source.leaf(source.normal(s.batch, s.time, s.heads).sigmoid())


def _delta(source: Source) -> dict[str, Tensor]:
    return {**_qkv(source, unit=True), "beta": _beta(source)}


def _gated_delta(source: Source) -> dict[str, Tensor]:
    gate = source.leaf(source.gate(), torch.float32)
    return {**_qkv(source, unit=True), "g": gate, "beta": _beta(source)}


def _channel_delta(source: Source) -> dict[str, Tensor]:
    return {**_qkv(source, unit=True), "g": source.leaf(source.gate(source.shape.width)), "beta": _beta(source)}


def _channels(source: Source) -> dict[str, Tensor]:
    x, g = source.heads().flatten(2), source.gate(source.shape.width).flatten(2)
    return {"x": source.leaf(x), "g": source.leaf(g)}


def _scan(source: Source) -> dict[str, Tensor]:
    s, n = source.shape, min(NARROW, source.shape.width)
    channels = s.heads * s.width
    return {
        "x": source.leaf(source.heads().flatten(2)),
        "dt": source.leaf(softplus(source.heads().flatten(2) - 4)),
        "A": source.leaf(-torch.arange(1, n + 1, device=source.device).float().repeat(channels, 1), torch.float32),
        "B": source.leaf(source.normal(s.batch, s.time, n)),
        "C": source.leaf(source.normal(s.batch, s.time, n)),
        "D": source.leaf(torch.ones(channels, device=source.device), torch.float32),
    }


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another implementation of the same function. `adapt` turns our arguments into its call."""

    name: str
    module: str
    function: str
    adapt: Callable[[Callable[..., Any], Mapping[str, Tensor]], Any] | None = None

    def load(self) -> Callable[[Mapping[str, Tensor]], Tensor]:
        """Import it (only now) and return a function from our arguments to its output."""
        function = getattr(importlib.import_module(self.module), self.function)

        def call(inputs: Mapping[str, Tensor]) -> Tensor:
            result = function(**inputs) if self.adapt is None else self.adapt(function, inputs)
            return result[0] if isinstance(result, tuple) else result

        return call


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operator of `fla_swap.ops`.

    `make`: a `Source` → its tensor arguments. `options`: its other arguments. `products`, `exponentials`: operations of
    one forward pass (see `work`). `per_batch`: arguments that all heads share, `(B, T, …)`: cut by sequence only.
    """

    name: str
    make: Callable[[Source], dict[str, Tensor]]
    options: Mapping[str, Any] = field(default_factory=dict)
    products: Callable[[Shape], float] = state_products
    exponentials: Callable[[Shape], float] = lambda shape: 0.0
    backward: float = 2.0
    per_batch: tuple[str, ...] = ()
    peers: tuple[Peer, ...] = ()

    def inputs(self, shape: Shape, device: str, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        with torch.no_grad():
            made = self.make(Source(shape, device, dtype, seed))
        return {name: x.detach().requires_grad_() for name, x in made.items()}

    def load(self) -> Callable[..., Any] | None:
        """The operator, or None while `fla_swap.ops` has none of that name."""
        return getattr(importlib.import_module("fla_swap.ops"), self.name, None)

    def step(self) -> Callable[..., Any] | None:
        return getattr(importlib.import_module("fla_swap.ops"), f"{self.name}_step", None)


def _rwkv6(function: Callable[..., Any], x: Mapping[str, Tensor]) -> Any:
    return function(x["q"], x["k"], x["v"], x["g"], x["u"])


def _unnormalised(function: Callable[..., Any], x: Mapping[str, Tensor]) -> Any:
    return function(**x, normalize=False)


def _sdpa(function: Callable[..., Any], x: Mapping[str, Tensor]) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    on_gpu = x["q"].is_cuda
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION if on_gpu else SDPBackend.MATH):
        o = function(*(x[n].transpose(1, 2) for n in "qkv"), is_causal=True)
    return o.transpose(1, 2)


_FLEX: dict[Any, Any] = {}


def _flex(function: Callable[..., Any], x: Mapping[str, Tensor]) -> Tensor:
    """FlexAttention, compiled, with a causal window as its block mask (made once, outside what is timed)."""
    from torch.nn.attention.flex_attention import create_block_mask

    q = x["q"]
    key = (q.shape[1], str(q.device))
    if key not in _FLEX:

        def window(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & (i - j < WINDOW)

        _FLEX[key] = create_block_mask(window, None, None, q.shape[1], q.shape[1], device=str(q.device))
    if "compiled" not in _FLEX:
        _FLEX["compiled"] = torch.compile(function)
    o = _FLEX["compiled"](*(x[n].transpose(1, 2) for n in "qkv"), block_mask=_FLEX[key])
    return o.transpose(1, 2)


def _fla(module: str, function: str, adapt: Callable[..., Any] | None = None) -> tuple[Peer, ...]:
    return (Peer(name="fla", module=f"fla.ops.{module}", function=function, adapt=adapt),)


SOFTMAX = Peer(name="sdpa", module="torch.nn.functional", function="scaled_dot_product_attention", adapt=_sdpa)
FLEX = Peer(name="flex", module="torch.nn.attention.flex_attention", function="flex_attention", adapt=_flex)

CASES = (
    Case(name="linear_attention", make=_plain, peers=_fla("linear_attn", "chunk_linear_attn", _unnormalised)),
    Case(name="retention", make=_plain, peers=(*_fla("retention", "chunk_retention"), SOFTMAX)),
    Case(name="simple_gla", make=_head_gate, peers=_fla("simple_gla", "chunk_simple_gla")),
    Case(name="gla", make=_channel_gate, peers=_fla("gla", "chunk_gla")),
    Case(name="rwkv6", make=_bonus, peers=_fla("rwkv6", "chunk_rwkv6", _rwkv6)),
    Case(name="gsa", make=_gated_slots, products=slot_products, peers=_fla("gsa", "chunk_gsa")),
    Case(name="abc", make=_slots, products=slot_products, peers=_fla("abc", "chunk_abc")),
    Case(name="hgrn", make=_channels, products=lambda shape: 0.0, peers=_fla("hgrn", "fused_recurrent_hgrn")),
    Case(
        name="selective_scan",
        make=_scan,
        products=lambda shape: 0.0,
        exponentials=scan_exponentials,
        per_batch=("B", "C"),
    ),
    Case(name="based", make=_narrow, products=feature_products, peers=_fla("based", "parallel_based")),
    Case(name="rebased", make=_narrow, products=feature_products, peers=_fla("rebased", "parallel_rebased")),
    Case(name="delta_rule", make=_delta, products=delta_products, peers=_fla("delta_rule", "chunk_delta_rule")),
    Case(
        name="gated_delta_rule",
        make=_gated_delta,
        products=delta_products,
        peers=_fla("gated_delta_rule", "chunk_gated_delta_rule"),
    ),
    Case(name="kda", make=_channel_delta, products=delta_products, peers=_fla("kda", "chunk_kda")),
    Case(
        name="window_attention",
        make=_plain,
        options={"window": WINDOW},
        products=lambda shape: window_work(shape, WINDOW),
        backward=2.5,
        peers=(FLEX, SOFTMAX),
    ),
)


def by_name() -> dict[str, Case]:
    """All cases; a duplicate name raises."""
    found: dict[str, Case] = {}
    for case in CASES:
        if case.name in found:
            raise ValueError(f"two cases are called {case.name!r}")
        found[case.name] = case
    return found
