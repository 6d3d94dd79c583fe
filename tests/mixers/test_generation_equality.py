"""Every mixer by every way to generate, with a state and without; `results/generation-equality.md` is the same."""

from __future__ import annotations

import pytest

from fla_swap.bench.generation_checks import CHECKS, SLOW
from fla_swap.bench.layer_checks import NotApplicable
from fla_swap.mixers import MIXERS, Softmax


def cells():
    for kind in MIXERS:
        for name in CHECKS:
            marks = [pytest.mark.slow] if name in SLOW else []
            yield pytest.param(kind, name, id=f"{kind.name}-{name}", marks=marks)


@pytest.mark.parametrize(("kind", "name"), cells())
def test_generation_with_a_state_equals_generation_without(kind, name):
    try:
        CHECKS[name](kind)
    except NotApplicable:
        assert kind is Softmax and name == "state bytes"
