"""The proof of a call: a swapped layer, called as the owner was called, returns what that returned; and what the owner
does with masks that it was not called with: none, and one that hides something where the observed one hid nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fla_swap.arguments import HIDDEN, get_argument, set_argument
from fla_swap.errors import FlaSwapError
from fla_swap.hybrid import SwappedAttention
from fla_swap.mixers import TokenMixer
from fla_swap.types import ArgPath, AttentionSite, Mask

TOLERANCE = 1e-4
"""The largest relative difference, in fp32, between what a model computes and what is rebuilt from a site."""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """One call of the owner (`twin`, fp32, random weights): what it `returned`, and which tokens are `valid` [B, T]."""

    site: AttentionSite
    twin: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    returned: Tensor
    valid: Tensor

    def argument(self, path: ArgPath | None) -> Any:
        return None if path is None else get_argument(path, self.args, self.kwargs)

    def again(self, path: ArgPath, value: Any, run: nn.Module) -> Tensor:
        """The output of `run`, called with another value at `path`."""
        args, kwargs = set_argument(path, value, self.args, self.kwargs)
        return output_of(self.site, run(*args, **kwargs))


@dataclass(frozen=True, kw_only=True)
class CallProof:
    """`own_mask`, `unmasked`: as in `CallContract`; `reason`: why a swapped layer does not honour the call, or None."""

    own_mask: bool
    unmasked: str | None = None
    reason: str | None = None


def prove_call(observed: Observed, mixer: TokenMixer, rebuilt: Callable[[AttentionSite], TokenMixer]) -> CallProof:
    """Call a swapped layer with `mixer` as the owner was called; `rebuilt` makes the softmax attention of a site."""
    site = observed.site
    if site.kind == "cross":
        return CallProof(own_mask=site.call.own_mask)
    own = site.call.own_mask or _hides_itself(observed)
    reason = _called(observed, _layer(observed, own, mixer))
    if reason is not None and not own and _called(observed, _layer(observed, True, mixer)) is None:
        own, reason = True, None
    if reason is None:
        reason = _blank_mask(observed, _layer(observed, own, mixer))
    return CallProof(own_mask=own, unmasked=_unmasked(observed, rebuilt), reason=reason)


def _layer(observed: Observed, own: bool, mixer: TokenMixer) -> SwappedAttention:
    site = dataclasses.replace(observed.site, call=dataclasses.replace(observed.site.call, own_mask=own))
    return SwappedAttention(site, mixer, observed.twin, keep_original=False).eval()


def _called(observed: Observed, layer: SwappedAttention) -> str | None:
    try:
        found = output_of(observed.site, layer(*observed.args, **observed.kwargs))
        apart = difference(found, observed.returned, observed.valid)
    except (FlaSwapError, RuntimeError, TypeError, ValueError, IndexError) as error:
        return f"a swapped layer cannot be called as the module is: {type(error).__name__}: {error}"
    if apart <= TOLERANCE:
        return None
    return (
        f"a swapped layer, called as the module is, returns something else (by {apart:.2e}): one of the arguments "
        f"{sorted(layer.tensors_seen or ())} means something that is not understood"
    )


def _hides_itself(observed: Observed) -> bool:
    """Whether the owner hides what the site's mask hides also where its mask argument hides nothing."""
    path, rows = observed.site.call.mask, observed.valid.all(1)
    mask = observed.argument(path)
    if path is None or not isinstance(mask, Tensor) or mask.dim() != 4 or observed.site.mask.kind == "bidirectional":
        return False
    nothing = torch.zeros_like(mask) if mask.is_floating_point() or observed.site.call.hides else torch.ones_like(mask)
    seen = observed.again(path, nothing, observed.twin)
    return bool(rows.any()) and difference(seen[rows], observed.returned[rows], observed.valid[rows]) <= TOLERANCE


def _unmasked(observed: Observed, rebuilt: Callable[[AttentionSite], TokenMixer]) -> str | None:
    """What the owner computes without its mask argument, told on the rows without padding."""
    site, rows = observed.site, observed.valid.all(1)
    if site.call.mask is None or not isinstance(observed.argument(site.call.mask), Tensor):
        return None
    if not bool(rows.any()):
        return "other"
    try:
        found = observed.again(site.call.mask, None, observed.twin)
        if difference(found[rows], observed.returned[rows], observed.valid[rows]) <= TOLERANCE:
            return "own"
        if site.mask.kind in ("window", "chunked"):
            causal = dataclasses.replace(site, mask=Mask(kind="causal"))
            layer = SwappedAttention(causal, rebuilt(causal), observed.twin, keep_original=False).eval()
            wanted = observed.again(site.call.mask, None, layer)
            if difference(found[rows], wanted[rows], observed.valid[rows]) <= TOLERANCE:
                return "causal"
    except Exception:  # whatever the owner's code does without the mask that it expects
        return "other"
    return "other"


def _blank_mask(observed: Observed, layer: SwappedAttention) -> str | None:
    """Where an observed mask hid nothing: does it hide keys when it says so? The reason when it does something else."""
    call = observed.site.call
    for path in (call.mask, call.padding, call.pairs):
        mask = observed.argument(path)
        if path is None or not isinstance(mask, Tensor) or bool(_hidden(mask, call.hides).any()):
            continue
        hiding, compared = _hiding(mask, observed.valid, call.hides, pairs=path is call.pairs)
        try:
            wanted, found = (observed.again(path, hiding, run) for run in (observed.twin, layer))
            apart = difference(found, wanted, compared)
        except Exception as error:
            apart = f"{type(error).__name__}: {str(error)[:200]}"
        if isinstance(apart, str) or not apart <= TOLERANCE:
            told = apart if isinstance(apart, str) else f"by {apart:.2e}"
            return (
                f"argument {path.keyword or f'number {path.position}'} hid nothing when the module was observed; where "
                f"it hides keys, the module does something else than hide them ({told}). Inspect with example_inputs "
                "in which it hides something"
            )
    return None


def _hidden(mask: Tensor, hides: bool) -> Tensor:
    """bool, true where a mask (additive, of truth values or of whole numbers) hides a key."""
    if mask.is_floating_point():
        return mask <= HIDDEN
    return mask if hides and mask.dtype == torch.bool else mask == 0


def _hiding(mask: Tensor, valid: Tensor, hides: bool, *, pairs: bool) -> tuple[Tensor, Tensor]:
    """The mask hiding what comes later ([T, S], `pairs`), else the first third of the keys; the tokens to compare."""
    fill = torch.finfo(mask.dtype).min if mask.is_floating_point() else hides and mask.dtype == torch.bool
    if pairs:
        return mask.masked_fill(torch.ones_like(mask, dtype=torch.bool).triu(1), fill), valid
    mask, compared, count = mask.clone(), valid.clone(), max(1, mask.shape[-1] // 3)
    mask[..., :count], compared[:, :count] = fill, False
    return mask, compared


def difference(found: Tensor, wanted: Tensor, valid: Tensor) -> float:
    """The largest difference on the valid tokens, relative to the largest value."""
    found, wanted = found[valid].double(), wanted[valid].double()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def output_of(site: AttentionSite, returned: Any) -> Tensor:
    """The attention's output [B, T, D] in what the owner returned."""
    return batch_first(site, returned if site.call.outputs is None else returned[site.call.output_index])


def batch_first(site: AttentionSite, x: Tensor) -> Tensor:
    return x.transpose(0, 1) if site.call.time_first else x
