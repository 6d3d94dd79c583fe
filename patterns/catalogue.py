"""The recognisers, in the order in which they are tried. A new one is one class in one file and one line here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fla_swap.errors import RecogniserError
from fla_swap.patterns.adapters import Adapted
from fla_swap.patterns.base import Recogniser
from fla_swap.patterns.core import FusedCore, SoftmaxCore
from fla_swap.patterns.flex import FlexCore
from fla_swap.patterns.norm import QKNorm
from fla_swap.patterns.path import Clip, Factor
from fla_swap.patterns.plugins import checked, installed_recognisers
from fla_swap.patterns.projection import Project
from fla_swap.patterns.rope import Rotary
from fla_swap.patterns.scores import Floor, Mask, Scale, Softcap
from fla_swap.patterns.sinks import Shift, Sinks
from fla_swap.patterns.temperature import LogTemperature
from fla_swap.patterns.unnormalised import UnnormalisedCore

SCORES: tuple[Recogniser, ...] = (Shift(), Sinks(), Softcap(), Scale(), Mask(), Floor())
PATH: tuple[Recogniser, ...] = (Project(), Adapted(), QKNorm(), Factor(), Clip(), LogTemperature(), Rotary())


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """Recognisers by slot, in order."""

    cores: tuple[Recogniser, ...]
    scores: tuple[Recogniser, ...]
    path: tuple[Recogniser, ...]


def catalogue(extra: Iterable[Recogniser] | None = None) -> Catalogue:
    """The built-in recognisers with a user's own before them: `extra`, or those of installed packages when it is None.

    Raises RecogniserError for what is no recogniser, for an unknown slot, and for two of one name in a slot.
    """
    if extra is not None and not isinstance(extra, Iterable):
        raise RecogniserError(f"patterns={extra!r} is no sequence of recognisers: write patterns=(…,)")
    own = list(installed_recognisers() if extra is None else (checked(r, "patterns=") for r in extra))
    scores = _unique("scores", own, SCORES)
    builtin = (FusedCore(), FlexCore(), SoftmaxCore(scores=scores), UnnormalisedCore())
    return Catalogue(cores=_unique("core", own, builtin), scores=scores, path=_unique("path", own, PATH))


def _unique(slot: str, own: list[Recogniser], builtin: tuple[Recogniser, ...]) -> tuple[Recogniser, ...]:
    together = (*(r for r in own if r.slot == slot), *builtin)
    names = [r.name for r in together]
    if len(set(names)) != len(names):
        raise RecogniserError(f"two recognisers for slot {slot!r} have the same name: {sorted(names)}")
    return together
