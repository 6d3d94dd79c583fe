"""The layers of the papers, `paper(…)`, against their formulas written as plain loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from fla_swap.errors import MixerError
from fla_swap.kernels.feature.maps import hedgehog_features
from fla_swap.mixers import (
    ABC,
    GLA,
    GSA,
    HGRN2,
    RWKV6,
    ABCConfig,
    Based,
    BasedConfig,
    GLAConfig,
    GSAConfig,
    Hedgehog,
    HedgehogConfig,
    HGRN2Config,
    Lightning,
    LightningConfig,
    Mamba2,
    Mamba2Config,
    Rebased,
    RebasedConfig,
    RetNet,
    RetNetConfig,
    RWKV6Config,
)

B, T, D, H = 2, 9, 12, 3


def same(a, b, tolerance=1e-8):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def randomised(mixer):
    """All parameters random, and an input."""
    torch.manual_seed(3)
    mixer = mixer.double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return mixer, torch.randn(B, T, D, dtype=torch.float64)


def heads(*projected):
    return [y.unflatten(-1, (H, -1)) for y in projected]


def recurrence(q, k, v, decay):
    """S = decay · S + k vᵀ, o = Sᵀ q; decay [B, T, H, K] or [B, T, H, K, V] or broadcastable."""
    state, rows = torch.zeros(B, H, k.shape[-1], v.shape[-1], dtype=torch.float64), []
    for t in range(T):
        state = decay[:, t] * state + k[:, t, :, :, None] * v[:, t, :, None]
        rows.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(rows, 1)


def rms(y, eps=1e-5):
    return y / (y.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def convolved(x, weight, bias):
    padded = F.pad(x.mT, (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight[:, None], bias, groups=weight.shape[0])).mT


@torch.no_grad()
def test_retnet():
    """Rotary q and k, γ = 1 − 2^(−5−h), values twice as wide, group norm, swish gate."""
    mixer, x = randomised(RetNet(RetNetConfig.paper(hidden_size=D, num_heads=H)))
    assert mixer.v_head_dim == 2 * D // H and not mixer.log_rate.requires_grad
    q, k, v = heads(mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x))
    steps = torch.arange(T).double()
    turn = torch.polar(torch.ones(T, 2).double(), steps[:, None] * torch.tensor([1.0, 0.01]).double())[:, None]
    q, k = (torch.view_as_real(torch.complex(y[..., :2], y[..., 2:]) * turn).mT.flatten(-2) for y in (q, k))
    gamma = 1 - 2.0 ** (-5 - torch.arange(H).double())
    o = recurrence(q, k, v, gamma.view(1, 1, H, 1, 1).expand(B, T, -1, -1, -1)) / 2
    o = F.layer_norm(o, (8,), eps=1e-5) * mixer.head_scale
    o = o.flatten(2) * F.silu(mixer.gate.up(x))
    same(mixer(x)[0], mixer.o_proj(o), 1e-5)  # decays and angles are made in fp32


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 2])
def test_lightning(layer):
    """Decays of ALiBi's slopes, slower in later layers; swish on q and k; a norm over all heads."""
    mixer, x = randomised(Lightning(LightningConfig.paper(hidden_size=D, num_heads=H, layer=layer, num_layers=4)))
    q, k, v = heads(F.silu(mixer.q_proj(x)), F.silu(mixer.k_proj(x)), mixer.v_proj(x))
    slopes = 2 ** (-8 / H * (torch.arange(H).double() + 1)) * (1 - layer / 3 + 1e-5)
    o = recurrence(q, k, v, torch.exp(-slopes).view(1, 1, H, 1, 1).expand(B, T, -1, -1, -1))
    o = rms(o.flatten(2)) * mixer.head_scale.flatten() * 2 * mixer.gate.up(x).sigmoid()
    same(mixer(x)[0], mixer.o_proj(o), 1e-5)


