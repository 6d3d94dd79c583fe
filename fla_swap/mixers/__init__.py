"""The token mixers: one file each, listed once in `MIXERS`. `fs.plan(report, mixer=NAME)` takes their names."""

from __future__ import annotations

from fla_swap.errors import MixerError
from fla_swap.mixers.abc import ABC, ABCConfig
from fla_swap.mixers.base import MixerConfig, State, TokenMixer
from fla_swap.mixers.based import Based, BasedConfig
from fla_swap.mixers.deltanet import DeltaNet, DeltaNetConfig
from fla_swap.mixers.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig
from fla_swap.mixers.gla import GLA, GLAConfig
from fla_swap.mixers.gsa import GSA, GSAConfig
from fla_swap.mixers.hedgehog import Hedgehog, HedgehogConfig
from fla_swap.mixers.hgrn import HGRN, HGRNConfig
from fla_swap.mixers.hgrn2 import HGRN2, HGRN2Config
from fla_swap.mixers.kda import KDA, KDAConfig
from fla_swap.mixers.lightning import Lightning, LightningConfig
from fla_swap.mixers.mamba import Mamba, MambaConfig
from fla_swap.mixers.mamba2 import Mamba2, Mamba2Config
from fla_swap.mixers.rebased import Rebased, RebasedConfig
from fla_swap.mixers.retnet import RetNet, RetNetConfig
from fla_swap.mixers.rwkv6 import RWKV6, RWKV6Config
from fla_swap.mixers.softmax import Softmax, SoftmaxConfig
from fla_swap.mixers.window import Window, WindowConfig

MIXERS: tuple[type[TokenMixer], ...] = (
    Softmax,
    Window,
    RetNet,
    Lightning,
    GLA,
    HGRN,
    HGRN2,
    Mamba,
    Mamba2,
    RWKV6,
    GSA,
    ABC,
    Based,
    Rebased,
    Hedgehog,
    DeltaNet,
    GatedDeltaNet,
    KDA,
)


def mixer_class(name: str) -> type[TokenMixer]:
    """The mixer called `name`; a MixerError that lists the known names otherwise."""
    for mixer in MIXERS:
        if mixer.name == name:
            return mixer
    raise MixerError(f"no mixer is called {name!r}; the mixers are {[m.name for m in MIXERS]}")


__all__ = [
    "ABC",
    "GLA",
    "GSA",
    "HGRN",
    "HGRN2",
    "KDA",
    "MIXERS",
    "RWKV6",
    "ABCConfig",
    "Based",
    "BasedConfig",
    "DeltaNet",
    "DeltaNetConfig",
    "GLAConfig",
    "GSAConfig",
    "GatedDeltaNet",
    "GatedDeltaNetConfig",
    "HGRN2Config",
    "HGRNConfig",
    "Hedgehog",
    "HedgehogConfig",
    "KDAConfig",
    "Lightning",
    "LightningConfig",
    "Mamba",
    "Mamba2",
    "Mamba2Config",
    "MambaConfig",
    "MixerConfig",
    "RWKV6Config",
    "Rebased",
    "RebasedConfig",
    "RetNet",
    "RetNetConfig",
    "Softmax",
    "SoftmaxConfig",
    "State",
    "TokenMixer",
    "Window",
    "WindowConfig",
    "mixer_class",
]
