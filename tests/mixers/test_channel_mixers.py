"""HGRN and Mamba: the papers' layers as plain loops in float64, where a swap starts, and what they have no use for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from fla_swap.errors import MixerError
from fla_swap.mixers import HGRN, HGRNConfig, Mamba, MambaConfig, Softmax
from fla_swap.types import Temperature

from .test_mixer_conversion import SITE, hidden, weights  # noqa: F401
from .test_paper_layers import B, D, H, T, convolved, randomised, rms, same


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 3])
def test_hgrn(layer):
    """A mean of swish-ed values with a forget gate above the layer's bound; norm over all channels, swish gate."""
    mixer, x = randomised(HGRN(HGRNConfig.paper(hidden_size=D, num_heads=H, layer=layer, num_layers=4)))
    if layer:
        fresh = HGRN(HGRNConfig.paper(hidden_size=D, num_heads=H, layer=layer, num_layers=4))
        same(fresh.bound_logit.sigmoid(), torch.full((D,), 0.75), 1e-6)
    bound = mixer.bound_logit.sigmoid() if layer else 0.0
    f = bound + (1 - bound) * mixer.f_proj(x).sigmoid()
    state, rows = torch.zeros(B, D, dtype=torch.float64), []
    for t in range(T):
        state = f[:, t] * state + (1 - f[:, t]) * F.silu(mixer.v_proj(x[:, t]))
        rows.append(state)
    o = rms(torch.stack(rows, 1)) * mixer.head_scale.flatten() * F.silu(mixer.gate.up(x))
    same(mixer(x)[0], mixer.o_proj(o))


@torch.no_grad()
def test_mamba():
    """Twice as wide, convolution with swish, Δ, B and C from the values, D skip, swish gate."""
    mixer, x = randomised(Mamba(MambaConfig.paper(hidden_size=D, num_heads=H, state_size=5, dt_rank=2)))
    assert mixer.x_proj.bias is None and mixer.channels == 2 * D
    u = convolved(mixer.v_proj(x), mixer.conv.weight, mixer.conv.bias)
    low, b, c = mixer.x_proj(u).split((2, 5, 5), -1)
    dt = F.softplus(mixer.dt_proj(low))
    state, rows = torch.zeros(B, 2 * D, 5, dtype=torch.float64), []
    for t in range(T):
        state = state * torch.exp(-dt[:, t, :, None] * mixer.A_log.exp())
        state = state + (dt[:, t] * u[:, t])[..., None] * b[:, t, None, :]
        rows.append((state * c[:, t, None, :]).sum(-1) + mixer.D * u[:, t])
    o = torch.stack(rows, 1) * mixer.head_scale.flatten() * F.silu(mixer.gate.up(x))
    same(mixer(x)[0], mixer.o_proj(o))


def test_mambas_start_is_the_papers():
    """A is −1 … −N everywhere, Δ between .001 and .1 for a token of zeros, D is 1."""
    mixer = Mamba(MambaConfig.paper(hidden_size=64, num_heads=2))
    assert mixer.A_log.shape == (128, 16) and mixer.dt_proj.in_features == 4
    same(mixer.A_log.exp(), torch.arange(1.0, 17).expand(128, 16), 1e-6)
    steps = F.softplus(mixer.dt_proj.bias)
    assert 0.001 <= steps.min() < 0.01 < steps.max() <= 0.1001 and (mixer.D == 1).all()


@torch.no_grad()
@pytest.mark.parametrize("mixer_type", [HGRN, Mamba])
def test_a_swap_starts_as_a_mean_of_the_sites_values(weights, hidden, mixer_type):  # noqa: F811
    """HGRN: weights that halve in the half-life. Mamba: by a sum of such decays, one in all."""
    mixer = mixer_type.from_attention(SITE, weights, {"init_half_life": [2.0, 4.0, 8.0, 16.0]})
    plain = Softmax.from_attention(SITE, weights)
    v = plain.to_heads(*plain.project(hidden), None, None)[2].repeat_interleave(2, 2)
    age = (torch.arange(11)[:, None] - torch.arange(11)).double()
    rate = torch.log(torch.tensor(2.0).double()) / torch.tensor([2.0, 4.0, 8.0, 16.0]).double()
    decay = torch.where(age >= 0, torch.exp(-rate[:, None, None] * age.clamp_min(0)), 0.0)
    if mixer_type is HGRN:
        weight = decay * -torch.expm1(-rate)[:, None, None]
    else:
        scales = torch.arange(1.0, 17).double()
        gain = (1 / scales).sum()
        weight = sum(decay**n for n in scales) * rate[:, None, None] / gain
    torch.testing.assert_close(
        mixer.head_outputs(hidden), torch.einsum("hts,bshv->bthv", weight, v), rtol=1e-5, atol=1e-6
    )
    same(mixer.o_proj.weight, weights["o.weight"])


@torch.no_grad()
def test_mambas_start_adds_up_to_one_over_a_long_past():
    mixer = Mamba(MambaConfig(hidden_size=8, num_heads=2, init_half_life=(200.0,), output_gate=None))
    x = torch.randn(1, 1, 8).expand(1, 6000, 8)
    same(mixer.head_outputs(x)[0, -1].flatten(), mixer.v_proj(x[0, -1]), 0.05)


def test_options_about_queries_and_keys_are_refused_and_the_sites_are_left_out():
    with pytest.raises(MixerError, match=r"hgrn: it has no queries and keys, which \['k_bias'\]"):
        HGRN(HGRNConfig(hidden_size=D, num_heads=H, k_bias=True))
    site = dataclasses.replace(SITE, temperature=Temperature(scale=0.5, length=4, offset=1, padding=False))
    config = Mamba.config_for(site)
    assert config.q_norm is None and config.rope is None and config.temperature is None and config.v_bias
    assert not hasattr(Mamba(config), "q_proj")


@pytest.mark.parametrize(
    ("mixer_type", "options", "words"),
    [
        (HGRN, {"lower_bound": 1.0}, "hgrn: lower_bound must be at least 0 and below 1, got 1.0"),
        (HGRN, {"value_activation": "exp"}, "layers.0.attn: hgrn: value_activation must be .*'exp'"),
        (Mamba, {"state_size": 0}, "mamba: state_size and dt_rank must be at least 1"),
        (Mamba, {"dt_range": [0.1, 0.01]}, r"dt_range positive and in order, got 16, 2 and \(0.1, 0.01\)"),
    ],
)
def test_wrong_options_are_named(weights, mixer_type, options, words):  # noqa: F811
    with pytest.raises(MixerError, match=words):
        mixer_type.from_attention(SITE, weights, options)