@torch.no_grad()
def test_gla_with_gates_on_both_sides():
    mixer, x = randomised(GLA(GLAConfig.paper(hidden_size=D, num_heads=H, value_decay=True, clamp_min=-0.05)))
    q, k, v = heads(mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x))
    g, gv = (
        heads((F.logsigmoid(up(down(x))) / 16).clamp(min=-0.05))[0]
        for up, down in ((mixer.gk_up, mixer.gk_down), (mixer.gv_up, mixer.gv_down))
    )
    o = recurrence(q, k, v, (g[..., None] + gv[..., None, :]).exp()) * mixer.head_dim**-0.5
    o = (rms(o) * mixer.head_scale).flatten(2) * F.silu(mixer.gate.up(x))
    same(mixer(x)[0], mixer.o_proj(o))


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 3])
def test_hgrn2(layer):
    """Keys are what is forgotten, and no less than the layer's bound is kept."""
    mixer, x = randomised(HGRN2(HGRN2Config.paper(hidden_size=D, num_heads=H, layer=layer, num_layers=4)))
    q, z, v = heads(F.silu(mixer.q_proj(x)), mixer.k_proj(x), mixer.v_proj(x))
    bound = mixer.bound_logit.sigmoid().view(H, -1) if layer else 0.0
    f = bound + (1 - bound) * z.sigmoid()
    o = rms(recurrence(q, 1 - f, v, f[..., None]).flatten(2)) * mixer.head_scale.flatten()
    same(mixer(x)[0], mixer.o_proj(o))


@torch.no_grad()
def test_mamba2():
    """The state space written out: h = exp(Δ A) h + Δ B x, y = C h + D x, then the gate, then the norm."""
    mixer, x = randomised(Mamba2(Mamba2Config.paper(hidden_size=D, num_heads=H, head_dim=5)))
    assert mixer.v_head_dim == 2 * D // H and mixer.k_proj.out_features == 5
    line = torch.cat((mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)), -1)
    c, b, u = convolved(line, mixer.conv.weight, mixer.conv.bias).split((5, 5, 24), -1)
    u = u.unflatten(-1, (H, -1))
    dt = F.softplus(mixer.dt_proj(x) + mixer.dt_bias)
    y, state = torch.zeros(B, T, H, 8, dtype=torch.float64), torch.zeros(B, H, 8, 5, dtype=torch.float64)
    for t in range(T):
        state = state * torch.exp(-dt[:, t] * mixer.A_log.exp())[..., None, None]
        state = state + dt[:, t, :, None, None] * u[:, t, :, :, None] * b[:, t, None, None, :]
        y[:, t] = (state * c[:, t, None, None, :]).sum(-1) + mixer.D[:, None] * u[:, t]
    y = rms(y.flatten(2) * F.silu(mixer.gate.up(x))) * mixer.head_scale.flatten()
    same(mixer(x)[0], mixer.o_proj(y))


@torch.no_grad()
def test_rwkv6():
    """Five mixes with the token before, a decay that depends on the token, the bonus, group norm with a bias."""
    mixer, x = randomised(RWKV6(RWKV6Config.paper(hidden_size=D, num_heads=H, mix_rank=2, decay_rank=3)))
    change = F.pad(x, (0, 0, 1, -1)) - x
    ranks = torch.tanh((x + change * mixer.mix_first) @ mixer.mix_down.weight.T).unflatten(-1, (5, 2))
    mixed = [x + change * (mixer.mix[i] + ranks[:, :, i] @ mixer.mix_up[i]) for i in range(5)]
    q, k, v = heads(mixer.q_proj(mixed[0]), mixer.k_proj(mixed[1]), mixer.v_proj(mixed[2]))
    w = heads(mixer.decay_up(torch.tanh(mixer.decay_down(mixed[3]))))[0]
    state, rows = torch.zeros(B, H, 4, 4, dtype=torch.float64), []
    for t in range(T):
        now = k[:, t, :, :, None] * v[:, t, :, None]
        rows.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state + mixer.bonus[..., None] * now))
        state = torch.exp(-w[:, t].exp())[..., None] * state + now
    o = F.layer_norm(torch.stack(rows, 1), (4,), eps=64e-5) * mixer.head_scale + mixer.head_bias
    same(mixer(x)[0], mixer.o_proj(o.flatten(2) * F.silu(mixer.gate.up(mixed[4]))))


