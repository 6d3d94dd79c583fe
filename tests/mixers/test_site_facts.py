"""Everything that a site can state, in every mixer: adapters, norms, clip, temperature, gate, no output projection."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch.nn import functional as F

from fla_swap.errors import MixerError
from fla_swap.mixers import GLA, MIXERS, Softmax, Window
from fla_swap.mixers.base import HeadNorm, read_projection
from fla_swap.mixers.channels import ChannelMixer
from fla_swap.mixers.recurrent import RecurrentMixer
from fla_swap.types import (
    ArgPath,
    AttentionSite,
    CallContract,
    Gate,
    LowRank,
    Mask,
    Norm,
    Projection,
    Rope,
    Temperature,
    WeightRef,
)

RECURRENT = [mixer for mixer in MIXERS if issubclass(mixer, RecurrentMixer)]
D, H, HK, K, V, R = 24, 4, 2, 8, 6, 3
SHAPES = {"q": (H * K, D), "k": (HK * K, D), "v": (HK * V, D), "o": (D, H * V), "gate": (H * V, D), "head_gate": (H, D)}
SHAPES |= {"up": (H * K, R), "down": (R, D), "k_memory": (HK * K, 10), "v_memory": (HK * V, 10)}


def ref(name: str) -> WeightRef:
    return WeightRef(name=name)


SITE = AttentionSite(
    fqn="attn",
    layer=0,
    q=Projection(weight=ref("q"), bias=ref("bias"), adapters=(LowRank(down=ref("down"), up=ref("up"), scale=0.7),)),
    k=Projection(weight=ref("k")),
    v=Projection(weight=ref("v")),
    o=Projection(weight=ref("o")),
    hidden_size=D,
    heads=H,
    kv_heads=HK,
    head_dim=K,
    v_head_dim=V,
    scale=0.3,
    mask=Mask(kind="causal"),
    call=CallContract(hidden=ArgPath(position=0)),
    rope=Rope(inv_freq=(1.0, 0.3, 0.02)),
    k_norm=Norm(kind="layer", eps=1e-5, weight=ref("k_norm"), bias=ref("k_norm_bias"), per_head=True),
    v_norm=Norm(kind="rms", eps=1e-6, weight=ref("v_norm"), per_head=True),
    o_norm=Norm(kind="rms", eps=1e-6, weight=ref("o_norm"), across_heads=True),
    clip=0.8,
    v_scale=0.6,
    temperature=Temperature(scale=0.5, length=4, offset=1),
    gate=Gate(projection=Projection(weight=ref("gate"))),
)


@pytest.fixture
def weights():
    torch.manual_seed(5)
    named = {name: torch.randn(size) / size[1] ** 0.5 for name, size in SHAPES.items()}
    vectors = {"bias": H * K, "k_norm": HK * K, "k_norm_bias": HK * K, "v_norm": HK * V, "o_norm": H * V}
    named |= {name: torch.randn(size) for name, size in vectors.items()}
    return {name: tensor.double() for name, tensor in named.items()}


@pytest.fixture
def hidden():
    torch.manual_seed(6)
    return torch.randn(2, 11, D, dtype=torch.float64)


def by_hand(w, x):
    """The attention that SITE states, written out."""
    q = x @ (w["q"] + 0.7 * w["up"] @ w["down"]).T + w["bias"]
    q, k, v = (y.clamp(-0.8, 0.8).unflatten(-1, (n, -1)) for y, n in ((q, H), (x @ w["k"].T, HK), (x @ w["v"].T, HK)))
    k = F.layer_norm(k, (K,), eps=1e-5) * w["k_norm"].view(HK, K) + w["k_norm_bias"].view(HK, K)
    v = v * (v.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w["v_norm"].view(HK, V) * 0.6
    positions = torch.arange(11, dtype=torch.float64)
    turn = torch.polar(torch.ones(11, 3).double(), positions[:, None] * torch.tensor([1.0, 0.3, 0.02]).double())

    def rotate(y):
        z = torch.complex(y[..., :3], y[..., 3:6]) * turn[:, None]
        return torch.cat((z.real, z.imag, y[..., 6:]), -1)

    q, k = rotate(q), rotate(k)
    q = q * (1 + 0.5 * torch.log1p(torch.floor((positions + 1) / 4)))[:, None, None]
    k, v = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * 0.3
    scores = scores.masked_fill(~torch.ones(11, 11, dtype=torch.bool).tril(), float("-inf"))
    o = torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v).flatten(2)
    o = o * (o.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w["o_norm"]
    return o * torch.sigmoid(x @ w["gate"].T)


def close(a, b, tolerance: float = 1e-6) -> None:  # rotary tables are made in fp32
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_softmax_and_a_wide_window_compute_what_the_site_states(weights, hidden):
    expected = by_hand(weights, hidden) @ weights["o"].T
    close(Softmax.from_attention(SITE, weights)(hidden)[0], expected)
    close(Window.from_attention(SITE, weights)(hidden)[0], expected)


@torch.no_grad()
def test_without_an_output_projection_the_heads_stand_side_by_side(weights, hidden):
    bare = dataclasses.replace(SITE, o=None)
    for mixer_type in (Softmax, Window):
        mixer = mixer_type.from_attention(bare, weights)
        close(mixer(hidden)[0], by_hand(weights, hidden))
        close(mixer.output_weight(), torch.eye(H * V, dtype=torch.float64))


@torch.no_grad()
@pytest.mark.parametrize("activation", ["sigmoid", "silu", "tanh", "softplus"])
def test_a_gate_for_each_head(weights, hidden, activation):
    gated = dataclasses.replace(
        SITE, gate=Gate(projection=Projection(weight=ref("head_gate")), activation=activation, per_head=True)
    )
    opened = {"sigmoid": torch.sigmoid, "silu": F.silu, "tanh": torch.tanh, "softplus": F.softplus}[activation]
    plain = Window.from_attention(dataclasses.replace(SITE, gate=None), weights).head_outputs(hidden)
    expected = plain * opened(hidden @ weights["head_gate"].T)[..., None]
    close(Window.from_attention(gated, weights).head_outputs(hidden), expected)


@torch.no_grad()
@pytest.mark.parametrize("expand_kv", [True, False])
@pytest.mark.parametrize("mixer_type", RECURRENT)
def test_recurrent_mixers_keep_the_sites_norms_and_gate(weights, hidden, mixer_type, expand_kv):
    """Normed value heads go in, and what comes out is normed over all heads, then scaled, then gated as the site's."""
    mixer = mixer_type.from_attention(SITE, weights, {"expand_kv": expand_kv, "conv_size": None})
    plain = Softmax.from_attention(SITE, weights)
    _, k, v = mixer.to_heads(*mixer.project(hidden), None, None)
    _, k0, v0 = plain.to_heads(*plain.project(hidden), None, None)
    repeats = H // HK if expand_kv else 1
    close(k, k0.repeat_interleave(repeats, 2))
    close(v, v0.repeat_interleave(repeats, 2))
    ungated = dataclasses.replace(SITE, gate=None, o_norm=None)
    raw = mixer_type.from_attention(ungated, weights, {"expand_kv": expand_kv, "conv_size": None}).head_outputs(hidden)
    scale = torch.linspace(0.5, 2, H * V).double()
    mixer.set_head_scale_(scale.view(H, V))
    o = raw.flatten(2)
    o = o * (o.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weights["o_norm"] * scale
    close(mixer.head_outputs(hidden).flatten(2), o * torch.sigmoid(hidden @ weights["gate"].T))


@torch.no_grad()
@pytest.mark.parametrize("mixer_type", [Window, *RECURRENT])
def test_a_state_carries_the_position_of_the_temperature(weights, hidden, mixer_type):
    """Without rotary embedding too: piece by piece and token by token equals the whole."""
    unrotated = dataclasses.replace(SITE, rope=None)
    mixer = mixer_type.from_attention(unrotated, weights)
    whole = mixer(hidden)[0]
    state = mixer.init_state(2, device=hidden.device, dtype=hidden.dtype)
    pieces = [mixer(piece, state=state)[0] for piece in hidden.split((5, 1, 1, 4), 1)]
    close(torch.cat(pieces, 1), whole)


@torch.no_grad()
def test_cross_attention_reads_the_memory(weights, hidden):
    names = {"k": "k_memory", "v": "v_memory"}
    site = dataclasses.replace(
        SITE, kind="cross", memory_size=10, mask=Mask(kind="bidirectional"), rope=None, temperature=None, clip=None,
        k_norm=None, v_norm=None, o_norm=None, gate=None, v_scale=1.0,
        **{n: Projection(weight=ref(p)) for n, p in names.items()},
    )  # fmt: skip
    memory, valid = torch.randn(2, 5, 10).double(), torch.ones(2, 5, dtype=torch.bool)
    valid[1, 3:] = False
    q = Softmax.from_attention(site, weights).project(hidden, memory)[0].unflatten(-1, (H, K))
    k = (memory @ weights["k_memory"].T).unflatten(-1, (HK, K)).repeat_interleave(2, 2)
    v = (memory @ weights["v_memory"].T).unflatten(-1, (HK, V)).repeat_interleave(2, 2)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * 0.3
    scores = scores.masked_fill(~valid[:, None, None], float("-inf"))
    expected = torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v).flatten(2) @ weights["o"].T
    close(Softmax.from_attention(site, weights)(hidden, memory=memory, memory_valid=valid)[0], expected)


