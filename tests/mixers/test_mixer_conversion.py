"""What a mixer makes of an attention site: which weights it takes over, where its gates start, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from fla_swap.errors import MixerError
from fla_swap.mixers import (
    ABC,
    GLA,
    HGRN2,
    MIXERS,
    RWKV6,
    Based,
    DeltaNet,
    GatedDeltaNet,
    GatedDeltaNetConfig,
    GLAConfig,
    Hedgehog,
    HGRN2Config,
    Lightning,
    Mamba2,
    Mamba2Config,
    Rebased,
    RetNet,
    Softmax,
    Window,
    WindowConfig,
    mixer_class,
)
from fla_swap.mixers.recurrent import RecurrentMixer
from fla_swap.mixers.stateful import StatefulMixer
from fla_swap.types import ArgPath, AttentionSite, CallContract, Mask, Norm, Projection, Rope, WeightRef

D, H, HK, K, V = 24, 4, 2, 8, 6
RECURRENT = [mixer for mixer in MIXERS if issubclass(mixer, RecurrentMixer)]
STATEFUL = [mixer for mixer in MIXERS if issubclass(mixer, StatefulMixer)]
WITHOUT_DECAY = [ABC, Based, Rebased, Hedgehog, DeltaNet]


def projection(name: str) -> Projection:
    return Projection(weight=WeightRef(name=f"{name}.weight"), bias=WeightRef(name=f"{name}.bias"))


SITE = AttentionSite(
    fqn="layers.0.attn",
    layer=0,
    q=projection("q"),
    k=projection("k"),
    v=projection("v"),
    o=projection("o"),
    hidden_size=D,
    heads=H,
    kv_heads=HK,
    head_dim=K,
    v_head_dim=V,
    scale=0.3,
    mask=Mask(kind="causal"),
    call=CallContract(hidden=ArgPath(keyword="hidden_states")),
    rope=Rope(inv_freq=(1.0, 0.3, 0.02)),
    q_norm=Norm(kind="rms", eps=1e-6, weight=WeightRef(name="q_norm"), offset=1.0),
    k_norm=Norm(kind="rms", eps=1e-6, weight=WeightRef(name="k_norm"), across_heads=True),
    sinks=WeightRef(name="sinks"),
)


@pytest.fixture
def weights():
    torch.manual_seed(5)
    shapes = {"q": (H * K, D), "k": (HK * K, D), "v": (HK * V, D), "o": (D, H * V)}
    named = {f"{n}.weight": torch.randn(s) / s[1] ** 0.5 for n, s in shapes.items()}
    named |= {f"{n}.bias": torch.randn(s[0]) for n, s in shapes.items()}
    named |= {"q_norm": torch.randn(K), "k_norm": torch.randn(HK * K), "sinks": torch.randn(H)}
    return {name: tensor.double() for name, tensor in named.items()}


@pytest.fixture
def hidden():
    torch.manual_seed(6)
    return torch.randn(2, 11, D, dtype=torch.float64)


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@torch.no_grad()
def test_a_window_that_holds_everything_is_the_original_attention(weights, hidden):
    window, original = Window.from_attention(SITE, weights), Softmax.from_attention(SITE, weights)
    assert window.config.window == 512
    same(window(hidden)[0], original(hidden)[0])


def test_a_windowed_site_keeps_its_smaller_window():
    windowed = dataclasses.replace(SITE, mask=Mask(kind="window", window=7))
    assert Window.config_for(windowed).window == 7
    assert Window.config_for(windowed, {"window": 3}).window == 3


@torch.no_grad()
@pytest.mark.parametrize("expand_kv", [True, False])
def test_gated_deltanet_starts_as_a_plain_delta_rule_on_the_sites_heads(weights, hidden, expand_kv):
    """No gate, convolution or norm of the mixer's own changes the site's q, k, v; decay and β are constants."""
    mixer = GatedDeltaNet.from_attention(
        SITE, weights, {"init_half_life": [8.0, 16.0, 32.0, 64.0], "expand_kv": expand_kv}
    )
    original = Softmax.from_attention(SITE, weights)
    q, k, v = original.to_heads(*original.project(hidden), None, None)
    k, v = k.repeat_interleave(H // HK, 2), v.repeat_interleave(H // HK, 2)
    q, k = (y / (y.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    decay = 0.5 ** (1 / torch.tensor([8.0, 16.0, 32.0, 64.0], dtype=torch.float64))
    state = torch.zeros(2, H, K, V, dtype=torch.float64)
    for t in range(hidden.shape[1]):
        state = state * decay[:, None, None]
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + 0.5 * k[:, t, :, :, None] * error[:, :, None]
        expected = torch.einsum("bhkv,bhk->bhv", state, q[:, t])
        torch.testing.assert_close(mixer.head_outputs(hidden)[:, t], expected, rtol=1e-6, atol=1e-6)
    assert mixer.kv_heads == (H if expand_kv else HK)


@torch.no_grad()
def test_gla_starts_as_decayed_linear_attention_on_the_sites_heads(weights, hidden):
    mixer = GLA.from_attention(SITE, weights, GLAConfig(init_half_life=(20.0,), expand_kv=False))
    original = Softmax.from_attention(SITE, weights)
    q, k, v = original.to_heads(*original.project(hidden), None, None)
    k, v = k.repeat_interleave(H // HK, 2), v.repeat_interleave(H // HK, 2)
    q, k = (y / y.norm(dim=-1, keepdim=True) for y in (q, k))
    steps = torch.arange(11)
    age = (steps[:, None] - steps[None, :]).double()
    scores = torch.einsum("bthk,bshk->bhts", q, k) * K**-0.5 * torch.where(age >= 0, 0.5 ** (age / 20), 0.0)
    expected = torch.einsum("bhts,bshv->bthv", scores, v)
    torch.testing.assert_close(mixer.head_outputs(hidden), expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("mixer_type", [RetNet, Lightning, Mamba2, HGRN2])
def test_mixers_with_gated_decay_start_as_gla_does(weights, hidden, mixer_type):
    """On the site's heads, with the same decay and no gate in use; HGRN2 writes what it forgets."""
    options = {"init_half_life": [8.0, 16.0, 32.0, 64.0]} | ({"scale": 0.4} if mixer_type is HGRN2 else {})
    gla = GLA.from_attention(SITE, weights, options | {"balanced": mixer_type is HGRN2})
    mixer = mixer_type.from_attention(SITE, weights, options)
    torch.testing.assert_close(mixer(hidden)[0], gla(hidden)[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rwkv6_starts_as_gla_with_memories_one_step_younger(weights, hidden):
    """Tokens unmixed; the token itself counts in full, the one before is not decayed yet."""
    options = {"init_half_life": [8.0]}
    gla = GLA.from_attention(SITE, weights, options).head_outputs
    mixer = RWKV6.from_attention(SITE, weights, options)
    before = torch.cat([gla(hidden)[:, :1]] * 11, 1)
    for t in range(1, 11):  # γ · o_rwkv6 = o_gla + (γ − 1) · (what the token itself contributes)
        own = gla(hidden, positions=torch.arange(11)[None], starts=torch.arange(11)[None].expand(2, -1) == t)[:, t]
        before[:, t] = (gla(hidden)[:, t] - own) / 0.5 ** (1 / 8) + own
    torch.testing.assert_close(mixer.head_outputs(hidden), before, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("mixer_type", STATEFUL)
def test_the_calibration_surface(weights, hidden, mixer_type):
    mixer = mixer_type.from_attention(SITE, weights)
    assert mixer.calibratable and not Window.calibratable
    before = mixer.head_outputs(hidden)
    per_head, per_channel = torch.tensor([1.0, 2.0, -0.5, 0.1]).double(), torch.randn(H, V).double()
    mixer.set_head_scale_(per_head)
    same(mixer.head_outputs(hidden), before * per_head[:, None])
    mixer.set_head_scale_(per_channel)
    same(mixer.head_outputs(hidden), before * per_head[:, None] * per_channel)
    lives = torch.tensor([1.5, 10.0, 100.0, 30000.0]).double()
    if mixer_type in WITHOUT_DECAY:
        with pytest.raises(NotImplementedError):
            mixer.set_half_life_(lives)
        return
    mixer.set_half_life_(lives)
    g = mixer.decay(torch.zeros_like(hidden))
    g = g.mean(-1) if g.dim() == 4 else g
    torch.testing.assert_close(-math.log(2) / g[0, 0], lives, rtol=1e-6, atol=0)


@torch.no_grad()
def test_set_beta_and_its_doubled_range(weights, hidden):
    beta = torch.tensor([0.1, 0.5, 0.9, 0.99]).double()
    mixer = GatedDeltaNet.from_attention(SITE, weights)
    mixer.set_beta_(beta)
    same(mixer.beta(hidden)[1, 3], beta)
    doubled = GatedDeltaNet.from_attention(SITE, weights, {"negative_eigenvalues": True})
    doubled.set_beta_(2 * beta)
    same(doubled.beta(hidden)[1, 3], 2 * beta)


def test_biases_and_norms_follow_the_site(weights):
    bare = dataclasses.replace(
        SITE, q=Projection(weight=SITE.q.weight), o=Projection(weight=SITE.o.weight), q_norm=None, rope=None
    )
    mixer = GatedDeltaNet.from_attention(bare, weights)
    assert mixer.q_proj.bias is None and mixer.o_proj.bias is None and mixer.k_proj.bias is not None
    assert mixer.q_norm is None and mixer.k_norm is not None and mixer.rope is None
    assert GatedDeltaNet.from_attention(SITE, weights, {"use_rope": False}).rope is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_mixer_takes_the_dtype_of_the_weights(weights, dtype):
    mixer = GLA.from_attention(SITE, {name: tensor.to(dtype) for name, tensor in weights.items()})
    assert {parameter.dtype for parameter in mixer.parameters()} == {dtype}


@pytest.mark.parametrize("mixer_type", MIXERS)
def test_a_complete_config_survives_json(mixer_type):
    config = mixer_type.config_for(SITE)
    again = mixer_type.config_class.from_options(json.loads(json.dumps(config.to_options())))
    assert again == config and mixer_class(mixer_type.name) is mixer_type


REFUSED = {
    "window": (Window, {"window": 0}, "window"),
    "option": (GLA, {"half_life": 3}, r"\['half_life'\]"),
    "half lives": (GatedDeltaNet, {"init_half_life": [3.0, 4.0]}, "layers.0.attn.*1 or 4 .*3.0, 4.0"),
    "beta": (GatedDeltaNet, {"init_beta": 1.0}, "init_beta"),
    "gate": (GLA, {"output_gate": "tanh"}, "output_gate"),
    "feature map": (GLA, {"qk_activation": "exp"}, "layers.0.attn.*'exp'"),
    "convolution": (GatedDeltaNet, {"conv_activation": "relu"}, "conv_activation"),
    "tied keys": (HGRN2, HGRN2Config(tied=True), "layers.0.attn: hgrn2: tied keys"),
    "groups": (Mamba2, Mamba2Config(num_groups=2), "layers.0.attn: mamba2: .* 4 query heads"),
    "alibi": (Window, {"alibi": [0.5]}, "4 heads, got 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_options_are_named(weights, case):
    mixer_type, options, words = REFUSED[case]
    with pytest.raises(MixerError, match=words):
        mixer_type.from_attention(SITE, weights, options)


@pytest.mark.parametrize("mixer_type", [Window, *STATEFUL])
def test_head_counts_masks_and_widths_that_do_not_fit_name_the_site_and_the_numbers(mixer_type):
    with pytest.raises(MixerError, match=r"layers\.0\.attn: 4 query heads .* 3 "):
        mixer_type.config_for(dataclasses.replace(SITE, kv_heads=3))
    with pytest.raises(MixerError, match=r"layers\.0\.attn: .*'bidirectional'"):
        mixer_type.config_for(dataclasses.replace(SITE, mask=Mask(kind="bidirectional")))
    with pytest.raises(MixerError, match=f"{mixer_type.name}: 4 query heads cannot share 3"):
        mixer_type(mixer_type.config_class(hidden_size=D, num_heads=4, num_kv_heads=3, head_dim=K))
    if mixer_type in RECURRENT:
        with pytest.raises(MixerError, match=r"layers\.0\.attn: .* heads of 512 channels"):
            mixer_type.config_for(dataclasses.replace(SITE, head_dim=512))


def test_standalone_layers_need_only_their_dimensions():
    for mixer_type, config in (
        (Window, WindowConfig(hidden_size=D, num_heads=H, head_dim=K)),
        (GLA, GLAConfig(hidden_size=D, num_heads=H, head_dim=K)),
        (GatedDeltaNet, GatedDeltaNetConfig(hidden_size=D, num_heads=H, head_dim=K)),
    ):
        x = torch.randn(2, 5, D)
        y, state = mixer_type(config)(x)
        assert y.shape == x.shape and y.isfinite().all() and state is None
        with pytest.raises(MixerError, match=r"needs \['hidden_size', 'head_dim'\]"):
            mixer_type(type(config)(num_heads=H))


@pytest.mark.parametrize("mixer_type", MIXERS)
def test_a_layer_of_the_paper_needs_a_width_and_a_number_of_heads(mixer_type):
    config = mixer_type.config_class.paper(hidden_size=64, num_heads=2)
    mixer, x = mixer_type(config), torch.randn(2, 5, 64)
    y, state = mixer(x, output_state=True)
    assert y.shape == x.shape and y.isfinite().all()
    assert state is not None or mixer.uses_kv_cache
    with pytest.raises(MixerError, match=r"no option \['widht'\]"):
        mixer_type.config_class.paper(widht=3)


def test_widths_follow_from_the_hidden_size():
    assert WindowConfig(hidden_size=D, num_heads=H).filled().head_dim == D // H
    paper = GLAConfig.paper(hidden_size=64, num_heads=2).filled()
    assert (paper.head_dim, paper.v_head_dim) == (16, 32) and paper.output_gate == "swish"
    assert GLAConfig.paper(hidden_size=64, num_heads=2, output_gate=None, head_dim=8).output_gate is None
    with pytest.raises(MixerError, match="GLAConfig: 64 channels do not divide into 3 heads"):
        GLA(GLAConfig(hidden_size=64, num_heads=3))
