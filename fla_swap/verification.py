"""The identity proof: attention rebuilt from an `AttentionSite` alone must compute what the owner module computes.

Everything runs on a copy of the owner in fp32 with randomised weights, because fresh biases, unit norms and zeros would
hide errors, on random hidden states with a padded row and a length past every window.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fla_swap.arguments import get_argument, leaves, set_argument
from fla_swap.call_proof import TOLERANCE, Observed, batch_first, difference, output_of, prove_call
from fla_swap.errors import FlaSwapError, VerificationError
from fla_swap.mixers.softmax import Softmax
from fla_swap.noise import random_tokens, random_weight
from fla_swap.train_mode import TrainMode, train_mode
from fla_swap.types import ArgPath, AttentionSite


@dataclass(frozen=True, kw_only=True)
class Call:
    """How the owner was called in the real model: `args` and `kwargs` recorded by hooks; `valid` bool [B, T];
    `positions` int [B, T], as the model was given them (None: it was given none); `memory_valid` bool [B, S]."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    valid: Tensor
    positions: Tensor | None
    memory_valid: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Proof:
    """`error`: largest relative difference on the valid positions. `dropout`: what training mode drops of the
    probabilities. `eager_error`: how far the owner's own eager code is from what it runs (None: not tried).
    `output_dropout`: what it drops of the attention's output. `lost_dropout`: probability and shape of what it drops
    elsewhere. `own_mask`, `unmasked`: as in `CallContract`. `call_reason`: why a swapped layer cannot be called as the
    owner is."""

    error: float
    dropout: float = 0.0
    eager_error: float | None = None
    output_dropout: float = 0.0
    lost_dropout: tuple[tuple[float, tuple[int, ...]], ...] = ()
    own_mask: bool = False
    unmasked: str | None = None
    call_reason: str | None = None


def prove(site: AttentionSite, owner: nn.Module, call: Call) -> Proof:
    """Compare the owner (as a copy: the user's module is not touched) with the attention rebuilt from `site`.

    Code whose own output is not finite on large hidden states (an exponential without a shift) gets smaller ones.
    Raises VerificationError when they differ by more than `TOLERANCE`, or when either cannot be run.
    """
    try:
        return _prove(site, owner, call, 1.0)
    except _NotFinite:
        return _prove(site, owner, call, 0.2)


class _NotFinite(Exception):
    """The owner's own output is infinite or no number."""


def _prove(site: AttentionSite, owner: nn.Module, call: Call, size: float) -> Proof:
    twin = randomised(owner)
    args, kwargs = as_fp32((call.args, call.kwargs))
    hidden, args, kwargs = random_stream(site.call.hidden, args, kwargs, seed=1, size=size)
    counts = site.temperature is not None and site.temperature.padding
    more: dict[str, Any] = {"valid": call.valid, "positions": None if counts else call.positions}
    if site.call.memory is not None:
        memory, args, kwargs = random_stream(site.call.memory, args, kwargs, seed=2)
        more |= {"memory": batch_first(site, memory), "memory_valid": call.memory_valid}
    residual = None
    if site.call.residual is not None:
        residual = hidden
        if site.call.residual != site.call.hidden:
            residual = hidden.flip(0)
            args, kwargs = set_argument(site.call.residual, residual, args, kwargs)
        residual = batch_first(site, residual)
    weights = {f"{site.fqn}.{n}" if site.fqn else n: t for n, t in twin.state_dict().items()}
    buffers = buffer_versions(twin)
    with torch.no_grad():
        wanted = returned = output_of(site, twin(*args, **kwargs))
        check_buffers(site, twin, buffers)
        if size == 1.0 and not bool(wanted[call.valid].isfinite().all()):
            raise _NotFinite
        if residual is not None:
            wanted = wanted - residual
        try:
            mixer = Softmax.from_attention(site, weights).eval()
        except (FlaSwapError, KeyError, RuntimeError) as error:
            raise VerificationError(f"{site.fqn}: the attention cannot be rebuilt from its site: {error}") from error
        error = max(
            difference(mixer(batch_first(site, hidden), cos_sin=tables, **more)[0], wanted, call.valid)
            for tables in _table_choices(site, args, kwargs, call)
        )
    if not error <= TOLERANCE:
        raise VerificationError(
            f"{site.fqn}: the rebuilt attention differs from the module's own output by {error:.2e} (relative, fp32; "
            f"at most {TOLERANCE:.0e} is accepted): {site.source or 'it'} computes something that the site does not say"
        )
    trained = _train_mode(site, twin, args, kwargs, returned, residual, call)
    with torch.no_grad():
        observed = Observed(site=site, twin=twin, args=args, kwargs=kwargs, returned=returned, valid=call.valid)
        called = prove_call(observed, mixer, lambda other: Softmax.from_attention(other, weights).eval())
    return Proof(
        error=error,
        dropout=trained.probabilities,
        output_dropout=trained.output,
        lost_dropout=trained.others,
        own_mask=called.own_mask,
        unmasked=called.unmasked,
        call_reason=called.reason,
        eager_error=_eager(site, twin, args, kwargs, returned, call.valid),
    )


