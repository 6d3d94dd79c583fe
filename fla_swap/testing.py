"""For tests of a recogniser of your own: `check_recogniser` runs positives, near misses and the proof."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from fla_swap.errors import FlaSwapError
from fla_swap.inspection import Example, inspect
from fla_swap.patterns.base import Recogniser
from fla_swap.types import AttentionReport, AttentionSite

Positive = tuple[nn.Module, Example] | tuple[nn.Module, Example, Mapping[str, Any]]
NearMissCase = tuple[nn.Module, Example, str]


def check_recogniser(
    recogniser: Recogniser, *, positives: Iterable[Positive], near_misses: Iterable[NearMissCase] = ()
) -> None:
    """Hold a recogniser to what it should find, and to what it should leave alone.

    Args:
        recogniser: an instance; every check runs `fs.inspect` with it, and with the built-in recognisers alone.
        positives: (module, example inputs), or with a third item, facts that each new site must state, such as
            {"heads": 4, "softcap": 30.0}. The example inputs are those of `fs.inspect`.
        near_misses: (module, example inputs, a part of the reason). Modules that look alike and must be refused.
    Raises:
        AssertionError: a positive is found without the recogniser, is not found with it, is not proved, or states
            other facts; a near miss is found, or is refused for another reason. The message has the report's words.
    """
    positives, near_misses = list(positives), list(near_misses)
    assert positives, "a recogniser needs a positive: a module whose attention is found only with its help"
    for number, (module, example, *rest) in enumerate(positives):
        _check_positive(f"positive {number}", recogniser, module, example, rest[0] if rest else {})
    for number, (module, example, reason) in enumerate(near_misses):
        _check_near_miss(f"near miss {number}", recogniser, module, example, reason)


def _check_positive(
    case: str, recogniser: Recogniser, module: nn.Module, example: Example, facts: Mapping[str, Any]
) -> None:
    sites, report = _new_sites(case, recogniser, module, example)
    assert sites, f"{case}: with {recogniser.name!r} no site is found that is not found without it; {_said(report)}"
    for site in sites:
        assert site.proved, f"{case}: {site.fqn} is not proved"
        wrong = {n: getattr(site, n) for n, wanted in facts.items() if not _equal(getattr(site, n), wanted)}
        assert not wrong, f"{case}: {site.fqn} states {wrong}, expected { ({n: facts[n] for n in wrong}) }"


def _check_near_miss(case: str, recogniser: Recogniser, module: nn.Module, example: Example, reason: str) -> None:
    sites, report = _new_sites(case, recogniser, module, example)
    assert not sites, f"{case}: {[s.fqn for s in sites]} should have been refused, and were found and proved"
    assert any(reason in m.reason for m in report.near_misses), (
        f"{case}: no near miss has {reason!r} in its reason; {_said(report)}"
    )


def _new_sites(
    case: str, recogniser: Recogniser, module: nn.Module, example: Example
) -> tuple[list[AttentionSite], AttentionReport]:
    """The sites that are there, or are stated so, only with the recogniser; and the report with it."""
    try:
        before = inspect(module, example, patterns=(), strict=False)
        after = inspect(module, example, patterns=(recogniser,), strict=False)
    except FlaSwapError as error:
        raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
    known = {_stated(site) for site in before.sites}
    return [site for site in after.sites if _stated(site) not in known], after


def _stated(site: AttentionSite) -> AttentionSite:
    """A site without what depends on the sites around it."""
    return dataclasses.replace(site, layer=0, max_error=None)


def _said(report: AttentionReport) -> str:
    misses = [f"{m.fqn} stopped at {m.slot!r}: {m.reason} ({m.source})" for m in report.near_misses]
    return f"the sites are {[s.fqn for s in report.sites]}, the near misses {misses}"


def _equal(found: Any, wanted: Any) -> bool:
    if isinstance(found, float) and isinstance(wanted, int | float):
        return math.isclose(found, wanted, rel_tol=1e-5)
    return found == wanted