def test_where_rwkv6_starts():
    """The first layer mixes most in its first channels and forgets fastest in its last ones; later layers less so."""
    first, last = (RWKV6(RWKV6Config.paper(hidden_size=64, num_heads=4, layer=layer, num_layers=6)) for layer in (0, 5))
    for mixer in (first, last):
        assert mixer.mix[1, 0] == 1 and mixer.mix[1, -1] < mixer.mix[1, 20]
        assert mixer.decay_up.bias[0] == -6 and -1.01 < mixer.decay_up.bias[-1] <= -1
        assert mixer.decay_up.weight.eq(0).all() and mixer.mix_down.weight.eq(0).all()
    assert torch.allclose(first.bonus.flatten()[:3], torch.tensor([0.0, 0.1, -0.1]))
    assert torch.allclose(last.bonus.flatten()[:1], torch.tensor([1.0])) and first.mix[1, 20] > last.mix[1, 20]


def test_where_the_papers_layers_start():
    mamba = Mamba2(Mamba2Config.paper(hidden_size=64, num_heads=32))
    dt, rate = F.softplus(mamba.dt_bias), mamba.A_log.exp()
    assert 0.001 <= dt.min() < 0.01 < dt.max() <= 0.1 and 1 <= rate.min() < 4 < 12 < rate.max() <= 16
    assert mamba.D.eq(1).all()
    for layer, bound in enumerate((0.0, 0.25, 0.5, 0.75)):
        gate = HGRN2(HGRN2Config.paper(hidden_size=D, num_heads=H, layer=layer, num_layers=4))
        assert gate.decay(torch.zeros(1, 1, D)).exp().min() >= bound
        assert gate.bound_logit is None or gate.bound_logit.sigmoid().sub(bound).abs().max() < 1e-6


def test_options_that_do_not_fit():
    for words, build in {
        "init_decay": lambda: RetNet(RetNetConfig(hidden_size=D, num_heads=H, init_decay="slow")),
        r"3 heads .* 2 groups \(num_groups\)": lambda: Mamba2(Mamba2Config(hidden_size=D, num_heads=H, num_groups=2)),
        "lower_bound": lambda: HGRN2(HGRN2Config(hidden_size=D, num_heads=H, lower_bound=1.0)),
        "norm_kind": lambda: GLA(GLAConfig(hidden_size=D, num_heads=H, norm_kind="batch")),
        "2 groups for a norm": lambda: GLA(GLAConfig(hidden_size=D, num_heads=H, norm_groups=2)),
    }.items():
        with pytest.raises(MixerError, match=words):
            build()
    with pytest.raises(MixerError, match="tied keys"):
        HGRN2(HGRN2Config.paper(hidden_size=D, num_heads=H)).set_half_life_(torch.full((H,), 9.0))


@torch.no_grad()
def test_a_half_life_below_the_bound_becomes_the_shortest_possible():
    gate = HGRN2(HGRN2Config(hidden_size=D, num_heads=1, lower_bound=0.5))
    gate.set_half_life_(torch.tensor([0.5]))
    assert math.isclose(gate.decay(torch.zeros(1, 1, D)).exp().mean(), 0.5, abs_tol=1e-3)


