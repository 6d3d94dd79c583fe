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
) -> tuple[Tensor, Tensor, FeatureState | None]:
    """Σ_j (q_t · k_j) v_j / (Σ_j q_t · k_j + eps) over the tokens up to t.

    q, k [B,T,H,F] features of one dtype (queries' times what the keys' lack), v [B,T,H,V], g [B,T,H] log decays or
    None. The normaliser is one more value channel that is always one. Returns o [B,T,H,V] in v's dtype, the
    denominators [B,T,H] (without eps), and the final (S [N,H,F,V], z [N,H,F]) if asked for.
    """
    dtype, features = q.dtype, q.shape[3]
    wide_dtype = torch.promote_types(dtype, torch.float32)
    vf = torch.cat((v.to(dtype), v.new_ones((*v.shape[:3], 1), dtype=dtype)), -1)
    state = None if initial_state is None else torch.cat((initial_state[0], initial_state[1].unsqueeze(-1)), -1)
    wide = None if g is None else g.to(wide_dtype).unsqueeze(-1).expand(*g.shape, features)
    o, final = gla(
        q,
        k,
        vf,
        wide,
        scale=1.0,
        initial_state=state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        implementation=implementation,
    )
    above, below = o[..., :-1].to(wide_dtype), o[..., -1].to(wide_dtype)
    o = (above / (below + eps).unsqueeze(-1)).to(v.dtype)
    return o, below, None if final is None else (final[..., :-1].contiguous(), final[..., -1].contiguous())


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