def random_stream(
    path: ArgPath, args: tuple, kwargs: dict, *, seed: int, size: float = 1.0
) -> tuple[Tensor, tuple, dict]:
    """Random values (`random_tokens`) in the place of the tensor at `path`, and wherever an equal one is passed."""
    before = get_argument(path, args, kwargs)
    after = (size * random_tokens(before.shape, seed)).to(before.device)
    for place, value in leaves(args, kwargs):
        if isinstance(value, Tensor) and value.shape == before.shape and torch.equal(value, before):
            args, kwargs = set_argument(place, after, args, kwargs)
    return after, args, kwargs


def _table_choices(site: AttentionSite, args: tuple, kwargs: dict, call: Call) -> list[tuple[Tensor, Tensor] | None]:
    """The site's own frequencies and, when the caller passes tables, those. Half-precision tables stand alone, also
    those that were handed on as fp32 afterwards."""
    if site.call.cos is None or site.call.sin is None:
        return [None]
    cos, sin = get_argument(site.call.cos, args, kwargs), get_argument(site.call.sin, args, kwargs)
    half = get_argument(site.call.cos, call.args, call.kwargs).dtype in (torch.float16, torch.bfloat16)
    half = half or any(bool((cos.to(dtype).float() == cos).all()) for dtype in (torch.float16, torch.bfloat16))
    return [(cos, sin)] if half else [(cos, sin), None]


def randomised(owner: nn.Module) -> nn.Module:
    """A copy in fp32 and eval mode with every parameter random (`random_weight`).

    Parameters without values (fake tensors) come out as real ones, vectors around 1.
    """
    memo: dict[int, Any] = {id(p): _real(p) for p in owner.parameters() if isinstance(p, FakeTensor)}
    twin = copy.deepcopy(owner, memo).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(random_weight(parameter, generator))
    return twin


def _real(parameter: nn.Parameter) -> nn.Parameter:
    values = torch.ones(parameter.shape, dtype=torch.float32, device=parameter.device)
    return nn.Parameter(values, requires_grad=parameter.requires_grad)


def as_fp32(value: Any) -> Any:
    if isinstance(value, FakeTensor) and value.is_floating_point():
        return torch.randn(value.shape, generator=torch.Generator().manual_seed(2))
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(as_fp32(v) for v in value)
    if type(value) is dict:
        return {k: as_fp32(v) for k, v in value.items()}
    return value


def _train_mode(
    site: AttentionSite,
    twin: nn.Module,
    args: tuple,
    kwargs: dict,
    returned: Tensor,
    residual: Tensor | None,
    call: Call,
) -> TrainMode:
    """What training mode drops; raises VerificationError when it does anything else that a site cannot state."""
    keys = call.valid if call.memory_valid is None else call.memory_valid
    lengths = (call.valid.shape[1], keys.shape[1])
    found = train_mode(twin, lambda: output_of(site, twin(*args, **kwargs)), residual, lengths)
    apart = difference(found.returned, returned, call.valid)
    if not apart <= TOLERANCE:
        raise VerificationError(
            f"{site.fqn}: it computes something else in training mode, also with nothing dropped: its output differs "
            f"by {apart:.2e} from that in eval mode"
        )
    if found.scores:
        raise VerificationError(
            f"{site.fqn}: {found.scores:g} of the scores are dropped before the softmax in training mode, which a site "
            "cannot state"
        )
    return found


def buffer_versions(twin: nn.Module) -> dict[str, tuple[Tensor, int, Tensor]]:
    return {n: (b, b._version, b.clone()) for n, b in twin.named_buffers() if not isinstance(b, FakeTensor)}


def check_buffers(site: AttentionSite, twin: nn.Module, before: Mapping[str, tuple[Tensor, int, Tensor]]) -> None:
    """Buffers that a forward pass makes longer are tables; other values in a buffer are a memory of the calls."""
    for name, now in twin.named_buffers():
        if name not in before:
            continue
        tensor, version, value = before[name]
        if (now is tensor and now._version == version) or now.shape != value.shape or torch.equal(now, value):
            continue
        raise VerificationError(
            f"{site.fqn}: its forward writes its buffer {name!r}, which a mixer in its place would not do"
        )


def _eager(
    site: AttentionSite, twin: nn.Module, args: tuple, kwargs: dict, wanted: Tensor, valid: Tensor
) -> float | None:
    """How far the module's own eager code is from `wanted`, where its config names another implementation.

    None without a mask where the site has one: eager code does not make its own.
    """
    config = getattr(twin, "config", None)
    running = getattr(config, "_attn_implementation", None)
    if config is None or running in (None, "eager"):
        return None
    mask = site.call.mask
    if site.mask.kind != "bidirectional" and (mask is None or get_argument(mask, args, kwargs) is None):
        return None
    if mask is not None and isinstance(seen := get_argument(mask, args, kwargs), Tensor) and seen.dtype == torch.bool:
        additive = torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, torch.finfo(torch.float32).min)
        args, kwargs = set_argument(mask, additive, args, kwargs)
    try:
        config._attn_implementation = "eager"
        with torch.no_grad():
            return difference(output_of(site, twin(*args, **kwargs)), wanted, valid)
    except (ValueError, KeyError, NotImplementedError):
        return None
    finally:
        config._attn_implementation = running


def weights_of(model: nn.Module) -> Mapping[str, Tensor]:
    """Fully qualified name → tensor for every parameter and buffer."""
    return {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}
