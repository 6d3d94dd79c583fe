"""Small mixers with every option in use and all parameters random, so that nothing is hidden by a neutral start."""

from __future__ import annotations

import pytest
import torch

from fla_swap.mixers import (
    MIXERS,
    ABCConfig,
    BasedConfig,
    DeltaNetConfig,
    GatedDeltaNetConfig,
    GLAConfig,
    GSAConfig,
    HedgehogConfig,
    HGRN2Config,
    HGRNConfig,
    KDAConfig,
    LightningConfig,
    Mamba2Config,
    MambaConfig,
    RebasedConfig,
    RetNetConfig,
    RWKV6Config,
    WindowConfig,
)
from fla_swap.types import Norm, Rope, WeightRef

ROPE = Rope(inv_freq=(1.0, 0.3, 0.02))
HEADS = {"hidden_size": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "v_head_dim": 6, "rope": ROPE}
NORM = Norm(kind="rms", eps=1e-6, weight=WeightRef(name="norm"))

CONFIGS = {
    "window": WindowConfig(window=5, **HEADS),
    "window_all": WindowConfig(
        window=4, softcap=3.0, sinks=True, alibi=(0.5, 0.25, 0.1, 0.0), q_norm=NORM, k_norm=NORM, q_bias=True, **HEADS
    ),
    "gla": GLAConfig(**HEADS),
    "gla_all": GLAConfig(
        expand_kv=False, use_rope=False, conv_size=3, conv_activation="silu", qk_activation="elu", output_norm=True,
        output_gate="swish", gate_rank=4, qk_l2norm=False, balanced=True, clamp_min=-0.8, value_decay=True,
        v_bias=True, **HEADS,
    ),
    "gated_deltanet": GatedDeltaNetConfig(**HEADS),
    "gated_deltanet_all": GatedDeltaNetConfig(
        expand_kv=False, conv_activation="silu", qk_activation="silu", output_norm=True, output_gate="swish",
        negative_eigenvalues=True, q_norm=NORM, k_norm=NORM, norm_after_rope=True, k_bias=True, **HEADS,
    ),
    "gated_deltanet_shared": GatedDeltaNetConfig(
        num_qk_heads=2, hidden_size=24, num_heads=4, head_dim=8, v_head_dim=6, rope=ROPE
    ),
    "deltanet": DeltaNetConfig(**HEADS),
    "deltanet_all": DeltaNetConfig.paper(
        hidden_size=24, num_heads=4, num_qk_heads=2, conv_size=3, negative_eigenvalues=True
    ),
    "kda": KDAConfig(**HEADS),
    "kda_all": KDAConfig.paper(
        hidden_size=24, num_heads=4, expand_kv=False, num_kv_heads=2, decay_rank=3, gate_rank=4,
        negative_eigenvalues=True,
    ),
    "retnet": RetNetConfig(**HEADS),
    "retnet_all": RetNetConfig.paper(
        hidden_size=24, num_heads=4, expand_kv=False, num_kv_heads=2, conv_size=2, conv_bias=True, train_decay=True
    ),
    "lightning": LightningConfig(**HEADS),
    "lightning_all": LightningConfig.paper(
        hidden_size=24, num_heads=4, layer=1, num_layers=4, train_decay=True, norm_groups=2
    ),
    "hgrn2": HGRN2Config(**HEADS),
    "hgrn2_all": HGRN2Config.paper(hidden_size=24, num_heads=4, layer=1, num_layers=4, conv_size=3, gate_rank=2),
    "hgrn2_bound": HGRN2Config(lower_bound=0.3, expand_kv=False, **HEADS),
    "hgrn": HGRNConfig(**HEADS),
    "hgrn_all": HGRNConfig.paper(hidden_size=24, num_heads=4, layer=1, num_layers=4, conv_size=3, gate_rank=2),
    "mamba": MambaConfig(state_size=3, **HEADS),
    "mamba_all": MambaConfig.paper(hidden_size=24, num_heads=4, state_size=5, dt_rank=3, v_bias=True),
    "mamba2": Mamba2Config(**HEADS),
    "mamba2_all": Mamba2Config.paper(hidden_size=24, num_heads=4, head_dim=8, num_groups=2, norm_groups=2),
    "rwkv6": RWKV6Config(**HEADS),
    "rwkv6_all": RWKV6Config.paper(
        hidden_size=24, num_heads=4, layer=1, num_layers=3, mix_rank=3, decay_rank=2, conv_size=2
    ),
    "gsa": GSAConfig(num_slots=5, **HEADS),
    "gsa_all": GSAConfig.paper(hidden_size=24, num_heads=4, num_slots=3, expand_kv=False, num_kv_heads=2, conv_size=3),
    "abc": ABCConfig(num_slots=5, **HEADS),
    "abc_all": ABCConfig.paper(
        hidden_size=24, num_heads=4, num_slots=3, clamp=1.5, v_activation="silu", output_activation="silu"
    ),
    "based": BasedConfig(feature_dim=4, **HEADS),
    "based_all": BasedConfig.paper(
        hidden_size=24, num_heads=4, feature_dim=3, expand_kv=False, num_kv_heads=2, conv_size=3, output_norm=True
    ),
    "based_window": BasedConfig(feature_dim=4, window=3, expand_kv=False, **HEADS),
    "rebased": RebasedConfig(feature_dim=4, eps=1e-3, **HEADS),
    "rebased_all": RebasedConfig.paper(hidden_size=24, num_heads=4, feature_dim=3, qk_norm=False, eps=1e-2),
    "hedgehog": HedgehogConfig(window=3, **HEADS),
    "hedgehog_all": HedgehogConfig.paper(
        hidden_size=24, num_heads=4, feature_dim=3, expand_kv=False, num_kv_heads=2, output_gate="swish"
    ),
}  # fmt: skip
CLASSES = {mixer.name: mixer for mixer in MIXERS}


def build(case: str, dtype: torch.dtype = torch.float64):
    """A mixer of this case whose parameters are all random (gates and convolutions included)."""
    torch.manual_seed(0)
    name = next(name for name in sorted(CLASSES, key=len, reverse=True) if case == name or case.startswith(f"{name}_"))
    mixer = CLASSES[name](CONFIGS[case]).to(dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return mixer


@pytest.fixture(params=CONFIGS)
def mixer(request):
    return build(request.param)


@pytest.fixture
def hidden():
    """Two rows of 13 tokens."""
    torch.manual_seed(1)
    return torch.randn(2, 13, 24, dtype=torch.float64)
