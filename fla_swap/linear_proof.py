"""The proof of a layer that is linear already: our mixer, built from what was read, computes what the module computes.

Everything runs on a copy of the module in fp32 with random weights, at the lengths that it was observed at, whole and
with the state carried over a split and token by token; once more with larger and with smaller vectors, which is where
decays and write strengths come from. Only equality is a match.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fla_swap.call_proof import TOLERANCE, Observed, batch_first, difference, output_of, prove_call
from fla_swap.errors import FlaSwapError, VerificationError
from fla_swap.mixers import TokenMixer, mixer_class
from fla_swap.mixers.same import same_options
from fla_swap.train_mode import train_mode
from fla_swap.types import AttentionSite
from fla_swap.verification import Call, as_fp32, buffer_versions, check_buffers, random_stream, randomised

SIZES = ((1.0, TOLERANCE), (0.1, TOLERANCE), (3.0, 10 * TOLERANCE))
"""Factors on the module's vectors, and what may differ: with large ones a norm behind almost nothing makes the rounding
of fp32 large (both sides were seen 1e-4 away from float64)."""
STEPS = 3


def same_mixer(site: AttentionSite, weights: Any) -> TokenMixer:
    """The mixer that computes what the linear layer at `site` computes. MixerError when no option says it."""
    assert site.recurrence is not None
    return mixer_class(site.recurrence.mixer).from_attention(site, weights, same_options(site))


def prove_linear(candidates: Sequence[AttentionSite], owner: nn.Module, calls: Sequence[Call]) -> tuple[int, float]:
    """Which candidate is what the module computes, and its largest relative difference. `calls`: of several lengths.

    Raises VerificationError when none is, when the module does something else in training mode or keeps a memory of its
    own, or when a swapped layer cannot be called as it is.
    """
    number = _closest(candidates, owner, calls[0])
    site = candidates[number]
    error = 0.0
    for size, tolerance in SIZES:
        for call in calls:
            found = _compared(site, _Run.of(site, owner, call, size))
            error = max(error, found)
            if not found <= tolerance:
                raise VerificationError(
                    f"{site.fqn}: {site.kind}, rebuilt, differs from the module's own output by {found:.2e} (relative, "
                    f"fp32; at most {tolerance:.0e} is accepted) with vectors {size:g} times as large, on "
                    f"{call.valid.shape[1]} tokens"
                )
    run = _Run.of(site, owner, calls[0], 1.0)
    _check_training(site, run)
    _check_call(site, run)
    return number, error


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """One call of a random copy of the owner."""

    twin: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden: Tensor
    returned: Tensor
    valid: Tensor

    @staticmethod
    def of(site: AttentionSite, owner: nn.Module, call: Call, size: float) -> _Run:
        twin = randomised(owner)
        with torch.no_grad():
            for parameter in twin.parameters():
                if parameter.dim() == 1:
                    parameter.mul_(size)
        args, kwargs = as_fp32((call.args, call.kwargs))
        hidden, args, kwargs = random_stream(site.call.hidden, args, kwargs, seed=1)
        buffers = buffer_versions(twin)
        with torch.no_grad():
            returned = output_of(site, twin(*args, **kwargs))
        check_buffers(site, twin, buffers)
        return _Run(twin=twin, args=args, kwargs=kwargs, hidden=hidden, returned=returned, valid=call.valid)

    def mixer(self, site: AttentionSite) -> TokenMixer:
        weights = {f"{site.fqn}.{n}" if site.fqn else n: t for n, t in self.twin.state_dict().items()}
        return same_mixer(site, weights).eval()


def _closest(candidates: Sequence[AttentionSite], owner: nn.Module, call: Call) -> int:
    """The candidate whose output is nearest. Raises VerificationError when none can be built, or is near enough."""
    run, reasons, errors = _Run.of(candidates[0], owner, call, 1.0), [], {}
    for number, site in enumerate(candidates):
        try:
            errors[number] = _whole(site, run)
        except (FlaSwapError, KeyError, RuntimeError) as error:
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        if errors[number] < TOLERANCE / 100:
            break
    if not errors:
        raise VerificationError(f"{candidates[0].fqn}: no mixer of ours can be built from it: {reasons[0]}")
    best = min(errors, key=lambda number: errors[number])
    if not errors[best] <= TOLERANCE:
        raise VerificationError(
            f"{candidates[0].fqn}: read as {candidates[0].kind}, but what is rebuilt from it differs from the module's "
            f"own output by {errors[best]:.2e} at least (relative, fp32; {len(errors)} readings tried): it computes "
            f"something else ({candidates[0].source}){_rounded(owner)}"
        )
    return best


def _rounded(owner: nn.Module) -> str:
    """What to know where tables that the module stores are rounded themselves."""
    half = [n for n, b in owner.named_buffers() if b.dtype in (torch.float16, torch.bfloat16)]
    if not half:
        return ""
    return (
        f"; it stores {half} in half precision, where they are no powers of one rate: inspect the model in fp32 (the "
        "plan is for the other too)"
    )


@torch.no_grad()
def _whole(site: AttentionSite, run: _Run) -> float:
    x = batch_first(site, run.hidden)
    return difference(run.mixer(site)(x, valid=run.valid)[0], run.returned, run.valid)


@torch.no_grad()
def _compared(site: AttentionSite, run: _Run) -> float:
    """The largest difference of the whole, and of the same with a state carried on."""
    mixer, x, valid = run.mixer(site), batch_first(site, run.hidden), run.valid
    whole = mixer(x, valid=valid)[0]
    length = x.shape[1]
    bounds = [0, length // 2, *range(max(length - STEPS, length // 2 + 1), length + 1)]
    state = mixer.init_state(len(x), device=x.device, dtype=x.dtype)
    pieces = []
    for start, stop in itertools.pairwise(bounds):
        if stop > start:
            pieces.append(mixer(x[:, start:stop], valid=valid[:, start:stop], state=state)[0])
    carried = torch.cat(pieces, 1)
    return max(difference(y, run.returned, valid) for y in (whole, carried))


def _check_training(site: AttentionSite, run: _Run) -> None:
    """It must compute the same in training mode, and drop nothing."""
    lengths = (run.valid.shape[1], run.valid.shape[1])
    found = train_mode(run.twin, lambda: output_of(site, run.twin(*run.args, **run.kwargs)), None, lengths)
    apart = difference(found.returned, run.returned, run.valid)
    if not apart <= TOLERANCE or found.scores or found.probabilities or found.output or found.others:
        raise VerificationError(f"{site.fqn}: it computes something else in training mode, by {apart:.2e}")


def _check_call(site: AttentionSite, run: _Run) -> None:
    with torch.no_grad():
        observed = Observed(
            site=site, twin=run.twin, args=run.args, kwargs=run.kwargs, returned=run.returned, valid=run.valid
        )
        called = prove_call(observed, run.mixer(site), run.mixer)
    if called.reason is not None:
        raise VerificationError(f"{site.fqn}: {called.reason}")
