"""A mixer of ours that computes exactly what a linear layer of a model computes: its options and its weights.

The layer's recurrence (`AttentionSite.recurrence`) says which mixer; nothing is left to training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fla_swap.errors import MixerError
from fla_swap.mixers.base import copy_linear, read_projection, read_ref, wide
from fla_swap.types import AttentionSite, Norm, Recurrence, WeightRef

SAME = "same"
"""What a plan calls the mixer that a linear layer's own recurrence names."""

_DECAYS = {"mamba2": "dt_proj", "gated_deltanet": "a_proj", "kda": "f_up"}
_GATES = {"silu": "swish", "sigmoid": "sigmoid"}


def same_options(site: AttentionSite) -> dict[str, Any]:
    """The options of the mixer that `site.recurrence` names. MixerError for what no option of ours says."""
    read = _recurrence(site)
    norm, gate = read.norm, None if read.gate_activation is None else _GATES[read.gate_activation]
    if norm is not None and read.gate_first and gate == "sigmoid":
        raise MixerError(f"{site.fqn}: a norm behind a sigmoid gate, which our gates (2 · sigmoid) do not give exactly")
    options = {
        "hidden_size": site.hidden_size,
        "num_heads": site.heads,
        "num_kv_heads": site.heads,
        "head_dim": site.head_dim,
        "v_head_dim": site.v_head_dim,
        "q_bias": site.q.bias is not None,
        "k_bias": site.k.bias is not None,
        "v_bias": site.v.bias is not None,
        "o_bias": site.o is not None and site.o.bias is not None,
        "output_size": site.output_size,
        "conv_size": read.taps,
        "qkv_activation": read.activation if read.taps is None else None,
        "conv_bias": read.conv_bias is not None,
        "conv_activation": None if read.taps is None else read.activation,
        "output_norm": norm is not None,
        "norm_after_gate": read.gate_first,
        "output_gate": gate,
        "gate_rank": read.gate_rank,
        "use_rope": False,
        "scale": read.scale,
        "qk_l2norm": read.unit,
        **_norm_options(site, read),
    }
    return options | _own_options(site, read)


def _recurrence(site: AttentionSite) -> Recurrence:
    if site.recurrence is None:
        raise MixerError(f"{site.fqn} is softmax attention: {SAME!r} is for layers that are linear already")
    return site.recurrence


def _norm_options(site: AttentionSite, read: Recurrence) -> dict[str, Any]:
    norm, width = read.norm, read.norm_width
    if norm is None or width is None:
        return {}
    if width % site.v_head_dim or site.heads % (width // site.v_head_dim):
        raise MixerError(f"{site.fqn}: a norm over {width} channels in heads of {site.v_head_dim}")
    groups = site.heads * site.v_head_dim // width
    return {
        "norm_eps": norm.eps,
        "norm_kind": norm.kind,
        "norm_groups": None if groups == site.heads else groups,
        "norm_bias": norm.bias is not None,
    }


def _own_options(site: AttentionSite, read: Recurrence) -> dict[str, Any]:
    """The options that only some of the mixers have."""
    shared = read.qk_heads
    if read.mixer == "mamba2":
        return {"num_groups": shared, "step_limits": read.step_limits}
    if read.step_limits is not None:
        raise MixerError(f"{site.fqn}: the softplus in its decay is held between {read.step_limits}")
    if read.mixer == "lightning":
        if shared != site.heads:
            raise MixerError(f"{site.fqn}: {shared} heads of q and k for {site.heads} of v under a fixed decay")
        return {"train_decay": False}
    if read.beta_limit not in (1.0, 2.0):
        raise MixerError(f"{site.fqn}: a write strength up to {read.beta_limit:g}; it is 1 or 2")
    own: dict[str, Any] = {"num_qk_heads": shared, "negative_eigenvalues": read.beta_limit == 2.0}
    if read.mixer == "kda":
        if read.decay_down is None:
            raise MixerError(f"{site.fqn}: a decay of full rank for each channel")
        own["decay_rank"] = read.decay_rank
    return own


@torch.no_grad()
def load_recurrence(mixer: Any, site: AttentionSite, weights: Mapping[str, Tensor]) -> None:
    """Give `mixer`, built with `same_options`, the weights of the layer at `site`."""
    read = _recurrence(site)
    projections = [(mixer.q_proj, site.q), (mixer.k_proj, site.k), (mixer.v_proj, site.v)]
    if site.o is not None:
        projections.append((mixer.o_proj, site.o))
    if read.beta is not None:
        projections.append((mixer.b_proj, read.beta))
    if read.gate is not None:
        projections.append((mixer.gate.up, read.gate))
    if read.gate_down is not None:
        projections.append((mixer.gate.down, read.gate_down))
    for own, projection in projections:
        copy_linear(own, *read_projection(weights, projection))
    if read.conv is not None:
        mixer.conv.weight.copy_(read_ref(weights, read.conv))
    if read.conv_bias is not None:
        mixer.conv.bias.copy_(read_ref(weights, read.conv_bias))
    _load_output(mixer, read, weights)
    _load_decay(mixer, read, weights)
    if hasattr(mixer, "D"):
        mixer.D.zero_()
        if read.skip is not None:
            mixer.D.copy_(_vector(weights, read.skip))


def _vector(weights: Mapping[str, Tensor], ref: WeightRef) -> Tensor:
    return read_ref(weights, ref).flatten()


def _load_output(mixer: Any, read: Recurrence, weights: Mapping[str, Tensor]) -> None:
    """Weight and bias of the norm; our sigmoid gates are twice a sigmoid."""
    half = 0.5 if read.gate_activation == "sigmoid" else 1.0
    norm = read.norm or Norm(kind="rms", eps=0.0)
    mixer.head_scale.fill_(half)
    if norm.weight is not None:
        weight = wide(_vector(weights, norm.weight)) + norm.offset
        mixer.head_scale.copy_(half * weight.view(-1, mixer.v_head_dim).expand_as(mixer.head_scale))
    if norm.bias is not None:
        bias = wide(_vector(weights, norm.bias))
        mixer.head_bias.copy_(half * bias.view(-1, mixer.v_head_dim).expand_as(mixer.head_bias))


def _load_decay(mixer: Any, read: Recurrence, weights: Mapping[str, Tensor]) -> None:
    assert read.rate is not None
    rate = _vector(weights, read.rate)
    if read.decay is None:
        mixer.log_rate.copy_(wide(rate).log())
        return
    mixer.A_log.copy_(rate)
    weight, bias = read_projection(weights, read.decay)
    getattr(mixer, _DECAYS[read.mixer]).weight.copy_(weight)
    if read.decay_down is not None:
        down, none = read_projection(weights, read.decay_down)
        if none is not None:
            raise MixerError(f"{read.decay_down.weight.name}: a bias inside the low-rank map of a decay")
        mixer.f_down.weight.copy_(down)
    shift = torch.zeros_like(mixer.dt_bias) if bias is None else bias
    mixer.dt_bias.copy_(shift if read.dt_bias is None else shift + _vector(weights, read.dt_bias))
