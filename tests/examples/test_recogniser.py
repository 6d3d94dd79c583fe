"""The recogniser that CONTRIBUTING walks through: what it finds, what it refuses; the page shows this very file."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fla_swap.inspection import inspect
from fla_swap.testing import check_recogniser

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "examples" / "recogniser.py"


@pytest.fixture(scope="module")
def hadamard() -> Any:
    spec = importlib.util.spec_from_file_location("example_recogniser", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.Hadamard()


def walsh(size: int) -> Tensor:
    """The Hadamard matrix of Sylvester, scaled to be orthogonal."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / size**0.5


class Rotated(nn.Module):
    """Attention whose queries and keys (`turned` says which) are turned by a stored matrix, as QuaRot leaves them."""

    matrix: Tensor

    def __init__(self, matrix: Tensor, turned: str = "qk"):
        super().__init__()
        self.turned = turned
        self.q_proj, self.o_proj = nn.Linear(32, 32), nn.Linear(32, 32)
        self.k_proj, self.v_proj = nn.Linear(32, 16), nn.Linear(32, 16)
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (4, 8)).transpose(1, 2)
        k, v = (p(x).unflatten(-1, (2, 8)).transpose(1, 2) for p in (self.k_proj, self.v_proj))
        if "q" in self.turned:
            q = q @ self.matrix
        if "k" in self.turned:
            k = k @ self.matrix
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


X = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))


def test_the_recogniser_finds_what_it_should_and_nothing_else(hadamard: Any) -> None:
    facts = {"heads": 4, "kv_heads": 2, "head_dim": 8, "scale": 8**-0.5, "rope": None}
    check_recogniser(
        hadamard,
        positives=[(Rotated(walsh(8)), X, facts), (nn.Sequential(nn.LayerNorm(32), Rotated(walsh(8))), X)],
        near_misses=[
            (Rotated(2 * walsh(8)), X, "a stored matrix that is not orthogonal"),
            (Rotated(walsh(8), turned="q"), X, "differs from the module's own output"),
        ],
    )


def test_it_is_short() -> None:
    assert len(FILE.read_text(encoding="utf-8").splitlines()) < 40


def test_contributing_shows_the_file_as_it_is() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert f"```python\n{FILE.read_text(encoding='utf-8')}```" in page


# The helper itself: every way in which a recogniser can disappoint is told apart


@pytest.mark.parametrize(
    ("cases", "message"),
    [
        ({"positives": []}, "a recogniser needs a positive"),
        (
            {"positives": [(Rotated(walsh(8), turned=""), X)]},
            "positive 0: with 'hadamard' no site is found that",
        ),
        ({"positives": [(Rotated(walsh(8), turned="q"), X)]}, "positive 0: .*stopped at 'proof'.*test_recogniser.py:"),
        ({"positives": [(Rotated(walsh(8)), X, {"heads": 3})]}, "states {'heads': 4}, expected {'heads': 3}"),
        ({"positives": [(Rotated(walsh(8)), X[0, 0])]}, "positive 0: CaptureError: example_inputs"),
        ({"near_misses": [(Rotated(walsh(8)), X, "")]}, "near miss 0: .* should have been refused, and were found"),
        ({"near_misses": [(Rotated(2 * walsh(8)), X, "too warm")]}, "no near miss has 'too warm' in its reason"),
    ],
)
def test_the_helper_says_what_is_wrong(hadamard: Any, cases: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_recogniser(hadamard, **{"positives": [(Rotated(walsh(8)), X)], **cases})


def test_without_the_recogniser_the_reason_names_the_step() -> None:
    report = inspect(Rotated(walsh(8)), X, strict=False)
    (miss,) = report.near_misses
    assert miss.reason == "q is multiplied by a stored matrix after its split into heads"
    assert "            q = q @ self.matrix" in report.explain("") and "recogniser for slot 'path'" in report.explain(
        ""
    )
