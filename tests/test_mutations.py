"""Mutations: one thing is changed, and nothing may be claimed that is no longer true. Two tables say what is tried.

`SITES` changes one fact of a true site; the proof must fail. `CODE` changes the model's code; `inspect` must state the
changed fact, or refuse with a reason. A claim that equals the unchanged model's is a failure in both.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from models import tiny
from torch import Tensor, nn

from fla_swap import finishing, inspection
from fla_swap.errors import VerificationError
from fla_swap.types import AttentionReport, AttentionSite, Gate, Mask, Projection, Temperature, WeightRef
from fla_swap.verification import prove


@cache
def proof(family: str) -> tuple[Any, ...]:
    """(site, owner, call) of the first layer, as `inspect` proved it."""
    calls: list[tuple[Any, ...]] = []

    def recorded(*args: Any) -> Any:
        calls.append(args)
        return prove(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finishing, "prove", recorded)
        inspection.inspect(MODELS[family]() if family in MODELS else tiny(family, "eager"), *INPUTS.get(family, ()))
    return calls[0]


def replaced(name: str, **changes: Any) -> Callable[[AttentionSite], AttentionSite]:
    """Changes fields of the fact `name` (a projection, a norm, the rotary embedding)."""

    def change(site: AttentionSite) -> AttentionSite:
        fact = getattr(site, name)
        values = {n: v(getattr(fact, n)) if callable(v) else v for n, v in changes.items()}
        return dataclasses.replace(site, **{name: dataclasses.replace(fact, **values)})

    return change


def stated(**changes: Any) -> Callable[[AttentionSite], AttentionSite]:
    """Changes fields of the site itself; a function gets the old value."""
    return lambda site: dataclasses.replace(
        site, **{n: v(getattr(site, n)) if callable(v) else v for n, v in changes.items()}
    )


def swapped(name: str, first: int, second: int) -> Callable[[AttentionSite], AttentionSite]:
    """Swaps two heads in a projection (bias and all)."""

    def change(site: AttentionSite) -> AttentionSite:
        projection: Projection = getattr(site, name)
        width = site.v_head_dim if name in "vo" else site.head_dim
        count = site.heads if name in "qo" else site.kv_heads
        order = list(range(count))
        order[first], order[second] = order[second], order[first]

        def turned(ref: WeightRef | None) -> WeightRef | None:
            if ref is None:
                return None
            rows = [r for a, b in ref.rows or ((0, count * width),) for r in range(a, b)]
            rows = [rows[h * width + d] for h in order for d in range(width)]
            return dataclasses.replace(ref, rows=tuple((r, r + 1) for r in rows))

        new = dataclasses.replace(projection, weight=turned(projection.weight), bias=turned(projection.bias))
        return dataclasses.replace(site, **{name: new})

    return change


def one(values: Any, index: int, factor: float) -> Any:
    return tuple(v * factor if n == index else v for n, v in enumerate(values))


def window(by: int) -> Callable[[AttentionSite], AttentionSite]:
    return stated(mask=lambda m: Mask(kind="window", window=(m.window or 0) + by))


# name: (family, change of a true site)
SITES: dict[str, tuple[str, Callable[[AttentionSite], AttentionSite]]] = {
    "scale, one percent more": ("llama", stated(scale=lambda s: s * 1.01)),
    "scale, none (GPT-J)": ("gptj", stated(scale=1.0)),
    "two query heads swapped": ("llama", swapped("q", 0, 3)),
    "two key heads swapped": ("llama", swapped("k", 0, 1)),
    "two value heads swapped": ("llama", swapped("v", 0, 1)),
    "two rows of the output swapped": ("llama", swapped("o", 1, 2)),
    "heads read in a row where they are interleaved": (
        "gpt_neox",
        lambda s: dataclasses.replace(
            s, q=Projection(weight=WeightRef(name=s.q.weight.name, rows=((0, 64),)), bias=s.q.bias)
        ),
    ),
    "keys used as values": ("gpt2", lambda s: dataclasses.replace(s, v=s.k)),
    "keys grouped twice as wide": ("qwen2", stated(kv_heads=1)),
    "one head fewer": ("gpt2", stated(heads=2, kv_heads=2)),
    "a weight that is transposed read as it is": ("gpt2", replaced("o", weight=lambda w: WeightRef(name=w.name))),
    "query bias dropped": ("qwen2", replaced("q", bias=None)),
    "value bias dropped": ("qwen2", replaced("v", bias=None)),
    "output bias dropped": ("gpt2", replaced("o", bias=None)),
    "another layer's bias": ("gpt2", lambda s: dataclasses.replace(s, q=dataclasses.replace(s.q, bias=s.k.bias))),
    "rotary base, one percent more": (
        "llama",
        replaced("rope", inv_freq=lambda f: tuple(x * 1.01 ** (-i / len(f)) for i, x in enumerate(f))),
    ),
    "one rotary frequency": ("llama", replaced("rope", inv_freq=lambda f: one(f, 1, 1.01))),
    "rotary pairs, half for interleaved": ("gptj", replaced("rope", style="half")),
    "rotary pairs, interleaved for half": ("llama", replaced("rope", style="interleaved")),
    "rotary tables scaled": ("llama", replaced("rope", attention_scaling=1.01)),
    "rotary of half the channels": ("llama", replaced("rope", inv_freq=lambda f: f[:4])),
    "rotary of all channels where it is partial": ("gpt_neox", replaced("rope", inv_freq=lambda f: (*f, 0.1, 0.05))),
    "no rotary": ("llama", stated(rope=None)),
    "softcap, a tenth less": ("gemma2", stated(softcap=45.0)),
    "no softcap": ("gemma2", stated(softcap=None)),
    "a softcap where there is none": ("llama", stated(softcap=50.0)),
    "one ALiBi slope, one percent": ("bloom", stated(alibi=lambda a: one(a, 0, 1.01))),
    "the smallest ALiBi slope, five percent": ("bloom", stated(alibi=lambda a: one(a, 3, 1.05))),
    "two ALiBi slopes swapped": ("bloom", stated(alibi=lambda a: (a[1], a[0], *a[2:]))),
    "no ALiBi": ("bloom", stated(alibi=None)),
    "window, one more": ("mistral", window(1)),
    "window, one fewer": ("mistral", window(-1)),
    "no window": ("mistral", stated(mask=Mask(kind="causal"))),
    "chunks instead of a window": ("mistral", stated(mask=Mask(kind="chunked", window=21))),
    "a window where there is none": ("llama", stated(mask=Mask(kind="window", window=28))),
    "bidirectional": ("gpt2", stated(mask=Mask(kind="bidirectional"))),
    "norm eps": ("qwen3", replaced("q_norm", eps=1e-5)),
    "norm weight with an offset": ("qwen3", replaced("k_norm", offset=1.0)),
    "norm without its weight": ("qwen3", replaced("q_norm", weight=None)),
    "the other norm's weight": (
        "qwen3",
        lambda s: replaced("q_norm", weight=s.k_norm and s.k_norm.weight)(s),
    ),
    "layer norm for RMS norm": ("qwen3", replaced("q_norm", kind="layer")),
    "norm of each head for one across heads": ("olmo2", replaced("q_norm", across_heads=False, weight=None)),
    "one norm missing": ("qwen3", stated(k_norm=None)),
    "norm after rotary": ("qwen3", stated(norm_after_rope=True)),
    "sinks dropped": ("gpt_oss", stated(sinks=None)),
    "clamp dropped": ("olmo", stated(clip=None)),
    "clamp, a tenth more": ("olmo", stated(clip=lambda c: c * 1.1)),
    "a temperature where there is none": ("llama", stated(temperature=Temperature(scale=0.1, length=8))),
    "queries and keys exchanged": ("gpt2", lambda s: dataclasses.replace(s, q=s.k, k=s.q)),
    "queries and keys exchanged under rotation and causal mask": (
        "olmo",
        lambda s: dataclasses.replace(s, q=s.k, k=s.q),
    ),
    "values scaled": ("llama", stated(v_scale=1.001)),
    "a window on either side": ("mistral", stated(mask=lambda m: Mask(kind="local", window=m.window))),
    "one channel of one key head": (
        "llama",
        replaced("k", weight=lambda w: dataclasses.replace(w, rows=((0, 1), (0, 1), (2, 16)))),
    ),
    "gate dropped": ("gated", stated(gate=None)),
    "gate with another activation": ("gated", replaced("gate", activation="silu")),
    "gate from another projection": ("gated", lambda s: dataclasses.replace(s, gate=Gate(projection=s.q))),
}


class Plain(nn.Module):
    """Attention written out, with rotary embedding, norms and biases; `change` says what is done differently."""

    mask: Tensor

    def __init__(self, change: str = ""):
        super().__init__()
        self.change = change
        self.q, self.o = nn.Linear(32, 32), nn.Linear(32, 32)
        self.k, self.v = nn.Linear(32, 16), nn.Linear(32, 16)
        self.q_norm, self.k_norm = nn.RMSNorm(8, eps=1e-5), nn.RMSNorm(8, eps=1e-5)
        self.sinks, self.gate = nn.Parameter(torch.randn(4)), nn.Linear(32, 32)
        mask = torch.ones(64, 64, dtype=torch.bool).tril()
        if change == "one mask entry hidden":
            mask[9, 3] = False
        if change == "one mask entry of the future seen":
            mask[5, 6] = True
        if change == "the diagonal hidden":
            mask = mask.tril(-1)
            mask[:, 0] = True
        if change == "window of 7":
            mask = mask.triu(-6)
        if change == "one mask entry of one head":
            mask = mask.repeat(4, 1, 1)
            mask[2, 9, 3] = False
        self.register_buffer("mask", mask)
        if change == "key bias dropped":
            self.k.register_parameter("bias", None)
        if change == "norm eps":
            self.q_norm.eps = 1e-3

    def turned(self, x: Tensor, base: float) -> Tensor:
        angles = torch.arange(x.shape[-2])[:, None] * base ** -(torch.arange(4) / 4)
        if self.change == "positions from one":
            angles = angles + base ** -(torch.arange(4) / 4)
        cos, sin, (a, b) = angles.cos(), angles.sin(), x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def forward(self, x: Tensor) -> Tensor:
        change, base = self.change, 200.0 if self.change == "rotary base" else 100.0
        hidden = x * 1.01 if change == "the input scaled" else x
        q, k, v = self.q(hidden), self.k(hidden), self.v(hidden)
        q, k, v = (y.unflatten(-1, (-1, 8)).transpose(1, 2) for y in (q, k, v))
        q, k = q if change == "query norm dropped" else self.q_norm(q), self.k_norm(k)
        q = self.turned(q, base)
        k = self.turned(k, 100.0 if change != "rotary base" else base)
        if change == "one head rotated faster":
            q = torch.cat((q[:, :3], self.turned(self.q_norm(self.q(x)[..., 24:])[:, None], 101.0)), 1)
        if change == "rotary base of the keys alone":
            k = self.turned(self.k_norm(self.k(x).unflatten(-1, (-1, 8)).transpose(1, 2)), 101.0)
        if change == "two key heads swapped":
            k = k.flip(1)
        if change == "keys one token late":
            k = k.roll(1, 2)
        if change == "values scaled":
            v = v * 1.01
        if change == "grouped by turns":
            k, v = k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)
        else:
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = q @ k.transpose(-1, -2) * (8**-0.5 * (1.01 if change == "scale" else 1.0))
        if change == "a little of the square":
            scores = scores + 1e-3 * scores * scores
        if change == "a clamp that nothing reaches":
            scores = scores.clamp(-1e6, 1e6)
        if change != "softcap dropped":
            scores = 20.0 * torch.tanh(scores / 20.0)
        if change == "one head's scores scaled":
            scores = scores * torch.tensor([1.0, 1.0, 1.01, 1.0])[:, None, None]
        if change == "a bias on one score":
            scores = scores + torch.zeros(x.shape[1], x.shape[1]).index_put(
                (torch.tensor(9), torch.tensor(3)), torch.tensor(0.5)
            )
        seen = self.mask[..., : x.shape[1], : x.shape[1]]
        scores = scores.masked_fill(~seen, float("-inf"))
        if change == "a mask that reads values":
            scores = scores.masked_fill(scores < -5.0, float("-inf"))
        if change == "a sink":
            sinks = self.sinks[None, :, None, None].expand(*scores.shape[:3], 1)
            p = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
        else:
            p = scores.softmax(-2 if change == "softmax over the queries" else -1)
        if change == "probabilities scaled":
            p = p * 0.99
        if change == "dropout that never stops":
            p = nn.functional.dropout(p, 0.01, training=True)
        y = p @ v
        if change == "a little of each token's own value":
            y = y + 1e-3 * v
        if change == "the first token left out":
            y = y * (torch.arange(x.shape[1]) > 0)[:, None]
        if change == "heads swapped before the output":
            y = y[:, [1, 0, 2, 3]]
        y = y.transpose(1, 2).flatten(2)
        if change == "a gate":
            y = y * self.gate(x).sigmoid()
        if change == "a scale before the output":
            y = y * 1.01
        y = self.o(y)
        if change == "a scale after the output":
            y = y * 1.01
        return y + x if change == "a residual" else y


class Stack(nn.Module):
    """A layer as it is, another one, and one for each change."""

    def __init__(self, changes: Iterable[str]):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Plain(change) for change in ("", "", *changes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(nn.functional.layer_norm(x, (32,)))
        return x


X = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
MODELS: dict[str, Callable[[], nn.Module]] = {"gated": lambda: Plain("a gate")}
INPUTS: dict[str, tuple[Any, ...]] = {"gated": (X,)}


@dataclass(frozen=True)
class Says:
    """The site must state this (a function gets the site), and that."""

    facts: dict[str, Any]


@dataclass(frozen=True)
class Refuses:
    """No site: a near miss (or an error) with this in its reason; "" for a softmax that is no attention."""

    reason: str


# name of the change in `Plain`: what must come of it
CODE: dict[str, Says | Refuses] = {
    "one mask entry hidden": Refuses("the mask is neither causal"),
    "one mask entry of the future seen": Refuses("the mask is neither causal"),
    "one mask entry of one head": Refuses("the mask differs between heads"),
    "the diagonal hidden": Refuses("the mask is neither causal"),
    "a mask that reads values": Refuses("depends on the values"),
    "window of 7": Says({"mask": Mask(kind="window", window=7)}),
    "softcap dropped": Says({"softcap": None}),
    "scale": Says({"scale": 1.01 * 8**-0.5}),
    "one head's scores scaled": Refuses("multiplied by a table that is not 1 wherever they count"),
    "a bias on one score": Refuses("a bias on the scores that is not ALiBi"),
    "rotary base": Says({"rope": lambda r: r.inv_freq == pytest.approx([200 ** (-i / 4) for i in range(4)], rel=1e-4)}),
    "rotary base of the keys alone": Refuses("q and k are rotated differently"),
    "positions from one": Refuses("positions do not start at 0"),
    "query norm dropped": Says({"q_norm": None, "k_norm": lambda n: n is not None and n.eps == 1e-5}),
    "norm eps": Says({"q_norm": lambda n: n.eps == 1e-3, "k_norm": lambda n: n.eps == 1e-5}),
    "key bias dropped": Says({"k": lambda p: p.bias is None, "v": lambda p: p.bias is not None}),
    "two key heads swapped": Says(
        {"k": lambda p: p.weight.rows == ((8, 16), (0, 8)), "v": lambda p: p.weight.rows is None}
    ),
    "grouped by turns": Refuses("query heads that share a key/value head do not stand together"),
    "keys one token late": Refuses("an order of rows, heads, queries and keys that is not read"),
    "values scaled": Says({"v_scale": lambda factor: abs(factor - 1.01) < 1e-6}),
    "the input scaled": Says({"place": "graph"}),
    "probabilities scaled": Refuses(""),
    "softmax over the queries": Refuses(""),
    "heads swapped before the output": Says({"q": lambda q: q.weight.rows == ((8, 16), (0, 8), (16, 32))}),
    "a scale before the output": Refuses("between the core and the output projection"),
    "a scale after the output": Says({"place": "graph"}),
    "one head rotated faster": Refuses("cat.default of 2 tensors between the projection and the core"),
    "a little of the square": Refuses("a sum of several products"),
    "a clamp that nothing reaches": Refuses("clamp.default between the softmax and q kᵀ"),
    "dropout that never stops": Refuses("differs from the module's own output"),
    "a little of each token's own value": Refuses("between the core and the output projection"),
    "the first token left out": Refuses("multiplied by a stored or constant factor"),
    "a sink": Says({"sinks": lambda s: s is not None and s.name.endswith(".sinks")}),
    "a gate": Says({"gate": lambda g: g is not None and g.activation == "sigmoid"}),
    "a residual": Says({"call": lambda c: c.residual is not None}),
}


def facts(site: AttentionSite) -> dict[str, Any]:
    """What a site states, without what differs between any two layers: names, numbers, the proof."""
    text = repr(dataclasses.replace(site, layer=0, max_error=None, source="", anchor=""))
    return {"text": re.sub(r"layers\.\d+", "layers", text)}


@cache
def stack() -> AttentionReport:
    return inspection.inspect(Stack(CODE), X)


@pytest.mark.parametrize("name", SITES)
def test_a_changed_site_is_refused(name: str) -> None:
    family, change = SITES[name]
    site, owner, call = proof(family)
    assert prove(site, owner, call).error < 1e-5
    with pytest.raises(VerificationError):
        prove(change(site), owner, call)


@pytest.mark.parametrize("name", CODE)
def test_changed_code_is_stated_or_refused(name: str) -> None:
    wanted, fqn = CODE[name], f"layers.{2 + list(CODE).index(name)}"
    first, rest = stack().site("layers.0"), [s for s in stack().sites if s.fqn.partition("#")[0] == fqn]
    if isinstance(wanted, Refuses):
        assert not rest, f"claimed: {rest}"
        said = [m.reason for m in stack().near_misses if m.fqn == fqn]
        loose = [line for line in stack().unclaimed if line.startswith(f"{fqn} ")]
        assert len(said) + len(loose) == 1 and wanted.reason in " ".join(said)
        return
    (site,) = rest
    assert site.proved and facts(site) != facts(first)
    for field, value in wanted.facts.items():
        found = getattr(site, field)
        assert value(found) if callable(value) else found == (pytest.approx(value) if field == "scale" else value), (
            found
        )


def test_unchanged_code_gives_equal_facts() -> None:
    assert facts(stack().site("layers.0")) == facts(stack().site("layers.1"))