def test_gsa_is_the_papers_layer():
    """Swish on q, k, v and on the output, g = logsigmoid(W x) / 8, a norm over all heads."""
    mixer, x = randomised(GSA(GSAConfig.paper(hidden_size=D, num_heads=H, num_slots=5)))
    q, k, v = (F.silu(y) for y in heads(mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)))
    alpha = (x @ mixer.f_proj.weight.T).sigmoid().pow(1 / 8).unflatten(-1, (H, 5))
    keys, values = torch.zeros(2, B, H, 5, D // H, dtype=torch.float64)
    rows = []
    for t in range(T):
        keys = alpha[:, t, :, :, None] * keys + (1 - alpha[:, t])[..., None] * k[:, t, :, None]
        values = alpha[:, t, :, :, None] * values + (1 - alpha[:, t])[..., None] * v[:, t, :, None]
        p = (torch.einsum("bhmk,bhk->bhm", keys, q[:, t]) * (D // H) ** -0.5).softmax(-1)
        rows.append(torch.einsum("bhm,bhmv->bhv", p, values))
    o = rms(F.silu(torch.stack(rows, 1)).flatten(2)) * mixer.head_scale.flatten()
    assert mixer.f_proj.bias is None and mixer.gate is None
    same(mixer(x)[0], mixer.o_proj(o))


def test_abc_is_the_papers_layer():
    """Slots are means of the keys and values so far under learned weights exp(W x)."""
    mixer, x = randomised(ABC(ABCConfig.paper(hidden_size=D, num_heads=H, num_slots=5)))
    q, k, v = heads(mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x))
    s = mixer.s_proj(x).unflatten(-1, (H, 5))
    rows = []
    for t in range(T):
        weights = s[:, : t + 1].softmax(1)
        keys, values = (torch.einsum("bjhm,bjhk->bhmk", weights, y[:, : t + 1]) for y in (k, v))
        p = (torch.einsum("bhmk,bhk->bhm", keys, q[:, t]) * (D // H) ** -0.5).softmax(-1)
        rows.append(torch.einsum("bhm,bhmv->bhv", p, values))
    same(mixer(x)[0], mixer.o_proj(torch.stack(rows, 1).flatten(2) * mixer.head_scale.flatten()))


def attended(weights, v):
    """Σ_j weights_tj v_j / Σ_j weights_tj over j ≤ t; weights [B, H, T, T]."""
    weights = weights.tril()
    return torch.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdim=True), v)


@pytest.mark.parametrize("kind", ["based", "rebased"])
def test_based_and_rebased_are_the_papers_layers(kind):
    """q and k of few channels, v of the full width; ReBased norms q and k, scales and moves them."""
    taylor = kind == "based"
    config = BasedConfig if taylor else RebasedConfig
    layer = (Based if taylor else Rebased)(config.paper(hidden_size=D, num_heads=H, feature_dim=2, eps=0.0))
    mixer, x = randomised(layer)
    q, k, v = heads(mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x))
    assert q.shape[-1] == 2 and v.shape[-1] == D // H and mixer.q_map is None
    if not taylor:
        q = F.layer_norm(q, (2,)) * mixer.q_gamma + mixer.q_beta
        k = F.layer_norm(k, (2,)) * mixer.k_gamma + mixer.k_beta
    scores = torch.einsum("bthk,bshk->bhts", q, k) * 2**-0.5
    o = attended(1 + scores + scores**2 / 2 if taylor else scores**2, v)
    same(mixer(x)[0], mixer.o_proj(o.flatten(2) * mixer.head_scale.flatten()))


def test_hedgehog_is_the_papers_layer():
    mixer, x = randomised(Hedgehog(HedgehogConfig.paper(hidden_size=D, num_heads=H, eps=0.0)))
    q, k, v = heads(mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x))

    def features(y, weight):
        z = torch.einsum("bthk,hfk->bthf", y, weight)
        return torch.cat((z.softmax(-1), (-z).softmax(-1)), -1)

    weights = torch.einsum("bthf,bshf->bhts", features(q, mixer.q_map), features(k, mixer.k_map))
    same(mixer(x)[0], mixer.o_proj(attended(weights, v).flatten(2) * mixer.head_scale.flatten()))


@pytest.mark.parametrize("kind", ["hedgehog", "based"])
def test_a_window_and_features_share_one_denominator(kind):
    """γ exp(s) for the last three tokens, features for older ones (LoLCATs' equation)."""
    sizes = {"hidden_size": D, "num_heads": H, "window": 3, "eps": 1e-12, "output_gate": None}
    if kind == "hedgehog":
        mixer, x = randomised(Hedgehog(HedgehogConfig(**sizes)))
    else:
        mixer, x = randomised(Based(BasedConfig(feature_dim=2, head_dim=4, v_head_dim=4, **sizes)))
    q, k, v = heads(mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x))
    scores = torch.einsum("bthk,bshk->bhts", q, k) * 4**-0.5
    if kind == "hedgehog":
        mapped_q, mapped_k = hedgehog_features(q, mixer.q_map), hedgehog_features(k, mixer.k_map)
        weights = torch.einsum("bthf,bshf->bhts", mapped_q, mapped_k)
    else:
        s = torch.einsum("bthk,bshk->bhts", *mixer.channels(q, k)) * 4**-0.5
        weights = 1 + s + s**2 / 2
    age = torch.arange(T)[:, None] - torch.arange(T)
    weights = torch.where(age < 3, mixer.window_logit.exp()[:, None, None] * scores.exp(), weights)
    same(mixer(x)[0], mixer.o_proj(attended(weights, v).flatten(2) * mixer.head_scale.flatten()), 1e-6)
