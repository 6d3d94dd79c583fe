"""The delta-rule mixers against transformers' own layers: their weights loaded into ours give the same output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import KimiLinearConfig, Qwen3NextConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from fla_swap.errors import MixerError
from fla_swap.kernels.delta.reference import gated_delta_rule_reference
from fla_swap.mixers import KDA, DeltaNet, DeltaNetConfig, GatedDeltaNet, GatedDeltaNetConfig, KDAConfig

D, H, K, V = 32, 2, 8, 6


def randomised(layer: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.normal_(std=0.5)
            if name.endswith("norm.weight"):
                parameter.add_(1)
    return layer.eval()


def tokens(count: int = 70) -> Tensor:
    return torch.randn(2, count, D, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def decoded(mixer, x: Tensor, prompt: int) -> Tensor:
    """The mixer's output when all tokens after `prompt` come one at a time."""
    pieces = [mixer(x[:, :prompt], output_state=True)]
    for t in range(prompt, x.shape[1]):
        pieces.append(mixer(x[:, t : t + 1], state=pieces[0][1]))
    return torch.cat([y for y, _ in pieces], 1)


@torch.no_grad()
def load_qwen(mixer: GatedDeltaNet, layer: Qwen3NextGatedDeltaNet) -> None:
    """Qwen3-Next interleaves its fused projections by key head: q, k, and r value heads' v and z; β and a."""
    group = layer.num_v_heads // layer.num_k_heads
    fused = layer.in_proj_qkvz.weight.unflatten(0, (layer.num_k_heads, -1))
    q, k, v, z = fused.split((K, K, group * V, group * V), 1)
    b, a = layer.in_proj_ba.weight.unflatten(0, (layer.num_k_heads, -1)).split((group, group), 1)
    mixer.q_proj.weight.copy_(q.flatten(0, 1))
    mixer.k_proj.weight.copy_(k.flatten(0, 1))
    mixer.v_proj.weight.copy_(v.flatten(0, 1))
    mixer.gate.up.weight.copy_(z.flatten(0, 1))
    mixer.gate.up.bias.zero_()
    mixer.b_proj.weight.copy_(b.flatten(0, 1))
    mixer.b_proj.bias.zero_()
    mixer.a_proj.weight.copy_(a.flatten(0, 1))
    mixer.A_log.copy_(layer.A_log)
    mixer.dt_bias.copy_(layer.dt_bias)
    mixer.conv.weight.copy_(layer.conv1d.weight[:, 0])
    mixer.head_scale.copy_(layer.norm.weight.expand_as(mixer.head_scale))
    mixer.o_proj.weight.copy_(layer.out_proj.weight)


def test_qwen3_next_gated_deltanet():
    """Key heads shared by value heads, short convolution, gated RMS norm: the same output, in one pass and decoding."""
    config = Qwen3NextConfig(
        hidden_size=D,
        linear_num_key_heads=H,
        linear_num_value_heads=2 * H,
        linear_key_head_dim=K,
        linear_value_head_dim=V,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    layer = randomised(Qwen3NextGatedDeltaNet(config, 0))
    mixer = GatedDeltaNet(
        GatedDeltaNetConfig.paper(
            hidden_size=D,
            num_heads=2 * H,
            num_qk_heads=H,
            head_dim=K,
            v_head_dim=V,
            expand_v=1.0,
            scale=K**-0.5,
            conv_size=config.linear_conv_kernel_dim,
            norm_eps=config.rms_norm_eps,
        )
    )
    load_qwen(mixer, layer)
    x = tokens()
    with torch.no_grad():
        expected = layer(x)
        torch.testing.assert_close(mixer(x)[0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decoded(mixer, x, 67), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def load_kimi(mixer: KDA, layer: KimiLinearDeltaAttention) -> None:
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "b_proj"):
        getattr(mixer, name).weight.copy_(getattr(layer, name).weight)
    mixer.b_proj.bias.zero_()
    mixer.conv.weight.copy_(layer.conv1d.weight[:, 0])
    mixer.f_down.weight.copy_(layer.forget_gate.f_a_proj.weight)
    mixer.f_up.weight.copy_(layer.forget_gate.f_b_proj.weight)
    mixer.dt_bias.copy_(layer.forget_gate.dt_bias)
    mixer.A_log.copy_(layer.forget_gate.A_log.flatten())
    mixer.gate.down.weight.copy_(layer.g_a_proj.weight)
    mixer.gate.up.weight.copy_(layer.g_b_proj.weight)
    mixer.gate.up.bias.zero_()
    mixer.head_scale.copy_(layer.o_norm.weight.expand_as(mixer.head_scale) / 2)  # our gate is 2 · sigmoid


def test_kimi_delta_attention():
    config = KimiLinearConfig(
        hidden_size=D,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_heads=H,
        linear_head_dim=K,
        linear_conv_kernel_dim=4,
    )
    layer = randomised(KimiLinearDeltaAttention(config, 0))
    mixer = KDA(
        KDAConfig.paper(
            hidden_size=D, num_heads=H, head_dim=K, gate_rank=K, scale=K**-0.5, norm_eps=config.rms_norm_eps
        )
    )
    load_kimi(mixer, layer)
    x = tokens()
    with torch.no_grad():
        expected = layer(x)
        torch.testing.assert_close(mixer(x)[0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decoded(mixer, x, 67), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_deltanet_is_the_papers_recurrence():
    config = DeltaNetConfig.paper(hidden_size=D, num_heads=H, head_dim=K, v_head_dim=V, conv_size=None)
    mixer, x = randomised(DeltaNet(config)), tokens(9)
    q, k = (torch.nn.functional.silu(p(x)).unflatten(-1, (H, K)) for p in (mixer.q_proj, mixer.k_proj))
    v, beta = mixer.v_proj(x).unflatten(-1, (H, V)), mixer.b_proj(x).sigmoid()
    o, _ = gated_delta_rule_reference(q, k, v, None, beta, scale=1.0, qk_l2norm=True)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + config.norm_eps) * mixer.head_scale
    torch.testing.assert_close(mixer(x)[0], mixer.o_proj(o.flatten(2)), rtol=1e-4, atol=1e-5)


def test_heads_that_do_not_divide_are_named():
    with pytest.raises(MixerError, match="4 heads do not divide into 3"):
        GatedDeltaNet(GatedDeltaNetConfig(hidden_size=D, num_heads=4, num_qk_heads=3))
