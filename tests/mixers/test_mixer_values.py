"""The layers against their formulas written as plain loops in float64, their gradients, compilation and autocast."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch.nn import functional as F

from fla_swap.mixers import GLA, GatedDeltaNet, GatedDeltaNetConfig, GLAConfig, Softmax, SoftmaxConfig
from fla_swap.types import Mask

from .conftest import CONFIGS, build

B, T, D, H, K = 2, 9, 12, 3, 4


def same(a, b, **options):
    torch.testing.assert_close(a, b, **({"rtol": 1e-8, "atol": 1e-9} | options))


def randomised(mixer):
    torch.manual_seed(3)
    mixer = mixer.double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return mixer, torch.randn(B, T, D, dtype=torch.float64)


def convolved(x, weight):
    """Causal depthwise convolution, tap by tap; the last tap weighs the token itself."""
    y = torch.zeros_like(x)
    for t in range(x.shape[1]):
        for tap in range(weight.shape[1]):
            source = t - (weight.shape[1] - 1 - tap)
            if source >= 0:
                y[:, t] += weight[:, tap] * x[:, source]
    return y


def test_gated_deltanet_is_the_papers_recurrence():
    config = GatedDeltaNetConfig(
        hidden_size=D, num_heads=H, head_dim=K, conv_activation="silu", output_norm=True, output_gate="swish"
    )
    mixer, x = randomised(GatedDeltaNet(config))
    line = torch.cat((mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)), -1)
    q, k, v = (y.view(B, T, H, K) for y in F.silu(convolved(line, mixer.conv.weight)).chunk(3, -1))
    q, k = (y / (y.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    g = -mixer.A_log.exp() * F.softplus(x @ mixer.a_proj.weight.T + mixer.dt_bias)
    beta = mixer.b_proj(x).sigmoid()
    expected = torch.zeros(B, T, H, K, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            state = torch.zeros(K, K, dtype=torch.float64)
            for t in range(T):
                key, value = k[b, t, h], v[b, t, h]
                state = g[b, t, h].exp() * state
                state = state + beta[b, t, h] * torch.outer(key, value - state.T @ key)
                expected[b, t, h] = state.T @ q[b, t, h]
    expected = expected / (expected.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.head_scale
    expected = expected * F.silu(mixer.gate.up(x)).view(B, T, H, K)
    same(mixer.head_outputs(x), expected)
    same(mixer(x)[0], mixer.o_proj(expected.flatten(2)))


def test_gla_is_the_papers_recurrence():
    mixer, x = randomised(
        GLA(GLAConfig(hidden_size=D, num_heads=H, head_dim=K, gate_rank=2, qk_l2norm=False, output_norm=True))
    )
    q, k, v = (p(x).view(B, T, H, K) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    alpha = mixer.gk_up(mixer.gk_down(x)).sigmoid().pow(1 / 16).view(B, T, H, K)
    state, rows = torch.zeros(B, H, K, K, dtype=torch.float64), []
    for t in range(T):
        state = alpha[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        rows.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) * K**-0.5)
    expected = torch.stack(rows, 1)
    expected = expected / (expected.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.head_scale
    expected = expected * 2 * mixer.gate.up(mixer.gate.down(x)).sigmoid().view(B, T, H, K)
    same(mixer.head_outputs(x), expected)


def test_window_is_softmax_attention_under_a_window_mask(hidden):
    for case in ("window", "window_all"):
        mixer, config = build(case), CONFIGS[case]
        names = {f.name for f in dataclasses.fields(SoftmaxConfig)}
        shared = {n: getattr(config, n) for n in names if hasattr(config, n)}
        plain = Softmax(SoftmaxConfig(mask=Mask(kind="window", window=config.window), **shared)).double()
        plain.load_state_dict(mixer.state_dict())
        tolerance = {} if case == "window" else {"rtol": 1e-5, "atol": 1e-6}  # its scores are in fp32
        same(mixer(hidden)[0], plain(hidden)[0], **tolerance)
        wide = type(mixer)(type(config)(**(shared | {"window": 13}))).double()
        wide.load_state_dict(mixer.state_dict())
        causal = Softmax(SoftmaxConfig(**shared)).double()
        causal.load_state_dict(mixer.state_dict())
        same(wide(hidden)[0], causal(hidden)[0], **tolerance)


def test_gradients_equal_finite_differences(mixer, hidden):
    """Along a random direction per tensor, for every parameter and the input, padding and document starts included."""
    valid = torch.ones(2, 13, dtype=torch.bool)
    valid[0, :2] = False
    starts = torch.zeros(2, 13, dtype=torch.bool)
    starts[1, 5] = True
    torch.manual_seed(4)
    readout = torch.randn(2, 13, 24, dtype=torch.float64) * valid[..., None]
    x = hidden.clone().requires_grad_()

    def loss():
        return (mixer(x, valid=valid, starts=starts)[0] * readout).sum()

    named = {"hidden_states": x, **dict(mixer.named_parameters())}
    gradients = torch.autograd.grad(loss(), list(named.values()))
    for (name, tensor), gradient in zip(named.items(), gradients, strict=True):
        direction, step = torch.randn_like(tensor), 1e-5
        with torch.no_grad():
            tensor.add_(step * direction)
            above = loss()
            tensor.sub_(2 * step * direction)
            below = loss()
            tensor.add_(step * direction)
        torch.testing.assert_close(
            (gradient * direction).sum(),
            (above - below) / (2 * step),
            rtol=1e-5,
            atol=1e-6,
            msg=lambda m, n=name: n + m,
        )


def test_training_with_a_state_treats_it_as_a_constant(mixer, hidden):
    with torch.no_grad():
        _, state = mixer(hidden[:, :6], output_state=True)
        whole, _ = mixer(hidden)
    x = hidden[:, 6:].clone().requires_grad_()
    y, after = mixer(x, state=state)
    y.sum().backward()
    same(y.detach(), whole[:, 6:])
    assert x.grad is not None and not any(t.requires_grad for t in after.values())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", ["window", "gla_all", "hgrn_all", "mamba", "gated_deltanet"])
def test_compiles_without_graph_breaks_forward_backward_and_decode(case, backend, hidden):
    torch._dynamo.reset()
    mixer, hidden = build(case, torch.float32), hidden.float()
    compiled_from = copy.deepcopy(mixer)
    compiled = torch.compile(compiled_from, fullgraph=True, dynamic=False, backend=backend)
    valid = torch.ones(2, 13, dtype=torch.bool)
    for module in (mixer, compiled):
        module(hidden, valid=valid)[0].pow(2).sum().backward()
    for (name, a), b in zip(mixer.named_parameters(), compiled_from.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None, name
        same(b.grad, a.grad, rtol=1e-3, atol=1e-3 * a.grad.abs().max().item())
    with torch.no_grad():
        _, state = mixer(hidden, output_state=True)
        own = {name: tensor.clone() for name, tensor in state.items()}
        where = {name: tensor.data_ptr() for name, tensor in own.items()}
        for token in hidden[:, :3].split(1, 1):
            expected, _ = mixer(token, state=state)
            y, own = compiled(token, state=own)
            same(y, expected, rtol=1e-4, atol=1e-5)
        for name in state:
            same(own[name], state[name], rtol=1e-4, atol=1e-5)
        assert {name: tensor.data_ptr() for name, tensor in own.items()} == where


def test_bf16_autocast_keeps_gates_and_state_in_fp32(mixer, hidden):
    mixer, hidden = mixer.float(), hidden.float()
    expected = mixer(hidden)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(hidden, output_state=True)
    y.float().pow(2).sum().backward()
    assert (y.float() - expected).pow(2).mean().sqrt() < 0.03 * expected.pow(2).mean().sqrt()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())
    if "recurrent" in state:
        assert state["recurrent"].dtype == torch.float32


def test_runs_in_bf16(mixer, hidden):
    expected = mixer(hidden)[0]
    y, state = mixer.bfloat16()(hidden.bfloat16(), output_state=True)
    with torch.no_grad():
        step, _ = mixer(hidden[:, :1].bfloat16(), state=state)
    assert y.dtype == step.dtype == torch.bfloat16
    assert (y.double() - expected).pow(2).mean().sqrt() < 0.05 * expected.pow(2).mean().sqrt()
