"""The run for compute-sanitizer: every operator at an odd shape, forward, backward, packed and one step."""

from __future__ import annotations

import pytest

from fla_swap.bench.catalogue import CASES
from fla_swap.bench.sanitize import exercise


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_every_operator_runs_every_way(name):
    assert exercise(name, "cpu", "bfloat16") == "forward, backward, packed, step"
