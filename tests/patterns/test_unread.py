"""Code that the matcher fails on is refused with the error and its place: no model makes `inspect` crash."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_models import plain
from torch import Tensor, nn

import fla_swap as fs
from fla_swap import captures, finishing, matching
from fla_swap.capture import capture
from fla_swap.errors import CaptureError
from fla_swap.patterns import core


def failing(error: Exception) -> Any:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


def guard_error() -> Exception:
    """What torch raises where a graph's size depends on data."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    return GuardOnDataDependentSymNode(None, "Could not extract specialized integer")  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [ValueError("zip() argument 2 is shorter"), IndexError("no such place")])
def test_a_core_that_the_matcher_fails_on_is_a_near_miss(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(matching, "join_projections", failing(error))
    report = fs.inspect(plain("EinsumBthd"), strict=False)
    assert not report.sites and [m.slot for m in report.near_misses] == ["matcher", "matcher"]
    (reason,) = {m.reason for m in report.near_misses}
    assert f"could not read this code, {type(error).__name__}: {error} (test_unread.py:" in reason
    assert "plain_" in report.near_misses[0].source and "please report it" in reason


@pytest.mark.parametrize("make", [guard_error, lambda: TypeError("unhashable")])
def test_a_core_that_a_recogniser_fails_on_is_a_near_miss(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    error = make()
    monkeypatch.setattr(core, "between_products", failing(error))
    report = fs.inspect(plain("EinsumBthd"), strict=False)
    assert not report.sites and [m.slot for m in report.near_misses] == ["scores", "scores"]
    assert all(f"could not read this code, {type(error).__name__}" in m.reason for m in report.near_misses)


def test_a_module_that_the_proof_fails_on_is_a_near_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finishing, "prove", failing(AttributeError("no such name")))
    report = fs.inspect(plain("EinsumBthd"), strict=False)
    assert not report.sites and {m.slot for m in report.near_misses} == {"proof"}
    assert "AttributeError: no such name" in report.near_misses[0].reason


def test_a_graph_that_cannot_be_read_as_a_whole_is_a_capture_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captures, "mask_lengths", failing(KeyError("lost")))
    with pytest.raises(CaptureError, match=r"Decoder: fla_swap could not read this code, KeyError: 'lost'"):
        fs.inspect(plain("EinsumBthd"))


class Sized(nn.Module):
    """A table whose size is a number that was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.Buffer(torch.arange(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + x.new_ones(int(self.steps.max().item()) + 2).sum()


def test_a_table_whose_size_was_computed_has_that_size() -> None:
    graph = capture(Sized(), ((torch.randn(2, 5, 4),), {}), length=5)
    total = next(n for n in graph.nodes if "sum" in str(n.target) and not graph.is_open(n))
    assert float(graph.evaluate(total)) == 5