def test_adapters_are_merged_into_the_weight(weights):
    weight, bias = read_projection(weights, SITE.q)
    close(weight, weights["q"] + 0.7 * weights["up"] @ weights["down"], 1e-12)
    assert bias is weights["bias"]
    half = {name: tensor.bfloat16() for name, tensor in weights.items()}
    assert read_projection(half, SITE.q)[0].dtype == torch.bfloat16


@torch.no_grad()
def test_a_norm_for_each_head_has_a_row_for_each():
    norm = HeadNorm(Norm(kind="rms", eps=0.0, weight=ref("w"), per_head=True), 2, 3)
    norm.load({"w": torch.tensor([1.0, 1, 1, 2, 3, 4])})
    x = torch.tensor([[[[3.0, 3, 3], [-5, 5, 5]]]])
    close(norm(x), torch.tensor([[[[1.0, 1, 1], [-2, 3, 4]]]]))


@pytest.mark.parametrize("mixer_type", MIXERS)
def test_the_facts_survive_json(mixer_type):
    config = mixer_type.config_for(SITE)
    again = mixer_type.config_class.from_options(json.loads(json.dumps(config.to_options())))
    assert again == config and again.gate == SITE.gate
    assert again.temperature == (None if issubclass(mixer_type, ChannelMixer) else SITE.temperature)


def test_an_unknown_activation_names_the_site():
    odd = dataclasses.replace(SITE, gate=Gate(projection=SITE.k, activation="cosine"))
    with pytest.raises(MixerError, match=r"attn: gla: .*'sigmoid'.* got 'cosine'"):
        GLA.config_for(odd)
