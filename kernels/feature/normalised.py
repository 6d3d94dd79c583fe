"""Linear attention with a normaliser on features that exist already (Transformers are RNNs, 2006.16236)."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_swap.kernels.decay.ops import gla, gla_step

FeatureState = tuple[Tensor, Tensor]


def normalised(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    eps: float = 1e-6,
    initial_state: FeatureState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, FeatureState | None]:
    """Linear attention with a normaliser on features that exist already, as in Transformers are RNNs, 2006.16236.

    q, k [B,T,H,F] features (queries' times what the keys' lack), v [B,T,H,V], g [B,T,H] log decays or None. The
    normaliser is one more value channel that is always one. Computed in fp32 or wider. Returns as `based`.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    features = q.shape[3]
    qf, kf, vf = (x.to(dtype) for x in (q, k, v))
    vf = torch.cat((vf, torch.ones_like(vf[..., :1])), -1)
    state = None if initial_state is None else torch.cat((initial_state[0], initial_state[1].unsqueeze(-1)), -1)
    wide = None if g is None else g.to(dtype).unsqueeze(-1).expand(*g.shape, features)
    o, final = gla(
        qf,
        kf,
        vf,
        wide,
        scale=1.0,
        initial_state=state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        implementation=implementation,
    )
    o = (o[..., :-1] / (o[..., -1:] + eps)).to(v.dtype)
    return o, None if final is None else (final[..., :-1], final[..., -1])


def normalised_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    state: FeatureState,
    eps: float = 1e-6,
    implementation: str | None = None,
) -> Tensor:
    """`normalised` for decoding, in place on both parts of the state (contiguous); no gradient."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    qf, kf, vf = (x.to(dtype) for x in (q, k, v))
    above = gla_step(qf, kf, vf, state=state[0], scale=1.0, implementation=implementation)
    ones = torch.ones_like(vf[..., :1])
    below = gla_step(qf, kf, ones, state=state[1].unsqueeze(-1), scale=1.0, implementation=implementation)
    return (above / (below + eps)).to(v.dtype)
